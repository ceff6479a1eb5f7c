"""PPO's losses: from a distribution's parameters, and from log-probs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from pyppo import _C, library
from pyppo.autograd import differentiable, refuse_grad, refuse_tangents
from pyppo.library import device_errors
from pyppo.results import LossGrads, LossMetrics

Family = Literal["categorical", "multi_categorical", "bernoulli", "normal"]
Objective = Literal["clip", "unclipped", "kl"]


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
