"""The compiled kernels as csrc/bindings.cpp has them: positional only. `pyppo.ops` is the documented face."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

_Array: TypeAlias = Tensor | np.ndarray[Any, np.dtype[Any]]

# Returns (advantages, returns): the given ones, or new tensors where they are None.
def gae(
    rewards: _Array,
    values: _Array,
    terminated: _Array,
    truncated: _Array,
    valid: _Array | None,
    final_values: _Array | None,
    advantages: _Array | None,
    returns: _Array | None,
    gamma: float,
    gae_lambda: float,
    /,
) -> tuple[Any, Any]: ...

# Returns (loss, stats [8], (d_logits, d_mean, d_log_std, d_values)); loss is None on CUDA, where it is stats[0].
def ppo_loss_grad(
    distribution: str | None,
    logits: Tensor | None,
    mean: Tensor | None,
    log_std: Tensor | None,
    nvec: Any,
    action_mask: Tensor | None,
    actions: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    weights: Tensor | None,
    denominator: float | Tensor | None,
    old_logits: Tensor | None,
    old_mean: Tensor | None,
    old_log_std: Tensor | None,
    objective: str,
    clip_coef: float | None,
    clip_coef_high: float | None,
    dual_clip: float | None,
    value_clip_coef: float | None,
    kl_coef: float,
    ent_coef: float,
    vf_coef: float,
    norm_adv: bool,
    errors: Callable[[int], Tensor] | None,
    attached: bool,
    /,
) -> tuple[Tensor | None, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]]: ...

# Returns (loss, stats [8], (d_logp, d_entropy, d_values, d_kl)); loss is None on CUDA, where it is stats[0].
def surrogate_loss_grad(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    entropy: Tensor | None,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    kl: Tensor | None,
    weights: Tensor | None,
    denominator: float | Tensor | None,
    objective: str,
    clip_coef: float | None,
    clip_coef_high: float | None,
    dual_clip: float | None,
    value_clip_coef: float | None,
    kl_coef: float,
    ent_coef: float,
    vf_coef: float,
    norm_adv: bool,
    attached: bool,
    /,
) -> tuple[Tensor | None, Tensor, tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]]: ...

# Whether a floating scalar is exactly 1; False where that is not to be read without a wait.
def is_one(scalar: Tensor, /) -> bool: ...

# Returns (actions, logp, entropy).
def sample(
    distribution: str | None,
    logits: Tensor | None,
    mean: Tensor | None,
    log_std: Tensor | None,
    nvec: Any,
    action_mask: Tensor | None,
    seed: int,
    step: int | Tensor,
    row_offset: int,
    deterministic: bool,
    errors: Callable[[int], Tensor] | None,
    /,
) -> tuple[Tensor, Tensor, Tensor]: ...

# In place; returns the gradient's norm before clipping.
def adam(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    learning_rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    max_grad_norm: float | None,
    skip: Tensor | None,
    /,
) -> Tensor: ...
def permutation(out: Tensor, seed: int, iteration: int, epoch: int, /) -> None: ...
def philox(key: int, c0: int, c1: int, c2: int, c3: int, /) -> tuple[int, int, int, int]: ...
def set_num_threads(count: int, /) -> None: ...
def get_num_threads() -> int: ...
def cpu_capability() -> str: ...
def build_info() -> dict[str, Any]: ...
