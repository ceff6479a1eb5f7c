"""The kernels as functions on torch tensors: CPU and CUDA, float32 and float64.

Tensors are C-contiguous or copied; all of one call are on one device and, where floating, of one dtype (on CUDA the
network's outputs may be float16 or bfloat16; everything else is float32 then). A wrong dtype, shape, device or value
raises a ``TypeError`` or ``ValueError`` that names the argument. Under ``torch.compile`` the same functions trace to
registered operators (see ``library.py``), without a graph break.

CUDA calls do not synchronise: an action or index out of range is clamped there and noted on the device;
``check_errors`` reads the note and raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pyppo import _C, library
from pyppo._C import build_info, cpu_capability, get_num_threads, set_num_threads
from pyppo.autograd import differentiable, refuse_grad, refuse_tangents
from pyppo.library import device_errors
from pyppo.results import LossGrads, LossMetrics, Sample

__all__ = [
    "LossGrads",
    "LossMetrics",
    "MlpEngine",
    "Sample",
    "adam",
    "build_info",
    "check_errors",
    "cpu_capability",
    "gae",
    "gather_minibatch",
    "get_num_threads",
    "normalize",
    "permutation",
    "ppo_loss",
    "ppo_loss_grad",
    "sample",
    "set_num_threads",
    "surrogate_loss",
]

MlpEngine = _C.MlpEngine
"""An MLP policy's forward pass, sampling and whole update on the CPU; `pyppo.engines.native_engine` drives it."""

Family = Literal["categorical", "multi_categorical", "bernoulli", "normal"]
Objective = Literal["clip", "unclipped", "kl"]


# --- advantages -------------------------------------------------------------------------------------------------------


@overload
def gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    valid: Tensor | None = None,
    final_values: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    valid: np.ndarray | None = None,
    final_values: np.ndarray | None = None,
    out: tuple[np.ndarray, np.ndarray] | None = None,
    moments: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]: ...
def gae(
    rewards: Any,
    values: Any,
    terminated: Any,
    truncated: Any,
    *,
    gamma: float = 0.99,
    gae_lambda: float = 0.95,
    valid: Any = None,
    final_values: Any = None,
    out: Any = None,
    moments: Any = None,
) -> Any:
    """Generalized advantage estimates and lambda-returns (Schulman et al. 2016, arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma (1 - terminated_t) V(next_t) - V(s_t)
        A_t     = delta_t + gamma gae_lambda (1 - terminated_t) (1 - truncated_t) A_{t+1}

    A terminated step has no future. A truncated one has, of which the value of the episode's *final* observation tells:
    ``final_values[t]`` where given (same-step autoreset), else ``values[t + 1]`` (next-step autoreset, where the row
    after a done row holds that observation). Terminated wins where both are set. Rows that are not ``valid`` are no
    experience: outputs are 0 there, and the next valid row's value and advantage carry across them. What a cut or an
    invalid row hides does not matter, not even NaN.

    Args:
        rewards: [T, N] float32 or float64, T steps of N environments.
        values: [T + 1, N], the value of each step's observation, and in the last row that of the one after.
        terminated, truncated: [T, N] bool or uint8.
        gamma, gae_lambda: discount and trace decay, in [0, 1].
        valid: [T, N] bool or uint8; None: all rows are valid.
        final_values: [T, N], read only where truncated.
        out: (advantages, returns) to write to instead of new tensors.
        moments: float64 [2, 3] to fill: of the advantages at valid rows, and of the returns, how many there are, their
            mean (0 where there are none), and the sum of squared deviations from it. In a fixed order: the same input
            gives the same bits.

    Returns:
        advantages [T, N] and returns [T, N] = advantages + values. Torch tensors for tensors, NumPy arrays for arrays.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, dtype, device or range, or requires grad.
    """
    if not isinstance(rewards, Tensor):
        return _gae_numpy(rewards, values, terminated, truncated, gamma, gae_lambda, valid, final_values, out, moments)
    if is_compiling():
        refuse_grad(rewards=rewards, values=values, final_values=final_values)
        inputs = (rewards, values, terminated, truncated, valid, final_values, gamma, gae_lambda)
        new = library.gae(*inputs) if moments is None else library.gae_moments(*inputs, moments)
        return new if out is None else tuple(_filled(to, x) for to, x in zip(_pair(out, Tensor), new, strict=True))
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    advantages, returns = (None, None) if out is None else _pair(out, Tensor)
    new = _C.gae(
        rewards, values, terminated, truncated, valid, final_values, advantages, returns, gamma, gae_lambda, moments
    )
    if out is not None:
        torch.autograd.graph.increment_version((advantages, returns))  # a graph that saved them must notice
    if moments is not None:
        torch.autograd.graph.increment_version(moments)
    return new


