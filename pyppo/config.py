"""The settings of a run: one frozen dataclass, validated, with presets by environment.

Every field is documented by the string under it; the command line shows the same text as help.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pyppo.config_rules import RULES, checked
from pyppo.presets import preset_for

__all__ = ["Config", "preset_for"]


@dataclass(frozen=True)
class Config:
    """What to train, for how long and how.

    Values are checked and brought to their field's type on construction (a list becomes a tuple, `1e6` an int where an
    int is wanted). A value that breaks its field's rule raises `ValueError`, one of the wrong kind `TypeError`; both
    name the field, the value and the rule. The names are those of CleanRL and Schulman et al. 2017 (arXiv 1707.06347).
    """

    env_id: str
    """The environment's name, e.g. "CartPole-v1" (`pyppo envs` lists them); a label only where you bring your own
    environments."""
    total_timesteps: int = 1_000_000
    """Environment steps to train for; rows that only carry a reset do not count. Training stops at the first iteration
    with at least as many."""
    seed: int = 1
    """Seed of everything: environments, network initialisation, action noise and minibatch order (0 to 2**63 - 1)."""

    num_envs: int = 8
    """Environments stepped side by side (N)."""
    num_steps: int = 256
    """Steps that each environment takes for one rollout (T)."""
    num_groups: int | Literal["auto"] = "auto"
    """Groups that the environments are served in, each its own pool; one steps while the policy acts for another, or
    each is served by a thread of its own (`one_core`). "auto" measures at the start, but not where results depend on
    it: but for the engine "native" the number changes rounding, since a matrix product's last bits depend on the batch
    size. There it takes one; on a GPU two, where `num_envs` is even and a step takes longer than a microsecond, as all
    but classic control, toy text and MiniGrid."""
    env_threads: int | Literal["auto"] = "auto"
    """EnvPool threads a group; "auto" (or 0) measures at the start. Changes speed, never results."""
    one_core: bool | Literal["auto"] = "auto"
    """Keep each group, its environments and the policy that acts for them in turn, to one core, since waking another
    takes as long as short steps do. Where the engine "native" runs a built-in policy, groups have a core each and are
    served at once, unless there are more of them than cores; else all share one core. "auto" measures at the start.
    Changes speed, never results."""
    env_options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Further keyword arguments of the environment (JSON values), saved with the policy and used again by
    `evaluate`."""

    learning_rate: float = 3e-4
    """Adam's step size at the start."""
    anneal_lr: bool = True
    """Lower the learning rate linearly to 0 over `total_timesteps`."""
    adaptive_lr_kl: float | None = None
    """Target KL of a KL-adaptive learning rate: divided by 1.5 above twice the target, multiplied by 1.5 below half of
    it, kept in [1e-6, 1e-2]. Needs `anneal_lr` off."""
    adam_eps: float = 1e-5
    """Adam's epsilon, added to the root of the second moment."""
    max_grad_norm: float | None = 0.5
    """Largest global gradient norm; longer gradients are scaled down to it. None: no limit."""

    gamma: float = 0.99
    """Discount factor of rewards."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation (Schulman et al. 2016): 0 is one-step, 1 is Monte Carlo."""
    num_minibatches: int = 32
    """Near-equal parts that the valid rows of a rollout are split into, each one gradient step."""
    update_epochs: int = 10
    """Passes over each rollout."""
    norm_adv: Literal["minibatch", "batch", "none"] = "minibatch"
    """Where advantages are brought to mean 0 and deviation 1: each minibatch, the whole rollout, or nowhere."""

    objective: Literal["clip", "unclipped", "kl"] = "clip"
    """Policy objective: the clipped ratio (eq. 7), the plain ratio (eq. 6), or the plain ratio with a KL penalty (eq.
    8)."""
    clip_coef: float = 0.2
    """The ratio is clipped to [1 - clip_coef, 1 + clip_coef]; also the value loss's clip range where `clip_vloss` is
    on."""
    clip_coef_high: float | None = None
    """Upper clip range where it differs: [1 - clip_coef, 1 + clip_coef_high]. None: the same as `clip_coef`."""
    dual_clip: float | None = None
    """Lower bound of the objective at negative advantages, as a multiple of the advantage (Ye et al. 2020). None:
    off."""
    clip_vloss: bool = True
    """Take the larger of the plain and the clipped value loss, clipped `clip_coef` around the old value."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    vf_coef: float = 0.5
    """Weight of the value loss 0.5 * (V - R)^2. Libraries without that half (Stable-Baselines3) mean twice their figure
    here."""
    target_kl: float | None = None
    """Stop an update before a step whose minibatch has an approximate KL above 1.5 times this. None: never."""
    kl_coef: float = 1.0
    """Weight of the KL penalty of objective "kl" (beta of eq. 8), at the start where `kl_target` adapts it."""
    kl_target: float | None = None
    """Adapt `kl_coef` to this exact KL after each update: doubled above 1.5 times, halved below 1/1.5 of it. Objective
    "kl" only."""

    norm_obs: bool = False
    """Normalise float observations by their running mean and deviation."""
    clip_obs: float | None = 10.0
    """Normalised observations are clipped to plus or minus this (only with `norm_obs`). None: no limit."""
    warmup_rows: int = 2048
    """Rows of random actions that the observation statistics start from (only with `norm_obs`); they do not count as
    steps."""
    norm_reward: bool = False
    """Divide rewards by the running deviation of the discounted return."""
    clip_reward: float | None = 10.0
    """Scaled rewards are clipped to plus or minus this (only with `norm_reward`). None: no limit."""

    network: Literal["auto", "mlp", "nature_cnn", "small_cnn", "combined"] = "auto"
    """The built-in policy's network: hidden layers on flat features, convolutions for images of at least 36 x 36 or for
    small ones, or both joined. "auto" goes by the observations; the run's first line says which it is."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers, of the actor and of the critic alike; empty: linear. (Networks "mlp" and
    "combined".)"""
    shared_trunk: bool = False
    """Let actor and critic share the hidden layers, with a linear head each. (A recurrent policy always does.)"""
    activation: Literal["tanh", "relu", "elu", "silu"] = "tanh"
    """Activation of the hidden layers."""
    log_std_init: float = 0.0
    """Initial logarithm of the action's standard deviation (continuous actions)."""
    state_dependent_std: bool = False
    """Let the actor put out the standard deviation too, for each state; else one parameter serves all states."""
    image_scale: float = 255.0
    """uint8 images are divided by this; 10 suits grids of small symbols (MiniGrid)."""
    image_symbols: int | None = None
    """Images of integers are grids of symbols 0 to this less 1: each channel becomes so many one-hot planes (11 for
    MiniGrid). None: they are numbers, and `image_scale` holds."""
    recurrent: Literal["none", "gru", "lstm"] = "none"
    """Give the policy a memory: a recurrent layer after the hidden ones. Minibatches are then whole sequences of
    `num_steps`, so `num_minibatches` is at most `num_envs`; where it is not given, at most half of that."""
    recurrent_size: int = 128
    """Width of the recurrent layer."""
    action_bounds: Literal["clip", "rescale"] = "clip"
    """How continuous actions meet finite bounds: a clipped copy is sent, or [-1, 1] is clipped and stretched to the
    bounds."""

    engine: Literal["auto", "torch", "native", "cuda_graph"] = "auto"
    """Who runs the policy and the update: "native", all in C++, for the built-in policy on the CPU; "cuda_graph", as
    captured CUDA graphs on a GPU, for policies with `heads`; "torch", for every policy and device; "auto" takes native
    or cuda_graph where it can run the policy."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" runs the policy's networks under torch's bfloat16 autocast in training; parameters, loss, advantages and
    optimiser are float32, and so is all of a policy that is loaded or evaluated. Not for engine "native"."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:<index>", or "auto": where the policy's parameters are, which for the built-in policy is the
    CPU."""
    torch_threads: int = 1
    """Threads that torch may use; part of what makes a run reproducible."""

    run_dir: str | None = "runs"
    """Folder that the run's own folder is made in. None: nothing is written."""
    save_interval: int = 10
    """Iterations between checkpoints; the last iteration is always saved. 0: only the last."""

    def __post_init__(self) -> None:
        for name in RULES:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        _check_together(self)

    @classmethod
    def for_env(cls, env_id: str, **overrides: Any) -> Config:
        """The preset for `env_id` (see `preset_for`) with `overrides` in place of its values.

        With a memory, a `num_minibatches` that is not among them is brought to what fits (`fit_minibatches`).

        Raises:
            ValueError: an override names no field, or a value breaks its rule.
            TypeError: a value is of the wrong kind.
        """
        _check_names(overrides)
        config = cls(**{**preset_for(env_id), "env_id": env_id, **overrides})
        return config if "num_minibatches" in overrides else config.fit_minibatches()

    def fit_minibatches(self) -> Config:
        """With a memory, `num_minibatches` of whole sequences: at most half of `num_envs`, so that each has two.

        It is lowered to the next number that divides `num_envs`, and never raised. Without a memory nothing changes.
        """
        most = max(1, self.num_envs // 2)
        if self.recurrent == "none" or self.num_minibatches <= most:
            return self
        return self.replace(num_minibatches=next(n for n in range(most, 0, -1) if self.num_envs % n == 0))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`. Fields left out take their defaults; an unknown key raises a `ValueError`."""
        _check_names(values)
        if "env_id" not in values:
            raise ValueError("env_id is missing; it must name the environment")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value (tuples become lists)."""
        values = dataclasses.asdict(self)
        values["hidden_sizes"] = list(self.hidden_sizes)
        return values

    def replace(self, **changes: Any) -> Config:
        """A copy with `changes`, checked again."""
        _check_names(changes)
        return dataclasses.replace(self, **changes)

    @property
    def batch_size(self) -> int:
        """Rows of one rollout, `num_envs * num_steps` (reset rows included)."""
        return self.num_envs * self.num_steps

    @property
    def minibatch_size(self) -> int:
        """Rows of the largest minibatch of a rollout in which every row is valid."""
        return -(-self.batch_size // self.num_minibatches)


def _check_together(config: Config) -> None:
    """The rules that tie fields to each other."""
    if config.num_minibatches > config.batch_size:
        rule = f"at most num_envs * num_steps = {config.batch_size}"
        raise ValueError(f"num_minibatches is {config.num_minibatches}; it must be {rule}")
    if config.num_groups != "auto" and config.num_envs % config.num_groups:
        raise ValueError(f"num_groups is {config.num_groups}; it must divide num_envs = {config.num_envs}")
    if config.adaptive_lr_kl is not None and config.anneal_lr:
        raise ValueError(f"adaptive_lr_kl is {config.adaptive_lr_kl}; it must be None unless anneal_lr is False")
    if config.dual_clip is not None and config.objective != "clip":
        raise ValueError(f"dual_clip is {config.dual_clip}; it must be None unless objective is 'clip'")
    if config.kl_target is not None and config.objective != "kl":
        raise ValueError(f"kl_target is {config.kl_target}; it must be None unless objective is 'kl'")


def _check_names(values: Mapping[str, Any]) -> None:
    names = [entry.name for entry in dataclasses.fields(Config)]
    for key in values:
        if key not in names:
            if key in ("envs", "policy"):
                raise ValueError(f"{key!r} is no field of Config; pyppo.Trainer(config, {key}=...) takes your own")
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise ValueError(f"{key!r} is no field of Config{hint} Fields: {', '.join(names)}")
