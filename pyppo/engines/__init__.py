"""Engines: who runs the policy and the update on a device. The only seam between the trainer and a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pyppo.actions import Distribution

if TYPE_CHECKING:
    from pyppo.config import Config
    from pyppo.rollout import Rollout

_log = logging.getLogger("pyppo")


class Schedule(NamedTuple):
    """The coefficients of one update, as the trainer's schedules have them at its start."""

    learning_rate: float
    clip_coef: float
    ent_coef: float
    kl_coef: float


class Engine(Protocol):
    """Acts, values and updates. Every engine must produce what `TorchEngine` does, to rounding."""

    name: str
    """As `Config.engine` calls it."""
    reason: str
    """Why it is this one that runs, for the run's log."""
    device: torch.device
    """Where the rollout must lie."""
    dist_shapes: dict[str, tuple[int, ...]] | None
    """What the rollout must keep of the distribution that acted (name to shape of one row); None: nothing."""
    state_shape: tuple[int, ...] | None
    """What the rollout must keep of the state that the policy carries, one environment's; None: it has none."""

    def act(self, rollout: Rollout, t: int, rows: slice) -> np.ndarray:
        """Fill row `t` of `rows` with action, log-prob and value; return the environment's actions [n, *shape]."""
        ...

    def value(self, obs: Mapping[str, np.ndarray | Tensor], state: Tensor | None = None) -> Tensor:
        """Values [n] of observations that are not in the rollout (same-step autoreset's final ones).

        Args:
            state: [n, *state_shape], what flows into them, for a policy that carries a state.
        """
        ...

    def bootstrap(self, rollout: Rollout) -> None:
        """Write the value of the observation after the last step to `rollout.values[T]`."""
        ...

    def update(self, rollout: Rollout, schedule: Schedule, iteration: int) -> dict[str, float]:
        """All epochs over one rollout whose advantages and returns are set; the metrics, means over its rows.

        Keys: loss, policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm, updates (steps applied), and
        kl: the exact KL(old || new) over all valid rows at the end, where `dist_shapes` is not None, else NaN.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The optimiser: `step` [1] and the moments as `exp_avg.<parameter>`, `exp_avg_sq.<parameter>`."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state_dict`, of any engine.

        Raises:
            ValueError: a parameter's moments are missing or of another shape.
        """
        ...


def make_engine(config: Config, policy: nn.Module, distribution: Distribution) -> Engine:
    """The engine that `config.engine` names, on `config.device`.

    "auto" is native, on the CPU, or cuda_graph, on a GPU, where that can run the policy; else torch. `Engine.reason`
    says why. Whether a policy can be captured shows when it first runs: a `CudaGraphEngine` that "auto" took goes on as
    `TorchEngine` if it cannot, and says so.

    Raises:
        ValueError: the device cannot be had, the settings ask for what the policy cannot give, or the engine that is
            asked for cannot run it.
    """
    from pyppo.engines.cuda_graph_engine import CudaGraphEngine
    from pyppo.engines.native_engine import NativeEngine
    from pyppo.engines.sequence_engine import SequenceEngine
    from pyppo.engines.torch_engine import TorchEngine

    device = resolve_device(config.device, policy)
    name, reason = _choose(config, policy, device, distribution)
    recurrent = getattr(policy, "state_shape", None) is not None
    kinds: dict[str, Callable[..., Engine]] = {
        "native": NativeEngine,
        "cuda_graph": CudaGraphEngine,
        "torch": SequenceEngine if recurrent else TorchEngine,
    }
    engine = kinds[name](policy, config, device, distribution)
    engine.reason = reason
    _log.info(describe(engine))
    return engine


def _choose(config: Config, policy: nn.Module, device: torch.device, distribution: Distribution) -> tuple[str, str]:
    """The engine's name, and why it is that one."""
    from pyppo.engines import cuda_graph_engine, native_engine

    if config.engine == "cuda_graph" and device.type != "cuda":
        raise ValueError(
            f"engine is 'cuda_graph'; it must be 'auto', 'native' or 'torch', since the device is {device}, not a GPU"
        )
    if config.engine != "auto":
        return config.engine, "as asked for"
    if device.type == "cuda":
        unfit = cuda_graph_engine.why_not(policy, device)
        return ("cuda_graph", "a policy with heads()") if unfit is None else ("torch", f"cuda_graph cannot: {unfit}")
    unfit = native_engine.why_not(policy, device, distribution, config.precision)
    return ("native", "an MLP on the CPU") if unfit is None else ("torch", f"native cannot: {unfit}")


def describe(engine: Engine) -> str:
    """One line for a log: which engine runs where, and why it."""
    return f"engine: {engine.name} on {engine.device} ({engine.reason})"


def resolve_device(name: str, policy: nn.Module) -> torch.device:
    """The device that `name` means. "auto": where the policy's parameters are."""
    if name == "auto":
        return next((p.device for p in policy.parameters()), torch.device("cpu"))
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {name!r}; torch finds no usable GPU here, so it must be 'cpu' or 'auto'")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"device is {name!r}; the index must be below {torch.cuda.device_count()}")
        device = torch.device("cuda", device.index or 0)
    return device


def valid_indices(valid: Tensor) -> Tensor:
    """Flat indices int64 [n] of the true elements of `valid` [T, N], in [T, N] order."""
    return valid.reshape(-1).nonzero().squeeze(1)


def as_tensors(obs: Mapping[str, np.ndarray | Tensor], device: torch.device) -> dict[str, Any]:
    """Observations on `device` in the storage dtypes: floats as float32, the rest as they are."""
    tensors = {key: torch.as_tensor(x, device=device) for key, x in obs.items()}
    return {key: x.float() if x.dtype.is_floating_point else x for key, x in tensors.items()}
