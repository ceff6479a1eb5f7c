"""`ops.sample` on a GPU: the CPU's actions for the same seed, and the reference's log-probs and entropies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import FAMILIES, assert_near, cast, family_parameters, generator, random_mask
from gpu_cases import DEVICE, NETWORK_DTYPES, compute_dtype, on_device

from pyppo import ops, reference

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
SIZES = [(1, 1), (5, 2), (129, 7), (1021, 18), (257, 32), (64, 33), (40, 130), (11, 1021)]


def parameters_of(family: str, batch: int, width: int, network_dtype: torch.dtype) -> dict[str, Any]:
    g = generator(100 * batch + width)
    parameters = cast(family_parameters(g, family, batch, width), network_dtype)
    if family != "normal":
        parameters["action_mask"] = random_mask(g, family, parameters.get("nvec"), batch, width)
    return parameters


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("network_dtype", NETWORK_DTYPES)
@pytest.mark.parametrize(("batch", "width"), SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_matches_the_cpu_and_the_reference(
    family: str, batch: int, width: int, network_dtype: torch.dtype, deterministic: bool
) -> None:
    parameters = parameters_of(family, batch, width, network_dtype)
    steps = torch.arange(batch) * 10**10
    options = {"seed": 11, "row_offset": 1000, "deterministic": deterministic}
    drawn = ops.sample(**on_device(parameters), step=steps.to(DEVICE), **options)
    dtype = compute_dtype(network_dtype)
    on_cpu = ops.sample(**cast(parameters, dtype), step=steps, **options)
    actions = drawn.actions.cpu()
    assert actions.dtype == on_cpu.actions.dtype
    if family == "normal":
        assert_near(actions, on_cpu.actions, TOLERANCE[dtype], "actions")
    else:
        # The two compilers round exp differently by an ulp, so a number next to an edge may fall on either side.
        assert (actions != on_cpu.actions).sum() <= actions.numel() // 10_000
    exact = reference.make_distribution(**cast(parameters, torch.float64))
    taken = actions.double() if family == "normal" else actions
    assert_near(drawn.logp.cpu(), exact.log_prob(taken), TOLERANCE[dtype], "logp")
    assert_near(drawn.entropy.cpu(), exact.entropy(), TOLERANCE[dtype], "entropy")


@pytest.mark.parametrize("width", [6, 70])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_depend_on_its_batch(family: str, width: int) -> None:
    parameters = on_device(parameters_of(family, 300, width, torch.float32))
    whole = ops.sample(**parameters, seed=1, step=2, row_offset=10)
    rows = {k: v[37:161] if isinstance(v, torch.Tensor) and v.dim() == 2 else v for k, v in parameters.items()}
    part = ops.sample(**rows, seed=1, step=2, row_offset=47)
    for whole_x, part_x in zip(whole, part, strict=True):
        assert torch.equal(whole_x[37:161], part_x)


@pytest.mark.parametrize("width", [4, 50])
@pytest.mark.parametrize("family", ["categorical", "bernoulli", "normal"])
def test_impossible_rows_are_noted(family: str, width: int) -> None:
    parameters = parameters_of(family, 60, width, torch.float32)
    parameters["mean" if family == "normal" else "logits"][41, 1] = float("nan")
    parameters.pop("action_mask", None)
    ops.check_errors(DEVICE)
    drawn = ops.sample(**on_device(parameters), seed=1)
    with pytest.raises(ValueError, match="row 41"):
        ops.check_errors(DEVICE)
    if family == "categorical":
        assert ((drawn.actions >= 0) & (drawn.actions < width)).all()


def test_empty() -> None:
    drawn = ops.sample(logits=torch.zeros(0, 3, device=DEVICE), seed=1)
    assert all(len(x) == 0 for x in drawn)
