"""Proximal Policy Optimization: a thin trainer around compiled kernels. Names are imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyppo import ops as ops
    from pyppo.checkpoint import load as load
    from pyppo.config import Config as Config
    from pyppo.evaluation import Evaluation as Evaluation
    from pyppo.evaluation import evaluate as evaluate
    from pyppo.ops import gae as gae
    from pyppo.ops import ppo_loss as ppo_loss
    from pyppo.ops import surrogate_loss as surrogate_loss
    from pyppo.policy import MLPPolicy as MLPPolicy
    from pyppo.policy import Policy as Policy
    from pyppo.trained import Result as Result
    from pyppo.trainer import Trainer as Trainer
    from pyppo.trainer import train as train

    __version__: str

_HOMES = {
    "Config": "config",
    "Evaluation": "evaluation",
    "MLPPolicy": "policy",
    "Policy": "policy",
    "Result": "trained",
    "Trainer": "trainer",
    "evaluate": "evaluation",
    "gae": "ops",
    "load": "checkpoint",
    "ppo_loss": "ops",
    "surrogate_loss": "ops",
    "train": "trainer",
}

__all__ = [
    "Config", "Evaluation", "MLPPolicy", "Policy", "Result", "Trainer", "__version__", "evaluate", "gae", "load", "ops",
    "ppo_loss", "surrogate_loss", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name == "ops":
        return import_module("pyppo.ops")
    elif name in _HOMES:
        value = getattr(import_module(f"pyppo.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'pyppo' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pyppo")
    except PackageNotFoundError:  # imported from a source tree that is not installed
        return "0+unknown"
