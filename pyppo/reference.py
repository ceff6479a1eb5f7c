"""The kernels' functions in plain torch: the equations, for reading and for tests.

Same names, arguments and meaning as in `pyppo.ops`, for any float dtype, differentiable by autograd. Nothing here is
fast, and nothing is checked: `ops` refuses bad input, this file assumes good input. Metrics are a plain dict of 0-d
tensors with `LossMetrics`' keys.

Shapes: T steps, N environments, B samples, A logits a sample, D action dimensions, K categorical components.
An element that does not count (an invalid step, a row of weight 0, a forbidden action) is left out by a select, never
by a multiplication with 0, so that a NaN in it goes nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


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
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) -> advantages [T, N], returns [T, N].

        delta_t = r_t + gamma * (1 - terminated_t) * V(next_t) - V(s_t)
        A_t     = delta_t + gamma * lambda * (1 - terminated_t) * (1 - truncated_t) * A_{t+1}
        returns = A + V

    `next_t` is the final observation where step t is truncated (its value is `final_values[t]`, else `values[t + 1]`),
    otherwise the next valid step's. Invalid steps give 0 and are passed over. `values` is [T + 1, N], the rest [T, N].
    `moments` [2, 3] gets count, mean and sum of squared deviations of the valid advantages, and of the returns.
    """
    terminated, truncated = terminated.bool(), truncated.bool()
    valid = torch.ones_like(terminated) if valid is None else valid.bool()
    zero = torch.zeros_like(values[-1])
    next_value, trace = values[-1], zero
    advantages, returns = [], []
    for t in range(rewards.shape[0] - 1, -1, -1):
        final = values[t + 1] if final_values is None else final_values[t]
        bootstrap = torch.where(terminated[t], zero, torch.where(truncated[t], final, next_value))
        carried = torch.where(terminated[t] | truncated[t], zero, trace)
        advantage = rewards[t] + gamma * bootstrap - values[t] + gamma * gae_lambda * carried
        next_value = torch.where(valid[t], values[t], next_value)
        trace = torch.where(valid[t], advantage, trace)
        advantages.append(torch.where(valid[t], advantage, zero))
        returns.append(torch.where(valid[t], advantage + values[t], zero))
    result = torch.stack(advantages[::-1]), torch.stack(returns[::-1])
    if moments is not None:
        for row, x in zip(moments, (x[valid].double() for x in result), strict=True):
            mean = x.sum() / max(1, len(x))
            row.copy_(torch.stack([torch.tensor(float(len(x))), mean, (x - mean).square().sum()]))
    if out is None:
        return result
    return out[0].copy_(result[0]), out[1].copy_(result[1])


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
    distribution: str | None = None,
    nvec: Sequence[int] | None = None,
    action_mask: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    objective: str = "clip",
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
) -> tuple[Tensor, dict[str, Tensor]]:
    """The PPO loss from a distribution's parameters: `surrogate_loss` of its log-prob, entropy and KL."""
    keep = torch.ones(len(old_logp), dtype=torch.bool) if weights is None else weights != 0

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[keep]

    def spread(x: Tensor | None) -> Tensor | None:  # log_std [D] is one for all samples
        return None if x is None or mean is None else x.expand_as(mean)[keep]

    mask = rows(action_mask)
    new = make_distribution(distribution, rows(logits), rows(mean), spread(log_std), nvec, mask)
    kl = None
    if old_logits is not None or old_mean is not None:
        kl = make_distribution(distribution, rows(old_logits), rows(old_mean), spread(old_log_std), nvec, mask).kl(new)
    return surrogate_loss(
        logp=new.log_prob(actions[keep]),
        old_logp=old_logp[keep],
        advantages=advantages[keep],
        entropy=new.entropy(),
        values=rows(values),
        old_values=rows(old_values),
        returns=rows(returns),
        kl=kl,
        weights=rows(weights),
        denominator=denominator,
        objective=objective,
        clip_coef=clip_coef,
        clip_coef_high=clip_coef_high,
        dual_clip=dual_clip,
        value_clip_coef=value_clip_coef,
        kl_coef=kl_coef,
        ent_coef=ent_coef,
        vf_coef=vf_coef,
        norm_adv=norm_adv,
    )


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
    objective: str = "clip",
    clip_coef: float = 0.2,
    clip_coef_high: float | None = None,
    dual_clip: float | None = None,
    value_clip_coef: float | None = None,
    kl_coef: float = 0.0,
    ent_coef: float = 0.0,
    vf_coef: float = 0.5,
    norm_adv: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The PPO loss from given log-probs (Schulman et al. 2017, eq. 7, 8 and 9), all arguments of one shape.

    loss = sum of weight * (policy + vf_coef * value - ent_coef * entropy) / denominator
    """
    keep = torch.ones_like(logp, dtype=torch.bool) if weights is None else weights != 0
    weight = torch.ones_like(logp[keep]) if weights is None else weights[keep].to(logp.dtype)
    divisor = torch.as_tensor(weight.sum() if denominator is None else denominator, dtype=logp.dtype)
    scale = torch.where(divisor == 0, torch.zeros_like(divisor), 1.0 / divisor)

    def weighted_mean(x: Tensor | None) -> Tensor:
        return torch.zeros_like(scale) if x is None else (weight * x).sum() * scale

    low, high = 1.0 - clip_coef, 1.0 + (clip_coef if clip_coef_high is None else clip_coef_high)
    log_ratio = logp[keep] - old_logp[keep]
    ratio = log_ratio.exp()
    advantage = normalize_advantages(advantages[keep]) if norm_adv else advantages[keep]
    exact_kl = None if kl is None else kl[keep]
    policy = policy_loss(ratio, advantage, exact_kl, objective, low, high, dual_clip, kl_coef)
    value = None
    if values is not None and returns is not None:
        old_value = None if old_values is None else old_values[keep]
        value = value_loss(values[keep], returns[keep], old_value, value_clip_coef)
    parts = {
        "policy_loss": weighted_mean(policy),
        "value_loss": weighted_mean(value),
        "entropy": weighted_mean(None if entropy is None else entropy[keep]),
        "approx_kl": weighted_mean(ratio - 1.0 - log_ratio),
        "clip_fraction": weighted_mean(((ratio < low) | (ratio > high)).to(logp.dtype)),
        "kl": weighted_mean(exact_kl),
        "denominator": divisor,
    }
    loss = parts["policy_loss"] + vf_coef * parts["value_loss"] - ent_coef * parts["entropy"]
    return loss, {name: x.detach() for name, x in {"loss": loss, **parts}.items()}


def policy_loss(
    ratio: Tensor,
    advantage: Tensor,
    kl: Tensor | None,
    objective: str,
    low: float,
    high: float,
    dual_clip: float | None,
    kl_coef: float,
) -> Tensor:
    """One objective for each sample.

    clip:      -min(ratio * A, clip(ratio, low, high) * A)                      (Schulman et al. 2017, eq. 7)
               with dual_clip c, where A < 0: -max(that min, c * A)             (Ye et al. 2020, eq. 5)
    unclipped: -ratio * A                                                       (Schulman et al. 2017, eq. 6)
    kl:        -ratio * A + kl_coef * KL(old || new)                            (Schulman et al. 2017, eq. 8)
    """
    unclipped = ratio * advantage
    if objective == "unclipped":
        return -unclipped
    if objective == "kl":
        return -unclipped if kl is None else -unclipped + kl_coef * kl
    smaller = torch.minimum(unclipped, ratio.clamp(low, high) * advantage)
    if dual_clip is not None:
        smaller = torch.where(advantage < 0, torch.maximum(smaller, dual_clip * advantage), smaller)
    return -smaller


def value_loss(value: Tensor, returns: Tensor, old_value: Tensor | None, value_clip_coef: float | None) -> Tensor:
    """0.5 * (V - R)^2; with clipping the larger of that and 0.5 * (clip(V, V_old - e, V_old + e) - R)^2."""
    squared = 0.5 * (value - returns).square()
    if value_clip_coef is None or old_value is None:
        return squared
    near = torch.clamp(value, old_value - value_clip_coef, old_value + value_clip_coef)
    return torch.maximum(squared, 0.5 * (near - returns).square())


def normalize_advantages(advantages: Tensor) -> Tensor:
    """(A - mean) / (deviation with ddof 1 + 1e-8); fewer than two are left as they are."""
    if advantages.numel() < 2:
        return advantages
    return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


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
    """Adam (Kingma & Ba 2015, algorithm 1) in place on flat [P] buffers -> the norm of `grads` before clipping.

        g = grads * min(1, max_grad_norm / (norm + 1e-6))
        m = b1 * m + (1 - b1) * g                   v = b2 * v + (1 - b2) * g^2
        params = params * (1 - lr * weight_decay) - lr * m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Weight decay is decoupled (Loshchilov & Hutter 2019). Where `skip` is true nothing changes, `step` included.
    """
    with torch.no_grad():
        norm = grads.norm()
        if skip is not None and bool(skip):
            return norm
        scaled = grads if max_grad_norm is None else grads * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        t = int(step.add_(1))
        exp_avg.mul_(betas[0]).add_((1.0 - betas[0]) * scaled)
        exp_avg_sq.mul_(betas[1]).add_((1.0 - betas[1]) * scaled.square())
        direction = exp_avg / (1.0 - betas[0] ** t) / ((exp_avg_sq / (1.0 - betas[1] ** t)).sqrt() + eps)
        params.mul_(1.0 - learning_rate * weight_decay).sub_(learning_rate * direction)
        return norm


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
    """Part p of P: the rows `rows[order[count * p // P : count * (p + 1) // P]]` of each column, in `out`.

    What is left of `out` repeats the first of them, or what stands first in the order, or row 0; `weights` is 0 there.
    """
    total, p = int(count), int(part)
    chosen = rows[order[total * p // num_parts : total * (p + 1) // num_parts]]
    weights.zero_()[: len(chosen)] = 1.0
    spare = chosen[:1] if len(chosen) else rows[order[:1]] if total else torch.zeros(1, dtype=torch.int64)
    filled = torch.cat([chosen, spare.expand(len(weights) - len(chosen))])
    for column, to in zip(columns, out, strict=True):
        to.copy_(column[filled])


def normalize(
    x: Tensor, mean: Tensor, var: Tensor, *, eps: float = 1e-8, clip: float | None = None, out: Tensor | None = None
) -> Tensor:
    """(x - mean) / sqrt(var + eps) in float32, held in [-clip, clip]; x [n, ...], mean and var [...]."""
    y = (x.float() - mean.float()) * torch.rsqrt(var + eps).float()
    y = y if clip is None else y.clamp(-clip, clip)
    return y if out is None else out.copy_(y)


def expectation(log_p: Tensor, x: Tensor) -> Tensor:
    """p * x where p > 0, else 0, whatever x is there."""
    return log_p.exp() * torch.where(log_p > -math.inf, x, 0.0)


@dataclass(frozen=True)
class Categorical:
    """softmax(logits), logits [B, A]; an action that `action_mask` [B, A] forbids has the logit -inf."""

    logits: Tensor
    action_mask: Tensor | None = None

    def log_probs(self) -> Tensor:
        """log p of each action [B, A]; -inf where it cannot be drawn."""
        allowed = self.logits if self.action_mask is None else self.logits.masked_fill(~self.action_mask, -math.inf)
        return log_softmax(allowed, -1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """log softmax(logits)[action], actions [B]."""
        return self.log_probs().gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """-sum p log p."""
        log_p = self.log_probs()
        return -expectation(log_p, log_p).sum(-1)

    def kl(self, new: Categorical) -> Tensor:
        """KL(self || new) = sum p (log p - log p_new)."""
        log_p = self.log_probs()
        return expectation(log_p, log_p - new.log_probs()).sum(-1)


@dataclass(frozen=True)
class MultiCategorical:
    """K independent categoricals side by side, logits [B, sum(nvec)], actions [B, K]; everything is a sum over K."""

    logits: Tensor
    nvec: Sequence[int]
    action_mask: Tensor | None = None

    def parts(self) -> list[Categorical]:
        """The K components."""
        sizes = [int(n) for n in self.nvec]
        masks = [None] * len(sizes) if self.action_mask is None else self.action_mask.split(sizes, -1)
        return [Categorical(*pair) for pair in zip(self.logits.split(sizes, -1), masks, strict=True)]

    def log_prob(self, actions: Tensor) -> Tensor:
        """Sum over K of the components' log-probs."""
        pairs = zip(self.parts(), actions.unbind(-1), strict=True)
        return torch.stack([part.log_prob(action) for part, action in pairs]).sum(0)

    def entropy(self) -> Tensor:
        """Sum over K of the components' entropies."""
        return torch.stack([part.entropy() for part in self.parts()]).sum(0)

    def kl(self, new: MultiCategorical) -> Tensor:
        """KL(self || new), the sum over K."""
        pairs = zip(self.parts(), new.parts(), strict=True)
        return torch.stack([part.kl(new_part) for part, new_part in pairs]).sum(0)


