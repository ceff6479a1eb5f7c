"""The extension as csrc/bindings/ has it: kernels positional only. `pyppo.ops` is the documented face."""

from collections.abc import Callable, Sequence
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
    moments: _Array | None,
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

# Fills out and weights.
def gather_minibatch(
    columns: Sequence[Tensor],
    rows: Tensor,
    order: Tensor,
    count: Tensor,
    part: Tensor,
    num_parts: int,
    out: Sequence[Tensor],
    weights: Tensor,
    errors: Callable[[int], Tensor] | None,
    /,
) -> None: ...

# Returns out, or a new tensor where it is None.
def normalize(
    x: Tensor, mean: Tensor, var: Tensor, eps: float, clip: float | None, out: Tensor | None, /
) -> Tensor: ...
def philox(key: int, c0: int, c1: int, c2: int, c3: int, /) -> tuple[int, int, int, int]: ...
def set_num_threads(count: int, /) -> None: ...
def get_num_threads() -> int: ...

# Whether kernels that the calling thread runs keep to it.
def set_alone(on: bool, /) -> None: ...
def cpu_capability() -> str: ...
def build_info() -> dict[str, Any]: ...

class MlpEngine:
    """An MLP policy bound to its parameters, its optimiser's state and a rollout, all on the CPU and contiguous.

    Keeps the tensors and reads and writes them in place: bind anew when one of them is replaced. P parameters, T steps
    of N environments, F features, A parameters of a distribution, D components of a normal one, K of a discrete one.
    Any wrong dtype, shape or range: a TypeError or ValueError that names the argument.

    Args:
        params, grads, exp_avg, exp_avg_sq: [P] float32 or float64, which is the arithmetic's dtype.
        step: int64 [1], Adam's t.
        layers: (inputs, outputs, offset of weight [outputs, inputs] in params, offset of bias) of trunk, actor, critic
            in this order; all are activated but the last of actor and of critic.
        num_trunk, num_actor, num_critic: how many of the layers each has; the trunk may have none.
        activation: "tanh", "relu", "elu" or "silu".
        log_std_offset: of log_std [D] in params (normal). None: the actor has 2 D outputs, means and then x, and
            log_std is log_std_limit * tanh(x / log_std_limit) of each row.
        log_std_limit: greater than 0; None if there is no such log_std.
        distribution: "categorical", "multi_categorical" (with nvec), "bernoulli" or "normal".
        obs: float32 [T+1, N, F].
        action_mask: bool or (u)int8 [T+1, N, A], which actions are allowed; None: all. None with a normal distribution.
        obs_mean, obs_scale: float32 [F] or both None: networks see clip((obs - mean) * scale), to plus or minus
            obs_clip where that is not None.
        actions: int64 or, normal, float32 [T, N, ...].
        logp, advantages, returns: float32 [T, N]. values: float32 [T+1, N].
        steps: int64 [N], the counters of the rows' noise; read only.
        old_params, old_log_std: float32 [T, N, A] and [T, N, D], the acting distribution; None: not kept.
        env_actions: [N, ...] of (u)int8, int16, int32, int64, float32 or float64, what the environments are sent.
        action_start: int64 [K], added to discrete actions; None: 0.
        action_low, action_high: float64 [D], bounds of what is sent, infinite where there is none (normal).
        rescale: whether [-1, 1] is mapped onto the bounds.
        noise_seed, order_seed: of the actions and of the minibatches.
    """

    def __init__(
        self,
        *,
        params: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        step: Tensor,
        layers: Sequence[tuple[int, int, int, int]],
        num_trunk: int,
        num_actor: int,
        num_critic: int,
        activation: str,
        log_std_offset: int | None,
        log_std_limit: float | None,
        distribution: str,
        nvec: Sequence[int] | None,
        obs: Tensor,
        action_mask: Tensor | None,
        obs_mean: Tensor | None,
        obs_scale: Tensor | None,
        obs_clip: float | None,
        actions: Tensor,
        logp: Tensor,
        values: Tensor,
        advantages: Tensor,
        returns: Tensor,
        steps: Tensor,
        old_params: Tensor | None,
        old_log_std: Tensor | None,
        env_actions: Tensor,
        action_start: Tensor | None,
        action_low: Tensor | None,
        action_high: Tensor | None,
        rescale: bool,
        noise_seed: int,
        order_seed: int,
    ) -> None: ...
    # Rows first to first + count of step t; a ValueError names the row [0, N) that allows no action.
    def act(self, t: int, first: int, count: int, /) -> None: ...
    # float32 [n, F], normalised like the rollout's -> float32 [n].
    def value(self, obs: Tensor, /) -> Tensor: ...
    # values[T] from obs[T].
    def bootstrap(self) -> None: ...
    # rows: int64 [n], flat indices t * N + n. Returns float64 [minibatches seen, 10]: the loss's stats [8], the
    # gradient's norm, and 1.0 if the step was taken. Ends before a step whose approximate KL is above kl_limit. A
    # ValueError names the row t * N + n whose action is impossible.
    def update(
        self,
        rows: Tensor,
        iteration: int,
        epochs: int,
        num_minibatches: int,
        *,
        objective: str,
        clip_coef: float,
        clip_coef_high: float | None,
        dual_clip: float | None,
        value_clip_coef: float | None,
        kl_coef: float,
        ent_coef: float,
        vf_coef: float,
        norm_adv: bool,
        learning_rate: float,
        eps: float,
        max_grad_norm: float | None,
        kl_limit: float | None,
    ) -> Tensor: ...
    # Mean KL(old || present) over the rows.
    def exact_kl(self, rows: Tensor, /) -> float: ...

# What a step of EnvPool costs beside the environments and the policy.
class PoolReader:
    # receive(): EnvPool's answer, a sequence of arrays. flags, observations: (column, index of its array); a column is
    # an array [T, ...] or takes `column[t] = array`. done: index of the flags bool [N] of ended episodes; where one is
    # set, finite_ends(observation, answer) is written in place of an observation.
    def __init__(
        self,
        receive: Callable[[], Sequence[np.ndarray]],
        flags: Sequence[tuple[Any, int]],
        observations: Sequence[tuple[Any, int]],
        done: int,
        finite_ends: Callable[[np.ndarray, Any], np.ndarray],
    ) -> None: ...
    # The answer to step t, once there: flags to row t, observations to row t + 1.
    def read(self, t: int, /) -> Any: ...

class PoolSender:
    # buffer: [N, ...], what send(message) sends; low, high: [D], of a row's components.
    def __init__(
        self,
        send: Callable[[Any], Any],
        message: Any,
        buffer: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
    ) -> None: ...
    # False: the actions have another shape or dtype or are out of bounds, and nothing was sent. one_core: let the
    # pool's thread run first.
    def send(self, actions: np.ndarray, one_core: bool, /) -> bool: ...
