"""How fast are the kernels? Against NumPy, eager torch, torch.compile, torchrl, and the machine's own limit.

    python bench/kernels.py [--quick] [--groups gae loss …] [--json FILE]

All contenders of a row run in one process, in turn. "limit" is a copy of the bytes that the kernel has to move at the
least, on as many threads; "of limit" is its time over the kernel's. Targets are the project's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import _baselines as base
import _data_cases as data
import torch
from _common import (
    Contender,
    CopyOf,
    Timing,
    alternate,
    console,
    fixed_costs,
    machine,
    microseconds,
    show_facts,
    show_table,
    warn_if_busy,
    write_json,
)

from pyppo import ops

LIMIT = data.LIMIT
GAE_SIZES = ((2048, 1), (128, 8), (256, 64), (128, 1024), (1024, 4096), (1, 1))
CATEGORICAL_SIZES = ((1, 4), (256, 4), (4096, 6), (32768, 4), (262144, 18))
NORMAL_SIZES = ((64, 6), (2048, 6), (32768, 6))
SAMPLE_SIZES = (
    ("categorical", 8, 4),
    ("categorical", 1024, 6),
    ("categorical", 32768, 18),
    ("normal", 8, 6),
    ("normal", 1024, 6),
)
ADAM_LAYERS = {"64-64": (17, 64, 64, 6), "256-256": (64, 256, 256, 8), "1024-1024": (376, 1024, 1024, 17)}
DATA_CASES: dict[str, tuple[Callable[[], data.DataCase], ...]] = {
    "permutation": (lambda: data.permutation_case(2048), lambda: data.permutation_case(131_072)),
    "gather": (
        lambda: data.gather_case(2048, 64, (17,)),
        lambda: data.gather_case(131_072, 4096, (17,)),
        lambda: data.gather_case(1024, 256, (4, 84, 84), dtype=torch.uint8),
    ),
    "normalize": (
        lambda: data.normalize_case(8, 17, torch.float64),
        lambda: data.normalize_case(4096, 17, torch.float32),
    ),
    "call": (data.call_case,),
}
AUTOGRAD = "torch.compile, autograd"


@dataclass(frozen=True)
class Target:
    """What a contender has to reach: whether it does, and what it was."""

    name: str
    text: str
    check: Callable[[dict[str, Timing]], tuple[bool, str]]


@dataclass
class Case:
    """One size: contenders on one input. `LIMIT` is a bound, no rival."""

    name: str
    contenders: dict[str, Contender]
    ours: tuple[str, ...]
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- targets --------------------------------------------------------------------------------------------------------


def least_ratio(rival: Timing, ours: Timing) -> float:
    """The smaller of the medians' and the minima's: a rival that was disturbed more often is no slower for that."""
    return min(rival.median / ours.median, rival.minimum / ours.minimum)


def at_most(name: str, limit_us: float) -> Target:
    """A call takes no longer than that."""
    return Target(
        name,
        f"<= {limit_us:g} us",
        lambda t: (1e6 * t[name].median <= limit_us, f"{microseconds(t[name].median)} us"),
    )


def times_faster(name: str, rival: str, factor: float) -> Target:
    """A call takes so many times less than the rival's."""

    def check(times: dict[str, Timing]) -> tuple[bool, str]:
        ratio = least_ratio(times[rival], times[name])
        return ratio >= factor, f"{ratio:.2f} x"

    return Target(name, f">= {factor:g} x {rival}", check)


def faster_than_all(case: Case) -> list[Target]:
    """Each of ours is faster than each rival."""

    def check(times: dict[str, Timing], name: str) -> tuple[bool, str]:
        rivals = [times[other] for other in case.contenders if other not in (*case.ours, LIMIT)]
        ratio = min(least_ratio(rival, times[name]) for rival in rivals)
        return ratio > 1, f"{ratio:.2f} x"

    return [Target(name, "> every rival", lambda times, name=name: check(times, name)) for name in case.ours]


# --- cases ----------------------------------------------------------------------------------------------------------


