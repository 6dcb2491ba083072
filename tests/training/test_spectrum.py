"""Tables and pictures of spectra: what is shown is what the kernels found, and it can be read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.patches import Circle

from jaxrl_llm.kernels import bellman, spectral
from jaxrl_llm.training import spectrum
from tests import oracles
from tests.kernels import chains

pytestmark = pytest.mark.slow

NAMES = ("Critical", "Serious", "Stable", "Improving", "Recovered")
SHIFTS = [f"shift {index}" for index in range(6)]


def analyse(matrix, start=0):
    with jax.enable_x64(True):
        initial = jnp.eye(len(matrix))[start]
        return jax.device_get(spectrum.analyse(jnp.asarray(matrix), initial, num_steps=40))


@pytest.fixture(scope="module")
def patient():
    return analyse(chains.PATIENT)


@pytest.fixture(scope="module")
def rota():
    return analyse(chains.rota(0.9, 0.8, 0.7))


@pytest.fixture(scope="module")
def two_classes():
    return analyse(chains.TWO_CLASSES)


def only_axes(figure) -> Any:
    (axes,) = figure.axes
    return axes


def legend(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_measures_of_the_patient_chain_are_the_oracle(patient):
    found = spectrum.measures(patient, NAMES)
    second = oracles.PATIENT_CHAIN_EIGENVALUES[1]
    time = np.linalg.solve(np.eye(4) - chains.PATIENT[:4, :4], np.ones(4))[0]
    expected = {
        "second eigenvalue": second,
        "spectral gap": 1 - second,
        "largest modulus below 1": second,
        "relaxation time": oracles.PATIENT_CHAIN_MIXING_TIME,
        "mixing time": 14,
        "time to absorption": time,
        "absorbed in Recovered": 1,
    }
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), atol=1e-6)


def test_measures_of_a_periodic_chain_have_no_mixing_time(rota):
    found = spectrum.measures(rota, SHIFTS)
    assert "mixing time" not in found
    assert "time to absorption" not in found
    assert (found["second eigenvalue"], found["spectral gap"]) == (1, 0)
    np.testing.assert_allclose([found[f"long run {name}"] for name in SHIFTS], 1 / 6)
    assert rota.rate == 1


def test_measures_leave_out_a_law_of_many_states(rota, monkeypatch):
    monkeypatch.setattr(spectrum, "_MAX_ENDS", 5)
    found = spectrum.measures(rota, SHIFTS)
    assert not [name for name in found if name.startswith("long run")]


def test_show_chain_prints_the_oracle_beside_and_draws(patient, two_classes, tmp_path, capsys):
    oracle = {"relaxation time": oracles.PATIENT_CHAIN_MIXING_TIME}
    shown = spectrum.show_chain(tmp_path / "patient", "A chain", patient, NAMES, oracle)
    assert shown == spectrum.measures(patient, NAMES)
    output = capsys.readouterr().out
    (row,) = [line.split() for line in output.splitlines() if line.startswith("relaxation")]
    assert row[2:] == ["5.683346", "5.683346"]
    assert "One recurrent class; the law of the state converges." in output
    assert imread(tmp_path / "patient_eigenvalues.png").ndim == 3
    spectrum.show_chain(tmp_path / "two", "Two", two_classes, SHIFTS)
    expected = "2 recurrent classes to end in; the law of the state goes on cycling, with period 3."
    assert expected in capsys.readouterr().out


def test_verdict_counts_only_classes_that_the_start_may_end_in(capsys, tmp_path):
    spectrum.show_chain(tmp_path / "one", "One", analyse(chains.TWO_CLASSES, start=1), SHIFTS)
    assert "One recurrent class; the law of the state converges." in capsys.readouterr().out


def test_eigenvalue_plane_shows_each_eigenvalue_and_both_circles(rota, patient):
    axes = only_axes(spectrum.eigenvalue_plane(rota.spectrum, title="Rota"))
    points = np.concatenate([np.asarray(group.get_offsets()) for group in axes.collections])
    expected = np.asarray(rota.spectrum.eigenvalues)
    drawn = np.sort_complex(np.round(points @ [1, 1j], 9))
    np.testing.assert_allclose(drawn, np.sort_complex(np.round(expected, 9)), atol=1e-8)
    radii = [patch.get_radius() for patch in axes.patches if isinstance(patch, Circle)]
    np.testing.assert_allclose(radii, [1, np.cbrt(0.8 * 0.6 * 0.4)])
    assert axes.get_aspect() == 1
    assert legend(axes) == ["3 of modulus 1", "largest below 1: modulus 0.5769"]
    axes = only_axes(spectrum.eigenvalue_plane(patient.spectrum))
    assert [len(group.get_offsets()) for group in axes.collections] == [3, 1, 1]


def test_eigenvalue_plane_of_one_state_has_one_circle():
    one = spectral.Spectrum(jnp.ones(1), jnp.array(1), jnp.array(0.0), jnp.array(0.0))
    axes = only_axes(spectrum.eigenvalue_plane(one))
    assert len(axes.patches) == 1
    assert legend(axes) == ["1 of modulus 1"]


def test_convergence_rate_draws_measured_marks_and_lines_of_the_predicted_slope(patient, rota):
    distances = {"patient": patient.distances, "rota": rota.distances}
    rates = {"patient": patient.rate, "rota": rota.rate}
    axes = only_axes(spectrum.convergence_rate(distances, rates))
    assert axes.get_yscale() == "log"
    for index, name in enumerate(distances):
        measured, predicted = axes.lines[2 * index : 2 * index + 2]
        np.testing.assert_array_equal(measured.get_ydata(), distances[name])
        slopes = np.diff(np.log(predicted.get_ydata()))
        np.testing.assert_allclose(slopes, np.log(rates[name]), atol=1e-12)
        # The prediction meets the last measurement, and nearly the one ten steps before.
        np.testing.assert_allclose(predicted.get_ydata()[-1], distances[name][-1])
        np.testing.assert_allclose(predicted.get_ydata()[-11], distances[name][-11], rtol=0.01)
    with pytest.raises(ValueError, match=r"rates has \['rota'\]; it must name \['patient'"):
        spectrum.convergence_rate(distances, {"rota": 1.0})
    with pytest.raises(ValueError, match="distances is empty; name at least one chain"):
        spectrum.convergence_rate({}, {})


def test_convergence_rate_leaves_out_what_is_rounding():
    curves = {"at once": [0.0, 0.0], "slow": [1.0, 0.5, 1e-17]}
    axes = only_axes(spectrum.convergence_rate(curves, {"at once": 0.0, "slow": 0.5}))
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [1.0, 0.5])
    assert len(axes.lines) == 2


def test_show_low_rank_prints_errors_within_their_bounds_and_draws(tmp_path, capsys, x64):
    mdp = oracles.patient_chain()
    policy = bellman.uniform_policy(mdp)
    errors = spectrum.show_low_rank(tmp_path / "a", "A", mdp, policy, 0.9, (0, 4, 5))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = np.array([row for row in rows if row and row[0] in ("0", "4", "5")], float)
    singular = np.linalg.svd(chains.PATIENT, compute_uv=False)
    np.testing.assert_allclose(rows[:, 1], [*singular[[0, 4]], 0], atol=5e-3)
    # At rank 0 there is no next state: the value is the reward.
    missed = oracles.PATIENT_CHAIN_VALUE - oracles.PATIENT_CHAIN_REWARD
    np.testing.assert_allclose(errors[0], missed.max(), atol=1e-5)
    np.testing.assert_allclose(rows[:, 2], list(errors.values()), rtol=0.01)
    assert np.all(rows[:, 2] <= rows[:, 3] * 1.01)
    assert errors[5] < 1e-9 < errors[4]
    assert imread(tmp_path / "a_low_rank.png").ndim == 3


def test_low_rank_error_draws_both_norms():
    scale = np.array([3.0, 2.0, 1.0])
    axes = only_axes(spectrum.low_rank_error(scale, {1: 0.5}))
    norm, frobenius, values = axes.lines
    np.testing.assert_array_equal(norm.get_ydata(), scale)
    np.testing.assert_allclose(frobenius.get_ydata(), np.sqrt([14, 5, 1]))
    assert (values.get_xdata()[0], values.get_ydata()[0]) == (1, 0.5)
    with pytest.raises(ValueError, match=r"scale has shape \(2,\); it must be \[R\], decreasing"):
        spectrum.low_rank_error([1.0, 2.0])
