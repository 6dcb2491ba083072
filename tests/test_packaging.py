"""What is shipped: the wheel, its metadata, the pinned versions and the documented commands."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import defaultdict
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxrl_llm", "experiments", "benchmarks")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this clone, built offline."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    """What a package index would say of the wheel."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def _pins_of(python: str) -> dict[str, list[Version]]:
    """The pinned versions that apply to a Python version on this kind of machine."""
    pins = defaultdict(list)
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(environment):
            (specifier,) = pin.specifier
            pins[canonicalize_name(pin.name)].append(Version(specifier.version))
    return pins


def _readme_command(marker: str) -> str:
    """The one line of the fenced block that follows `<!-- marker command -->`."""
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(rf"^<!-- {marker} command -->\n```bash\n(.*)\n```$", readme, re.MULTILINE)
    assert len(blocks) == 1, f"README.md needs one {marker} command of one line, has {len(blocks)}"
    return blocks[0]


def test_wheel_holds_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("*.py", "*.npz", "py.typed")
        for path in (ROOT / package).rglob(pattern)
    }
    assert expected - set(wheel.namelist()) == set()
    assert "jaxrl_llm/py.typed" in expected


def test_wheel_holds_nothing_else(wheel: zipfile.ZipFile) -> None:
    folders = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} == set(PACKAGES)
    assert [name for name in wheel.namelist() if "__pycache__" in name] == []


def test_wheel_carries_the_licence(wheel: zipfile.ZipFile, metadata: Message) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/licenses/LICENSE"))
    assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()
    assert metadata["License-Expression"] == "Apache-2.0"


def test_wheel_offers_the_documented_extras(metadata: Message) -> None:
    extras = {"cuda12", "cuda13", "tpu", "test", "peers", "dev"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras


def test_constraints_are_exact() -> None:
    inexact = [str(pin) for pin in PINS if [part.operator for part in pin.specifier] != ["=="]]
    assert inexact == []
    assert [str(pin) for pin in PINS if pin.url or pin.extras] == []


def test_constraints_leave_accelerators_to_the_extras() -> None:
    vendors = re.compile(r"nvidia|cuda|triton|libtpu|jax-cuda")
    assert [pin.name for pin in PINS if vendors.match(pin.name)] == []


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_constraints_pin_each_dependency_once_within_its_range(python: str) -> None:
    pins = _pins_of(python)
    assert {name: versions for name, versions in pins.items() if len(versions) != 1} == {}
    extras = [line for extra in ("test", "peers", "dev") for line in EXTRAS[extra]]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        (version,) = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}"


@pytest.mark.parametrize("marker", ["main", "test"])
def test_readme_command_names_what_exists(marker: str) -> None:
    command = _readme_command(marker)
    modules = [name for name in re.findall(r"-m (\S+)", command) if name.startswith(PACKAGES)]
    for module in modules:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for name in re.findall(r"-c (\S+\.txt)", command):
        assert (ROOT / name).exists(), name


def test_ci_is_an_executable_script_without_syntax_errors() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
