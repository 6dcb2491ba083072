"""The picture shows each measured rate where it belongs."""

import json
import re

import matplotlib.image
import numpy as np
import pytest

from benchmarks import throughput_picture
from jaxrl_llm.training import cli

MACHINE = {
    "platform": "cpu",
    "processor": "AMD EPYC",
    "cores": 2,
    "device": "cpu",
    "devices": 1,
    "versions": {"jax": "0.10.2"},
}


def write(path, *records, machine=MACHINE):
    lines = [
        {"case": case, "error": error, "machine": machine}
        # As the harness writes it: what failed has neither a rate nor a peer.
        | ({"items_per_second": rate, "peer": peer} if error is None else {})
        for case, rate, peer, error in records
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def results(tmp_path):
    peer = {"name": "simglucose", "items_per_second": 72.0}
    return write(
        tmp_path / "results.jsonl",
        ("environments/glucose-1", 3.0, None, None),
        ("environments/glucose-1", 5e3, peer, None),
        ("environments/glucose-2048", 1e6, {"missing": "simglucose"}, None),
        ("environments/icu-sepsis-vitals-64", 2e5, None, None),
        ("environments/cartpole-64-gymnasium-vector", 4e6, None, None),
        ("environments/hiv-64", None, None, "out of memory"),
        ("ppo/cartpole-64", 9.0, None, None),
    )


def test_read_keeps_the_last_rate_of_each_environment(results):
    measured = throughput_picture.read([results])
    assert measured.ours == {
        "glucose": {1: 5e3, 2048: 1e6},
        "icu-sepsis-vitals": {64: 2e5},
        "cartpole": {64: 4e6},
    }
    assert measured.peers == {"simglucose": {1: 72.0}}
    assert measured.machine == "AMD EPYC, 2 cores, JAX 0.10.2"


def test_throughput_draws_each_rate_and_the_fastest_first(results):
    (axes,) = throughput_picture.throughput(throughput_picture.read([results])).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    assert list(lines) == ["cartpole", "glucose", "icu-sepsis-vitals", "(simglucose)"]
    np.testing.assert_array_equal(lines["glucose"], [[1, 5e3], [2048, 1e6]])
    (peer,) = (line for line in axes.get_lines() if line.get_label() == "(simglucose)")
    assert peer.get_marker() == "*"
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_main_writes_a_picture(results, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    throughput_picture.main(throughput_picture.Options(results=(results,), picture=picture))
    assert capsys.readouterr().out == f"{picture}\n"
    assert matplotlib.image.imread(picture).shape[:2] == (840, 1350)


def test_default_is_the_committed_table():
    measured = throughput_picture.read(throughput_picture.Options().results)
    assert len(measured.ours) >= 15
    assert all({1, 64, 2048, 16384} <= set(rates) for rates in measured.ours.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; check the path"),
        ('{"case": ', "invalid JSON at column"),
        ("", "holds no record; write one JSON object a line"),
        ("3", "no benchmark's record; give files that `python -m benchmarks` wrote"),
        ('{"case": "environments/hiv-1"}', "no benchmark's record; give files that"),
        ('{"case": "hiv-1", "error": null, "machine": {}}', "no benchmark's record; give files"),
    ],
)
def test_read_names_the_file_that_it_cannot_use(content, message, tmp_path):
    path = tmp_path / "results.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
        throughput_picture.read([path])


def test_command_line_needs_a_file(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.parse(throughput_picture.Options, ["--results"])
    assert "--results is empty; name at least one file" in capsys.readouterr().err


def test_read_refuses_no_environment_and_two_machines(results, tmp_path):
    others = write(tmp_path / "others.jsonl", ("ppo/cartpole-64", 9.0, None, None))
    with pytest.raises(ValueError, match="hold no environment; run --match environments"):
        throughput_picture.read([others])
    gpu = {**MACHINE, "platform": "gpu", "device": "NVIDIA H200"}
    other = write(tmp_path / "gpu.jsonl", ("environments/hiv-1", 1.0, None, None), machine=gpu)
    assert throughput_picture.read([other]).machine == "1 × NVIDIA H200, JAX 0.10.2"
    with pytest.raises(ValueError, match=re.escape("are of 2 machines; draw one at a time")):
        throughput_picture.read([results, other])
