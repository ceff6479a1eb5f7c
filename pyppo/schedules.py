"""The coefficients of an update over a run: what falls with the steps, and what follows the KL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pyppo.config import Config
from pyppo.engines import Schedule

_LEARNING_RATES = (1e-6, 1e-2)  # bounds of the KL-adaptive learning rate


class Schedules:
    """The learning rate and the KL coefficient of a run.

    Attributes:
        learning_rate: now; with `anneal_lr` what it falls from.
        kl_coef: of the KL penalty, now.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.learning_rate, self.kl_coef = config.learning_rate, config.kl_coef

    def at(self, steps: int) -> Schedule:
        """The coefficients for a rollout that begins after `steps` valid steps."""
        config = self._config
        left = max(0.0, 1.0 - steps / config.total_timesteps)  # `Trainer.step` may go on past the total
        learning_rate = config.learning_rate * left if config.anneal_lr else self.learning_rate
        return Schedule(learning_rate, config.clip_coef, config.ent_coef, self.kl_coef)

    def adapt(self, kl: float) -> None:
        """Move the KL coefficient (Schulman et al. 2017, section 4) or the learning rate on an update's exact KL."""
        target, rate_target = self._config.kl_target, self._config.adaptive_lr_kl
        if target is not None and math.isfinite(kl):
            self.kl_coef *= 2.0 if kl > 1.5 * target else 0.5 if kl < target / 1.5 else 1.0
        if rate_target is not None and math.isfinite(kl):
            factor = 1 / 1.5 if kl > 2.0 * rate_target else 1.5 if kl < rate_target / 2.0 else 1.0
            low, high = _LEARNING_RATES
            self.learning_rate = min(max(self.learning_rate * factor, low), high)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint's `state.json` keeps: where they are, and where the settings had them begin."""
        begin = {"kl_coef": self._config.kl_coef, "learning_rate": self._config.learning_rate}
        return {"kl_coef": self.kl_coef, "learning_rate": self.learning_rate, "schedules_began": begin}

    def load_state_dict(self, state: Mapping[str, Any], before: Config) -> None:
        """Go on from where a run stood, unless a setting is another one than it began with.

        Args:
            before: the run's settings, for checkpoints that do not say where its schedules began.
        """
        begin = {"kl_coef": before.kl_coef, "learning_rate": before.learning_rate, **state.get("schedules_began", {})}
        if self._config.kl_coef == begin["kl_coef"]:
            self.kl_coef = float(state["kl_coef"])
        if self._config.learning_rate == begin["learning_rate"]:
            self.learning_rate = float(state["learning_rate"])
