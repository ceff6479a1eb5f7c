"""Random but well-conditioned inputs for the kernels, in float64, from a seed and a shape.

Well-conditioned: gradients jump where a ratio meets a clip bound or two candidates of a max tie, and there float32 and
float64 may rightly land on different sides. The inputs keep away from such points, so that every comparison can be
tight.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pyppo import reference

FAMILIES = ("categorical", "multi_categorical", "bernoulli", "normal")
PARAMETERS = ("logits", "mean", "log_std", "values")
METRICS = ("loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "kl", "denominator")
GARBAGE = float("nan")

# One, primes, and one less and more than multiples of the vector widths (4, 8, 16 floats) and of a tile (64 samples).
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 11, 13, 15, 16, 17, 23, 31, 32, 33, 63, 64, 65, 67, 127, 128, 129)
seeds = st.integers(0, 2**31 - 1)
floats = st.sampled_from([torch.float32, torch.float64])
batches = st.one_of(st.sampled_from(EDGES), st.integers(1, 300), st.sampled_from([1021, 2048, 4099]))
widths = st.sampled_from((1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 18, 31, 33, 65))


def environment(**changes: str | None) -> dict[str, str]:
    """For a Python process of a test's own: this one's variables and its pyppo; None takes a variable out."""
    merged = {**os.environ, "PYTHONPATH": str(Path(reference.__file__).parents[1]), **changes}
    return {name: value for name, value in merged.items() if value is not None}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def coin(g: torch.Generator, probability: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g) < probability


def integers(g: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=g)


def partition(g: torch.Generator, total: int) -> tuple[int, ...]:
    """A random `nvec` with this sum."""
    sizes = []
    while total > 0:
        sizes.append(1 + int(integers(g, min(total, 9), 1)))
        total -= sizes[-1]
    return tuple(sizes)


def cast(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same arguments with every float tensor in `dtype`."""
    floating = {k: v.to(dtype) for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return {**inputs, **floating}


def restride(x: Tensor, how: int) -> Tensor:
    """The same elements behind other strides: as they are, transposed, every other of a buffer, or an offset slice."""
    if x.dim() == 0 or how == 0:
        return x
    if how == 1 and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 2:
        buffer = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        view = buffer[..., ::2]
    else:
        view = torch.zeros(x.shape[0] + 2, *x.shape[1:], dtype=x.dtype)[1:-1]
    return view.copy_(x)


def away_from(x: Tensor, points: list[float], distance: float = 0.01) -> Tensor:
    """x with whatever is close to a point moved to a little above it."""
    for point in points:
        x = torch.where((x - point).abs() < distance, point + 2 * distance, x)
    return x


def family_parameters(g: torch.Generator, family: str, batch: int, width: int, spread: float = 1.0) -> dict[str, Any]:
    """logits or mean and log_std (and nvec) of `batch` distributions."""
    if family == "normal":
        per_sample = bool(coin(g, 0.5, 1))
        log_std = 0.5 * normal(g, *((batch, width) if per_sample else (width,))) - 0.5
        return {"mean": spread * normal(g, batch, width), "log_std": log_std}
    logits = {"logits": 2.0 * spread * normal(g, batch, width), "distribution": family}
    return {**logits, "nvec": partition(g, width)} if family == "multi_categorical" else logits


def random_mask(g: torch.Generator, family: str, nvec: tuple[int, ...] | None, batch: int, width: int) -> Tensor:
    """Allowed actions; at least one in each categorical component."""
    mask = coin(g, 0.6, batch, width)
    if family == "bernoulli":
        return mask
    start = 0
    for size in nvec or (width,):
        sure = start + integers(g, size, batch)
        mask[torch.arange(batch), sure] = True
        start += size
    return mask


def random_actions(g: torch.Generator, parameters: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """Actions that the distributions can produce."""
    if "mean" in parameters:
        mean = parameters["mean"]
        return mean + parameters["log_std"].exp() * normal(g, *mean.shape)
    logits = parameters["logits"]
    free = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask
    if parameters["distribution"] == "bernoulli":
        return (coin(g, 0.5, *logits.shape) & free).long()
    pieces = free.split(list(parameters.get("nvec") or [logits.shape[1]]), -1)
    drawn = torch.stack([torch.multinomial(piece.double(), 1, generator=g)[:, 0] for piece in pieces], -1)
    return drawn if parameters["distribution"] == "multi_categorical" else drawn[:, 0]


def value_inputs(g: torch.Generator, batch: int, clip: float | None) -> dict[str, Tensor]:
    """values, old values, returns, away from the kinks of the clipped value loss."""
    old, returns = normal(g, batch), normal(g, batch)
    step = normal(g, batch)
    if clip is None:
        return {"values": old + step, "old_values": old, "returns": returns}
    step = away_from(step, [-clip, clip])
    near = old + step.clamp(-clip, clip)
    tie = (step.abs() > clip) & ((old + step - returns).abs() - (near - returns).abs()).abs().lt(0.01)
    return {"values": old + step, "old_values": old, "returns": torch.where(tie, returns + 0.05, returns)}


# The loss of most papers and of the defaults, with every option said.
PLAIN = {
    "objective": "clip",
    "clip_coef": 0.2,
    "clip_coef_high": None,
    "dual_clip": None,
    "value_clip_coef": None,
    "kl_coef": 0.0,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
    "norm_adv": False,
}

objectives = st.sampled_from(["clip", "clip", "unclipped", "kl"])


@st.composite
def loss_options(draw: Callable[..., Any]) -> dict[str, Any]:
    """Hyperparameters of the loss; those of another objective are left out now and then, as callers do."""
    return {
        "objective": draw(objectives),
        "clip_coef": draw(st.sampled_from([0.1, 0.2, 0.5])),
        "clip_coef_high": draw(st.sampled_from([None, 0.3, 1.5])),
        "dual_clip": draw(st.sampled_from([None, 1.4, 3.0])),
        "value_clip_coef": draw(st.sampled_from([None, 0.2, 1.0])),
        "kl_coef": draw(st.sampled_from([0.0, 0.7])),
        "ent_coef": draw(st.sampled_from([0.0, 0.01, 0.5])),
        "vf_coef": draw(st.sampled_from([0.5, 1.0])),
        "norm_adv": draw(st.booleans()),
    }


def finish_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only another objective takes."""
    kept = dict(options)
    if kept["objective"] != "clip":
        kept["dual_clip"] = None
    if kept["objective"] != "kl":
        kept["kl_coef"] = 0.0
    return kept


def log_ratios(g: torch.Generator, options: Mapping[str, Any], *shape: int) -> Tensor:
    """log(new / old), its ratio away from the clip bounds."""
    high = options["clip_coef"] if options["clip_coef_high"] is None else options["clip_coef_high"]
    bounds = [1 - options["clip_coef"], 1 + high, options["dual_clip"] or 3.0]
    return away_from((0.4 * normal(g, *shape)).exp(), bounds).log()


def random_weights(g: torch.Generator, kind: str | None, *shape: int) -> Tensor | None:
    if kind is None:
        return None
    kept = coin(g, 0.7, *shape)
    return kept if kind == "bool" else kept * (0.1 + torch.rand(*shape, generator=g, dtype=torch.float64))


def loss_case(
    seed: int,
    family: str,
    batch: int,
    width: int,
    options: Mapping[str, Any],
    *,
    masked: bool = False,
    weights: str | None = None,
    with_values: bool = True,
    denominator: float | None = None,
) -> dict[str, Any]:
    """Keyword arguments of `ppo_loss` in float64."""
    g, options = generator(seed), finish_options(options)
    case = family_parameters(g, family, batch, width)
    mask = None
    if masked and family != "normal":
        mask = case["action_mask"] = random_mask(g, family, case.get("nvec"), batch, width)
    case["actions"] = random_actions(g, case, mask)
    distribution = reference.make_distribution(
        case.get("distribution"), case.get("logits"), case.get("mean"), case.get("log_std"), case.get("nvec"), mask
    )
    case["old_logp"] = distribution.log_prob(case["actions"]) - log_ratios(g, options, batch)
    case["advantages"] = 0.3 + normal(g, batch)
    if options["objective"] == "kl":
        names = ("mean", "log_std") if family == "normal" else ("logits",)
        case |= {f"old_{name}": case[name] + 0.3 * normal(g, *case[name].shape) for name in names}
    if with_values:
        case |= value_inputs(g, batch, options["value_clip_coef"])
    else:
        options["value_clip_coef"] = None
    case |= {"weights": random_weights(g, weights, batch), "denominator": denominator}
    return case | options


def surrogate_case(
    seed: int, shape: tuple[int, ...], options: Mapping[str, Any], *, weights: str | None = None
) -> dict[str, Any]:
    """Keyword arguments of `surrogate_loss` in float64."""
    g, options = generator(seed), finish_options(options)
    case: dict[str, Any] = {"logp": -1.0 - normal(g, *shape).abs(), "advantages": 0.3 + normal(g, *shape)}
    case["old_logp"] = case["logp"] - log_ratios(g, options, *shape)
    case["entropy"] = 1.0 + 0.2 * normal(g, *shape)
    if options["objective"] == "kl":
        case["kl"] = normal(g, *shape).square()
    count = int(torch.tensor(shape).prod())
    flat = value_inputs(g, count, options["value_clip_coef"])
    case |= {name: x.reshape(shape) for name, x in flat.items()}
    case["weights"] = random_weights(g, weights, *shape)
    return case | options


def spoil_unweighted(case: Mapping[str, Any]) -> dict[str, Any]:
    """The same case with NaN, or an action that does not exist, wherever a row's weight is 0."""
    spoiled, dead = dict(case), case["weights"] == 0
    for name, x in case.items():
        if not isinstance(x, Tensor) or x.dim() == 0 or name == "weights":
            continue
        if name in ("log_std", "old_log_std") and x.dim() == 1:  # one for all samples
            continue
        x = x.clone()
        if x.is_floating_point():
            x[dead] = GARBAGE
        elif x.dtype == torch.bool:
            x[dead] = False
        else:
            x[dead] = 200 if x.dtype == torch.uint8 else -7
            x[dead & (torch.arange(dead.numel()).view(dead.shape) % 2 == 0)] = 100 if x.dtype == torch.uint8 else 10**6
        spoiled[name] = x
    return spoiled


def to_dict(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(metrics[name]) for name in METRICS}


def with_gradients(
    function: Callable[..., Any], case: Mapping[str, Any], names: tuple[str, ...] = PARAMETERS
) -> tuple[Tensor, dict[str, float], dict[str, Tensor]]:
    """Loss, metrics, and the gradient of every argument in `names` that the case has."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in names if case.get(name) is not None}
    loss, metrics = function(**{**case, **leaves})
    loss.backward()
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return loss.detach(), to_dict(metrics), grads


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """|actual - expected| <= tolerance * (|expected| + the largest |expected|), element by element."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.abs() + expected.abs().max()
    wrong = ~((actual - expected).abs() <= tolerance * scale + 1e-30)
    if wrong.any():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(f"{what}{list(where)}: {actual[where]!r}, expected {expected[where]!r}")


def assert_same_loss(
    actual: tuple[Tensor, dict[str, float], dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, float], dict[str, Tensor]],
    tolerance: float,
) -> None:
    """Loss and metrics to `tolerance` times the size of a sample's terms (about 10), gradients element by element."""
    assert abs(float(actual[0]) - float(expected[0])) <= tolerance * (10 + abs(float(expected[0])))
    for name in METRICS:
        assert abs(actual[1][name] - expected[1][name]) <= tolerance * (10 + abs(expected[1][name])), (
            f"{name}: {actual[1][name]!r}, expected {expected[1][name]!r}"
        )
    assert actual[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert_near(actual[2][name], gradient, tolerance, f"d loss / d {name}")


TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11}
