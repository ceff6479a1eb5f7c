"""The learning suite: environments, what differs from their presets, how long, what is expected, and who says so.

A gate is of training scores (the mean return of a run's last 100 training episodes, CleanRL's measure) or of evaluation
scores (whole episodes of the trained policy, actions without noise, the Zoo's). The two are never compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyppo


@dataclass(frozen=True)
class Task:
    """One environment of the suite."""

    env_id: str
    reference: str
    """Score and source; "±" as the source means it."""
    gate: float | None = None
    """What is to be reached; None: nothing is asked yet."""
    of: Literal["training", "evaluation"] = "training"
    """Which score the gate is of."""
    every: bool = False
    """Whether every run has to reach it; else their mean."""
    seeds: int = 5
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the preset (`pyppo.preset_for`), or from the defaults where there is none."""
    native: bool = True
    """Whether the native engine can run it; images are torch's."""
    modes: float | None = None
    """Where runs end either clearly below or clearly above this: how many did."""


_CLEANRL, _ZOO, _PAPER = "CleanRL", "RL Baselines3 Zoo", "Schulman et al. 2017, fig. 3, v1"

# fmt: off
SUITE = (
    Task("CartPole-v1", f"490.0 ± 6.1 ({_CLEANRL})", gate=495, every=True, seeds=10),
    Task("Acrobot-v1", f"-86.4 ± 1.3 ({_CLEANRL})", gate=-90),
    Task("LunarLander-v3", f"242 ± 32, evaluation ({_ZOO}, v2)", gate=220, of="evaluation"),
    Task("Pendulum-v1", f"-172 ± 104, evaluation ({_ZOO})", gate=-200),
    Task("Hopper-v4", f"2383 ± 272 ({_CLEANRL})", gate=2200),
    Task("HalfCheetah-v4", f"1443 ± 46, earlier 2906 ± 1129 ({_CLEANRL})", gate=2200, seeds=10, modes=2500),
    Task("Walker2d-v4", f"2909, band 2678 to 3126 ({_PAPER})", gate=2678),
    Task("Swimmer-v4", f"107, band 102 to 112 ({_PAPER})", gate=65, seeds=10),
    Task("InvertedDoublePendulum-v4", f"7910, band 7584 to 8197 ({_PAPER})", gate=7584, seeds=10),
    Task("MiniGrid-Empty-5x5-v0", "0.955, the most there is", gate=0.9, native=False,
         fields={"total_timesteps": 60_000}),
    Task("Locks", "16, the most there is (MultiDiscrete actions; bench/own_envs.py)", gate=15,
         fields={"num_envs": 16, "num_steps": 128, "num_minibatches": 8, "update_epochs": 4, "learning_rate": 1e-3,
                 "gamma": 0.0, "ent_coef": 0.05, "total_timesteps": 300_000}),
    Task("Catch", "1, the most there is (images; bench/own_envs.py)", gate=0.9, native=False,
         fields={"num_envs": 16, "num_steps": 128, "num_minibatches": 8, "update_epochs": 4, "learning_rate": 2.5e-3,
                 "ent_coef": 0.01, "total_timesteps": 300_000}),
)
# fmt: on


def config_of(task: Task, engine: str, seed: int, steps: int | None = None) -> pyppo.Config:
    """One run's settings.

    Args:
        engine: "torch", or "native", which a task whose `native` is False cannot have.
        steps: in place of the task's own number.
    """
    fields = {**task.fields, "engine": engine, "seed": seed, "run_dir": None}
    if steps is not None:
        fields["total_timesteps"] = steps
    return pyppo.Config.for_env(task.env_id, **fields)


def engine_of(task: Task, engine: Literal["auto", "native", "torch"]) -> str | None:
    """The engine that runs the task; None if the one asked for cannot."""
    if engine == "torch" or (engine == "auto" and not task.native):
        return "torch"
    return "native" if task.native else None