def gae_case(num_steps: int, num_envs: int, compile_steps: int) -> Case:
    shape = (num_steps, num_envs)
    rewards, values = torch.randn(shape), torch.randn(num_steps + 1, num_envs)
    terminated, truncated = torch.rand(shape) < 0.01, torch.rand(shape) < 0.005
    tensors = (rewards, values, terminated, truncated)
    arrays = tuple(x.numpy() for x in tensors)
    out = (torch.empty(shape), torch.empty(shape))
    options = {"gamma": base.GAMMA, "gae_lambda": base.LAMBDA}
    contenders: dict[str, Contender] = {
        "ops.gae": lambda: ops.gae(*tensors, **options),
        "ops.gae(out=)": lambda: ops.gae(*tensors, **options, out=out),
        "numpy": lambda: base.gae_numpy(*arrays),
        "torch": lambda: base.gae_torch(*tensors),
    }
    case = Case(f"{num_steps} x {num_envs}", contenders, ("ops.gae", "ops.gae(out=)"))
    if num_steps <= compile_steps:
        compiled = torch.compile(base.gae_torch, dynamic=False, fullgraph=True)
        contenders["torch.compile"] = lambda: compiled(*tensors)
    else:
        case.notes.append(f"{case.name}: torch.compile left out, a loop of {num_steps} steps takes minutes to compile")
    if (torchrl := base.gae_torchrl(*tensors)) is not None:
        contenders["torchrl"] = torchrl
    # Rewards and values in, advantages and returns out, two flag arrays: 4 * 4 + 2 bytes an element.
    contenders[LIMIT] = CopyOf(18 * num_steps * num_envs)
    if shape in ((2048, 1), (128, 8)):
        case.targets.append(at_most("ops.gae", 8))
    elif shape == (1, 1):
        case.targets.append(at_most("ops.gae", 5))
    elif shape == (1024, 4096):
        case.targets.append(times_faster("ops.gae(out=)", LIMIT, 0.7))
    case.targets += faster_than_all(case)
    check_equal(case.name, contenders, rtol=1e-4, names=("ops.gae", "ops.gae(out=)", "numpy", "torch", "torch.compile"))
    return case


def loss_case(family: str, batch: int, width: int) -> Case:
    categorical = family == "categorical"
    actions = torch.randint(width, (batch,)) if categorical else torch.randn(batch, width)
    old_logp, advantages, values, returns = -torch.rand(batch), *(torch.randn(batch) for _ in range(3))
    head = {"logits": torch.randn(batch, width)} if categorical else {
        "mean": torch.randn(batch, width), "log_std": torch.full((width,), -0.5)}  # fmt: skip
    data = {"actions": actions, "old_logp": old_logp, "advantages": advantages, "returns": returns}
    options = {"clip_coef": base.CLIP, "ent_coef": base.ENT_COEF, "vf_coef": base.VF_COEF, "norm_adv": True}
    leaves = {name: x.clone().requires_grad_() for name, x in {**head, "values": values}.items()}

    def grad() -> Any:
        loss, _, grads = ops.ppo_loss_grad(**head, values=values, **data, **options)
        return loss, [g for g in grads if g is not None]

    def autograd() -> Any:
        for leaf in leaves.values():
            leaf.grad = None
        loss, _ = ops.ppo_loss(**leaves, **data, **options)
        loss.backward()
        return loss, [leaf.grad for leaf in leaves.values()]

    contenders: dict[str, Contender] = {"ops.ppo_loss_grad": grad, "ops.ppo_loss": autograd}
    case = Case(f"{family} {batch} x {width}", contenders, ("ops.ppo_loss_grad", "ops.ppo_loss"))
    if batch > 1:  # one row has no deviation to normalise advantages by
        loss = base.categorical_loss if categorical else base.normal_loss
        network, rest = [*head.values(), values], [actions, old_logp, advantages, returns]
        contenders["torch"] = base.with_gradient(loss, network, rest)
        compiled = torch.compile(loss, dynamic=False, fullgraph=True)
        contenders[AUTOGRAD] = base.with_gradient(compiled, network, rest)
        contenders["torch.compile, one graph"] = base.one_graph(loss, network, rest)
    # Categorical: logits in, their gradient out; actions 8, three floats and the value in, its gradient out. Normal:
    # mean and actions in, the mean's gradient out, four floats in, one out.
    bytes_a_row = 8 * width + 28 if categorical else 12 * width + 20
    contenders[LIMIT] = CopyOf(batch * bytes_a_row)
    case.targets += loss_targets(family, batch, width)
    check_equal(case.name, contenders, rtol=2e-3, names=tuple(contenders))
    return case


