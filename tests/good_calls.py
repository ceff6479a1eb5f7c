"""One good call of each kernel, on small inputs: what the tests of bad calls start from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyppo import ops


def floats(*shape: int) -> torch.Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float32).reshape(shape) / 10


def flags(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bool)


# Good calls; a bad one differs in one or two arguments.
GOOD: dict[str, Callable[[], dict[str, Any]]] = {
    "gae": lambda: {
        "rewards": floats(3, 2), "values": floats(4, 2), "terminated": flags(3, 2), "truncated": flags(3, 2),
        "valid": ~flags(3, 2), "final_values": floats(3, 2), "gamma": 0.9, "gae_lambda": 0.8,
        "out": (floats(3, 2), floats(3, 2)),
    },
    "categorical": lambda: {
        "logits": floats(4, 3), "actions": torch.tensor([0, 1, 2, 0]), "action_mask": ~flags(4, 3), **samples(),
    },
    "multi": lambda: {
        "logits": floats(4, 5), "nvec": (2, 3), "actions": torch.tensor([[0, 0], [1, 2], [0, 1], [1, 1]]), **samples(),
    },
    "bernoulli": lambda: {
        "logits": floats(4, 3), "distribution": "bernoulli", "actions": torch.ones(4, 3).long(), **samples(),
    },
    "normal": lambda: {
        "mean": floats(4, 3), "log_std": floats(3), "actions": floats(4, 3), **samples(),
    },
    "surrogate": lambda: {
        "logp": -floats(4), "entropy": floats(4), "kl": floats(4), **samples(),
    },
    "sample": lambda: {"logits": floats(4, 3), "action_mask": ~flags(4, 3), "seed": 1, "step": 2, "row_offset": 3},
    "sample_multi": lambda: {"logits": floats(4, 5), "nvec": [2, 3], "seed": 1, "step": torch.arange(4)},
    "sample_normal": lambda: {"mean": floats(4, 3), "log_std": floats(4, 3), "seed": 1},
    "adam": lambda: {
        "params": floats(6), "grads": floats(6), "exp_avg": floats(6), "exp_avg_sq": floats(6),
        "step": torch.zeros(1, dtype=torch.int64), "learning_rate": 0.1, "max_grad_norm": 0.5,
        "skip": torch.zeros(1, dtype=torch.bool),
    },
    "permutation": lambda: {"n": 5, "seed": 1, "iteration": 2, "epoch": 3},
    "gather": lambda: {
        "columns": [floats(9, 3), flags(9)], "rows": torch.arange(6) + 2, "order": torch.arange(6).flip(0),
        "count": torch.tensor([6]), "part": torch.tensor([1]), "num_parts": 2,
        "out": [floats(3, 3), flags(3)], "weights": floats(3),
    },
    "normalize": lambda: {
        "x": floats(4, 3), "mean": floats(3).double(), "var": floats(3).double(), "clip": 10.0, "eps": 1e-8,
    },
    "set_num_threads": lambda: {"n": ops.get_num_threads()},
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gae": ops.gae, "surrogate": ops.surrogate_loss, "adam": ops.adam, "permutation": ops.permutation,
    "gather": ops.gather_minibatch, "normalize": ops.normalize,
    **dict.fromkeys(("categorical", "multi", "bernoulli", "normal"), ops.ppo_loss),
    **dict.fromkeys(("sample", "sample_multi", "sample_normal"), ops.sample),
    "set_num_threads": lambda n: ops.set_num_threads(n),
}  # fmt: skip
LOSSES = ("categorical", "multi", "bernoulli", "normal")


def samples() -> dict[str, Any]:
    return {
        "old_logp": -floats(4), "advantages": floats(4), "values": floats(4), "old_values": floats(4),
        "returns": floats(4), "weights": floats(4), "denominator": 4.0, "value_clip_coef": 0.2,
    }  # fmt: skip


def expect(call: str, arguments: dict[str, Any], error: Any, names: tuple[str, ...]) -> None:
    functions = [FUNCTIONS[call]]
    if call in LOSSES:
        functions.append(ops.ppo_loss_grad)
    for function in functions:
        with pytest.raises(error) as caught:
            function(**arguments)
        message = str(caught.value)
        assert any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", message) for name in names), message
