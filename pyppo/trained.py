"""What training gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyppo.config import Config
from pyppo.plot import plot_history

__all__ = ["Result"]


@dataclass
class Result:
    """What training gives back."""

    policy: Any
    """The trained policy; `policy.act(obs)`."""
    history: dict[str, list[float]]
    """One list a column, one entry an iteration: step, iteration, time, sps, episode_return, episode_length, episodes
    (finished in the iteration), episodes_total, loss, policy_loss, value_loss, entropy, approx_kl, kl, clip_fraction,
    explained_variance, learning_rate, kl_coef, grad_norm, updates, and the seconds time_act, time_env, time_gae,
    time_update, time_other. NaN where there is nothing to tell yet."""
    config: Config
    run_dir: Path | None
    """The run's folder; None if nothing was written."""
    interrupted: bool = False
    """Whether Ctrl-C ended it."""

    def __repr__(self) -> str:
        steps, returns = self.history.get("step"), self.history.get("episode_return")
        done = f"{steps[-1]:,.0f} steps, return {returns[-1]:.1f}" if steps and returns else "no steps"
        return f"Result({self.config.env_id}, {done}, {self.run_dir})"

    def plot(self, path: str | Path) -> Path:
        """Write the learning curve as a picture; the suffix says which kind."""
        return plot_history(self.history, path, title=self.config.env_id)
