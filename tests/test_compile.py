"""Under `torch.compile` the kernels are one graph with the eager results, and their registrations are sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import (
    FAMILIES,
    PARAMETERS,
    PLAIN,
    cast,
    coin,
    family_parameters,
    generator,
    loss_case,
    normal,
    surrogate_case,
)

from pyppo import ops

OPTIONS = {**PLAIN, "objective": "kl", "kl_coef": 0.4, "clip_coef_high": 0.3, "value_clip_coef": 0.2, "norm_adv": True}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A graph break is an error. The backend runs the traced graph, forward and backward, without generating code."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def assert_same(a: Any, b: Any) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
        assert x.dtype == y.dtype


def gae_case(steps: int, envs: int) -> dict[str, torch.Tensor]:
    g = generator(steps)
    masks = {"terminated": coin(g, 0.1, steps, envs), "truncated": coin(g, 0.1, steps, envs)}
    return {"rewards": normal(g, steps, envs).float(), "values": normal(g, steps + 1, envs).float(), **masks}


@pytest.mark.parametrize("optional", [False, True])
def test_gae(optional: bool) -> None:
    function = compiled(lambda **case: ops.gae(**case, gamma=0.9))
    for steps, envs in ((9, 4), (9, 4), (12, 5), (20, 7)):
        case = gae_case(steps, envs)
        if optional:
            case |= {"valid": ~case["terminated"], "final_values": case["rewards"] + 1}
        assert_same(function(**case), ops.gae(**case, gamma=0.9))


def test_gae_out() -> None:
    case = gae_case(9, 4)
    out = torch.zeros(9, 4), torch.zeros(9, 4)
    compiled(lambda: ops.gae(**case, out=out))()
    assert_same(out, ops.gae(**case))


def test_gae_moments() -> None:
    case = gae_case(9, 4)
    moments, expected = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)

    def function() -> Any:
        return *ops.gae(**case, moments=moments), moments + 0.0  # the graph reads what the kernel wrote

    assert_same(compiled(function)(), (*ops.gae(**case, moments=expected), expected))


def gather_case() -> dict[str, Any]:
    return {
        "columns": [torch.arange(24.0).view(8, 3), torch.arange(8)], "rows": torch.tensor([1, 3, 4, 6, 7]),
        "order": torch.tensor([4, 0, 3, 1, 2]), "count": torch.tensor([5]), "part": torch.tensor([0]), "num_parts": 2,
        "out": [torch.zeros(3, 3), torch.zeros(3, dtype=torch.int64)], "weights": torch.zeros(3),
    }  # fmt: skip


def test_gather_minibatch() -> None:
    def function(case: dict[str, Any]) -> Any:
        ops.gather_minibatch(**case)
        return case["out"][0] + 0.0, case["out"][1] + 0, case["weights"] + 0.0

    assert_same(compiled(function)(gather_case()), function(gather_case()))


def test_normalize() -> None:
    statistics = {"mean": torch.arange(3).double(), "var": torch.arange(3).double() + 1}

    def function(x: torch.Tensor, out: torch.Tensor) -> Any:
        ops.normalize(x, **statistics, out=out)
        return ops.normalize(x, **statistics, clip=1.5), out

    for x in (normal(generator(1), 5, 3), torch.arange(6).view(2, 3)):
        torch._dynamo.reset()
        out, expected = torch.zeros(x.shape), torch.zeros(x.shape)
        assert_same(compiled(function)(x, out), function(x, expected))


def run_loss(function: Callable[..., Any], case: dict[str, Any], names: tuple[str, ...]) -> list[torch.Tensor]:
    leaves = {name: case[name].detach().clone().requires_grad_() for name in names if name in case}
    loss, stats, approx_kl = function({**case, **leaves})
    loss.backward()
    return [loss.detach(), stats, approx_kl, *(x.grad for x in leaves.values())]


@pytest.mark.parametrize("family", FAMILIES)
def test_ppo_loss(family: str) -> None:
    def loss(case: dict[str, Any]) -> Any:
        loss, metrics = ops.ppo_loss(**case)
        return 2.0 * loss, metrics.stats, metrics.approx_kl

    function = compiled(loss, dynamic=True)
    for batch in (20, 33):
        case = cast(loss_case(1, family, batch, 4, OPTIONS, masked=True, weights="bool"), torch.float32)
        assert_same(run_loss(function, case, PARAMETERS), run_loss(loss, case, PARAMETERS))


def test_ppo_loss_without_the_optional_parts() -> None:
    options = {**OPTIONS, "objective": "clip", "norm_adv": False}
    case = loss_case(2, "categorical", 20, 4, options, with_values=False)
    for denominator in (None, 12.5, torch.tensor(12.5, dtype=torch.float64)):
        case["denominator"] = denominator

        def loss(case: dict[str, Any]) -> Any:
            loss, metrics = ops.ppo_loss(**case)
            return loss, metrics.stats, metrics.approx_kl

        assert_same(run_loss(compiled(loss), case, ("logits",)), run_loss(loss, case, ("logits",)))


@pytest.mark.parametrize("family", ["categorical", "normal"])
def test_ppo_loss_grad(family: str) -> None:
    case = loss_case(3, family, 20, 4, OPTIONS)

    def flat() -> list[torch.Tensor]:
        loss, metrics, grads = ops.ppo_loss_grad(**case)
        return [loss, metrics.stats, *(x for x in grads if x is not None)]

    assert_same(compiled(flat)(), flat())


def test_surrogate_loss() -> None:
    def loss(case: dict[str, Any]) -> Any:
        loss, metrics = ops.surrogate_loss(**case)
        return loss, metrics.stats, metrics["approx_kl"]

    function = compiled(loss, dynamic=True)
    names = ("logp", "entropy", "values", "kl")
    for shape in ((3, 7), (5, 11)):
        case = surrogate_case(4, shape, OPTIONS, weights="float")
        assert_same(run_loss(function, case, names), run_loss(loss, case, names))


@pytest.mark.parametrize("family", FAMILIES)
def test_sample(family: str) -> None:
    function = compiled(lambda parameters, step: ops.sample(**parameters, seed=5, step=step, row_offset=3))
    for batch in (16, 21):
        parameters = cast(family_parameters(generator(5), family, batch, 5), torch.float32)
        for step in (torch.arange(batch), 7):
            drawn = function(parameters, step)
            assert_same(drawn, ops.sample(**parameters, seed=5, step=step, row_offset=3))
            assert drawn._fields == ("actions", "logp", "entropy")


@pytest.mark.parametrize("rate", [1e-2, torch.tensor(1e-2)])
def test_adam(rate: Any) -> None:
    def update(state: dict[str, torch.Tensor]) -> torch.Tensor:
        # The graph reads what the kernel wrote: the order of the two must hold.
        norm = ops.adam(**state, learning_rate=rate, max_grad_norm=0.5, skip=torch.zeros(1, dtype=torch.bool))
        return norm + 0 * state["params"].sum()

    states = []
    for function in (update, compiled(update)):
        g = generator(6)
        state = {name: normal(g, 50).abs().float() for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
        state["step"] = torch.zeros(1, dtype=torch.int64)
        norms = torch.stack([function(state) for _ in range(3)])
        states.append([*state.values(), norms])
    assert_same(*states)
    assert int(states[1][4]) == 3


def test_one_graph_for_a_whole_update() -> None:
    """A small network, loss, backward and optimiser step in one function, against the same in eager mode."""
    case = cast(loss_case(7, "categorical", 40, 3, {**OPTIONS, "objective": "clip"}), torch.float32)
    obs = normal(generator(8), 40, 6).float()
    fixed = {k: v for k, v in case.items() if k not in ("logits", "values", "kl_coef")}

    def loss(weight: torch.Tensor) -> torch.Tensor:
        outputs = obs @ weight.view(6, 4)
        return ops.ppo_loss(logits=outputs[:, :3], values=outputs[:, 3], **fixed)[0]

    results = []
    for function in (loss, compiled(loss)):
        weight = normal(generator(9), 24).float()
        moments, step = torch.zeros(2, 24), torch.zeros(1, dtype=torch.int64)
        for _ in range(3):
            leaf = weight.clone().requires_grad_()
            function(leaf).backward()
            ops.adam(weight, leaf.grad, *moments, step, learning_rate=1e-2)
        results.append(weight)
    torch.testing.assert_close(*results)


@pytest.mark.slow
def test_generated_code() -> None:
    """The default backend: C++ generated around the kernels."""
    case = loss_case(10, "normal", 40, 3, OPTIONS)

    def loss(case: dict[str, Any]) -> Any:
        loss, metrics = ops.ppo_loss(**{**case, "mean": 2 * case["mean"]})
        return loss, metrics.stats, metrics.approx_kl

    for a, b in zip(*(run_loss(f, case, PARAMETERS) for f in (torch.compile(loss, fullgraph=True), loss)), strict=True):
        torch.testing.assert_close(a, b)


# ---- torch.library.opcheck: schema, fake implementation, autograd registration, tracing with dynamic shapes ---------


def leaf(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().clone().requires_grad_()


def loss_arguments(case: dict[str, Any], first: tuple[str, ...], then: tuple[str, ...]) -> tuple[Any, ...]:
    options = ("objective", "clip_coef", "clip_coef_high", "dual_clip", "value_clip_coef", "kl_coef", "ent_coef",
               "vf_coef", "norm_adv")  # fmt: skip
    return (*(leaf(case.get(k)) for k in first), *(case.get(k) for k in then), *(case[k] for k in options))


def ppo_arguments(family: str) -> tuple[Any, ...]:
    case = loss_case(11, family, 12, 4, OPTIONS, masked=True, weights="bool")
    case["denominator_number"] = 9.0
    then = ("distribution", "nvec", "action_mask", "actions", "old_logp", "advantages", "old_values", "returns",
            "weights", "denominator", "denominator_number", "old_logits", "old_mean", "old_log_std")  # fmt: skip
    return loss_arguments(case, PARAMETERS, then)


def surrogate_arguments() -> tuple[Any, ...]:
    case = surrogate_case(12, (3, 5), OPTIONS, weights="float")
    case["denominator"] = torch.tensor(9.0, dtype=torch.float64)
    then = ("old_logp", "advantages", "old_values", "returns", "weights", "denominator", "denominator_number")
    return loss_arguments(case, ("logp", "entropy", "values", "kl"), then)


OPERATORS: dict[str, Callable[[], tuple[str, tuple[Any, ...]]]] = {
    "gae": lambda: ("gae", (*gae_case(5, 3).values(), None, None, 0.99, 0.95)),
    "gae, all given": lambda: (
        "gae",
        (*gae_case(5, 3).values(), coin(generator(1), 0.8, 5, 3), gae_case(5, 3)["rewards"], 0.99, 0.95),
    ),
    **{f"ppo_loss {family}": lambda f=family: ("ppo_loss", ppo_arguments(f)) for family in FAMILIES},
    "surrogate_loss": lambda: ("surrogate_loss", surrogate_arguments()),
    "sample categorical": lambda: (
        "sample",
        (normal(generator(2), 6, 4), None, None, None, None, coin(generator(2), 0.9, 6, 4), 1, 2, None, 0, False),
    ),
    "sample normal": lambda: (
        "sample",
        (None, normal(generator(2), 6, 4), torch.zeros(4).double(), None, None, None, 1, 0, torch.arange(6), 0, True),
    ),
    "adam": lambda: (
        "adam",
        (*(normal(generator(i), 9).abs() for i in range(4)), torch.zeros(1).long(), None, 0.1, 0.9, 0.99, 1e-8, 0.0,
         0.5, None),
    ),
    "permutation": lambda: ("permutation", (10, 1, 2, 3, torch.device("cpu"))),
    "gae, moments": lambda: (
        "gae_moments",
        (*gae_case(5, 3).values(), None, None, 0.99, 0.95, torch.zeros(2, 3, dtype=torch.float64)),
    ),
    "gather_minibatch": lambda: ("gather_minibatch", tuple(gather_case().values())),
    "normalize": lambda: ("normalize", (normal(generator(1), 5, 3), torch.zeros(3).double(), torch.ones(3).double(),
                                        1e-8, 2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    operator, arguments = OPERATORS[name]()
    results = torch.library.opcheck(getattr(torch.ops.pyppo, operator).default, arguments)
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) >= 4


def test_every_operator_is_checked() -> None:
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names()
                  if name.startswith("pyppo::")}  # fmt: skip
    assert registered == {OPERATORS[name]()[0] for name in OPERATORS}


def test_permutation_out() -> None:
    out = torch.zeros(100, dtype=torch.int64)
    compiled(lambda: ops.permutation(100, seed=1, epoch=3, out=out))()
    assert torch.equal(out, ops.permutation(100, seed=1, epoch=3))


def test_permutation_and_large_seeds() -> None:
    """Seeds are unsigned, an operator's integers are not."""
    seed = 2**64 - 1
    compiled = torch.compile(lambda: ops.permutation(100, seed=seed, epoch=3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), ops.permutation(100, seed=seed, epoch=3))


@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_gae_out_is_checked_as_in_an_eager_call(wrong: str) -> None:
    rewards, values, flags = torch.randn(5, 2), torch.randn(6, 2), torch.zeros(5, 2, dtype=torch.bool)
    bad = torch.empty(5, 2, dtype=torch.float64) if wrong == "dtype" else torch.empty(3, 5, 2)
    compiled = torch.compile(lambda out: ops.gae(rewards, values, flags, flags, out=out), backend="eager")
    with pytest.raises((TypeError, ValueError), match="out"):
        compiled((bad, bad.clone()))
