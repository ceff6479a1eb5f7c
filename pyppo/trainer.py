"""The training loop: collect, estimate, update, report, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pyppo import checkpoint as checkpoints
from pyppo import report
from pyppo.actions import Distribution, stream_seed
from pyppo.config import Config
from pyppo.cores import Cores
from pyppo.engines import Schedule, describe, make_engine
from pyppo.engines.policy_check import check_policy
from pyppo.engines.torch_engine import TorchEngine
from pyppo.envpool_envs import env_spaces
from pyppo.estimate import estimate
from pyppo.finite import NotFiniteError, find_bad_parameter, find_cause, not_finite
from pyppo.normalize import ObservationNormalizer, RewardScaler
from pyppo.own_envs import Envs, as_groups
from pyppo.parts import check_kinds, settle_policy, torch_settings
from pyppo.policy import BUILT_IN, describe_policy
from pyppo.rollout import Collector
from pyppo.schedules import Schedules
from pyppo.stepping import Stepping, choose, make_groups
from pyppo.storage import Rollout
from pyppo.trained import Result
from pyppo.warmup import random_rows


def train(
    env_id: str, *, quiet: bool = False, callbacks: Sequence[Callable[[report.Row], None]] = (), **fields: Any
) -> Result:
    """Train on an EnvPool environment with its preset.

    Args:
        env_id: the environment, as `pyppo envs` lists them.
        quiet: say nothing but what needs attention.
        callbacks: called with each iteration's row of the history.
        **fields: any field of `Config`.

    Raises:
        ValueError, TypeError: no such environment, or a field breaks its rule.
        FloatingPointError: loss or parameters stopped being finite.
    """
    with Trainer(Config.for_env(env_id, **fields), quiet=quiet, callbacks=callbacks) as trainer:
        return trainer.train()


class Trainer:
    """Collects rollouts and updates the policy until `config.total_timesteps` valid steps are done.

    Observation statistics start from `config.warmup_rows` rows of random actions in the training environments, which
    are reset after that. A policy without `heads` draws from torch's global generator, which is seeded here for it.

    Args:
        config: the settings. `num_envs` is taken from `envs` where those are given.
        envs: your own environments: a `gymnasium.vector.VectorEnv` (or `EnvGroup`) or several, each a group; or a list
            of `gymnasium.make` names or of functions that make one environment each. None: EnvPool's.
        policy: your own module (see `pyppo.policy.Policy`); None: the built-in one that the settings describe.
        quiet: say nothing but what needs attention.
        callbacks: called with each iteration's row of the history; a list to add to later.
        resume_from: a loaded checkpoint to go on from; `Trainer.resume` is the short way.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the policy does not give what it must (`check_policy`).

    Attributes:
        stepping: how EnvPool's environments are stepped, and what the trial measured; None for your own.
    """

    def __init__(
        self,
        config: Config,
        envs: Envs | None = None,
        policy: nn.Module | None = None,
        *,
        quiet: bool = False,
        callbacks: Sequence[Callable[[report.Row], None]] = (),
        resume_from: checkpoints.Checkpoint | None = None,
    ) -> None:
        self.callbacks, self._quiet = list(callbacks) if isinstance(callbacks, Iterable) else callbacks, quiet
        check_kinds(config, policy, self.callbacks)
        self._own_envs = envs is not None
        self.groups = [] if envs is None else as_groups(envs)
        try:
            with torch_settings(config.torch_threads):
                self._assemble(config, policy, resume_from)
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                self.close()
            raise

    def _assemble(self, config: Config, policy: nn.Module | None, resume_from: checkpoints.Checkpoint | None) -> None:
        """Make or check all the parts; what `__init__` was given is known to be of the right kinds."""
        if self._own_envs:
            obs_space, action_space = self.groups[0].obs_space, self.groups[0].action_space
            config = config.replace(num_envs=sum(group.num_envs for group in self.groups), num_groups=1)
            if config.num_minibatches > config.num_envs:
                config = config.fit_minibatches()
        else:
            obs_space, action_space = env_spaces(config.env_id, config.env_options)
        if resume_from is not None:
            checkpoints.check_resume(resume_from, config, own_envs=self._own_envs)
        self.config = config
        self.rebuild = 0 if resume_from is None else int(resume_from.state["rebuild"]) + 1
        distribution = Distribution.from_space(action_space, config.action_bounds)
        own_policy = policy is not None
        self._spaces = checkpoints.described_spaces(obs_space, distribution)
        if resume_from is not None:
            checkpoints.check_spaces(resume_from, obs_space, distribution)
            policy = checkpoints.restore_policy(resume_from, policy)
        self.policy: Any = settle_policy(config, obs_space, distribution, policy, own_envs=self._own_envs)
        normalizer = getattr(self.policy, "normalizer", None)
        self._normalizer = normalizer if isinstance(normalizer, ObservationNormalizer) else None
        if config.norm_obs and self._normalizer is None:
            raise ValueError(
                f"norm_obs is True; it must be False, or the policy, a {type(self.policy).__name__}, must have a "
                "normalizer: an attribute of that name, a pyppo.normalize.ObservationNormalizer, that it applies itself"
            )
        if not hasattr(self.policy, "heads"):
            torch.manual_seed(stream_seed(config.seed, f"policy/{self.rebuild}"))
        self.engine = make_engine(config, self.policy, distribution)
        if own_policy:
            saved = config.run_dir is not None or resume_from is not None
            check_policy(self.policy, obs_space, distribution, self.engine.device, saved=saved)
        self.stepping: Stepping | None = None
        cores: Cores | None = None
        self._at_once = False  # whether groups are served at the same time
        if not self._own_envs:
            self.stepping = self._choose_stepping(own_policy)
            way = self.stepping.way
            self.groups = make_groups(config, way, rebuild=self.rebuild)
            cores, self._at_once = way.cores(self.groups), way.at_once
        self.rollout = Rollout(
            config.num_steps,
            config.num_envs,
            obs_space,
            action_space,
            device=self.engine.device,
            store_dist=self.engine.dist_shapes,
            state_shape=self.engine.state_shape,
            same_step=self.groups[0].autoreset == "same_step",
        )
        self.reward_scaler = RewardScaler(config.num_envs, config.gamma, config.clip_reward)
        scale = self.reward_scaler.scale if config.norm_reward else None
        self.collector = Collector(self.groups, self.rollout, self._act, self.engine.value, scale=scale, cores=cores)
        self.iteration, self.schedules = 0, Schedules(config)
        self.steps = 0  # valid steps of finished iterations
        self.history, self.clock = report.History(), report.Clock()
        self.run_dir: Path | None = None
        self._metrics: report.MetricsFile | None = None
        self._saved: tuple[int, Path] | None = None  # the last checkpoint and the iteration it is of
        self._partial_update = False
        if resume_from is not None:
            self._restore(resume_from)
        elif config.run_dir is not None:
            self.run_dir = checkpoints.new_run_dir(config.run_dir, config)
        self._reporter: report.Reporter | None = None
        self._warm = resume_from is not None
        self._resets = 0

    def _choose_stepping(self, own_policy: bool) -> Stepping:
        """How EnvPool's environments are stepped."""
        ours = not own_policy and self.engine.device.type == "cpu"
        # Where the engine is torch, the number of groups changes the last bits, so it is not chosen by speed.
        allow_groups = ours and not isinstance(self.engine, TorchEngine)
        act = self.engine.act if ours else None  # another policy's may count its calls, or draw random numbers
        return choose(
            self.config,
            act,
            allow_groups=allow_groups,
            on_gpu=self.engine.device.type != "cpu",
            store_dist=self.engine.dist_shapes,
            state_shape=self.engine.state_shape,
        )

    @classmethod
    def resume(
        cls,
        run: str | Path,
        envs: Envs | None = None,
        policy: nn.Module | None = None,
        *,
        quiet: bool = False,
        callbacks: Sequence[Callable[[report.Row], None]] = (),
        **changes: Any,
    ) -> Trainer:
        """A trainer that goes on from a run's latest checkpoint, or from a given checkpoint, in the same run folder.

        Environments are made anew with seeds of their own, since EnvPool can save none: unfinished episodes are lost.
        The folder stays as it is until the first iteration is done; then what is newer than the checkpoint is deleted.

        Args:
            run: the folder. envs, policy, quiet, callbacks: as for `Trainer`; needed again if they were given then.
            **changes: fields of `Config` to change, `total_timesteps` to train for longer.

        Raises:
            FileNotFoundError, ValueError: there is no usable run, it is complete, or a change does not fit what it
                holds (environment, number of environments, policy, observation statistics).
        """
        checkpoint = checkpoints.load_checkpoint(run)
        config = checkpoints.read_config(checkpoint.run).replace(**changes)
        return cls(config, envs, policy, quiet=quiet, callbacks=callbacks, resume_from=checkpoint)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def train(self) -> Result:
        """Iterate until `total_timesteps` valid steps are done; save; Ctrl-C ends it early and saves too.

        Called again after that, it goes on: in new episodes where Ctrl-C came while the environments stepped. An error
        or `SystemExit` saves too, and says where, unless it is that numbers are no longer finite.
        """
        self._reporter = report.make_reporter(self.config.total_timesteps, quiet=self._quiet)
        if not self._quiet:
            self._reporter.message(f"{describe(self.engine)}; policy: {describe_policy(self.policy)}")
        interrupted = False
        try:
            while self.steps < self.config.total_timesteps:
                self.step()
            self._save_once()
        except KeyboardInterrupt:
            interrupted = True
            saved = self._save_once()
            self._reporter.message(f"interrupted at step {self.steps:,}: {self._how_to_go_on(saved)}")
        except NotFiniteError:
            raise  # what would be saved is what went wrong
        except (Exception, SystemExit) as error:  # what a handler of SIGTERM raises too
            error.add_note(f"training stopped at step {self.steps:,}: {self._how_to_go_on(self._try_to_save())}")
            raise
        finally:
            self._reporter.close()
            self._reporter = None
        return Result(self.policy, self.history, self.config, self.run_dir, interrupted)

    def _how_to_go_on(self, saved: Path | None) -> str:
        """Where training was saved, and what takes it from there."""
        if saved is None:
            return "nothing was saved"
        own = {"envs": self._own_envs, "policy": type(self.policy) not in BUILT_IN.values()}
        given = "".join(f", {name}=..." for name, is_own in own.items() if is_own)
        call = f'pyppo.Trainer.resume("{self.run_dir}"{given})' if given else f"pyppo resume {self.run_dir}"
        return f"saved {saved}; go on with `{call}`"

    def _try_to_save(self) -> Path | None:
        """Save after an error, which matters more than one of saving."""
        try:
            return self._save_once()
        except Exception:
            return None

    def step(self) -> dict[str, float]:
        """One iteration. Returns its row of the history."""
        with torch_settings(self.config.torch_threads):
            self._start()
            schedule = self.schedules.at(self.steps)
            with self.clock.phase("env"), self._told_why():
                self.collector.collect()
            with self.clock.phase("gae"):
                self.engine.bootstrap(self.rollout)
                explained_variance = estimate(self.rollout, self.config)
            with self.clock.phase("update"):
                self._partial_update = True
                with self._told_why():
                    metrics = self.engine.update(self.rollout, schedule, self.iteration)
            self._check_finite(metrics)
            self._open_run()
            self.iteration += 1
            self._learn_statistics()
            self.schedules.adapt(metrics["kl"])
            row = self._record({**metrics, "explained_variance": float(explained_variance)}, schedule)
        if self.config.save_interval and self.iteration % self.config.save_interval == 0:
            self.save()
        return row

    def _start(self) -> None:
        """Before the first iteration, or the first after one that broke off or after somebody else reset the
        environments: warm up once, begin the episodes."""
        if self.collector.ready:
            return
        config, normalizer = self.config, self._normalizer
        if normalizer is not None and not self._warm and config.warmup_rows:
            rows = random_rows(self.groups, config.warmup_rows, stream_seed(config.seed, "warmup"))
            normalizer.update({key: torch.as_tensor(x, device=self.engine.device) for key, x in rows.items()})
        self._warm = True
        self.reward_scaler.reset()
        again = f"/{self._resets}" if self._resets else ""  # not the same episodes once more
        self.collector.reset(stream_seed(config.seed, f"environments/{self.rebuild}{again}"))
        self._resets += 1
        self.clock.start()

    def _open_run(self) -> None:
        """Begin to write the run's metrics; a resumed run, which has something of its own to save now, first drops what
        is newer than its checkpoint."""
        if self.run_dir is None or self._metrics is not None:
            return
        metrics = self.run_dir / "metrics.jsonl"
        if self.rebuild:
            report.rewrite_metrics(metrics, self.history)
            checkpoints.discard_after(self.run_dir, self.steps)
            checkpoints.write_config(self.run_dir, self.config)
        self._metrics = report.MetricsFile(metrics)

    def _act(self, rollout: Rollout, t: int, rows: slice) -> np.ndarray:
        start = time.perf_counter()
        actions = self.engine.act(rollout, t, rows)
        if rows.start == 0 or not self._at_once:
            self.clock.add("act", time.perf_counter() - start)  # at once, the clock is the caller's, who serves group 0
        return actions

    @contextmanager
    def _told_why(self) -> Iterator[None]:
        """Where the sampler or the loss refuses NaN, or the collector infinity: say where it came from."""
        try:
            yield
        except ValueError as error:
            if (cause := find_cause(self.policy, self.rollout.obs)) is not None:
                raise self._not_finite(cause) from error
            raise

    def _check_finite(self, metrics: Mapping[str, float]) -> None:
        """Stop before anything that is not a number reaches a checkpoint."""
        if (bad := find_bad_parameter(self.policy)) is not None:
            raise self._not_finite(f"{bad} is not")
        if metrics["updates"] > 0 and not math.isfinite(metrics["loss"]):
            raise self._not_finite(f"the loss is {metrics['loss']}")

    def _not_finite(self, what: str) -> NotFiniteError:
        return not_finite(what, f"iteration {self.iteration + 1} (step {self.steps:,})", self.config.learning_rate)

    def _learn_statistics(self) -> None:
        """Take the rollout's valid observations into the statistics, which were fixed until here."""
        if self._normalizer is not None:
            length = self.config.num_steps
            obs = {key: x[:length].flatten(0, 1) for key, x in self.rollout.obs.items()}
            if self.rollout.num_valid < length * self.config.num_envs:
                rows = self.rollout.valid_rows()
                obs = {key: x[rows] for key, x in obs.items()}
            self._normalizer.update(obs)

    # --- report and save ---------------------------------------------------------------------------------------------

    def _record(self, metrics: Mapping[str, float], schedule: Schedule) -> dict[str, float]:
        """Add the iteration to the history and tell everyone who listens.

        The step counts once the row is in the file: an interrupt before that leaves rows that are too new, which
        resuming drops, and none that is missing.
        """
        seconds, steps = self.clock.lap(), self.collector.valid_steps
        speed = (steps - self.steps) / sum(seconds.values())
        counters = {"step": steps, "iteration": self.iteration, "time": self.clock.total, "sps": speed}
        schedules = {"learning_rate": schedule.learning_rate, "kl_coef": schedule.kl_coef}
        times = {f"time_{name}": value for name, value in seconds.items()}
        finished = [(episode.episode_return, episode.length) for episode in self.collector.episodes]
        self.collector.episodes.clear()
        row = self.history.add(counters, finished, {**metrics, **schedules, **times})
        if self._metrics is not None:
            self._metrics(row)
        self.steps, self._partial_update = steps, False
        if self._reporter is not None:
            self._reporter.update(row)
        for callback in self.callbacks:
            callback(row)
        return row

    def save(self) -> Path | None:
        """Write a checkpoint of the last finished iteration; None if there is nothing to save or nowhere to.

        After Ctrl-C in the middle of an update the weights are some gradient steps ahead of the counters;
        `partial_update` in `state.json` says so.
        """
        if self.run_dir is None or self.steps == 0 or find_bad_parameter(self.policy) is not None:
            return None
        self._open_run()
        tensors = {
            **{f"engine.{name}": x for name, x in self.engine.state_dict().items()},
            **{f"reward_scaler.{name}": x for name, x in self.reward_scaler.state_dict().items()},
            "rollout.steps": self.rollout.steps,
        }
        state = {
            "step": self.steps, "iteration": self.iteration, "rebuild": self.rebuild, "time": self.clock.total,
            "own_envs": self._own_envs, **self._spaces, **self.schedules.state_dict(), **self.history.state_dict(),
            "policy": checkpoints.policy_recipe(self.policy), "torch": torch.__version__,
            "engine": {"name": self.engine.name, "reason": self.engine.reason},
            "partial_update": self._partial_update,
        }  # fmt: skip
        path = checkpoints.save_checkpoint(self.run_dir, self.policy.state_dict(), tensors, state)
        self._saved = (self.iteration, path)
        return path

    def _save_once(self) -> Path | None:
        """The checkpoint of where training stands, written unless it is there."""
        if self._saved is not None and self._saved[0] == self.iteration and not self._partial_update:
            return self._saved[1]
        return self.save()

    def _restore(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Counters, schedules, optimiser and statistics as the checkpoint has them; changes nothing in its run."""
        state, tensors = checkpoint.state, checkpoint.optimizer
        self.engine.load_state_dict(checkpoints.under("engine.", tensors))
        self.reward_scaler.load_state_dict(checkpoints.under("reward_scaler.", tensors))
        self.rollout.steps.copy_(tensors["rollout.steps"])
        self.steps = self.collector.valid_steps = int(state["step"])
        self.iteration, self.clock.total = int(state["iteration"]), float(state["time"])
        self.schedules.load_state_dict(state, checkpoints.read_config(checkpoint.run))
        self.history.load_state_dict(state)
        self.run_dir, self._saved = checkpoint.run, (self.iteration, checkpoint.path)
        metrics = self.run_dir / "metrics.jsonl"
        if metrics.exists():  # without its history a run can still go on
            self.history.update(report.read_metrics(metrics, last_step=self.steps))

    def close(self) -> None:
        """Close the metrics file, and the environments unless they are yours."""
        if (metrics := getattr(self, "_metrics", None)) is not None:  # `__init__` may have failed before
            metrics.close()
        for group in self.groups:
            if group.owned:
                group.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
