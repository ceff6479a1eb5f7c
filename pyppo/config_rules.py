"""What each field of `Config` may be: how a value is read, what it must satisfy, and the words that say so."""

from __future__ import annotations

import json
import math
import operator
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """How a field's value is read (`coerce` raises TypeError or ValueError where it cannot) and what it must
    satisfy."""

    coerce: Callable[[Any], Any]
    text: str
    holds: Callable[[Any], bool] = lambda value: True
    optional: bool = False


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1e6 steps are what people write
    return operator.index(value)


def _float(value: Any) -> float:
    if isinstance(value, (bool, str, bytes)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _bool(value: Any) -> bool:
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):  # numpy's, without importing it
        raise TypeError
    return bool(value)


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _path(value: Any) -> str:
    text = _str(os.fspath(value))
    return str(Path(text).expanduser()) if text == "~" or text.startswith("~/") else text


def _sizes(value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)):
        raise TypeError
    return tuple(_int(size) for size in value)


def _options(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError
    return json.loads(json.dumps(dict(value), allow_nan=False))  # what is saved is what ran


def _choice(*options: str) -> Rule:
    return Rule(_str, "one of " + ", ".join(map(repr, options)), lambda value: value in options)


def _at_least(low: int) -> Rule:
    return Rule(_int, f"an integer of at least {low}", lambda value: value >= low)


def _between(low: int, high: int) -> Rule:
    return Rule(_int, f"an integer from {low} to {high:,}", lambda value: low <= value <= high)


def _or_auto(rule: Rule) -> Rule:
    """`rule`, or "auto", which 0 also means where the rule allows it."""

    def coerce(value: Any) -> Any:
        if isinstance(value, str):
            if value != "auto":
                raise ValueError
            return value
        value = rule.coerce(value)
        return "auto" if value == 0 and not isinstance(value, bool) and rule.holds(value) else value

    return Rule(coerce, f"{rule.text}, or 'auto'", lambda value: value == "auto" or rule.holds(value))


_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_FLAG = Rule(_bool, "True or False")
_FRACTION = Rule(_float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
_NOT_NEGATIVE = Rule(_float, "a finite number of at least 0", lambda value: value >= 0)
_POSITIVE = Rule(_float, "a finite number above 0", lambda value: value > 0)
_POSITIVE_OR_NONE = _POSITIVE._replace(text="a finite number above 0, or None", optional=True)

_MOST_THREADS = 1024  # a process that can start no more of them ends without an exception

RULES: dict[str, Rule] = {
    "env_id": Rule(_str, "a non-empty string", lambda value: value.strip() != ""),
    "total_timesteps": _at_least(1),
    "seed": Rule(_int, "an integer from 0 to 2**63 - 1", lambda value: 0 <= value < 2**63),
    "num_envs": _between(1, 2**20),
    "num_steps": _at_least(1),
    "num_groups": _or_auto(_at_least(1)),
    "env_threads": _or_auto(_between(0, _MOST_THREADS)),
    "one_core": _or_auto(_FLAG),
    "env_options": Rule(_options, "a dict with string keys and JSON values"),
    "learning_rate": _POSITIVE,
    "anneal_lr": _FLAG,
    "adaptive_lr_kl": _POSITIVE_OR_NONE,
    "adam_eps": _POSITIVE,
    "max_grad_norm": _POSITIVE_OR_NONE,
    "gamma": _FRACTION,
    "gae_lambda": _FRACTION,
    "num_minibatches": _at_least(1),
    "update_epochs": _at_least(1),
    "norm_adv": _choice("minibatch", "batch", "none"),
    "objective": _choice("clip", "unclipped", "kl"),
    "clip_coef": Rule(_float, "a number above 0 and at most 1", lambda value: 0 < value <= 1),
    "clip_coef_high": _POSITIVE_OR_NONE,
    "dual_clip": Rule(_float, "a finite number above 1, or None", lambda value: value > 1, optional=True),
    "clip_vloss": _FLAG,
    "ent_coef": _NOT_NEGATIVE,
    "vf_coef": _NOT_NEGATIVE,
    "target_kl": _POSITIVE_OR_NONE,
    "kl_coef": _NOT_NEGATIVE,
    "kl_target": _POSITIVE_OR_NONE,
    "norm_obs": _FLAG,
    "clip_obs": _POSITIVE_OR_NONE,
    "warmup_rows": _at_least(0),
    "norm_reward": _FLAG,
    "clip_reward": _POSITIVE_OR_NONE,
    "hidden_sizes": Rule(_sizes, "a sequence of integers of at least 1", lambda value: all(n >= 1 for n in value)),
    "shared_trunk": _FLAG,
    "activation": _choice("tanh", "relu", "elu", "silu"),
    "network": _choice("auto", "mlp", "nature_cnn", "small_cnn", "combined"),
    "log_std_init": Rule(_float, "a finite number"),
    "state_dependent_std": _FLAG,
    "image_scale": _POSITIVE,
    "image_symbols": _at_least(2)._replace(text="an integer of at least 2, or None", optional=True),
    "recurrent": _choice("none", "gru", "lstm"),
    "recurrent_size": _at_least(1),
    "action_bounds": _choice("clip", "rescale"),
    "engine": _choice("auto", "torch", "native", "cuda_graph"),
    "precision": _choice("fp32", "bf16"),
    "device": Rule(_str, "'auto', 'cpu', 'cuda' or 'cuda:<index>'", lambda value: bool(_DEVICE.fullmatch(value))),
    "torch_threads": _between(1, _MOST_THREADS),
    "run_dir": Rule(_path, "a non-empty path, or None", lambda value: value != "", optional=True),
    "save_interval": _at_least(0),
}  # fmt: skip


def checked(name: str, value: Any) -> Any:
    """A field's value as `Config` keeps it; TypeError or ValueError with the field, the value and its rule."""
    rule = RULES[name]
    if value is None and rule.optional:
        return None
    try:
        result = rule.coerce(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be {rule.text}") from None
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}; it must be {rule.text}") from None
    if not rule.holds(result):
        raise ValueError(f"{name} is {value!r}; it must be {rule.text}")
    return result
