"""What TRPO, A2C and the vanilla policy gradient share: pyppo's trainer around an update of their own.

Rollouts, normalisation, advantages (GAE), networks and reports are those of `pyppo.Trainer`, acting and valuing those
of its `TorchEngine`. What differs is the update alone, which each algorithm writes in plain torch. `EngineTrainer`, the
trainer around another engine, also serves the measurements of epochs.py and clipping.py (`_experiments.py`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from _command import add_length, count
from table1_settings import SETTINGS, WRITTEN_OUT_LATER
from torch import Tensor, nn

from pyppo import Config, Trainer, ops
from pyppo.actions import Distribution, stream_seed
from pyppo.engines import Schedule, valid_indices
from pyppo.engines.objective import STATS
from pyppo.engines.torch_engine import TorchEngine
from pyppo.envpool_envs import env_spaces
from pyppo.policy import Minibatch
from pyppo.reference import make_distribution
from pyppo.rollout import Rollout

# What PPO's runs have too: the 2017 paper's continuous control (section 6.1 and table 3), and CleanRL's normalisation.
_OF_PPO = (
    "num_envs", "gamma", "norm_obs", "clip_obs", "norm_reward", "clip_reward", "action_bounds", "shared_trunk",
    "state_dependent_std", "hidden_sizes", "activation", "log_std_init", "ent_coef", *WRITTEN_OUT_LATER,
)  # fmt: skip
COMMON: dict[str, Any] = {
    **{name: SETTINGS["X"][name] for name in _OF_PPO}, "engine": "torch", "device": "cpu", "run_dir": None
}  # fmt: skip

MakeEngine = Callable[[nn.Module, Config, torch.device, Distribution], Any]
Engine = Callable[..., Any]
"""The same with `settings`, an algorithm's own."""
History = dict[str, list[float]]


class EngineTrainer(Trainer):
    """The trainer with an engine of one's own in the place of the one that `config.engine` names.

    Args:
        config, envs, **more: as for `pyppo.Trainer`.
        make_engine: makes it, from what the engine in its place was made from.

    Raises:
        TypeError: it is not of the other's kind, for which groups and storage were chosen.
    """

    def __init__(self, config: Config, envs: Any = None, *, make_engine: MakeEngine, **more: Any) -> None:
        super().__init__(config, envs, **more)
        named: Any = self.engine
        self.engine = make_engine(self.policy, self.config, named.device, named.distribution)
        if not isinstance(self.engine, type(named)):
            self.close()
            kinds = f"a {type(self.engine).__name__}; it must be a {type(named).__name__}"
            raise TypeError(f"make_engine gave {kinds}, since config.engine is {config.engine!r}")
        self.collector.final_value = self.engine.value


def train(engine: Engine, settings: Any, config: Config, envs: Any = None, *, quiet: bool = True) -> History:
    """Train.

    Args:
        engine: made from policy, config, device, distribution and `settings`. settings: the algorithm's own.
        envs: environments of your own, as for `pyppo.Trainer`; None: EnvPool's. quiet: show no progress.

    Returns:
        The history, as of `pyppo.train`: step, episode_return, time_update and so on, an entry an iteration.
    """
    make = partial(engine, settings=settings)
    with EngineTrainer(config, envs, make_engine=make, quiet=quiet) as trainer:
        return trainer.train().history


