"""Each cut against a sort in NumPy and against `transformers`, each draw against its exact law."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.kernels import policy_gradient, sampling

BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def random_rows(size, count=64):
    """Rows of every spread, some around a distant mean, some with part of the support removed."""
    random = np.random.default_rng(size)
    logits = random.normal(size=(count, size)) * random.choice([0.1, 1, 3, 10], size=(count, 1))
    logits += random.choice([0, -100], size=(count, 1))
    removed = random.random(logits.shape) < random.choice([0, 0.5], size=(count, 1))
    removed[np.arange(count), random.integers(size, size=count)] = False
    return np.where(removed, -np.inf, logits).astype(np.float32)


def softmax(logits):
    mass = np.exp(np.float64(logits) - np.max(logits))
    return mass / mass.sum()


def surely_and_possibly_kept(keys, threshold, margin=1e-5):
    """What float32 must keep, and what it may keep as well because of its rounding."""
    return keys > threshold[0] + margin, keys >= threshold[1] - margin


def crossing(keys, probability, p):
    """The least key of the shortest list whose probability is at least p, by a sort."""
    order = np.argsort(-keys, stable=True)
    before = np.cumsum(probability[order]) - probability[order]
    counts = [np.sum((before < p + slack) & (probability[order] > 0)) for slack in (-1e-5, 1e-5)]
    return [keys[order[max(count, 1) - 1]] for count in counts]


def oracle_top_k(logits, k):
    kept = (logits >= np.sort(logits)[::-1][min(k, len(logits)) - 1]) & (logits > -np.inf)
    return kept, kept


def oracle_top_p(logits, p):
    return surely_and_possibly_kept(logits, crossing(logits, softmax(logits), p))


def oracle_min_p(logits, p):
    threshold = logits.max() + np.log(p) if p > 0 else np.finfo(np.float32).min
    return surely_and_possibly_kept(logits, [threshold] * 2)


def oracle_typical(logits, p):
    probability = softmax(logits)
    surprise = -np.log(np.where(probability > 0, probability, np.exp(-700)))
    closeness = -abs(surprise - np.sum(probability * surprise))
    surely, possibly = surely_and_possibly_kept(closeness, crossing(closeness, probability, p))
    return surely & (probability > 0), possibly & (probability > 0)


CUTS = {
    "top_k": (sampling.top_k, oracle_top_k, [1, 2, 3, 10, 50, 10_000]),
    "top_p": (sampling.top_p, oracle_top_p, [0.0, 1e-6, 0.3, 0.9, 0.99]),
    "min_p": (sampling.min_p, oracle_min_p, [0.0, 0.01, 0.3, 1.0]),
    "typical": (sampling.typical, oracle_typical, [1e-6, 0.2, 0.9, 0.95]),
}
cuts = {name: jax.jit(jax.vmap(cut, in_axes=(0, None))) for name, (cut, _, _) in CUTS.items()}


def assert_equal_to_a_sort(name, logits, setting):
    actual = np.array(cuts[name](jnp.array(logits), setting))
    assert actual.dtype == np.float32
    for row, before in zip(actual, logits, strict=True):
        surely, possibly = CUTS[name][1](before, setting)
        kept = row > -np.inf
        assert kept.any()
        assert not (surely & ~kept).any()
        assert not (kept & ~possibly).any()
        np.testing.assert_array_equal(row[kept], before[kept])


@pytest.mark.parametrize("size", [2, 17, 1000])
@pytest.mark.parametrize("name", CUTS)
def test_cuts_equal_those_of_a_sort(name, size):
    for setting in CUTS[name][2]:
        assert_equal_to_a_sort(name, random_rows(size), setting)


@pytest.mark.parametrize("name", ["top_k", "top_p", "typical"])
def test_cuts_with_several_probes_a_pass_equal_those_with_one(name, monkeypatch):
    """Each platform runs one of the two; here both run on whichever there is."""
    logits, (cut, _, settings) = jnp.array(random_rows(200)), CUTS[name]

    def several(*arguments, cpu, default):
        assert cpu.keywords["num_probes"] < default.keywords["num_probes"]
        return default(*arguments)

    monkeypatch.setattr(jax.lax, "platform_dependent", several)
    # `partial` makes a new function, which no earlier trace answers for.
    wide = jax.jit(jax.vmap(partial(cut), in_axes=(0, None)))
    for setting in settings:
        np.testing.assert_array_equal(wide(logits, setting), cuts[name](logits, setting))


@pytest.mark.slow
def test_cuts_of_a_whole_vocabulary_equal_those_of_a_sort():
    logits = 3 * np.random.default_rng(0).normal(size=(2, 50257)).astype(np.float32) - 80
    for name, setting in (("top_k", 50), ("top_p", 0.9), ("typical", 0.5)):
        assert_equal_to_a_sort(name, logits, setting)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 100])
def test_cuts_keep_all_of_what_ties(size):
    logits = jnp.broadcast_to(jnp.array([[0.0], [-3.5], [1e30], [-1e30]]), (4, size))
    for name, setting in (("top_k", 1), ("top_p", 0.3), ("min_p", 1.0), ("typical", 0.3)):
        np.testing.assert_array_equal(cuts[name](logits, setting), logits)


def test_cuts_keep_ties_at_the_threshold_where_a_sort_cuts_them():
    probability = np.array([0.1, 0.2, 0.4, 0.2, 0.1])
    by_sort = np.argsort(-probability, stable=True)[:2]
    np.testing.assert_array_equal(by_sort, [2, 1])
    assert probability[by_sort].sum() > 0.5
    for name, setting in (("top_k", 2), ("top_p", 0.5)):
        kept = cuts[name](jnp.log(jnp.array(probability[None])), setting)[0] > -jnp.inf
        np.testing.assert_array_equal(kept, [False, True, True, True, False])


def test_cuts_tell_neighbouring_floats_apart_and_not_the_two_zeros():
    ordered = np.array([-1, -1e-30, -0.0, 0.0, 1e-30, 1], np.float32)
    kept = [(cuts["top_k"](jnp.array(ordered[None]), k) > -jnp.inf).sum() for k in range(1, 7)]
    assert kept == [1, 2, 4, 4, 5, 6]
    for value in np.array([-80.0, 0.7, 3e38], np.float32):
        row = [value, np.nextafter(value, np.float32(-np.inf)), np.float32(-3e38)]
        kept = cuts["top_k"](jnp.array([row]), 1) > -jnp.inf
        np.testing.assert_array_equal(kept, [[True, False, False]])


def test_cuts_at_one_keep_all_that_has_any_probability():
    logits = np.append(np.linspace(0, -80, 999), -np.inf).astype(np.float32)[None]
    for name in ("top_p", "typical"):
        np.testing.assert_array_equal(cuts[name](jnp.array(logits), 1.0), logits)


def test_a_single_token_survives_every_cut():
    logits = jnp.array([[-jnp.inf, -5.0, -jnp.inf]])
    for name, (_, _, settings) in CUTS.items():
        for setting in settings:
            np.testing.assert_array_equal(cuts[name](logits, setting), logits)


def test_repetition_penalty_lowers_the_tokens_seen():
    logits = jnp.array([2.0, -2.0, 2.0, -2.0, 0.0, -jnp.inf])
    seen = jnp.array([True, True, False, False, True, True])
    actual = sampling.repetition_penalty(logits, seen, 4.0)
    np.testing.assert_array_equal(actual, [0.5, -8, 2, -2, 0, -np.inf])
    np.testing.assert_array_equal(sampling.repetition_penalty(logits, seen, 1.0), logits)


def test_banned_removes_exactly_the_banned():
    actual = sampling.banned(jnp.arange(3.0), jnp.array([True, False, True]))
    np.testing.assert_array_equal(actual, [-np.inf, 1, -np.inf])


@pytest.mark.slow
def test_transformations_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = np.random.default_rng(0).normal(scale=4, size=(16, 3000)).astype(np.float32)
    prompt = np.random.default_rng(1).integers(3000, size=(16, 200))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, prompt, True, axis=1)
    cases = [
        (process.TopKLogitsWarper, sampling.top_k, [1, 50, 3000]),
        (process.TopPLogitsWarper, sampling.top_p, [0.1, 0.5, 0.95]),
        (process.MinPLogitsWarper, sampling.min_p, [0.02, 0.5]),
        (process.TypicalLogitsWarper, sampling.typical, [0.2, 0.9]),
        (
            process.RepetitionPenaltyLogitsProcessor,
            lambda row, penalty, seen: sampling.repetition_penalty(row, seen, penalty),
            [1.3, 0.5],
        ),
    ]
    for peer, ours, settings in cases:
        masks = (jnp.array(seen),) if peer is process.RepetitionPenaltyLogitsProcessor else ()
        batched = jax.jit(jax.vmap(ours, in_axes=(0, None, *[0] * len(masks))))
        for setting in settings:
            expected = peer(setting)(torch.tensor(prompt), torch.tensor(logits)).numpy()
            actual = batched(jnp.array(logits), setting, *masks)
            np.testing.assert_allclose(actual, expected, rtol=1e-6)


# The draw


draw = jax.jit(jax.vmap(sampling.sample, in_axes=(0, None)))
EXAMPLE = np.random.default_rng(3).normal(size=40).astype(np.float32)
SAMPLERS = {
    "all": (lambda row: row, np.ones(40, bool)),
    "top_k": (partial(sampling.top_k, k=8), oracle_top_k(EXAMPLE, 8)[1]),
    "top_p": (partial(sampling.top_p, p=0.8), oracle_top_p(EXAMPLE, 0.8)[1]),
    "min_p": (partial(sampling.min_p, p=0.05), oracle_min_p(EXAMPLE, 0.05)[1]),
    "typical": (partial(sampling.typical, p=0.5), oracle_typical(EXAMPLE, 0.5)[1]),
}


def assert_law(logits, probability, num_draws=200_000):
    """Pearson's test at one in a thousand: a fixed seed, so that it passes always or never."""
    uniform = jax.random.uniform(jax.random.key(0), (num_draws,))
    count = np.bincount(draw(uniform, logits), minlength=len(probability))
    kept = probability > 0
    assert not count[~kept].any()
    expected = num_draws * probability[kept]
    assert expected.min() > 5
    statistic = np.sum((count[kept] - expected) ** 2 / expected)
    # Wilson & Hilferty (1931): the cube root of a chi-squared number is nearly normal.
    spread = 2 / (9 * (kept.sum() - 1))
    assert statistic < (kept.sum() - 1) * (1 - spread + 3.09 * np.sqrt(spread)) ** 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampled_tokens_have_the_truncated_law(name):
    transform, kept = SAMPLERS[name]
    assert 3 < kept.sum() <= 40
    logits = transform(jnp.array(EXAMPLE))
    probability = np.where(kept, softmax(EXAMPLE), 0)
    probability /= probability.sum()
    assert_law(logits, probability)
    # What a learner is told about the tokens is the law they were drawn from.
    scored = jax.vmap(policy_gradient.log_probability, in_axes=(None, 0))(logits, jnp.arange(40))
    np.testing.assert_allclose(np.exp(scored), probability, rtol=1e-5)


