"""What bench/gpu.py measures: each kernel at the sizes that matter, with the bytes that it has to move at the least."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyppo import ops


@dataclass
class Case:
    """A kernel at one size: `make(i)` gives the call of the i-th copy of its inputs."""

    kernel: str
    size: str
    bytes_moved: int
    make: Callable[[int], Callable[[], Any]]


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def gae_case(num_steps: int, num_envs: int, *, moments: bool = False) -> Case:
    def make(_: int) -> Callable[[], Any]:
        shape = (num_steps, num_envs)
        rewards, values = floats(*shape), floats(num_steps + 1, num_envs)
        terminated, truncated, valid = (torch.rand(shape, device="cuda") < p for p in (0.01, 0.01, 0.98))
        out = (torch.empty_like(rewards), torch.empty_like(rewards))
        into = torch.empty(2, 3, dtype=torch.float64, device="cuda") if moments else None
        return lambda: ops.gae(rewards, values, terminated, truncated, valid=valid, out=out, moments=into)

    said = " moments" if moments else ""
    return Case("gae", f"T={num_steps} N={num_envs}{said}", 19 * num_steps * num_envs, make)


def loss_inputs(batch: int) -> dict[str, torch.Tensor]:
    return {name: floats(batch) for name in ("advantages", "values", "returns")}


def categorical_case(batch: int, width: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    def make(_: int) -> Callable[[], Any]:
        inputs: dict[str, Any] = loss_inputs(batch)
        inputs["values"] = inputs["values"].to(dtype)
        inputs["logits"] = floats(batch, width).to(dtype)
        inputs["actions"] = torch.randint(0, width, (batch,), device="cuda")
        inputs["old_logp"] = torch.full((batch,), -math.log(width), device="cuda")
        return lambda: ops.ppo_loss_grad(**inputs, ent_coef=0.01, **options)

    said = "".join(f" {name}" for name in options) + (" bf16" if dtype == torch.bfloat16 else "")
    size = 2 * torch.finfo(dtype).bits // 8
    return Case("loss, categorical", f"B={batch} A={width}{said}", batch * (size * (width + 1) + 20), make)


def normal_case(batch: int, width: int) -> Case:
    def make(_: int) -> Callable[[], Any]:
        inputs: dict[str, Any] = {**loss_inputs(batch), "mean": floats(batch, width), "log_std": floats(width) - 1}
        inputs["actions"], inputs["old_logp"] = floats(batch, width), floats(batch) - width
        return lambda: ops.ppo_loss_grad(**inputs)

    return Case("loss, normal", f"B={batch} D={width}", batch * (12 * width + 20), make)


def surrogate_case(batch: int) -> Case:
    def make(_: int) -> Callable[[], Any]:
        inputs = {name: floats(batch) for name in ("logp", "old_logp", "advantages")}
        weights = floats(batch).abs()
        return lambda: ops.surrogate_loss(**inputs, weights=weights)

    return Case("surrogate loss", f"B={batch}", 20 * batch, make)


def sample_case(family: str, batch: int, width: int) -> Case:
    def make(i: int) -> Callable[[], Any]:
        if family == "normal":
            mean, log_std = floats(batch, width), floats(width) - 1
            return lambda: ops.sample(mean=mean, log_std=log_std, seed=i, step=1)
        logits = floats(batch, width)
        return lambda: ops.sample(logits=logits, distribution=family, seed=i, step=1)

    a_row = {"categorical": 4 * width + 16, "bernoulli": 12 * width + 8, "normal": 8 * width + 8}
    return Case(f"sample, {family}", f"B={batch} A={width}", batch * a_row[family], make)


def adam_case(size: int) -> Case:
    def make(_: int) -> Callable[[], Any]:
        params, grads, exp_avg, exp_avg_sq = floats(size), floats(size), floats(size), floats(size).square()
        step = torch.zeros(1, dtype=torch.int64, device="cuda")
        return lambda: ops.adam(params, grads, exp_avg, exp_avg_sq, step, learning_rate=1e-4, max_grad_norm=0.5)

    return Case("adam", f"P={size}", 32 * size, make)  # the gradient is read twice: its norm comes first


def permutation_case(n: int) -> Case:
    def make(i: int) -> Callable[[], Any]:
        out = torch.empty(n, dtype=torch.int64, device="cuda")
        return lambda: ops.permutation(n, seed=i, out=out)

    return Case("permutation", f"n={n}", 8 * n, make)


def gather_case(rows: int, num_parts: int, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    """One part's observations of this shape, actions and four numbers a row."""
    slots = -(-rows // num_parts)
    layouts = [(shape, dtype), ((), torch.int64), *[((), torch.float32)] * 4]
    moved = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layouts)

    def make(i: int) -> Callable[[], Any]:
        arguments: dict[str, Any] = {
            "columns": [torch.zeros(rows, *s, dtype=d, device="cuda") for s, d in layouts],
            "rows": torch.arange(rows, device="cuda"), "order": ops.permutation(rows, seed=i, device="cuda"),
            "count": torch.tensor([rows], device="cuda"), "part": torch.tensor([i % num_parts], device="cuda"),
            "num_parts": num_parts, "out": [torch.zeros(slots, *s, dtype=d, device="cuda") for s, d in layouts],
            "weights": torch.zeros(slots, device="cuda"),
        }  # fmt: skip
        return lambda: ops.gather_minibatch(**arguments)

    return Case("gather_minibatch", f"{slots} of {rows}, {moved} bytes", slots * (2 * moved + 20), make)


