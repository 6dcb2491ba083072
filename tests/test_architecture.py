"""The rules of the house that a machine can check: layers, sizes, names, imports, portability."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "jaxrl_llm"
PYTHON_FILES = sorted(
    path
    for folder in ("jaxrl_llm", "experiments", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
LIBRARY_MODULES = [
    path for path in PYTHON_FILES if LIBRARY in path.parents and path.name != "__init__.py"
]
TEXT_FILES = [
    *PYTHON_FILES,
    *(path for suffix in ("md", "toml", "txt", "yaml") for path in ROOT.glob(f"*.{suffix}")),
    ROOT / ".ci" / "run",
]

# What a user of one kernel must never wait for.
HEAVY = {
    "distrax",
    "flashbax",
    "gymnasium",
    "icu_sepsis",
    "matplotlib",
    "orbax",
    "tensorboardX",
    "tensorflow_probability",
    "tokenizers",
    "torch",
    "transformers",
    "tyro",
}
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|Users|work|farm|mnt|scratch)/\w")
REGISTRY = re.compile(
    r"pythonhosted\.org|pypi\.org|[/]simple/|--(?:extra-)?index-url|--find[-]links"
)
PROCESS_LAYOUT = {"Mesh", "make_mesh", "set_mesh", "create_device_mesh"}


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _modules_after(statement: str) -> set[str]:
    """The modules that a fresh interpreter holds after `statement`."""
    script = f"{statement}\nimport sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def _names_of_process_layout(tree: ast.AST) -> set[str]:
    """Every use of a device mesh or of `jax.distributed` in a syntax tree."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_distributed = ast.unparse(node) == "jax.distributed"
            found |= {node.attr} if node.attr in PROCESS_LAYOUT or is_distributed else set()
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names} & {*PROCESS_LAYOUT, "distributed"}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & {"jax.distributed"}
    return found


def test_imports_keep_to_the_layers() -> None:
    script = "from importlinter.cli import lint_imports_command as lint; lint()"
    command = [sys.executable, "-c", script, "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_room_is_a_package() -> None:
    folders = {path.parent for path in PYTHON_FILES if ROOT / "tests" not in path.parents}
    assert [_relative(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {_relative(path): len(path.read_text().splitlines()) for path in PYTHON_FILES}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_every_experiment_is_shorter_than_80_lines() -> None:
    texts = {path: path.read_text() for path in (ROOT / "experiments").glob("*.py")}
    # What several scripts share is no script.
    lengths = {
        _relative(path): len(text.splitlines())
        for path, text in texts.items()
        if "cli.main" in text
    }
    assert {name: length for name, length in lengths.items() if length >= 80} == {}


def test_no_file_is_named_utils() -> None:
    vague = re.compile(r"_?(utils?|helpers?|common|misc)")
    assert [_relative(path) for path in PYTHON_FILES if vague.fullmatch(path.stem)] == []


def test_every_module_has_a_docstring() -> None:
    without = [
        _relative(path)
        for path in PYTHON_FILES
        if LIBRARY in path.parents and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert without == []


def test_every_module_has_a_test_file_in_the_mirrored_folder() -> None:
    mirrored = {
        path: ROOT / "tests" / path.relative_to(LIBRARY).with_name(f"test_{path.name}")
        for path in LIBRARY_MODULES
        if path != LIBRARY / "types" / "arrays.py"  # three names, nothing to call
    }
    assert [_relative(test) for test in mirrored.values() if not test.exists()] == []


def test_import_of_the_library_is_light() -> None:
    added = _modules_after("import jaxrl_llm") - _modules_after("import flax.struct")
    foreign = {name.partition(".")[0] for name in added} - sys.stdlib_module_names
    assert foreign <= {"jaxrl_llm", "chex", "numpy", "toolz", "typing_extensions"}


def test_import_of_every_kernel_is_light() -> None:
    kernels = [
        f"jaxrl_llm.kernels.{path.stem}"
        for path in LIBRARY_MODULES
        if path.parent == LIBRARY / "kernels"
    ]
    loaded = {name.partition(".")[0] for name in _modules_after(f"import {', '.join(kernels)}")}
    assert loaded & HEAVY == set()


def test_import_of_every_module_leaves_transformers_out() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in LIBRARY_MODULES
        if path.name != "__main__.py"
    ]
    loaded = {name.partition(".")[0] for name in _modules_after(f"import {', '.join(modules)}")}
    assert loaded & {"transformers", "torch", "gym"} == set()


def test_only_sharding_knows_meshes_and_processes() -> None:
    found = {
        _relative(path): _names_of_process_layout(ast.parse(path.read_text()))
        for path in LIBRARY_MODULES
        if path != LIBRARY / "training" / "sharding.py"
    }
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY], ids=["machine path", "registry"])
def test_files_name_no_machine(pattern: re.Pattern[str]) -> None:
    lines = [
        f"{_relative(path)}:{number}: {line.strip()}"
        for path in TEXT_FILES
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert lines == []


def test_names_of_process_layout_finds_each_spelling() -> None:
    source = """
import jax
from jax import distributed
from jax.sharding import Mesh
jax.distributed.initialize()
jax.make_mesh((1,), ("data",))
"""
    expected = {"distributed", "Mesh", "make_mesh"}
    assert _names_of_process_layout(ast.parse(source)) == expected


def test_machine_path_tells_paths_from_text() -> None:
    for folder in ("home", "root", "Users"):
        assert MACHINE_PATH.search(f"open('/{folder}/someone/runs')")
    for folder in ("work", "home"):
        assert not MACHINE_PATH.search(f"tests/{folder}/reports and ~/{folder}/reports")