def loss_targets(family: str, batch: int, width: int) -> list[Target]:
    if (family, batch, width) == ("categorical", 1, 4):
        return [at_most("ops.ppo_loss_grad", 5), at_most("ops.ppo_loss", 35)]
    if (family, batch, width) == ("categorical", 256, 4):
        return [times_faster("ops.ppo_loss", AUTOGRAD, 4), times_faster("ops.ppo_loss_grad", AUTOGRAD, 20)]
    if (family, batch, width) == ("categorical", 32768, 4):
        return [times_faster("ops.ppo_loss", AUTOGRAD, 10), times_faster("ops.ppo_loss_grad", AUTOGRAD, 10)]
    return []


def sample_case(family: str, batch: int, width: int) -> Case:
    distributions = torch.distributions
    if family == "categorical":
        logits = torch.randn(batch, width)
        ours = lambda: ops.sample(logits=logits, seed=1)  # noqa: E731
        make = lambda: distributions.Categorical(logits=logits, validate_args=False)  # noqa: E731
        bytes_a_row = 4 * width + 16
    else:
        mean, log_std = torch.randn(batch, width), torch.full((width,), -0.5)
        ours = lambda: ops.sample(mean=mean, log_std=log_std, seed=1)  # noqa: E731
        normal = distributions.Normal
        make = lambda: distributions.Independent(  # noqa: E731
            normal(mean, log_std.exp().expand_as(mean), validate_args=False), 1, validate_args=False
        )
        bytes_a_row = 8 * width + 8

    def torch_sample() -> Any:
        with torch.no_grad():
            distribution = make()
            actions = distribution.sample()
            return actions, distribution.log_prob(actions), distribution.entropy()

    limit = CopyOf(batch * bytes_a_row)
    contenders: dict[str, Contender] = {"ops.sample": ours, "torch.distributions": torch_sample, LIMIT: limit}
    case = Case(f"{family} {batch} x {width}", contenders, ("ops.sample",))
    case.targets += faster_than_all(case)
    return case


def adam_case(name: str, layers: tuple[int, ...]) -> Case:
    """An actor and a critic of these layers: ours on one flat buffer, torch's on the list of tensors."""
    widths = [layers, (*layers[:-1], 1)]
    shapes = [s for w in widths for a, b in pairwise(w) for s in ((b, a), (b,))]
    size = sum(torch.Size(shape).numel() for shape in shapes)
    flat, grads, exp_avg, exp_avg_sq = torch.randn(size), torch.randn(size), torch.zeros(size), torch.zeros(size)
    step = torch.zeros(1, dtype=torch.int64)
    options = {"learning_rate": 3e-4, "eps": 1e-5, "max_grad_norm": 0.5}
    contenders: dict[str, Contender] = {"ops.adam": lambda: ops.adam(flat, grads, exp_avg, exp_avg_sq, step, **options)}
    for kind in ("fused", "foreach"):
        contenders[f"torch AdamW({kind})"] = torch_adam(shapes, kind)
    contenders[LIMIT] = CopyOf(28 * size)  # parameters, gradients and moments in; parameters and moments out
    case = Case(f"{name}, {size:,} parameters", contenders, ("ops.adam",))
    case.targets += faster_than_all(case)
    return case


def torch_adam(shapes: list[tuple[int, ...]], kind: str) -> Contender:
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, eps=1e-5, weight_decay=0.0, **{kind: True})

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, 0.5, foreach=True)
        optimizer.step()

    return run


def check_equal(case: str, contenders: dict[str, Contender], *, rtol: float, names: tuple[str, ...]) -> None:
    """Before timing: all compute the same. The first is held against the others."""
    found = {name: _flat(contenders[name]()) for name in names if name in contenders and name != LIMIT}
    first_name, first = next(iter(found.items()))
    for name, results in found.items():
        for x, y in zip(first, results, strict=True):
            if not torch.allclose(x, y, rtol=rtol, atol=rtol * float(x.abs().max())):
                raise AssertionError(f"{case}: {first_name} and {name} differ")


def _flat(results: Any) -> list[torch.Tensor]:
    if isinstance(results, (tuple, list)):
        return [x for item in results for x in _flat(item)]
    return [torch.as_tensor(results).detach().clone()]


