"""The kernels registered as torch operators (``torch.ops.pyppo.*``), which is what ``torch.compile`` traces.

Eager calls do not come here: a registered operator's dispatch costs more than a small kernel. An operator's schema
knows no optional results, so what an argument was not given for is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyppo import _C

# Three int64 a CUDA device: the rows of an impossible action and of an impossible distribution, and the slot of a
# minibatch whose row does not exist, or -1.
error_flags: dict[torch.device, Tensor] = {}


def device_errors(index: int) -> Tensor:
    """Where kernels on CUDA device ``index`` note impossible rows; ``_C`` asks for it there only."""
    device = torch.device("cuda", index)
    flags = error_flags.get(device)
    if flags is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a graph capture holds the first call that notes errors on its device; run one before capturing"
            )
        with torch.inference_mode(False):  # the first call may be a policy's; `check_errors` writes to them outside
            flags = error_flags[device] = torch.full((3,), -1, dtype=torch.int64, device=device)
    return flags


def filled(to: Tensor, new: Tensor) -> Tensor:
    """While compiling: ``copy_`` would convert and broadcast what an eager call refuses."""
    if to.shape != new.shape or to.dtype != new.dtype or to.device != new.device:
        raise ValueError(f"out has {to.shape} {to.dtype} on {to.device}; it must be {new.shape} {new.dtype}")
    return to.copy_(new)


def _compute_dtype(network: Tensor) -> torch.dtype:
    return torch.float64 if network.dtype == torch.float64 else torch.float32


def _like(tensor: Tensor | None, device: torch.device) -> Tensor:
    if tensor is None:
        return torch.empty(0, device=device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _results(loss: Tensor | None, stats: Tensor, grads: Sequence[Tensor | None]) -> Any:
    """A loss kernel's results as an operator may return them: no None, and none a view of another."""
    given = [torch.empty(0, device=stats.device) if grad is None else grad for grad in grads]
    return stats[0].clone() if loss is None else loss, stats, *given


