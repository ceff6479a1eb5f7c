"""What the GPU tests share: cases on the device, networks' types, and one call of each kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from cases import PLAIN, cast, coin, generator, loss_case, normal, surrogate_case
from torch import Tensor

from pyppo import ops

DEVICE = "cuda"
NETWORK_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PPO_NETWORK = ("logits", "mean", "log_std", "values", "old_logits", "old_mean", "old_log_std")
SURROGATE_NETWORK = ("logp", "entropy", "values", "kl")
# Of a gradient, relative to the largest: what is stored in half precision is rounded to it.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-11, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def compute_dtype(network_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if network_dtype == torch.float64 else torch.float32


def in_network_dtype(case: Mapping[str, Any], network_dtype: torch.dtype, network: tuple[str, ...]) -> dict[str, Any]:
    """The network's outputs in their type, everything else in that of the arithmetic."""
    computed = cast(case, compute_dtype(network_dtype))
    return computed | {k: v.to(network_dtype) for k, v in computed.items() if k in network and v is not None}


def on_device(case: Mapping[str, Any], device: str = DEVICE) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in case.items()}


class Kernel(NamedTuple):
    """One call of a kernel: what it reads, and a function that runs it and returns its results."""

    inputs: dict[str, Any]
    call: Callable[[], tuple[Tensor, ...]]


def gae_kernel(
    num_steps: int, num_envs: int, device: str = DEVICE, dtype: torch.dtype = torch.float32, *, moments: bool = False
) -> Kernel:
    g = generator(1)
    inputs = on_device(
        {
            "rewards": normal(g, num_steps, num_envs).to(dtype),
            "values": normal(g, num_steps + 1, num_envs).to(dtype),
            "terminated": coin(g, 0.02, num_steps, num_envs),
            "truncated": coin(g, 0.02, num_steps, num_envs),
            "valid": coin(g, 0.97, num_steps, num_envs),
        },
        device,
    )
    if not moments:
        return Kernel(inputs, lambda: ops.gae(**inputs))

    def call() -> tuple[Tensor, ...]:
        found = torch.full((2, 3), float("nan"), dtype=torch.float64, device=device)
        return *ops.gae(**inputs, moments=found), found

    return Kernel(inputs, call)


def loss_kernel(
    family: str, batch: int, width: int, device: str = DEVICE, dtype: torch.dtype = torch.float32, **changes: Any
) -> Kernel:
    options = {**PLAIN, "norm_adv": True, **changes}
    case = loss_case(1, family, batch, width, options, weights="bool")
    inputs = on_device(in_network_dtype(case, dtype, PPO_NETWORK), device)

    def call() -> tuple[Tensor, ...]:
        loss, metrics, grads = ops.ppo_loss_grad(**inputs)
        return loss, metrics.stats, *(x for x in grads if x is not None)

    return Kernel(inputs, call)


