"""`ops.sample`: the right distribution, the right log-prob, and noise that depends on seed, row and step alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    FAMILIES,
    assert_near,
    batches,
    cast,
    family_parameters,
    floats,
    generator,
    random_mask,
    restride,
    seeds,
    widths,
)
from hypothesis import given
from hypothesis import strategies as st

from pyppo import _C, ops, reference

families = st.sampled_from(FAMILIES)
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-13}
DRAWS = 40_000


def chi_square_threshold(degrees: int) -> float:
    """Exceeded with probability about 1e-6 (Wilson-Hilferty); the seeds are fixed, so a pass stays a pass."""
    return degrees * (1 - 2 / (9 * degrees) + 4.75 * math.sqrt(2 / (9 * degrees))) ** 3


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def parameters_and_mask(seed: int, family: str, batch: int, width: int, masked: bool) -> dict[str, Any]:
    g = generator(seed)
    parameters = family_parameters(g, family, batch, width)
    if masked and family != "normal":
        parameters["action_mask"] = random_mask(g, family, parameters.get("nvec"), batch, width)
    return parameters


def distribution_of(parameters: dict[str, Any]) -> Any:
    return reference.make_distribution(**parameters)


@given(seed=seeds, family=families, batch=batches, width=widths, dtype=floats, masked=st.booleans(), mode=st.booleans())
def test_log_prob_and_entropy_match_reference(
    seed: int, family: str, batch: int, width: int, dtype: torch.dtype, masked: bool, mode: bool
) -> None:
    parameters = cast(parameters_and_mask(seed, family, batch, width, masked), dtype)
    drawn = ops.sample(**parameters, seed=seed, step=seed % 1000, deterministic=mode)
    d = distribution_of(cast(parameters, torch.float64))
    shape = {"categorical": (batch,), "multi_categorical": (batch, len(parameters.get("nvec", ())))}
    assert drawn.actions.shape == shape.get(family, (batch, width))
    assert drawn.actions.dtype == (dtype if family == "normal" else torch.int64)
    assert drawn.logp.dtype == drawn.entropy.dtype == dtype
    assert_near(
        drawn.logp, d.log_prob(drawn.actions.double() if family == "normal" else drawn.actions), TOLERANCE[dtype]
    )
    assert_near(drawn.entropy, d.entropy(), TOLERANCE[dtype])


@given(seed=seeds, family=families, width=widths, dtype=floats, start=st.integers(0, 30), count=st.integers(1, 70))
def test_a_row_does_not_depend_on_its_batch(
    seed: int, family: str, width: int, dtype: torch.dtype, start: int, count: int
) -> None:
    parameters = cast(parameters_and_mask(seed, family, 100, width, True), dtype)
    parts = slice(start, start + count)
    steps = torch.arange(100) * 7
    whole = ops.sample(**parameters, seed=seed, step=steps, row_offset=1000)
    rows = {k: v[parts] if isinstance(v, torch.Tensor) and v.shape[0] == 100 and v.dim() > 1 else v
            for k, v in parameters.items()}  # fmt: skip
    part = ops.sample(**rows, seed=seed, step=steps[parts], row_offset=1000 + start)
    for a, e in zip(part, whole, strict=True):
        assert torch.equal(a, e[parts])


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_is_counted_by_seed_row_and_step(family: str) -> None:
    parameters = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v
                  for k, v in parameters_and_mask(1, family, 64, 9, False).items()}  # fmt: skip

    def draw(**noise: Any) -> torch.Tensor:
        return ops.sample(**parameters, **noise).actions

    first = draw(seed=5, step=3)
    assert torch.equal(first, draw(seed=5, step=3))
    assert torch.equal(first, draw(seed=5, step=torch.full((64,), 3)))
    assert torch.equal(draw(seed=5), draw(seed=5, step=0, row_offset=0))
    for other in ({"seed": 6, "step": 3}, {"seed": 5, "step": 4}, {"seed": 5, "step": 3, "row_offset": 64}):
        assert (draw(**other) != first).any(), other
    # Beyond 32 bits nothing is cut off.
    assert (draw(seed=5 + 2**32, step=3) != first).any()
    assert (draw(seed=5, step=3 + 2**32) != first).any()


def philox(key: int, counter: list[int]) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011), one block."""
    (k0, k1), (c0, c1, c2, c3) = (key & 0xFFFFFFFF, key >> 32), counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's known answers
        ([0, 0, 0, 0], 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, 0xFFFFFFFFFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_philox(counter: list[int], key: int, words: str) -> None:
    expected = [int(word, 16) for word in words.split()]
    assert list(_C.philox(key, *counter)) == expected
    assert philox(key, counter) == expected  # this file's own, for the tests below


@pytest.mark.parametrize(("seed", "row", "step"), [(0, 0, 0), (2**63 - 25, 7, 2**40 + 3), (2**32 + 9, 2**31, 1)])
def test_bits_are_philox(seed: int, row: int, step: int) -> None:
    """Nine fair bits of float32 rows: uniform word / 2^32 < 1/2, four words to a block of (row, step, block)."""
    count = 9
    drawn = ops.sample(
        logits=torch.zeros(3, count), distribution="bernoulli", seed=seed, step=step, row_offset=row
    ).actions
    for i in range(3):
        words = []
        for block in range(3):
            words += philox(seed, [(row + i) & 0xFFFFFFFF, step & 0xFFFFFFFF, step >> 32, block])
        assert drawn[i].tolist() == [int(word < 2**31) for word in words[:count]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_noise_is_box_muller_of_philox(dtype: torch.dtype) -> None:
    seed, step = 123456789, 42
    drawn = ops.sample(mean=torch.zeros(2, 5, dtype=dtype), log_std=torch.zeros(5, dtype=dtype), seed=seed, step=step)
    for row in range(2):
        words = [word for block in range(3) for word in philox(seed, [row, step, 0, block])]
        if dtype == torch.float32:
            uniforms = [(word >> 8) * 2.0**-24 for word in words]
        else:
            uniforms = [((a << 21) ^ (b >> 11)) * 2.0**-53 for a, b in zip(words[::2], words[1::2], strict=True)]
        expected = []
        for u, v in zip(uniforms[::2], uniforms[1::2], strict=True):
            radius = math.sqrt(-2 * math.log(1 - u))
            expected += [radius * math.cos(2 * math.pi * v), radius * math.sin(2 * math.pi * v)]
        assert drawn.actions[row].tolist() == pytest.approx(expected[:5], abs=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("actions", [1, 2, 3, 7, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_categorical_frequencies(actions: int, dtype: torch.dtype) -> None:
    logits = torch.randn(actions, generator=generator(actions), dtype=torch.float64)
    drawn = ops.sample(logits=logits.to(dtype).expand(DRAWS, actions), seed=11, step=1).actions
    counts = torch.bincount(drawn, minlength=actions).double()
    assert counts.shape == (actions,)
    if actions == 1:
        assert counts.item() == DRAWS
    else:
        assert chi_square(counts, logits.softmax(-1)) < chi_square_threshold(actions - 1)


def test_categorical_frequencies_over_steps_of_one_row() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5], dtype=torch.float64)
    drawn = [int(ops.sample(logits=logits[None], seed=12, step=step).actions) for step in range(5000)]
    counts = torch.bincount(torch.tensor(drawn), minlength=4).double()
    assert chi_square(counts, logits.softmax(-1)) < chi_square_threshold(3)


def test_multi_categorical_frequencies_and_independence() -> None:
    logits = torch.tensor([0.3, -0.3, 1.0, 0.0, -1.0, 0.0, 0.5], dtype=torch.float64)
    nvec = (2, 3, 2)
    drawn = ops.sample(logits=logits.expand(DRAWS, 7), nvec=nvec, seed=13).actions
    joint = drawn[:, 0] * 6 + drawn[:, 1] * 2 + drawn[:, 2]
    parts = [part.softmax(-1) for part in logits.split(list(nvec))]
    expected = torch.einsum("a,b,c->abc", *parts).flatten()
    counts = torch.bincount(joint, minlength=12).double()
    assert chi_square(counts, expected) < chi_square_threshold(11)


def test_bernoulli_frequencies_and_independence() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    drawn = ops.sample(logits=logits.expand(DRAWS, 3), distribution="bernoulli", seed=14).actions
    joint = torch.bincount(drawn @ torch.tensor([4, 2, 1]), minlength=8).double()
    p = logits.sigmoid()
    expected = torch.einsum("a,b,c->abc", *[torch.stack([1 - x, x]) for x in p]).flatten()
    assert chi_square(joint, expected) < chi_square_threshold(7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_is_normal(dtype: torch.dtype) -> None:
    """Kolmogorov-Smirnov for each dimension; the threshold is exceeded with probability 2 exp(-2 * 2.7^2) = 1e-6."""
    mean, log_std = torch.tensor([0.0, 5.0, -1.0], dtype=dtype), torch.tensor([0.0, 1.0, -2.0], dtype=dtype)
    drawn = ops.sample(mean=mean.expand(DRAWS, 3), log_std=log_std, seed=15).actions
    z = ((drawn - mean) / log_std.exp()).double()
    for dimension in range(3):
        cdf = torch.special.ndtr(z[:, dimension].sort().values)
        grid = torch.arange(DRAWS + 1, dtype=torch.float64) / DRAWS
        distance = torch.maximum((cdf - grid[:-1]).abs().max(), (cdf - grid[1:]).abs().max())
        assert float(distance) * math.sqrt(DRAWS) < 2.7
    assert np.abs(np.corrcoef(z.numpy().T) - np.eye(3)).max() < 5 / math.sqrt(DRAWS)
    assert z.abs().max() > 3.5  # tails are there


def test_neighbouring_rows_and_steps_are_uncorrelated() -> None:
    mean, log_std = torch.zeros(DRAWS, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    first = ops.sample(mean=mean, log_std=log_std, seed=16, step=1).actions[:, 0]
    following = ops.sample(mean=mean, log_std=log_std, seed=16, step=2).actions[:, 0]
    limit = 5 / math.sqrt(DRAWS)
    assert abs(float((first * following).mean())) < limit
    assert abs(float((first[1:] * first[:-1]).mean())) < limit
    assert abs(float((first.square()[1:] * first.square()[:-1]).mean()) - 1) < 4 * limit


@given(seed=seeds, family=families, width=widths, dtype=floats, masked=st.booleans())
def test_deterministic_is_the_mode(seed: int, family: str, width: int, dtype: torch.dtype, masked: bool) -> None:
    parameters = cast(parameters_and_mask(seed, family, 33, width, masked), dtype)
    drawn = ops.sample(**parameters, seed=seed, deterministic=True)
    if family == "normal":
        assert torch.equal(drawn.actions, parameters["mean"])
        return
    mask = parameters.get("action_mask", torch.ones(33, width, dtype=torch.bool))
    logits = parameters["logits"].masked_fill(~mask, -math.inf)
    if family == "bernoulli":
        assert torch.equal(drawn.actions, (logits > 0).long())
        return
    parts = logits.split(list(parameters.get("nvec", (width,))), -1)
    expected = torch.stack([part.argmax(-1) for part in parts], -1)
    assert torch.equal(drawn.actions.view(33, -1), expected)
    assert torch.equal(drawn.actions, ops.sample(**parameters, seed=seed + 1, step=9, deterministic=True).actions)


def test_mode_of_a_tie_is_the_first() -> None:
    drawn = ops.sample(logits=torch.tensor([[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0]]), seed=1, deterministic=True)
    assert drawn.actions.tolist() == [1, 0]


@given(seed=seeds, family=st.sampled_from(FAMILIES[:3]), width=widths, dtype=floats, by_infinity=st.booleans())
def test_masked_actions_are_never_drawn(
    seed: int, family: str, width: int, dtype: torch.dtype, by_infinity: bool
) -> None:
    parameters = cast(parameters_and_mask(seed, family, 500, width, True), dtype)
    mask = parameters["action_mask"]
    # The forbidden ones would be the likeliest by far.
    parameters["logits"] = parameters["logits"] + 50.0 * ~mask
    if by_infinity:
        parameters["logits"] = parameters["logits"].masked_fill(~parameters.pop("action_mask"), -math.inf)
    drawn = ops.sample(**parameters, seed=seed)
    if family == "bernoulli":
        assert not drawn.actions[~mask].any()
    else:
        parts = mask.split(list(parameters.get("nvec", (width,))), -1)
        for part, action in zip(parts, drawn.actions.view(500, -1).unbind(-1), strict=True):
            assert part[torch.arange(500), action].all()
    assert drawn.logp.isfinite().all()
    assert (drawn.logp <= 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sure", [0, 3, 6])
def test_a_sure_action_is_always_drawn(sure: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(DRAWS, 7, dtype=dtype)
    logits[:, sure] = 1000.0
    drawn = ops.sample(logits=logits, seed=17)
    assert (drawn.actions == sure).all()
    assert not drawn.logp.any()
    assert not drawn.entropy.any()
    bits = ops.sample(logits=torch.tensor([[1000.0, -1000.0]], dtype=dtype).expand(DRAWS, 2),
                      distribution="bernoulli", seed=17)  # fmt: skip
    assert bits.actions[:, 0].all()
    assert not bits.actions[:, 1].any()
    assert not bits.logp.any()


def test_bits_of_infinite_logit_are_sure() -> None:
    logits = torch.tensor([[math.inf, -math.inf, 0.0]], dtype=torch.float64).expand(100, 3)
    drawn = ops.sample(logits=logits, distribution="bernoulli", seed=18)
    assert drawn.actions[:, 0].all()
    assert not drawn.actions[:, 1].any()
    assert drawn.logp.tolist() == pytest.approx([-math.log(2)] * 100, abs=1e-15)
    assert drawn.entropy.tolist() == pytest.approx([math.log(2)] * 100, abs=1e-15)


@given(seed=seeds, family=families, how=st.lists(st.integers(0, 3), min_size=3, max_size=3), dtype=floats)
def test_strides(seed: int, family: str, how: list[int], dtype: torch.dtype) -> None:
    parameters = cast(parameters_and_mask(seed, family, 21, 6, True), dtype)
    tensors = [k for k, v in parameters.items() if isinstance(v, torch.Tensor)]
    strided = {k: restride(parameters[k], h) for k, h in zip(tensors, how, strict=False)}
    steps = torch.arange(42)[::2]
    actual = ops.sample(**{**parameters, **strided}, seed=seed, step=steps)
    for a, e in zip(actual, ops.sample(**parameters, seed=seed, step=steps.contiguous()), strict=True):
        assert torch.equal(a, e)


def test_requires_no_gradient() -> None:
    drawn = ops.sample(logits=torch.zeros(4, 3), seed=1)
    assert not any(x.requires_grad for x in drawn)
    assert drawn._fields == ("actions", "logp", "entropy")
