"""The command line of the benchmarks: selection, output, exit codes."""

import json
import sys
import types

import jax
import pytest

from benchmarks import __main__ as command
from benchmarks import harness, machine
from benchmarks.harness import Case

LIMITS = machine.Limits(
    cached_bytes=50e9,
    streamed_bytes=25e9,
    written_bytes=5e9,
    float32_flops=200e9,
    float64_flops=None,
)


@pytest.fixture
def two_modules(monkeypatch, tmp_path):
    """Modules `fast` and `slow` of cases on a made-up clock; gives what was built, in order."""
    built = []

    def module(name, *case_names):
        def cases():
            for case_name in case_names:
                built.append(f"{name}/{case_name}")
                function = {"wrong": lambda: 1 // 0}.get(case_name, lambda: 0)
                yield Case(case_name, function, (), items=10)

        result = types.ModuleType(f"benchmarks.{name}")
        monkeypatch.setattr(result, "cases", cases, raising=False)
        monkeypatch.setitem(sys.modules, f"benchmarks.{name}", result)

    module("fast", "walk", "wrong")
    module("slow", "walk", "fast-walk")
    monkeypatch.setattr(command, "MODULES", ("fast", "slow"))
    monkeypatch.setattr(machine, "limits", lambda: LIMITS)
    monkeypatch.setattr(harness, "ROUND_SECONDS", 1e-4)
    monkeypatch.chdir(tmp_path)
    return built


@pytest.mark.parametrize(
    ("match", "selected"),
    [
        ("", ["fast/walk", "fast/wrong", "slow/walk", "slow/fast-walk"]),
        ("walk", ["fast/walk", "slow/walk", "slow/fast-walk"]),
        ("fast", ["fast/walk", "fast/wrong"]),
        ("slow/w", ["slow/walk"]),
        ("absent", []),
    ],
)
def test_select_matches_substrings_of_module_and_name(two_modules, match, selected):
    assert [case.name for case in command.select(match)] == selected


@pytest.mark.parametrize("match", ["fast", "fast/walk"])
def test_select_builds_only_the_module_that_the_match_names(two_modules, match):
    list(command.select(match))
    assert two_modules == ["fast/walk", "fast/wrong"]


@pytest.mark.slow
def test_main_writes_a_json_line_a_case_with_the_machine(two_modules, tmp_path, capsys):
    output = tmp_path / "results" / "lines.jsonl"
    options = ["--match", "slow", "--seconds", "0.001", "--output", str(output)]
    assert command.main(options) == 0
    assert command.main(options) == 0
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["case"] for record in records] == ["slow/walk", "slow/fast-walk"] * 2
    assert records[0]["machine"]["versions"]["jax"] == jax.__version__
    assert records[0]["machine"]["cores"] > 0
    assert records[0]["machine"]["limits"]["cached_bytes"] == 50e9
    printed = capsys.readouterr().out
    assert printed.count("slow/fast-walk ... median") == 2
    assert "times as fast" in printed


def test_main_names_its_file_by_device_and_date(two_modules, tmp_path):
    assert command.main(["--match", "slow/walk", "--seconds", "0.001"]) == 0
    (path,) = (tmp_path / "runs" / "benchmarks").iterdir()
    assert path.name.startswith(jax.devices()[0].device_kind.lower().split()[0])
    assert path.suffix == ".jsonl"


def test_main_exits_with_1_where_a_case_failed(two_modules, capsys):
    assert command.main(["--match", "fast", "--seconds", "0.001"]) == 1
    assert "fast/wrong ... failed: ZeroDivisionError" in capsys.readouterr().out


def test_main_exits_with_2_and_one_line_where_nothing_matches(two_modules, capsys):
    assert command.main(["--match", "absent"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "no case matches 'absent'; --list shows them (fast, slow)\n"


def test_main_exits_with_2_where_there_is_no_time(two_modules, capsys):
    assert command.main(["--seconds", "0"]) == 2
    assert capsys.readouterr().err == "--seconds is 0.0; give a positive number\n"


def test_main_lists_names_without_running(two_modules, capsys):
    assert command.main(["--list"]) == 0
    expected = "fast/walk\nfast/wrong\nslow/walk\nslow/fast-walk\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.2e-5, "42 µs"), (0.0, "0 µs")]
)
def test_duration_chooses_its_unit(seconds, text):
    assert command.duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(4_512_000, "4.51 M"), (1e3, "1 k"), (999.0, "999"), (2e9, "2 G")]
)
def test_quantity_chooses_its_prefix(number, text):
    assert command.quantity(number) == text
