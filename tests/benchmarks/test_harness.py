"""The harness's arithmetic, with clocks and disturbances made up; nothing here measures speed."""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import harness, machine
from benchmarks.harness import Case, Peer, PeerMissing

LIMITS = machine.Limits(
    cached_bytes=50e9,
    streamed_bytes=25e9,
    written_bytes=5e9,
    float32_flops=200e9,
    float64_flops=None,
)


@dataclass
class Clock:
    """A clock that only moves when told to."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def job(self, seconds, log=None, name=""):
        """A function of any arguments that takes `seconds` on this clock."""

        def function(*arguments):
            self.now += seconds
            if log is not None:
                log.append(name)
            return arguments

        return function


def peace():
    return 0.0


def run(case, clock, seconds=1.0):
    return harness.run(case, seconds=seconds, limits=LIMITS, clock=clock, others=peace)


def test_summary_gives_median_quartiles_and_rate():
    start = harness.Start(lower=0.5, compile=2.0, call=9.0)
    summary = harness.summary(start, np.array([4.0, 1.0, 3.0, 2.0, 100.0]), items=600)
    assert summary == {
        "items": 600,
        "median_seconds": 3.0,
        "quartiles_seconds": [2.0, 4.0],
        "items_per_second": 200.0,
        "lower_seconds": 0.5,
        "compile_seconds": 2.0,
    }


@pytest.mark.parametrize(("call", "expected"), [(7.0, 5.0), (1.0, 0.0)])
def test_summary_takes_compilation_from_the_first_call_where_it_was_not_measured(call, expected):
    start = harness.Start(lower=None, compile=None, call=call)
    assert harness.summary(start, np.full(3, 2.0), items=1)["compile_seconds"] == expected


def test_speedup_is_the_ratio_of_medians():
    own, peer = np.array([1.0, 2.0, 9.0]), np.array([5.0, 30.0, 6.0])
    speedup = harness.speedup(own, peer)
    assert speedup["ratio"] == 3.0
    assert speedup["interval"][0] <= 3.0 <= speedup["interval"][1]


def test_speedup_interval_ignores_what_slows_both():
    drift = np.linspace(1.0, 3.0, 50)
    np.testing.assert_allclose(harness.speedup(drift, 4 * drift)["interval"], [4.0, 4.0])


def test_speedup_interval_covers_the_true_ratio_at_its_level():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        own, peer = generator.lognormal(size=(2, 60))
        low, high = harness.speedup(own, peer, resamples=300)["interval"]
        covered += low <= 1.0 <= high
    assert 0.90 <= covered / 200 <= 1.0  # nominal .95, standard error .015


def test_share_of_limit_takes_the_limit_that_binds():
    work = {"cached_bytes": 1e9, "float32_flops": 20e9}  # 0.02 s and 0.1 s at the limits
    assert harness.share_of_limit(work, 0.4, LIMITS) == {"share": 0.25, "bound": "float32_flops"}


@pytest.mark.parametrize("name", ["bytes", "float64_flops"])
def test_share_of_limit_names_a_limit_that_the_machine_has_not(name):
    with pytest.raises(ValueError, match=rf"work\['{name}'\] is no limit .* use one of .*cached"):
        harness.share_of_limit({name: 1.0}, 1.0, LIMITS)


def test_interleave_alternates_which_program_goes_first():
    clock, log = Clock(), []
    programs = [
        Case("own", clock.job(0.5, log, "own"), (), 1),
        Peer("peer", clock.job(2.0, log, "peer")),
    ]
    sample = harness.interleave(programs, seconds=12.5, clock=clock, others=peace)
    assert log == ["own", "peer", "peer", "own"] * 2 + ["own", "peer"]
    np.testing.assert_array_equal(sample.seconds, np.tile([0.5, 2.0], (5, 1)))
    np.testing.assert_array_equal(sample.disturbed, False)


def test_interleave_calls_short_programs_once_more_before_timing_them():
    clock, log = Clock(), []
    programs = [
        Case("own", clock.job(0.001, log, "own"), (), 1),
        Peer("peer", clock.job(0.5, log, "peer")),
    ]
    sample = harness.interleave(programs, seconds=0.1, clock=clock, others=peace)
    assert len(sample.seconds) == harness.MINIMUM_REPETITIONS
    assert log.count("peer") == 5
    assert log.count("own") == 9  # all but the first repetition, which cannot know


def test_interleave_makes_fresh_arguments_outside_of_the_timed_region():
    clock, made, used = Clock(), [], []

    def fresh():
        clock.now += 5.0
        made.append(jnp.zeros(3) + len(made))
        return (made[-1],)

    def donating(array):
        clock.now += 0.25
        used.append(float(array[0]))
        array.delete()

    sample = harness.interleave(
        [Case("own", donating, fresh, 1)], seconds=1.0, clock=clock, others=peace
    )
    np.testing.assert_array_equal(sample.seconds, np.full((5, 1), 0.25))
    assert used == [0, 1, 2, 3, 4]


def disturbed_sample(shares, seconds):
    """Rounds of one second of which others take `shares` in turn, the last one for ever."""
    clock, log = Clock(), []
    busy, opening = [0.0], [True]

    def others():
        if not opening[0]:
            busy[0] += shares[min(len(log) - 1, len(shares) - 1)]
        opening[0] = not opening[0]
        return busy[0]

    case = Case("own", clock.job(1.0, log), (), 1)
    return harness.interleave([case], seconds=seconds, clock=clock, others=others)


def test_interleave_repeats_disturbed_rounds():
    sample = disturbed_sample([0.0, 0.9, 0.05, 0.11, 0.0], seconds=6.0)
    np.testing.assert_array_equal(sample.disturbed, [False, True, False, True] + [False] * 4)
    assert sample.undisturbed_only
    assert len(sample.kept) == 6


def test_interleave_gives_up_and_says_so_where_all_is_disturbed():
    sample = disturbed_sample([0.5], seconds=4.0)
    assert len(sample.seconds) == harness.PATIENCE * 4
    np.testing.assert_array_equal(sample.disturbed, True)
    assert sample.undisturbed_only is False
    assert len(sample.kept) == len(sample.seconds)


def test_interleave_takes_the_minimum_however_slow_the_call():
    clock = Clock()
    case = Case("own", clock.job(100.0), (), 1)
    sample = harness.interleave([case], seconds=1.0, clock=clock, others=lambda: clock.now)
    assert len(sample.seconds) == harness.MINIMUM_REPETITIONS


def test_interleave_stops_at_the_maximum():
    clock = Clock()
    case = Case("own", clock.job(0.125), (), 1)  # two to a round
    sample = harness.interleave([case], seconds=1e9, clock=clock, others=peace)
    assert len(sample.seconds) == harness.MAXIMUM_REPETITIONS


def test_interleave_knows_nothing_where_the_system_does_not_tell():
    clock = Clock()
    case = Case("own", clock.job(1.0), (), 1)
    sample = harness.interleave([case], seconds=5.0, clock=clock, others=lambda: None)
    assert sample.disturbed is None
    assert sample.undisturbed_only is None
    assert len(sample.kept) == 5


def test_first_call_measures_compilation_of_a_jitted_function_alone():
    double = jax.jit(lambda array: 2 * array, donate_argnums=0)
    ticks = iter(range(100))
    case = Case("own", double, lambda: (jnp.arange(3),), 1)
    result, start = harness.first_call(case, lambda: next(ticks))
    np.testing.assert_array_equal(result, [0, 2, 4])
    assert (start.lower, start.compile, start.call) == (1, 1, 1)


def test_first_call_leaves_compilation_of_a_host_function_unknown():
    clock = Clock()
    result, start = harness.first_call(Peer("theirs", clock.job(3.0), (1, 2)), clock)
    assert result == (1, 2)
    assert start == harness.Start(lower=None, compile=None, call=3.0)


@pytest.mark.slow
def test_run_compares_by_the_item_and_its_record_is_json():
    clock = Clock()
    case = Case(
        "own",
        clock.job(0.5),
        (7,),
        items=100,
        peer=lambda: Peer("theirs", clock.job(1.0), (7,), items=50),
        unit="steps",
        agree=np.testing.assert_array_equal,
        work=lambda result: {"cached_bytes": result[0] * 1e9},
    )
    record = run(case, clock, seconds=7.5)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["error"] is None
    assert record["items_per_second"] == 200.0
    assert record["peer"]["items_per_second"] == 50.0
    assert record["speedup"] == {"ratio": 4.0, "interval": [4.0, 4.0]}
    assert record["limit"] == {"share": pytest.approx(0.28), "bound": "cached_bytes"}
    assert (record["repetitions"], record["disturbed"]) == (5, 0.0)
    assert record["undisturbed_only"] is True


@pytest.mark.slow
def test_run_leaves_a_missing_peer_out():
    def missing():
        raise PeerMissing("peer quantecon not installed: pip install it")

    clock = Clock()
    record = run(Case("own", clock.job(0.5), (), 1, peer=missing), clock)
    assert record["error"] is None
    assert record["peer"] == {"missing": "peer quantecon not installed: pip install it"}
    assert record["median_seconds"] == 0.5
    assert "speedup" not in record
    assert "quantecon not installed" in command.progress(record)


def test_run_still_times_a_case_whose_peer_fails():
    def broken():
        raise RuntimeError("two\n lines")

    clock = Clock()
    case = Case("own", clock.job(0.5), (), 1, peer=lambda: Peer("theirs", broken))
    record = run(case, clock)
    assert record["error"] == "peer failed: RuntimeError: two lines"
    assert record["median_seconds"] == 0.5
    assert record["error"] in command.progress(record)


def test_run_reports_disagreement_instead_of_times():
    def agree(result, peer_result):
        assert result == peer_result, "values differ"

    clock = Clock()
    peer = Peer("theirs", clock.job(1.0), (2,))
    record = run(Case("own", clock.job(1.0), (1,), 1, peer=lambda: peer, agree=agree), clock)
    assert record["error"].startswith("AssertionError: values differ")
    assert "median_seconds" not in record


def test_run_reports_a_case_that_fails():
    record = run(Case("own", lambda: 1 // 0, (), 1), Clock())
    assert record["error"].startswith("ZeroDivisionError: ")
    assert command.progress(record) == f"failed: {record['error']}"


def test_others_from_subtracts_idle_time_and_our_own():
    # Of 2 processors: user 3, nice 1, system 2, interrupts .5 + .5, stolen 1: 8 s busy, 2 s ours.
    stat = "cpu  300 100 200 5000 700 50 50 100 0 0\ncpu0 1 2\ncpu1 1 2\nintr 9\n"
    assert machine.others_from(stat, 100, 2.0) == 3.0


def test_seconds_of_others_is_none_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "STAT", tmp_path / "stat")
    assert machine.seconds_of_others() is None


def test_limits_are_measured_once(monkeypatch):
    for name in ("CACHED_SIDE", "STREAMED_SIDE", "CPU_GEMM_SIDE", "ACCELERATOR_GEMM_SIDE"):
        monkeypatch.setattr(machine, name, 32)
    monkeypatch.setattr(machine, "WRITTEN_ELEMENTS", 1024)
    monkeypatch.setattr(machine, "SAMPLE_SECONDS", 1e-6)
    machine.limits.cache_clear()
    try:
        measured = machine.limits()
        assert machine.limits() is measured
    finally:
        machine.limits.cache_clear()
    rates = [rate for rate in vars(measured).values() if rate is not None]
    assert len(rates) >= 4
    assert all(0 < rate < float("inf") for rate in rates)