def _pair(out: Any, kind: type) -> tuple[Any, Any]:
    if isinstance(out, (tuple, list)) and len(out) == 2 and isinstance(out[0], kind) and isinstance(out[1], kind):
        return out[0], out[1]
    what = [type(x).__name__ for x in out] if isinstance(out, (tuple, list)) else type(out).__name__
    raise TypeError(f"out is {what}; it must be a pair (advantages, returns) of {kind.__name__}")


def _filled(to: Tensor, new: Tensor) -> Tensor:
    """While compiling: ``copy_`` would convert and broadcast what an eager call refuses."""
    if to.shape != new.shape or to.dtype != new.dtype or to.device != new.device:
        raise ValueError(f"out has {to.shape} {to.dtype} on {to.device}; it must be {new.shape} {new.dtype}")
    return to.copy_(new)


def _gae_numpy(
    rewards: Any, values: Any, terminated: Any, truncated: Any, gamma: float, gae_lambda: float, valid: Any,
    finals: Any, out: Any, moments: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    if not isinstance(rewards, np.ndarray):
        raise TypeError(f"rewards is {type(rewards).__name__}; it must be a torch tensor or a NumPy array")
    advantages, returns = (
        (np.empty_like(rewards, order="C", subok=False) for _ in range(2)) if out is None else _pair(out, np.ndarray)
    )
    _C.gae(rewards, values, terminated, truncated, valid, finals, advantages, returns, gamma, gae_lambda, moments)
    return advantages, returns


# --- losses -----------------------------------------------------------------------------------------------------------


def ppo_loss(
    *,
    logits: Tensor | None = None,
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    actions: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    distribution: Family | None = None,
    nvec: Sequence[int] | None = None,
    action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    objective: Objective = "clip",
    clip_coef: float = 0.2,
    clip_coef_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_coef: float | None = None,
    kl_coef: float = 0.0,
    old_logits: Tensor | None = None,
    old_mean: Tensor | None = None,
    old_log_std: Tensor | None = None,
    ent_coef: float = 0.0,
    vf_coef: float = 0.5,
    norm_adv: bool = False,
) -> tuple[Tensor, LossMetrics]:
    """The PPO loss of a minibatch (Schulman et al. 2017, arXiv 1707.06347, eq. 7 to 9), with autograd.

        ratio  = exp(logp - old_logp)
        policy = -min(ratio A, clip(ratio, 1 - clip_coef, 1 + clip_coef_high) A)     objective "clip"
                 -ratio A                                                            objective "unclipped"
                 -ratio A + kl_coef KL(old || new)                                   objective "kl"
        value  = (V - R)^2 / 2, or the larger of that and (clip(V, V_old - e, V_old + e) - R)^2 / 2
        loss   = sum of weight (policy + vf_coef value - ent_coef entropy) / denominator

    Log-prob, entropy, KL, loss and gradient are one pass. Gradients flow to ``logits``, ``mean``, ``log_std`` and
    ``values``.

    Args:
        logits: [B, A], unnormalised log-probabilities; -inf is an action that cannot be taken.
        mean, log_std: [B, D], and [D] or [B, D], of a diagonal Gaussian.
        actions: categorical [B] and multi_categorical [B, K] int64 or int32; bernoulli [B, D] bool or integer; normal
            [B, D] floating.
        old_logp: [B], the actions' log-probs when they were taken.
        advantages: [B].
        values, returns: [B], both or neither: without them there is no value loss.
        old_values: [B], needed by ``value_clip_coef``.
        distribution: "categorical", "multi_categorical", "bernoulli" or "normal"; None: normal with ``mean``,
            multi_categorical with ``nvec``, else categorical.
        nvec: the number of choices of each of K actions, whose logits lie side by side: sum(nvec) = A.
        action_mask: [B, A] bool, True where an action is allowed; bernoulli: False is a bit that is surely 0.
        weights: [B], bool (which rows count) or floating. A row of weight 0 is ignored, whatever it holds.
        denominator: a number or 0-d tensor; None: the sum of weights (the loss is 0 should that be 0). Micro-batches
            and ranks pass the whole batch's, and their gradients add up to the whole batch's.
        clip_coef, clip_coef_high: the ratio's range below and above 1; None: the same.
        dual_clip: c > 1 bounds the loss of negative advantages at c A (Ye et al. 2020, arXiv 1912.09729, eq. 5).
        value_clip_coef: e of the value loss; None: not clipped.
        old_logits, old_mean, old_log_std: the distribution that drew the actions, for the exact KL.
        norm_adv: subtract the advantages' mean and divide by their standard deviation (ddof 1) + 1e-8, over the rows
            that count; fewer than two: unchanged.

    Returns:
        loss (0-d) and its ``LossMetrics``.

    Raises:
        ValueError, TypeError: an argument is missing or of the wrong shape, dtype, device or range; on the CPU also an
            action out of range, masked, or a row whose actions are all masked.
    """
    if is_compiling():
        compiled = library.ppo_loss(
            distribution, logits, mean, log_std, nvec, action_mask, actions, old_logp, advantages, values, old_values,
            returns, weights, denominator, old_logits, old_mean, old_log_std, objective, clip_coef, clip_coef_high,
            dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv,
        )  # fmt: skip
        return compiled[0], LossMetrics(compiled[1])
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    result = _C.ppo_loss_grad(
        distribution, logits, mean, log_std, nvec, action_mask, actions, old_logp, advantages, values, old_values,
        returns, weights, denominator, old_logits, old_mean, old_log_std, objective, clip_coef, clip_coef_high,
        dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv, device_errors, True,
    )  # fmt: skip
    return differentiable(result, logits, mean, log_std, values), LossMetrics(result[1])


def ppo_loss_grad(
    *,
    logits: Tensor | None = None,
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    actions: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    distribution: Family | None = None,
    nvec: Sequence[int] | None = None,
    action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    objective: Objective = "clip",
    clip_coef: float = 0.2,
    clip_coef_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_coef: float | None = None,
    kl_coef: float = 0.0,
    old_logits: Tensor | None = None,
    old_mean: Tensor | None = None,
    old_log_std: Tensor | None = None,
    ent_coef: float = 0.0,
    vf_coef: float = 0.5,
    norm_adv: bool = False,
) -> tuple[Tensor, LossMetrics, LossGrads]:
    """``ppo_loss`` with its gradients at once and without autograd: what training loops and engines call.

    Arguments as ``ppo_loss``; none may require grad. Hand the gradients on with
    ``torch.autograd.backward([logits, values], [grads.logits, grads.values])``.

    Returns:
        loss (0-d), its ``LossMetrics`` and ``LossGrads``.
    """
    if is_compiling():
        refuse_grad(logits=logits, mean=mean, log_std=log_std, values=values)
        compiled, metrics, *grads = library.ppo_loss(
            distribution, logits, mean, log_std, nvec, action_mask, actions, old_logp, advantages, values, old_values,
            returns, weights, denominator, old_logits, old_mean, old_log_std, objective, clip_coef, clip_coef_high,
            dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv,
        )  # fmt: skip
        given = (logits, mean, log_std, values)
        kept = [grad if x is not None else None for grad, x in zip(grads, given, strict=True)]
        return compiled, LossMetrics(metrics), LossGrads(*kept)
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    loss, stats, gradients = _C.ppo_loss_grad(
        distribution, logits, mean, log_std, nvec, action_mask, actions, old_logp, advantages, values, old_values,
        returns, weights, denominator, old_logits, old_mean, old_log_std, objective, clip_coef, clip_coef_high,
        dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv, device_errors, False,
    )  # fmt: skip
    if loss is None:  # on CUDA a view of the metrics: no kernel of its own
        loss = stats[0]
    return loss, LossMetrics(stats), tuple.__new__(LossGrads, gradients)  # LossGrads(...) would unpack and pack again


def surrogate_loss(
    *,
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    entropy: Tensor | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    kl: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    objective: Objective = "clip",
    clip_coef: float = 0.2,
    clip_coef_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_coef: float | None = None,
    kl_coef: float = 0.0,
    ent_coef: float = 0.0,
    vf_coef: float = 0.5,
    norm_adv: bool = False,
) -> tuple[Tensor, LossMetrics]:
    """``ppo_loss`` from given log-probs: for distributions of one's own, and for language models.

    All tensors have one shape, such as [B], or [B, T] for tokens. Gradients flow to ``logp``, ``entropy``, ``values``
    and ``kl``.

    Args:
        logp, old_logp: the actions' log-probs now and when they were taken.
        entropy: each sample's, needed by ``ent_coef``.
        kl: each sample's KL(old || new) or an estimate of it, needed by objective "kl".
        weights: bool (which tokens count) or floating; a sample of weight 0 is ignored, whatever it holds.
        denominator: None: the sum of weights.

    The rest is as in ``ppo_loss``.
    """
    if is_compiling():
        compiled = library.surrogate_loss(
            logp, old_logp, advantages, entropy, values, old_values, returns, kl, weights, denominator, objective,
            clip_coef, clip_coef_high, dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv,
        )  # fmt: skip
        return compiled[0], LossMetrics(compiled[1])
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    result = _C.surrogate_loss_grad(
        logp, old_logp, advantages, entropy, values, old_values, returns, kl, weights, denominator, objective,
        clip_coef, clip_coef_high, dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv, True,
    )  # fmt: skip
    return differentiable(result, logp, entropy, values, kl), LossMetrics(result[1])


# --- acting -----------------------------------------------------------------------------------------------------------


def sample(
    *,
    logits: Tensor | None = None,
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    distribution: Family | None = None,
    nvec: Sequence[int] | None = None,
    action_mask: Tensor | None = None,
    seed: int,
    step: int | Tensor = 0,
    row_offset: int = 0,
    deterministic: bool = False,
) -> Sample:
    """Draws an action from each row's distribution, with counted noise.

    The noise of a row is Philox4x32-10 (Salmon et al. 2011) of key ``seed`` and counter (row_offset + row, step): the
    same action whatever the batch, thread count or device.

    Args:
        logits, mean, log_std, distribution, nvec, action_mask: as in ``ppo_loss``; none may require grad.
        seed: in [0, 2^64).
        step: a number, or int64 [B], each row's own.
        row_offset: the first row's number; rows are below 2^32.
        deterministic: take the mode instead: the likeliest action, the mean.

    Returns:
        actions: int64 [B] (categorical), int64 [B, K] (multi_categorical), int64 [B, D] of 0 and 1 (bernoulli), or
        floating [B, D] (normal); their log-probs [B]; the distributions' entropies [B].

    Raises:
        ValueError, TypeError: as ``ppo_loss``; on the CPU also where a row's distribution is NaN or allows no action.
    """
    if is_compiling():
        refuse_grad(logits=logits, mean=mean, log_std=log_std)
        return Sample(
            *library.sample(
                distribution, logits, mean, log_std, nvec, action_mask, seed, step, row_offset, deterministic
            )
        )
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    drawn = _C.sample(
        distribution, logits, mean, log_std, nvec, action_mask, seed, step, row_offset, deterministic, device_errors
    )
    return tuple.__new__(Sample, drawn)


def check_errors(device: torch.device | str = "cuda") -> None:
    """Raises if a kernel on this CUDA device met an impossible action, distribution or index since the last check.

    Synchronises with the device. On the CPU the calls themselves raise, and this does nothing.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    flags = library.error_flags.get(device)
    if flags is None:
        return
    action, row, slot = flags.tolist()
    flags.fill_(-1)
    if action >= 0:
        raise ValueError(f"actions has an impossible action in row {action}; each must be in range and allowed")
    if row >= 0:
        raise ValueError(f"logits, mean or log_std allow no action in row {row}: all masked, or NaN")
    if slot >= 0:
        raise ValueError(f"rows, order, count or part was out of range for slot {slot} of a minibatch")


# --- updating ---------------------------------------------------------------------------------------------------------


def adam(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    learning_rate: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """One Adam step (Kingma and Ba 2015, arXiv 1412.6980) on a flat buffer, with global-norm clipping in the same call.

    As ``torch.nn.utils.clip_grad_norm_`` and ``torch.optim.AdamW`` (decoupled weight decay), to rounding, except that
    ``grads`` keep their unclipped values.

    Args:
        params, exp_avg, exp_avg_sq: [P] float32 or float64, updated in place.
        grads: [P].
        step: int64 [1], the number of steps applied so far; incremented.
        learning_rate: a number, or a 0-d tensor on the parameters' device.
        eps: added to the root of the second moment.
        weight_decay: the decay's rate, times the learning rate.
        max_grad_norm: gradients are scaled by min(1, max_grad_norm / (norm + 1e-6)); None: not.
        skip: bool [1]; where True, nothing changes, decided on the device.

    Returns:
        The gradients' norm before clipping, 0-d.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or range, or buffers that overlap.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas is {betas!r}; it must be a pair of numbers")
    if is_compiling():
        refuse_grad(params=params, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
        return library.adam(
            params, grads, exp_avg, exp_avg_sq, step, learning_rate, *betas, eps, weight_decay, max_grad_norm, skip
        )
    if forward_ad._current_level >= 0:
        refuse_tangents(**locals())
    norm = _C.adam(
        params, grads, exp_avg, exp_avg_sq, step, learning_rate, *betas, eps, weight_decay, max_grad_norm, skip
    )
    torch.autograd.graph.increment_version((params, exp_avg, exp_avg_sq, step))  # a graph that saved them must notice
    return norm


def permutation(
    n: int,
    *,
    seed: int,
    iteration: int = 0,
    epoch: int = 0,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
) -> Tensor:
    """A random order of 0 .. n - 1, int64 [n], counted: a function of (n, seed, iteration, epoch) on every device.

    A Feistel network keyed by Philox, with cycle walking (Black and Rogaway 2002).

    Args:
        n: how many numbers.
        seed, iteration, epoch: what the order is a function of.
        device: of the result; that of ``out`` where it is given.
        out: int64 [n] to write to instead of a new tensor.

    Raises:
        ValueError, TypeError: ``n`` is negative or not an int; ``seed`` is not in [0, 2^64), ``iteration`` or ``epoch``
            not in [0, 2^32); ``out`` has another shape or dtype.
    """
    if not isinstance(n, (int, np.integer)) or isinstance(n, bool):
        raise TypeError(f"n is {type(n).__name__}; it must be an int")
    if not 0 <= n < 1 << 48:
        raise ValueError(f"n is {n}; it must be in [0, 2^48)")
    if out is not None:
        if not isinstance(out, Tensor):
            raise TypeError(f"out is {type(out).__name__}; it must be a tensor")
        if out.shape != (n,):
            raise ValueError(f"out has shape {list(out.shape)}; it must be [n] = [{n}]")
        device = out.device
    if is_compiling():
        new = library.permutation(n, seed, iteration, epoch, torch.device(device))
        return new if out is None else _filled(out, new)
    order = torch.empty(int(n), dtype=torch.int64, device=device) if out is None else out
    _C.permutation(order, seed, iteration, epoch)
    if out is not None:
        torch.autograd.graph.increment_version(out)  # a graph that saved it must notice
    return order


# --- minibatches ------------------------------------------------------------------------------------------------------


def gather_minibatch(
    columns: Sequence[Tensor],
    rows: Tensor,
    order: Tensor,
    *,
    count: Tensor,
    part: Tensor,
    num_parts: int,
    out: Sequence[Tensor],
    weights: Tensor,
) -> None:
    """The rows of one minibatch out of many tensors, in one launch whose shape does not depend on how many there are.

    Part p of P holds the rows ``rows[order[i]]`` for i from count * p // P up to count * (p + 1) // P. It is written to
    the first slots of ``out``; the C slots suffice for any count. In a slot that is left, ``weights`` is 0 and ``out``
    repeats the part's first row (any valid row where the part is empty, row 0 where there is no valid row), so that it
    holds numbers that occur. On CUDA ``count`` and ``part`` are read on the device: a captured graph can be replayed as
    they change.

    Args:
        columns: 1 to 32 tensors [R, ...] of any dtype; R may differ, but each has the rows that are asked for.
        rows: int64 [capacity], the rows that count, of which the first ``count`` are used.
        order: int64 [capacity], of which the first ``count`` are a permutation of 0 .. count - 1.
        count: int64 [1], at most the capacity.
        part: int64 [1], p.
        num_parts: P, at least 1.
        out: one tensor [C, ...] for each column, of its dtype, with C = ceil(capacity / P).
        weights: float32 [C], 1 where a slot holds a row of the part, else 0.

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or range, or outputs that overlap anything. On CUDA a count,
            part or index out of range is clamped and noted, see ``check_errors``.
    """
    if is_compiling():
        refuse_grad(**{f"columns[{i}]": column for i, column in enumerate(columns)})
        library.gather_minibatch(columns, rows, order, count, part, num_parts, out, weights)
        return
    if forward_ad._current_level >= 0:
        refuse_tangents(**{f"columns[{i}]": column for i, column in enumerate(columns)})
    _C.gather_minibatch(columns, rows, order, count, part, num_parts, out, weights, device_errors)
    torch.autograd.graph.increment_version((*out, weights))  # a graph that saved them must notice


# --- observations -----------------------------------------------------------------------------------------------------


def normalize(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float = 1e-8,
    clip: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``(x - mean) / sqrt(var + eps)``, clipped, in float32 from whatever ``x`` is stored as.

    Mean and 1 / sqrt(var + eps) are rounded to float32 first: a product, and the same bits for a number whatever its
    batch.

    Args:
        x: [n, ...] float32, float64, bool, uint8, int8, int16, int32 or int64.
        mean, var: float64 [...], statistics of each element of a row.
        eps: added to the variance, at least 0.
        clip: the result is held in [-clip, clip]; None: not. NaN stays.
        out: float32 [n, ...] to write to instead of a new tensor.

    Returns:
        float32 [n, ...].

    Raises:
        ValueError, TypeError: a wrong shape, dtype, device or range, or an argument that requires grad.
    """
    if is_compiling():
        refuse_grad(x=x)
        new = library.normalize(x, mean, var, eps, clip)
        return new if out is None else _filled(out, new)
    if forward_ad._current_level >= 0:
        refuse_tangents(x=x)
    result = _C.normalize(x, mean, var, eps, clip, out)
    if out is not None:
        torch.autograd.graph.increment_version(out)
    return result
