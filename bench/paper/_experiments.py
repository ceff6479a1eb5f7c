"""The runs of figure3.py, epochs.py and clipping.py, as jobs of `_runs`: what each trains and what it measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import a2c
import numpy as np
import torch
import trpo
import vpg
from _loop import EngineTrainer
from _report import count_text, plus_minus
from _training import thinned, train_run

import pyppo
from pyppo.engines import Schedule, valid_indices
from pyppo.engines.native_engine import NativeEngine
from pyppo.reference import make_distribution
from pyppo.report import PHASES
from pyppo.rollout import Rollout

ENGINES = {"trpo": (trpo.TRPOEngine, trpo.Settings), "a2c": (a2c.A2CEngine, a2c.Settings),
           "vpg": (vpg.VPGEngine, vpg.Settings)}  # fmt: skip


def run_algorithm(
    algorithm: str, env_id: str, seed: int, fields: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """One run of figure 3, PPO's excepted.

    Args:
        algorithm: one of `ENGINES`. fields: of `pyppo.Config`. settings: of the algorithm.

    Returns:
        What `train_run` gives; `updates`, how many rollouts were learned from; `phases`, seconds of each.
    """
    engine, kind = ENGINES[algorithm]
    make_engine: Any = partial(engine, settings=kind(**settings))
    phases = dict.fromkeys((*PHASES, "other"), 0.0)
    rows = []

    def note(row: Mapping[str, float]) -> None:
        rows.append(row["iteration"])
        for name in phases:
            phases[name] += row[f"time_{name}"]

    config = pyppo.Config(env_id=env_id, seed=seed, **fields)
    result = train_run(config, callbacks=[note], make=partial(EngineTrainer, make_engine=make_engine))
    return {**result, "updates": len(rows), "phases": {name: round(x, 3) for name, x in phases.items()}}


class MeasuringEngine(NativeEngine):
    """`NativeEngine` that measures after each update how far the policy went: `kl`, whatever the objective."""

    def update(self, rollout: Rollout, schedule: Schedule, iteration: int) -> dict[str, float]:
        """The update; `kl` is the exact mean KL(the policy that collected || the policy now) over the valid rows."""
        rows = valid_indices(rollout.valid)
        obs = {key: x[: rollout.num_steps].flatten(0, 1)[rows] for key, x in rollout.obs.items()}
        old = self._distribution(obs)
        metrics = super().update(rollout, schedule, iteration)
        return {**metrics, "kl": float(old.kl(self._distribution(obs)).mean()) if len(rows) else math.nan}

    @torch.no_grad()
    def _distribution(self, obs: Mapping[str, torch.Tensor]) -> Any:
        params, _ = self.policy.heads(self.policy.prepare(obs))
        params = {name: x.double() if x.is_floating_point() else x for name, x in params.items()}  # copies
        return make_distribution(**self.distribution.loss_arguments, **params)


def run_measured(env_id: str, seed: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One run of PPO on the native engine, its KL measured.

    Returns:
        What `train_run` gives; `kl`, `approx_kl` and `clip_fraction`, the median over all updates of each; `kl_high`,
        the KL that one update in ten exceeded; `kl_curve`, [steps, exact KL after the update].
    """
    found: dict[str, list[float]] = {name: [] for name in ("step", "kl", "approx_kl", "clip_fraction")}

    def note(row: Mapping[str, float]) -> None:
        for name, column in found.items():
            column.append(row[name])

    config = pyppo.Config(env_id=env_id, seed=seed, **fields)
    result = train_run(config, callbacks=[note], make=partial(EngineTrainer, make_engine=MeasuringEngine))
    known = [(step, x) for step, x in zip(found["step"], found["kl"], strict=True) if math.isfinite(x)]
    steps, kl = [step for step, _ in known], [x for _, x in known]
    medians = {name: _quantile(found[name], 0.5) for name in ("kl", "approx_kl", "clip_fraction")}
    curve = thinned(steps, [_median_around(kl, i) for i in range(len(kl))], digits=6) if kl else [[], []]
    return {**result, **medians, "kl_high": _quantile(kl, 0.9), "kl_curve": curve}


def scores_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Mean ± standard deviation of runs' scores, how many runs, and how many of them diverged or have no score."""
    scores = [record["result"]["score"] for record in records if record["result"]["score"] is not None]
    return f"{plus_minus(scores)} ({count_text(records)})" if records else "–"


def _quantile(values: Sequence[float], share: float) -> float | None:
    """None where nothing is finite."""
    finite = [x for x in values if math.isfinite(x)]
    return float(np.quantile(finite, share)) if finite else None


def _median_around(values: Sequence[float], i: int, reach: int = 4) -> float:
    """Over an update's neighbours: a single one's KL jumps."""
    return float(np.median(values[max(0, i - reach) : i + reach + 1]))