def run_program(doc: str | None, engine: Engine, settings: Any, fields: Mapping[str, Any]) -> None:
    """The command line of a program: one run, with progress shown."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("env", metavar="ENV", help="an environment of EnvPool, without action masks")
    parser.add_argument("--seed", type=count, default=1, help="default: 1")
    add_length(parser)
    given = parser.parse_args()
    try:
        config = Config(env_id=given.env, seed=given.seed, total_timesteps=given.steps, **fields)
        env_spaces(config.env_id)
    except ValueError as error:
        parser.error(str(error))
    history = train(engine, settings, config, quiet=False)
    print(f"{given.env}: return {history['episode_return'][-1]:.1f}, the mean of the last 100 episodes")


class PolicyGradientEngine(TorchEngine):
    """Acts as `TorchEngine` does; a subclass writes `improve`, the update from one rollout's rows.

    Args:
        policy: an actor and a critic that share nothing, without action masks. config, device, distribution: as for
            `TorchEngine`.

    Attributes:
        actor_parameters, critic_parameters: the parameters of each.

    Raises:
        ValueError: actor and critic share layers, or there is an action mask.
    """

    def __init__(self, policy: nn.Module, config: Config, device: torch.device, distribution: Distribution) -> None:
        super().__init__(policy, config, device, distribution)
        critic = list(self.policy.critic.parameters())
        actor = list(self.policy.actor.parameters())
        if hasattr(policy, "log_std"):
            actor.append(self.policy.log_std)
        if len(actor) + len(critic) != len(list(policy.parameters())):
            raise ValueError("shared_trunk or network makes actor and critic share layers; they must share nothing")
        if self.policy.masked:
            raise ValueError("the environment has action masks; these programs do not know them")
        self.actor_parameters, self.critic_parameters = actor, critic

    def improve(self, data: Minibatch, schedule: Schedule, iteration: int) -> dict[str, float]:
        """Update policy and critic from the valid rows of a rollout; at least `loss` and `updates` of the metrics."""
        raise NotImplementedError

    def update(self, rollout: Rollout, schedule: Schedule, iteration: int) -> dict[str, float]:
        """One update; what the algorithm does not measure is NaN."""
        rows = valid_indices(rollout.valid)
        metrics = {**dict.fromkeys((*STATS, "grad_norm"), math.nan), "updates": 0.0}
        if len(rows):
            metrics |= self.improve(self._flatten(rollout).select(rows).data, schedule, iteration)
        return metrics

    def policy_at(self, obs: Any) -> Any:
        """The action distribution at prepared observations: `log_prob`, `entropy` and `kl`, each [B]."""
        return self.distribution_of(self.policy.heads(obs)[0])

    def distribution_of(self, params: Mapping[str, Tensor]) -> Any:
        """The same of the heads' parameters."""
        return make_distribution(**self.distribution.loss_arguments, **params)

    @torch.no_grad()
    def snapshot(self, obs: Any) -> Any:
        """The same, as it is now, whatever becomes of the parameters."""
        params, _ = self.policy.heads(obs)
        return self.distribution_of({name: x.clone() for name, x in params.items()})  # log_std is the parameter itself

    @torch.no_grad()
    def compare(self, old: Any, data: Minibatch) -> dict[str, float]:
        """The policy as it is now against the one that collected `data`: exact and approximate KL, entropy."""
        new = self.policy_at(data.obs)
        log_ratio = new.log_prob(data.actions) - data.logp
        approx_kl = (log_ratio.exp() - 1.0 - log_ratio).mean()
        return {"kl": float(old.kl(new).mean()), "approx_kl": float(approx_kl), "entropy": float(new.entropy().mean())}


class CriticFit:
    """Fits an engine's critic to returns: squared error, Adam, some passes in shuffled minibatches.

    What OpenAI Baselines' TRPO does (trpo_mpi: `vf_iters` passes, minibatches of 64, Adam at `vf_stepsize`).
    """

    def __init__(self, engine: PolicyGradientEngine, epochs: int, minibatch_size: int, learning_rate: float) -> None:
        self.engine, self.epochs, self.minibatch_size = engine, epochs, minibatch_size
        self.optimizer = torch.optim.Adam(engine.critic_parameters, lr=learning_rate, eps=1e-5, fused=True)
        self._order_seed = stream_seed(engine.config.seed, "critic minibatches")

    def __call__(self, data: Minibatch, iteration: int) -> float:
        """Fit; the mean loss 0.5 (V - R)^2 over all minibatches, each before its step."""
        losses = [self._step(data, rows) for rows in self._minibatches(len(data.logp), iteration)]
        return float(torch.stack(losses).mean())

    def _minibatches(self, count: int, iteration: int) -> Iterator[Tensor]:
        bounds = [*range(0, count, self.minibatch_size), count]
        for epoch in range(self.epochs):
            order = ops.permutation(count, seed=self._order_seed, iteration=iteration, epoch=epoch)
            yield from (order[start:stop] for start, stop in pairwise(bounds))

    def _step(self, data: Minibatch, rows: Tensor) -> Tensor:
        self.engine.flat.grad.zero_()
        values = self.engine.policy.value(data.obs[rows])
        loss = 0.5 * (values - data.returns[rows]).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


# --- a list of parameters as one vector ---------------------------------------------------------------------------


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors, one after the other, as one vector [P]."""
    return torch.cat([x.reshape(-1) for x in tensors])


@torch.no_grad()
def assign(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """Write a vector [P] into parameters: the inverse of `flatten`, in place."""
    parts = vector.split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.copy_(part.view_as(p))
