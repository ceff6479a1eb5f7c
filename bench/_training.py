"""One training run as a job of `_runs`: its score, its curve, its speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gymnasium.vector import VectorEnv

import pyppo
from pyppo.checkpoint import parameter_sha256

Row = Mapping[str, float]
CURVE_POINTS = 100


def train_run(
    config: pyppo.Config,
    envs: VectorEnv | None = None,
    *,
    callbacks: Sequence[Callable[[Row], None]] = (),
    evaluate: Callable[[Any], Any] | None = None,
    make: Callable[..., pyppo.Trainer] = pyppo.Trainer,
) -> dict[str, Any]:
    """Train; what a results file keeps of it.

    A run may stop being finite (without clipping, that happens). What it had until then counts: `diverged` is the
    message, `score` the mean of its last 100 episodes before.

    Args:
        config: the settings; `run_dir` None writes nothing else.
        envs: as for `pyppo.Trainer`.
        callbacks: called with each iteration's row.
        evaluate: from the policy to an object with `mean` and `std`; not called for a run that diverged.
        make: makes the trainer, from what `pyppo.Trainer` takes.

    Returns:
        score (mean return of the last 100 training episodes; None if no episode ended), best (the highest that it
        was), evaluation and evaluation_std, steps, seconds (of training), sps, engine, sha256 (of the parameters),
        diverged (a message, or None), curve (steps, and the returns that the score is the last of).
    """
    rows: list[Row] = []
    diverged = None
    with make(config, envs, quiet=True, callbacks=[rows.append, *callbacks]) as trainer:
        start = time.perf_counter()
        try:
            trainer.train()
        except FloatingPointError as error:
            diverged = str(error)
        seconds = time.perf_counter() - start
        engine, policy, steps = trainer.engine.name, trainer.policy, trainer.steps
    evaluation = evaluate(policy) if evaluate and diverged is None else None
    known = [(row["step"], row["episode_return"]) for row in rows if math.isfinite(row["episode_return"])]
    return {
        "score": known[-1][1] if known else None,
        "best": max((score for _, score in known), default=None),
        "evaluation": evaluation.mean if evaluation else None,
        "evaluation_std": evaluation.std if evaluation else None,
        "steps": steps,
        "seconds": round(seconds, 3),
        "sps": round(steps / seconds, 1),
        "engine": engine,
        "sha256": parameter_sha256(policy),
        "diverged": diverged,
        "curve": thinned(*zip(*known, strict=True)) if known else [[], []],
    }


def thinned(
    steps: Sequence[float], scores: Sequence[float], points: int = CURVE_POINTS, digits: int = 4
) -> list[list[float]]:
    """At most `points` of a curve, evenly spread, the last always: [steps, scores], with the digits that show."""
    count = len(steps)
    kept = (
        sorted({round((i + 1) * count / points) - 1 for i in range(points)} - {-1}) if count > points else range(count)
    )
    return [[int(steps[i]) for i in kept], [round(float(scores[i]), digits) for i in kept]]