def test_sampled_tokens_have_the_law_of_a_composition():
    seen = np.arange(40) % 3 == 0
    removed = np.arange(40) % 7 == 1
    logits = sampling.repetition_penalty(jnp.array(EXAMPLE), jnp.array(seen), 1.2)
    logits = sampling.banned(logits, jnp.array(removed)) / 1.5
    logits = sampling.min_p(sampling.top_p(sampling.top_k(logits, 20), 0.9), 0.1)

    expected = np.where(seen, np.where(EXAMPLE > 0, EXAMPLE / 1.2, EXAMPLE * 1.2), EXAMPLE)
    expected = np.where(removed, -np.inf, expected) / 1.5
    for cut, setting in ((oracle_top_k, 20), (oracle_top_p, 0.9), (oracle_min_p, 0.1)):
        expected = np.where(cut(expected, setting)[1], expected, -np.inf)
    assert_law(logits, softmax(expected))


@pytest.mark.parametrize("size", [1, 2, 3, 16, 17, 1000])
def test_sample_of_a_grid_has_the_frequencies_of_the_softmax(size):
    logits = random_rows(size, count=3)
    grid = jnp.array((np.arange(20_000) + 0.5) / 20_000, jnp.float32)
    for row in logits:
        frequency = np.bincount(draw(grid, jnp.array(row)), minlength=size) / 20_000
        np.testing.assert_allclose(frequency, softmax(row), atol=1.1e-4)