# --- gae --------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pyppo::gae", mutates_args=())
def gae(
    rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor, valid: Tensor | None,
    final_values: Tensor | None, gamma: float, gae_lambda: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``_C.gae`` with new results."""
    return _C.gae(rewards, values, terminated, truncated, valid, final_values, None, None, gamma, gae_lambda, None)


@gae.register_fake
def _(
    rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor, valid: Tensor | None,
    final_values: Tensor | None, gamma: float, gae_lambda: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like(rewards, rewards.device), _like(rewards, rewards.device)


@torch.library.custom_op("pyppo::gae_moments", mutates_args=("moments",))
def gae_moments(
    rewards: Tensor, values: Tensor, terminated: Tensor, truncated: Tensor, valid: Tensor | None,
    final_values: Tensor | None, gamma: float, gae_lambda: float, moments: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``_C.gae`` with new results, and the given moments."""
    return _C.gae(rewards, values, terminated, truncated, valid, final_values, None, None, gamma, gae_lambda, moments)


@gae_moments.register_fake
def _(rewards: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _like(rewards, rewards.device), _like(rewards, rewards.device)


# --- losses: (loss, metrics, a gradient for each input that has one) --------------------------------------------------


@torch.library.custom_op("pyppo::ppo_loss", mutates_args=())
def _ppo_loss(
    logits: Tensor | None, mean: Tensor | None, log_std: Tensor | None, values: Tensor | None,
    distribution: str | None, nvec: Sequence[int] | None, action_mask: Tensor | None, actions: Tensor,
    old_logp: Tensor, advantages: Tensor, old_values: Tensor | None, returns: Tensor | None, weights: Tensor | None,
    denominator: Tensor | None, denominator_number: float | None, old_logits: Tensor | None, old_mean: Tensor | None,
    old_log_std: Tensor | None, objective: str, clip_coef: float, clip_coef_high: float | None,
    dual_clip: float | None, value_clip_coef: float | None, kl_coef: float, ent_coef: float, vf_coef: float,
    norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, stats, grads = _C.ppo_loss_grad(
        distribution, logits, mean, log_std, nvec, action_mask, actions, old_logp, advantages, values, old_values,
        returns, weights, denominator if denominator is not None else denominator_number, old_logits, old_mean,
        old_log_std, objective, clip_coef, clip_coef_high, dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef,
        norm_adv, device_errors, True,  # autograd is the operator's business
    )  # fmt: skip
    return _results(loss, stats, grads)


@_ppo_loss.register_fake
def _(
    logits: Tensor | None, mean: Tensor | None, log_std: Tensor | None, values: Tensor | None,
    distribution: str | None, nvec: Sequence[int] | None, action_mask: Tensor | None, actions: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    network = logits if logits is not None else mean
    assert network is not None
    dtype, device = _compute_dtype(network), network.device
    loss, stats = torch.empty((), dtype=dtype, device=device), torch.empty(8, dtype=dtype, device=device)
    return loss, stats, *(_like(t, device) for t in (logits, mean, log_std, values))


@torch.library.custom_op("pyppo::surrogate_loss", mutates_args=())
def _surrogate_loss(
    logp: Tensor, entropy: Tensor | None, values: Tensor | None, kl: Tensor | None, old_logp: Tensor,
    advantages: Tensor, old_values: Tensor | None, returns: Tensor | None, weights: Tensor | None,
    denominator: Tensor | None, denominator_number: float | None, objective: str, clip_coef: float,
    clip_coef_high: float | None, dual_clip: float | None, value_clip_coef: float | None, kl_coef: float,
    ent_coef: float, vf_coef: float, norm_adv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    loss, stats, grads = _C.surrogate_loss_grad(
        logp, old_logp, advantages, entropy, values, old_values, returns, kl, weights,
        denominator if denominator is not None else denominator_number, objective, clip_coef, clip_coef_high,
        dual_clip, value_clip_coef, kl_coef, ent_coef, vf_coef, norm_adv, True,
    )  # fmt: skip
    return _results(loss, stats, grads)


@_surrogate_loss.register_fake
def _(logp: Tensor, entropy: Tensor | None, values: Tensor | None, kl: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dtype, device = _compute_dtype(logp), logp.device
    loss, stats = torch.empty((), dtype=dtype, device=device), torch.empty(8, dtype=dtype, device=device)
    return loss, stats, *(_like(t, device) for t in (logp, entropy, values, kl))


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.given = [x is not None for x in inputs[:4]]
    ctx.inputs = len(inputs)
    # Both losses' outputs: metrics and gradients are no functions to differentiate.
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    scaled = zip(ctx.saved_tensors, ctx.given, strict=True)
    grads = [g * d_loss if given and d_loss is not None else None for g, given in scaled]
    return (*grads, *[None] * (ctx.inputs - 4))


_ppo_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)
_surrogate_loss.register_autograd(_scale_gradients, setup_context=_keep_gradients)


def _split(denominator: float | Tensor | None) -> tuple[Tensor | None, float | None]:
    return (denominator, None) if isinstance(denominator, Tensor) else (None, denominator)


def ppo_loss(
    distribution: Any, logits: Any, mean: Any, log_std: Any, nvec: Any, action_mask: Any, actions: Any, old_logp: Any,
    advantages: Any, values: Any, old_values: Any, returns: Any, weights: Any, denominator: Any, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``_C.ppo_loss_grad``'s argument order; the operator has the differentiable ones first."""
    return _ppo_loss(
        logits, mean, log_std, values, distribution, None if nvec is None else list(nvec), action_mask, actions,
        old_logp, advantages, old_values, returns, weights, *_split(denominator), *rest,
    )  # fmt: skip


def surrogate_loss(
    logp: Any, old_logp: Any, advantages: Any, entropy: Any, values: Any, old_values: Any, returns: Any, kl: Any,
    weights: Any, denominator: Any, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``_C.surrogate_loss_grad``'s argument order."""
    return _surrogate_loss(
        logp, entropy, values, kl, old_logp, advantages, old_values, returns, weights, *_split(denominator), *rest
    )


def _signed(seed: int) -> int:
    """An operator's integers are signed, seeds are not."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be in [0, 2^64)")
    return seed - 2**64 if seed >= 2**63 else seed


# --- sample -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pyppo::sample", mutates_args=())
def _sample(
    logits: Tensor | None, mean: Tensor | None, log_std: Tensor | None, distribution: str | None,
    nvec: Sequence[int] | None, action_mask: Tensor | None, seed: int, step: int, steps: Tensor | None,
    row_offset: int, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _C.sample(
        distribution, logits, mean, log_std, nvec, action_mask, seed % 2**64, step if steps is None else steps,
        row_offset, deterministic, device_errors,
    )  # fmt: skip


@_sample.register_fake
def _(
    logits: Tensor | None, mean: Tensor | None, log_std: Tensor | None, distribution: str | None,
    nvec: Sequence[int] | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    network = logits if logits is not None else mean
    assert network is not None
    batch, width = network.shape
    dtype, device = _compute_dtype(network), network.device
    if mean is not None:
        actions = torch.empty((batch, width), dtype=dtype, device=device)
    elif nvec is not None:
        actions = torch.empty((batch, len(nvec)), dtype=torch.int64, device=device)
    else:
        shape = (batch, width) if distribution == "bernoulli" else (batch,)
        actions = torch.empty(shape, dtype=torch.int64, device=device)
    return actions, torch.empty(batch, dtype=dtype, device=device), torch.empty(batch, dtype=dtype, device=device)


def sample(
    distribution: Any, logits: Any, mean: Any, log_std: Any, nvec: Any, action_mask: Any, seed: int, step: Any,
    row_offset: int, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``_C.sample``'s argument order."""
    steps = step if isinstance(step, Tensor) else None
    return _sample(
        logits, mean, log_std, distribution, None if nvec is None else list(nvec), action_mask, _signed(seed),
        step if steps is None else 0, steps, row_offset, deterministic,
    )  # fmt: skip


# --- adam -------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pyppo::adam", mutates_args=("params", "exp_avg", "exp_avg_sq", "step"))
def _adam(
    params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, rate: Tensor | None,
    rate_number: float | None, beta1: float, beta2: float, eps: float, weight_decay: float,
    max_grad_norm: float | None, skip: Tensor | None,
) -> Tensor:  # fmt: skip
    learning_rate: Any = rate if rate is not None else rate_number
    return _C.adam(
        params, grads, exp_avg, exp_avg_sq, step, learning_rate, beta1, beta2, eps, weight_decay, max_grad_norm, skip
    )


@_adam.register_fake
def _(params: Tensor, *rest: Any) -> Tensor:
    return torch.empty((), dtype=params.dtype, device=params.device)


def adam(
    params: Tensor, grads: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, learning_rate: float | Tensor,
    *rest: Any,
) -> Tensor:  # fmt: skip
    """``_C.adam``'s argument order."""
    return _adam(params, grads, exp_avg, exp_avg_sq, step, *_split(learning_rate), *rest)


# --- permutation ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pyppo::permutation", mutates_args=())
def _permutation(n: int, seed: int, iteration: int, epoch: int, device: torch.device) -> Tensor:
    out = torch.empty(n, dtype=torch.int64, device=device)
    _C.permutation(out, seed % 2**64, iteration, epoch)
    return out


@_permutation.register_fake
def _(n: int, seed: int, iteration: int, epoch: int, device: torch.device) -> Tensor:
    return torch.empty(n, dtype=torch.int64, device=device)


def permutation(n: int, seed: int, iteration: int, epoch: int, device: torch.device) -> Tensor:
    """``ops.permutation``'s arguments."""
    return _permutation(n, _signed(seed), iteration, epoch, device)


# --- gather_minibatch -------------------------------------------------------------------------------------------------


@torch.library.custom_op("pyppo::gather_minibatch", mutates_args=("out", "weights"))
def _gather_minibatch(
    columns: Sequence[Tensor], rows: Tensor, order: Tensor, count: Tensor, part: Tensor, num_parts: int,
    out: Sequence[Tensor], weights: Tensor,
) -> None:  # fmt: skip
    _C.gather_minibatch(columns, rows, order, count, part, num_parts, out, weights, device_errors)


@_gather_minibatch.register_fake
def _(*_: Any) -> None:
    return None


def gather_minibatch(
    columns: Sequence[Tensor], rows: Tensor, order: Tensor, count: Tensor, part: Tensor, num_parts: int,
    out: Sequence[Tensor], weights: Tensor,
) -> None:  # fmt: skip
    """``_C.gather_minibatch``'s argument order."""
    _gather_minibatch(list(columns), rows, order, count, part, num_parts, list(out), weights)


# --- normalize --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("pyppo::normalize", mutates_args=())
def normalize(x: Tensor, mean: Tensor, var: Tensor, eps: float, clip: float | None) -> Tensor:
    """``_C.normalize`` with a new result."""
    return _C.normalize(x, mean, var, eps, clip, None)


@normalize.register_fake
def _(x: Tensor, mean: Tensor, var: Tensor, eps: float, clip: float | None) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)