def cases(groups: list[str], quick: bool, compile_steps: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Cases to be made when their turn comes: compiling and large buffers are paid one at a time."""
    keep = 2 if quick else None
    if "gae" in groups:
        for t, n in ((128, 8), (1, 1)) if quick else GAE_SIZES:
            yield "gae", lambda t=t, n=n: gae_case(t, n, compile_steps)
    if "loss" in groups:
        for batch, width in CATEGORICAL_SIZES[:keep]:
            yield "loss", lambda b=batch, w=width: loss_case("categorical", b, w)
        for batch, width in NORMAL_SIZES[: 1 if quick else None]:
            yield "loss", lambda b=batch, w=width: loss_case("normal", b, w)
    if "sample" in groups:
        for family, batch, width in SAMPLE_SIZES[:keep]:
            yield "sample", lambda f=family, b=batch, w=width: sample_case(f, b, w)
    if "adam" in groups:
        for name in list(ADAM_LAYERS)[:keep]:
            yield "adam", lambda name=name: adam_case(name, ADAM_LAYERS[name])
    for group, makers in DATA_CASES.items():
        if group in groups:
            for make in makers[:keep]:
                yield group, lambda make=make: Case(*make())


# --- results --------------------------------------------------------------------------------------------------------

TITLES = {
    "gae": "gae, T x N: microseconds a call",
    "loss": "PPO loss with metrics and gradients, B x A: microseconds",
    "sample": "action, log-prob and entropy, B x A: microseconds",
    "adam": "gradient clipping and Adam: microseconds",
    "permutation": "a minibatch epoch's order: microseconds",
    "gather": "one minibatch out of all columns: microseconds",
    "normalize": "observations by running statistics, n x features: microseconds",
    "call": "what a call costs: each kernel on the least input, microseconds",
}


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Times of a case and what follows from them, as JSON values."""
    times = alternate(case.contenders, seconds=seconds)
    rivals = {name: t.median for name, t in times.items() if name not in (*case.ours, LIMIT)}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else None
    return {
        "case": case.name,
        "us": {name: 1e6 * t.median for name, t in times.items()},
        "us_min": {name: 1e6 * t.minimum for name, t in times.items()},
        "samples": {name: t.samples for name, t in times.items()},
        "best_rival": best,
        "times_best_rival": {name: rivals[best] / times[name].median for name in case.ours} if best else {},
        "of_limit": {name: times[LIMIT].median / times[name].median for name in case.ours},
        "targets": [
            {"name": target.name, "target": target.text, "was": was, "pass": passed}
            for target in case.targets
            for passed, was in [target.check(times)]
        ],
        "notes": case.notes,
    }


def show_group(group: str, results: list[dict[str, Any]]) -> None:
    """One table: a row a contender, its times and ratios, and the targets that it has to meet."""
    rows = []
    for result in results:
        for i, name in enumerate(result["us"]):
            times = [microseconds(result[key][name] / 1e6) for key in ("us", "us_min")]
            ratios = [figure(result[key].get(name)) for key in ("times_best_rival", "of_limit")]
            targets = [t for t in result["targets"] if t["name"] == name]
            marks = [f"{'pass' if t['pass'] else 'FAIL'}  {t['target']}: {t['was']}" for t in targets]
            rows.append([result["case"] if i == 0 else "", name, *times, *ratios, "\n".join(marks)])
        rows.append([])
    show_table(TITLES[group], ["size", "<who", "us", "least", "x best rival", "of limit", "<targets"], rows)
    for note in dict.fromkeys(note for result in results for note in result["notes"]):
        console.print(f"  {note}")


def figure(value: float | None) -> str:
    """A ratio, if there is one."""
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few small sizes, for a look")
    parser.add_argument("--groups", nargs="+", choices=list(TITLES), default=list(TITLES), help="which tables")
    parser.add_argument("--seconds", type=float, help="measuring time of a row (default: 6; with --quick 0.5)")
    parser.add_argument("--compile-steps", type=int, default=128, help="longest GAE loop to compile (default: 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    seconds = given.seconds or (0.5 if given.quick else 6.0)
    torch.manual_seed(0)
    torch.set_num_threads(ops.get_num_threads())
    facts, costs = machine(), fixed_costs(seconds / 2)
    show_facts("machine", facts)
    show_facts("fixed costs", costs)
    warn_if_busy(facts)
    results: dict[str, list[dict[str, Any]]] = {}
    for group, make in cases(given.groups, given.quick, given.compile_steps):
        torch.compiler.reset()
        results.setdefault(group, []).append(measure(make(), seconds))
    for group, rows in results.items():
        show_group(group, rows)
    write_json(given.json, {"machine": facts, "fixed_costs": costs, **results})


if __name__ == "__main__":
    main()