@pytest.mark.parametrize("size", [2, 40, 500])
def test_sample_never_draws_a_removed_token_at_any_edge(size):
    """The numbers within two units in the last place of every step of the cumulative mass."""
    for row in random_rows(size, count=12):
        steps = np.append(np.cumsum(softmax(row)), 0).astype(np.float32)
        edges = [steps, np.append(steps, BELOW_ONE)]
        for direction in (0, 1):
            nearby = steps
            for _ in range(2):
                nearby = np.nextafter(nearby, np.float32(direction))
                edges.append(nearby)
        uniform = np.clip(np.concatenate(edges), 0, BELOW_ONE)
        tokens = np.array(draw(jnp.array(uniform), jnp.array(row)))
        assert tokens.min() >= 0
        assert (row[tokens] > -np.inf).all()
        assert (np.diff(tokens[np.argsort(uniform, stable=True)]) >= 0).all()


@pytest.mark.parametrize("place", [0, 255, 256, 50_000, 50_256])
def test_sample_finds_the_only_token_of_a_vocabulary(place):
    logits = jnp.full(50257, -jnp.inf).at[place].set(-7.0)
    tokens = draw(jnp.array([0, 0.5, BELOW_ONE], jnp.float32), logits)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, [place] * 3)


def test_greedy_equals_argmax():
    logits = jnp.array(np.round(random_rows(300)))
    expected = jnp.argmax(logits, axis=1)
    np.testing.assert_array_equal(jax.jit(jax.vmap(sampling.greedy))(logits), expected)