def normalize_case(rows: int, features: int, dtype: torch.dtype) -> Case:
    def make(_: int) -> Callable[[], Any]:
        x, mean, var = (
            (100 * floats(rows, features)).to(dtype),
            floats(features).double(),
            torch.ones(features).double().cuda(),
        )
        out = torch.empty(rows, features, device="cuda")
        return lambda: ops.normalize(x, mean, var, clip=10.0, out=out)

    return Case(
        "normalize", f"{rows} x {features} {str(dtype).split('.')[1]}", rows * features * (dtype.itemsize + 4), make
    )


def cases() -> list[Case]:
    return [
        *(gae_case(t, n) for t, n in ((128, 8), (2048, 1), (128, 4096), (1024, 4096), (4096, 8192), (1 << 20, 1))),
        *(categorical_case(b, a) for b, a in ((256, 4), (32768, 4), (262144, 18), (4096, 1024), (512, 50257))),
        categorical_case(32768, 4, norm_adv=True),
        categorical_case(262144, 18, torch.bfloat16),
        *(normal_case(b, d) for b, d in ((32768, 6), (262144, 17), (32768, 64))),
        surrogate_case(1 << 20),
        *(sample_case("categorical", b, a) for b, a in ((1024, 4), (65536, 18), (4096, 1024))),
        sample_case("bernoulli", 65536, 8),
        sample_case("normal", 65536, 6),
        *(adam_case(p) for p in (10_000, 1_000_000, 50_000_000)),
        permutation_case(131072),
        gae_case(128, 4096, moments=True),
        gather_case(131072, 32, (17,), torch.float32),
        gather_case(1024, 4, (4, 84, 84), torch.uint8),
        gather_case(131072, 32, (4, 84, 84), torch.uint8),
        normalize_case(4096, 17, torch.float64),
        normalize_case(131072, 17, torch.float32),
        normalize_case(4096, 7056, torch.uint8),
    ]


def eager_loss(batch: int, width: int) -> Callable[[], Any]:
    """The same categorical loss and gradients in eager torch."""
    inputs = loss_inputs(batch)
    logits = floats(batch, width).requires_grad_()
    values = inputs["values"].requires_grad_()
    actions = torch.randint(0, width, (batch, 1), device="cuda")
    old_logp = torch.full((batch,), -math.log(width), device="cuda")

    def call() -> Any:
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        ratio = (log_p.gather(-1, actions).squeeze(-1) - old_logp).exp()
        policy = -torch.minimum(ratio * inputs["advantages"], ratio.clamp(0.8, 1.2) * inputs["advantages"])
        value = 0.5 * (values - inputs["returns"]).square()
        return torch.autograd.grad((policy + 0.5 * value - 0.01 * entropy).mean(), (logits, values))

    return call