@dataclass(frozen=True)
class Bernoulli:
    """D independent bits, P(1) = sigmoid(logit), logits, mask and actions [B, D]; a forbidden bit is surely 0."""

    logits: Tensor
    action_mask: Tensor | None = None

    def log_probs(self) -> tuple[Tensor, Tensor]:
        """log P(0), log P(1)."""
        free = self.logits > -math.inf
        if self.action_mask is not None:
            free = free & self.action_mask
        logits = torch.where(free, self.logits, 0.0)
        return torch.where(free, logsigmoid(-logits), 0.0), torch.where(free, logsigmoid(logits), -math.inf)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Sum over bits of log P(bit)."""
        zero, one = self.log_probs()
        return torch.where(actions.bool(), one, zero).sum(-1)

    def entropy(self) -> Tensor:
        """-sum over bits of P(0) log P(0) + P(1) log P(1)."""
        zero, one = self.log_probs()
        return -(expectation(zero, zero) + expectation(one, one)).sum(-1)

    def kl(self, new: Bernoulli) -> Tensor:
        """Sum over bits of KL(self || new)."""
        (zero, one), (new_zero, new_one) = self.log_probs(), new.log_probs()
        return (expectation(zero, zero - new_zero) + expectation(one, one - new_one)).sum(-1)


@dataclass(frozen=True)
class Normal:
    """D independent normals, mean [B, D], log_std [B, D] or [D], actions [B, D]."""

    mean: Tensor
    log_std: Tensor

    def log_prob(self, actions: Tensor) -> Tensor:
        """Sum over D of -0.5 ((a - mean) / std)^2 - log std - 0.5 log 2 pi."""
        z = (actions - self.mean) * (-self.log_std).exp()
        return (-0.5 * z.square() - self.log_std - HALF_LOG_TWO_PI).sum(-1)

    def entropy(self) -> Tensor:
        """Sum over D of log std + 0.5 + 0.5 log 2 pi."""
        return (self.log_std.expand_as(self.mean) + 0.5 + HALF_LOG_TWO_PI).sum(-1)

    def kl(self, new: Normal) -> Tensor:
        """KL(self || new) = sum of log(std_new / std) + (std^2 + (mean - mean_new)^2) / (2 std_new^2) - 0.5."""
        variances = (2.0 * (self.log_std - new.log_std)).exp()
        shift = (self.mean - new.mean) * (-new.log_std).exp()
        return (new.log_std - self.log_std + 0.5 * (variances + shift.square()) - 0.5).sum(-1)


def make_distribution(
    distribution: str | None = None,
    logits: Tensor | None = None,
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    nvec: Sequence[int] | None = None,
    action_mask: Tensor | None = None,
) -> Any:
    """The family by name; without one: a mean makes it normal, `nvec` multi-categorical, else categorical."""
    if mean is not None and log_std is not None:
        return Normal(mean, log_std)
    assert logits is not None
    if nvec is not None:
        return MultiCategorical(logits, nvec, action_mask)
    return (Bernoulli if distribution == "bernoulli" else Categorical)(logits, action_mask)