@pytest.mark.slow
def test_sampling_batched_equals_one_by_one_and_jit_equals_eager():
    logits = jnp.array(random_rows(30, count=3))
    uniform = jax.random.uniform(jax.random.key(0), (3,))

    def token(uniform, logits):
        return sampling.sample(uniform, sampling.top_p(logits, 0.8))

    batched, one = jax.jit(jax.vmap(token))(uniform, logits), jax.jit(token)
    for index in range(3):
        assert batched[index] == one(uniform[index], logits[index])
    kept = sampling.top_p(logits[0], 0.8)
    np.testing.assert_array_equal(kept, jax.jit(sampling.top_p)(logits[0], 0.8))
    assert sampling.sample(uniform[0], kept) == jax.jit(sampling.sample)(uniform[0], kept)


@pytest.mark.slow
def test_sampling_of_bfloat16_is_in_float32():
    logits = jnp.array(random_rows(1000, count=1)[0], jnp.bfloat16)
    wide = logits.astype(jnp.float32)
    uniform = jax.random.uniform(jax.random.key(0), (1000,))
    np.testing.assert_array_equal(draw(uniform, logits), draw(uniform, wide))
    assert sampling.top_p(logits, 0.9).dtype == jnp.float32
    np.testing.assert_array_equal(sampling.top_p(logits, 0.9), sampling.top_p(wide, 0.9))


def test_sampling_refuses_a_batch():
    with pytest.raises(AssertionError):
        sampling.top_k(jnp.zeros((3, 5)), 2)
