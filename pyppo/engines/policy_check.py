"""A policy's answers to a first call, held against what the trainer needs of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from pyppo.actions import Distribution
from pyppo.masks import MASK
from pyppo.policy import Minibatch
from pyppo.storage import storage_dtype

_BATCHES = (3, 1)  # one row too: that is where a squeeze() too many shows
_STEPS = 2  # of sequences, for a policy with a state
_NO_GRADIENT = (
    "{} that no gradient goes through; they must depend on the parameters (no torch.no_grad(), no detach(), and not "
    "all parameters frozen)"
)


def check_policy(
    policy: nn.Module,
    obs_space: spaces.Dict,
    distribution: Distribution,
    device: torch.device,
    *,
    saved: bool = True,
) -> None:
    """Call a policy once and see whether what it gives has the right names, shapes and dtypes, and is finite; whether
    `act` gives the environments' actions; and, if it is to be `saved`, whether its state can be.

    It is asked about observations of zero, or what comes nearest in the space, 3 rows and then 1, the one in `eval`
    mode, where batch normalisation can take it. Its buffers, its noise (where it has `reseed`, as the built-in ones do)
    and torch's generator are left as they were. What is right here is not looked at again at each step.

    Raises:
        ValueError, TypeError: something is wrong; names the method, what it gave and what it must be.
    """
    for name, x in policy.state_dict().items():
        if saved and not isinstance(x, Tensor):
            raise TypeError(f"policy has state_dict()[{name!r}], {_described(x)}; it must be a tensor, to be saved")
    with _left_alone(policy, device):
        for count in _BATCHES:
            if count == 1:
                policy.eval()
            _Probe(policy, obs_space, distribution, device, count).run()


@contextmanager
def _left_alone(policy: nn.Module, device: torch.device) -> Iterator[None]:
    before = {name: x.clone() for name, x in policy.named_buffers()}
    modes = {module: module.training for module in policy.modules()}
    reseed: Any = getattr(policy, "reseed", None)
    noise = None if reseed is None else reseed(0)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        if noise:
            reseed(*noise)
    with torch.no_grad():
        for name, x in policy.named_buffers():
            if name in before and before[name].shape == x.shape:
                x.copy_(before[name])


class _Probe:
    """One call of each method with `count` rows; floats among the observations are zero, or else other numbers."""

    def __init__(
        self,
        policy: Any,
        obs_space: spaces.Dict,
        distribution: Distribution,
        device: torch.device,
        count: int,
        *,
        zero: bool = True,
    ) -> None:
        self.policy, self.distribution, self.device, self.count = policy, distribution, device, count
        shape = getattr(policy, "state_shape", None)
        self.shape = None if shape is None else _state_shape(shape)
        self.rows = (count,) if shape is None else (_STEPS, count)
        self.obs_space = obs_space
        self.obs = {name: _observation(space, name, self.rows, zero).to(device) for name, space in obs_space.items()}
        self.dtype = next((p.dtype for p in policy.parameters() if p.requires_grad), torch.float32)

    def run(self) -> None:
        prepared = self._prepared()
        if hasattr(self.policy, "heads"):
            given = self._call("heads", prepared, *self._state())
            names = ("params", "value") if self.shape is None else ("params", "value", "state")
            params, value, *state = self._parts("heads", given, names)
            self._check_params(params)
            self._check_rows("heads() gave a value", value)
            for x in state:
                self._check_state("heads()", x)
            if not (value.requires_grad or any(x.requires_grad for x in params.values())):
                raise ValueError(_NO_GRADIENT.format("heads() gave params and a value"))
            self._check_options(prepared)
            # Nobody trains with `act`: a wrong one would show in `evaluate`, after the training.
            self._act(deterministic=False)
            self._check_inside(self._act(deterministic=True))
            if self.count == 1:  # in `eval` mode
                self._check_mode()
            return
        self._act(deterministic=True)  # `evaluate` asks for it, after the training
        actions = self._act(deterministic=False)
        given = self._call("evaluate", prepared, actions, *self._state())
        logp, entropy, value = self._parts("evaluate", given, ("logp", "entropy", "value"))
        for name, x in (("logp", logp), ("entropy", entropy), ("value", value)):
            self._check_rows(f"evaluate() gave {name}", x)
        if not (logp.requires_grad or value.requires_grad):
            raise ValueError(_NO_GRADIENT.format("evaluate() gave logp and value"))
        self._check_options(prepared)

    def _check_options(self, prepared: Any) -> None:
        """`value` and `auxiliary_loss`, where there are any."""
        if hasattr(self.policy, "value") and self.shape is None:
            self._check_rows("value() gave a value", self._call("value", prepared))
        if not hasattr(self.policy, "auxiliary_loss"):
            return
        kind = torch.float32 if self.distribution.kind == "normal" else torch.int64
        actions = torch.zeros((*self.rows, *self.distribution.shape), dtype=kind, device=self.device)
        numbers = [torch.zeros(self.rows, dtype=self.dtype, device=self.device) for _ in range(4)]
        minibatch = Minibatch(prepared, actions.to(self.dtype) if kind.is_floating_point else actions, *numbers)
        if self.shape is not None:
            state, starts = self._state()
            minibatch = minibatch._replace(state=state, starts=starts, valid=torch.ones_like(starts))
        loss = self._call("auxiliary_loss", minibatch)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise ValueError(f"auxiliary_loss() gave {_described(loss)}; it must be a tensor of shape ()")

    def _prepared(self) -> Any:
        if not hasattr(self.policy, "prepare"):
            return self.obs
        rows = {name: x.flatten(0, 1) if self.shape is not None else x for name, x in self.obs.items()}
        with torch.no_grad():
            prepared = self._call("prepare", rows)
        entries = prepared if isinstance(prepared, Mapping) else {"the result": prepared}
        total = self.count * (1 if self.shape is None else _STEPS)
        for name, x in entries.items():
            if not isinstance(x, Tensor) or x.dim() == 0 or len(x) != total:
                must = f"a tensor of {total} rows, as many as it got, or a dict of such tensors"
                raise ValueError(f"prepare() gave {name}, {_described(x)}; it must be {must}")
        if self.shape is None:
            return prepared
        if not isinstance(prepared, Mapping):
            return prepared.unflatten(0, self.rows)
        return type(prepared)({name: x.unflatten(0, self.rows) for name, x in prepared.items()})  # type: ignore[call-arg]

    def _act(self, *, deterministic: bool) -> Tensor:
        """Actions of `act`, checked, as `evaluate` takes them."""
        last = {name: x[-1] if self.shape is not None else x for name, x in self.obs.items()}
        arrays: Any = {name: x.cpu().numpy() for name, x in last.items()}
        arrays = arrays["obs"] if list(arrays) == ["obs"] else arrays
        how = {"deterministic": True} if deterministic else {}  # as `evaluate` and as the trainer call it
        if self.shape is None:
            actions = self._call("act", arrays, **how)
        else:
            given = self._call("act", arrays, **how, state=self._state()[0])
            actions, state = self._parts("act", given, ("actions", "state"))
            self._check_state("act()", state)
        wanted = (self.count, *self.distribution.shape)
        array = self._array(actions)
        if array.shape != wanted:
            raise ValueError(f"act() gave actions of shape {array.shape}; it must be {wanted}")
        normal = self.distribution.kind == "normal"
        if array.dtype.kind not in ("f" if normal else "iub"):
            must = "floating point" if normal else "integers"
            raise TypeError(f"act() gave actions of dtype {array.dtype}; it must be {must}")
        if not np.isfinite(array).all():
            raise ValueError(f"act() gave an action that is not finite: {array[~np.isfinite(array)][0]}")
        tensor = torch.as_tensor(array, device=self.device).to(torch.float32 if normal else torch.int64)
        return tensor if self.shape is None else torch.stack([tensor] * _STEPS)

    def _check_inside(self, actions: Tensor) -> None:
        """Discrete actions of `act`, which `evaluate` sends as they are, must be of the environments' space."""
        family = self.distribution
        if family.kind == "normal":
            return
        low = np.array(family.start or 0).reshape(family.shape if family.start else ())
        nvec = 2 if family.nvec is None else np.array(family.nvec).reshape(family.shape)
        array = (actions[-1] if self.shape is not None else actions).cpu().numpy()
        if not ((array >= low) & (array < low + nvec)).all():
            must = f"actions of the environments' space, from {low.tolist()} to {(low + nvec - 1).tolist()}"
            raise ValueError(f"act(deterministic=True) gave {array.tolist()}; it must be {must}")

    def _check_mode(self) -> None:
        """With `heads`, the trainer sends the environments what `Distribution.to_env` makes of a sample; `act`, which
        `evaluate` sends as it is, must mean the same actions. Asked where the mean is hardly 0, which is 0 in any
        coordinates; not of policies with a state, or that answer twice in two ways."""
        family = self.distribution
        if family.kind != "normal" or self.shape is not None:
            return
        probe = _Probe(self.policy, self.obs_space, family, self.device, self.count, zero=False)
        with torch.no_grad():
            means = [probe._call("heads", probe._prepared())[0]["mean"] for _ in range(2)]
        given, again = (family.clip(probe._act(deterministic=True).cpu().numpy()) for _ in range(2))
        wanted = family.to_env(means[0].cpu().numpy())
        if not (torch.equal(*means) and np.array_equal(given, again) and np.isfinite(wanted).all()):
            return
        assert family.low is not None
        assert family.high is not None
        size = np.where(np.isfinite(family.high - family.low), family.high - family.low, 1.0)
        if (np.abs(given - wanted) > 1e-5 * size + 1e-3 * np.abs(wanted)).any():
            must = f"{wanted[0].tolist()}, the environments' action for the mean that heads() gives"
            how = f"action_bounds is {family.action_bounds!r}"
            raise ValueError(f"act(deterministic=True) gave {given[0].tolist()}; it must be {must} ({how})")

    def _array(self, actions: Any) -> np.ndarray:
        """What `act` gave as an array, as an environment would take it."""
        try:
            return np.asarray(actions)
        except Exception as error:  # a tensor on a GPU, or one that a gradient flows through
            must = "a NumPy array, or what becomes one"
            raise TypeError(f"act() gave actions, {_described(actions)}; it must be {must}: {error}") from error

    def _state(self) -> tuple[Tensor, ...]:
        """State and starts, for a policy that has one."""
        if self.shape is None:
            return ()
        state = torch.zeros(self.count, *self.shape, dtype=self.dtype, device=self.device)
        return state, torch.ones(self.rows, dtype=torch.bool, device=self.device)

    def _call(self, method: str, *given: Any, **named: Any) -> Any:
        try:
            return getattr(self.policy, method)(*given, **named)
        except Exception as error:
            seen = {name: tuple(x.shape) for name, x in self.obs.items()}
            raise ValueError(
                f"{method}() of the policy, a {type(self.policy).__name__}, failed on observations {seen}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _parts(self, method: str, given: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
        if not isinstance(given, tuple) or len(given) != len(names):
            what = f"{len(given)} values" if isinstance(given, tuple) else _described(given)
            raise ValueError(f"{method}() gave {what}; it must give a tuple of {', '.join(names)}")
        return given

    def _check_params(self, params: Any) -> None:
        wanted = ["mean", "log_std"] if self.distribution.kind == "normal" else ["logits"]
        if not isinstance(params, Mapping):
            raise TypeError(f"heads() gave params, {_described(params)}; it must be a dict with {' and '.join(wanted)}")
        extra = set(params) - {*wanted, MASK} if self.distribution.kind != "normal" else set(params) - {*wanted}
        if extra or set(wanted) - set(params):
            must = f"{' and '.join(map(repr, wanted))}, for {self.distribution.kind} actions"
            raise ValueError(f"heads() gave params {sorted(params)}; they must be {must}")
        shape = (*self.rows, self.distribution.num_params)
        for name in wanted:
            shapes = [shape, shape[-1:]] if name == "log_std" else [shape]
            self._check_tensor(f"heads() gave {name}", params[name], shapes)
        if MASK in params:
            self._check_mask(params[MASK], shape)
        elif MASK in self.obs:
            raise ValueError(
                f"heads() gave params {sorted(params)}; the environments have an action mask, so they must have "
                f"{MASK!r} too: obs[{MASK!r}], or another torch.bool mask that is at least as strict"
            )

    def _check_mask(self, mask: Any, shape: tuple[int, ...]) -> None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or tuple(mask.shape) != shape:
            raise ValueError(f"heads() gave action_mask, {_described(mask)}; it must be a torch.bool tensor of {shape}")

    def _check_rows(self, what: str, x: Any) -> None:
        self._check_tensor(what, x, [self.rows])

    def _check_state(self, what: str, x: Any) -> None:
        assert self.shape is not None
        self._check_tensor(f"{what} gave a state", x, [(self.count, *self.shape)])

    def _check_tensor(self, what: str, x: Any, shapes: list[tuple[int, ...]]) -> None:
        must = f"a tensor of shape {' or '.join(map(str, shapes))}"
        if not isinstance(x, Tensor):
            raise TypeError(f"{what}, {_described(x)}; it must be {must}")
        if tuple(x.shape) not in shapes:
            raise ValueError(f"{what} of shape {tuple(x.shape)}; it must be {must}")
        if x.dtype != self.dtype:
            raise TypeError(f"{what} of dtype {x.dtype}; it must be {self.dtype}, as the parameters")
        if x.device != self.device:
            raise ValueError(f"{what} on {x.device}; it must be on {self.device}")
        right = x.isfinite() | (x == -math.inf) if what.endswith("logits") else x.isfinite()  # -inf forbids an action
        if not bool(right.all()):
            raise ValueError(f"{what} that is not finite: {float(x.detach()[~right][0])}; every number must be finite")


def _state_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise TypeError(f"state_shape is {shape!r}; it must be a tuple of integers above 0")
    return shape


def _observation(space: spaces.Space, name: str, rows: tuple[int, ...], zero: bool) -> Tensor:
    """Zeros as a rollout stores them, or what comes nearest in the space; a mask that allows everything.

    Where `zero` is False floats are numbers from 0.1 to 0.9, the same in each call, as far as the space has them.
    """
    full = (*rows, *(space.shape or ()))
    if name == MASK:
        return torch.ones(full, dtype=torch.bool)
    if np.issubdtype(space.dtype, np.floating):
        low, high = (np.broadcast_to(getattr(space, name, 0), full) for name in ("low", "high"))
        wanted = np.zeros(full) if zero else np.linspace(0.1, 0.9, math.prod(full)).reshape(full)
        return torch.from_numpy(np.clip(wanted, low, high).astype(np.float32))
    if isinstance(space, spaces.Box):
        nearest = np.clip(np.zeros(full, space.dtype), space.low, space.high)
    else:
        nearest = np.array(np.broadcast_to(np.asarray(getattr(space, "start", 0)), full), dtype=space.dtype)
    return torch.as_tensor(nearest.astype(np.int64)).to(storage_dtype(name, space))


def _described(x: Any) -> str:
    return f"a tensor {x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