def surrogate_kernel(batch: int, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> Kernel:
    case = surrogate_case(1, (batch,), {**PLAIN, "norm_adv": True}, weights="float")
    inputs = on_device(in_network_dtype(case, dtype, SURROGATE_NETWORK), device)
    return Kernel(inputs, lambda: (ops.surrogate_loss(**inputs)[1].stats,))


def sample_kernel(family: str, batch: int, width: int, device: str = DEVICE) -> Kernel:
    from cases import family_parameters

    inputs = on_device(cast(family_parameters(generator(1), family, batch, width), torch.float32), device)
    return Kernel(inputs, lambda: tuple(ops.sample(**inputs, seed=3, step=5)))


def adam_kernel(size: int, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> Kernel:
    g = generator(1)
    inputs = {name: normal(g, size).to(dtype) for name in ("params", "grads", "exp_avg", "exp_avg_sq")}
    inputs["exp_avg_sq"].abs_()
    inputs["step"] = torch.tensor([3])
    inputs = on_device(inputs, device)

    def call() -> tuple[Tensor, ...]:
        state = {name: x.clone() for name, x in inputs.items()}  # it works in place
        norm = ops.adam(**state, learning_rate=1e-3, max_grad_norm=0.5, weight_decay=0.01)
        return norm, *state.values()

    return Kernel(inputs, call)


def permutation_kernel(n: int, device: str = DEVICE) -> Kernel:
    return Kernel({}, lambda: (ops.permutation(n, seed=1, iteration=2, epoch=3, device=device),))


def permutation_out_kernel(n: int, device: str = DEVICE) -> Kernel:
    def call() -> tuple[Tensor, ...]:
        out = torch.full((n,), -1, device=device)
        return (ops.permutation(n, seed=1, iteration=2, epoch=3, out=out),)

    return Kernel({}, call)


# Of a rollout: frames, what is one number a row, what has an odd number of bytes or of words.
COLUMNS = [((4, 84, 84), torch.uint8), ((17,), torch.float32), ((), torch.float32), ((), torch.int64),
           ((3,), torch.bool), ((5,), torch.bfloat16), ((1030,), torch.float64), ((0,), torch.float32)]  # fmt: skip


def gather_case(capacity: int, count: int, part: int, num_parts: int) -> dict[str, Any]:
    """Arguments on the CPU. Behind `count`, order and rows hold what must not be read."""
    g = generator(capacity + part)
    columns = [(100 * normal(g, capacity + 5, *shape)).to(dtype) for shape, dtype in COLUMNS]
    rows = torch.randperm(capacity + 5, generator=g)[:capacity]
    rows[count:] = 10**15
    order = torch.cat([torch.randperm(count, generator=g), torch.full((capacity - count,), -(10**15))])
    return {
        "columns": columns, "rows": rows, "order": order, "count": torch.tensor([count]),
        "part": torch.tensor([part]), "num_parts": num_parts,
    }  # fmt: skip


def gather_inputs(case: dict[str, Any], device: str = DEVICE) -> dict[str, Any]:
    """On the device, with outputs that hold rubbish."""
    inputs = on_device(case, device)
    inputs["columns"] = [x.to(device) for x in case["columns"]]
    slots = -(-len(case["rows"]) // case["num_parts"])
    inputs["out"] = [torch.full((slots, *x.shape[1:]), 77, device=device).to(x.dtype) for x in case["columns"]]
    inputs["weights"] = torch.full((slots,), float("nan"), device=device)
    return inputs


def gather_kernel(capacity: int, count: int, part: int, num_parts: int, device: str = DEVICE) -> Kernel:
    inputs = gather_inputs(gather_case(capacity, count, part, num_parts), device)
    columns = {f"columns[{i}]": x for i, x in enumerate(inputs["columns"])}

    def call() -> tuple[Tensor, ...]:
        ops.gather_minibatch(**inputs)
        return *(x.clone() for x in inputs["out"]), inputs["weights"].clone()

    return Kernel(columns, call)


def normalize_kernel(rows: int, features: int, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> Kernel:
    g = generator(1)
    inputs = {"x": (50 * normal(g, rows, features)).to(dtype), "mean": normal(g, features)}
    inputs["var"] = normal(g, features).square()
    inputs = on_device(inputs, device)
    return Kernel(inputs, lambda: (ops.normalize(**inputs, clip=10.0),))


# Each kernel in each of its shapes: wide and narrow, one block and many, one launch and several.
KERNELS: dict[str, Callable[[str], Kernel]] = {
    "gae, wide": lambda device: gae_kernel(130, 1000, device),
    "gae, long": lambda device: gae_kernel(9001, 2, device),
    "gae, long, float64": lambda device: gae_kernel(5003, 1, device, torch.float64),
    "loss, categorical": lambda device: loss_kernel("categorical", 40_003, 4, device),
    "loss, categorical, bfloat16": lambda device: loss_kernel("categorical", 1021, 18, device, torch.bfloat16),
    "loss, categorical, wide": lambda device: loss_kernel("categorical", 257, 1021, device),
    "loss, multi-categorical": lambda device: loss_kernel("multi_categorical", 1021, 33, device),
    "loss, bernoulli": lambda device: loss_kernel("bernoulli", 1021, 7, device),
    "loss, normal": lambda device: loss_kernel("normal", 1021, 6, device),
    "loss, normal, wide": lambda device: loss_kernel("normal", 3001, 65, device),
    "loss, normal, more sums than a block adds up": lambda device: loss_kernel("normal", 60_003, 31, device),
    "loss, normal, KL": lambda device: loss_kernel("normal", 300, 17, device, objective="kl", kl_coef=0.5),
    "surrogate loss": lambda device: surrogate_kernel(40_003, device),
    "sample, categorical": lambda device: sample_kernel("categorical", 1021, 6, device),
    "sample, categorical, wide": lambda device: sample_kernel("categorical", 67, 1021, device),
    "sample, multi-categorical": lambda device: sample_kernel("multi_categorical", 1021, 33, device),
    "sample, bernoulli": lambda device: sample_kernel("bernoulli", 1021, 9, device),
    "sample, normal": lambda device: sample_kernel("normal", 1021, 17, device),
    "adam": lambda device: adam_kernel(100_003, device),
    "adam, float64": lambda device: adam_kernel(1021, device, torch.float64),
    "permutation": lambda device: permutation_kernel(100_003, device),
    "permutation, out": lambda device: permutation_out_kernel(1021, device),
    "gae, moments": lambda device: gae_kernel(130, 1000, device, moments=True),
    "gae, long, moments": lambda device: gae_kernel(9001, 2, device, moments=True),
    "gae, one block, float64, moments": lambda device: gae_kernel(33, 7, device, torch.float64, moments=True),
    "gather_minibatch": lambda device: gather_kernel(300, 257, 2, 3, device),
    "normalize": lambda device: normalize_kernel(4099, 17, device),
    "normalize, uint8": lambda device: normalize_kernel(33, 1021, device, torch.uint8),
}
