"""What users bring, `Trainer(envs=...)` and `evaluate(envs=...)`, as groups of environments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gymnasium.vector import VectorEnv

from pyppo.contract import Purpose
from pyppo.envs import EnvGroup
from pyppo.gymnasium_envs import make_vector_env

Envs = VectorEnv | EnvGroup | Sequence[VectorEnv | EnvGroup] | Sequence[str | Callable[[], Any]]
"""What `Trainer` takes: a `VectorEnv`, an `EnvGroup` where the autoreset mode must be said, several of them, or a list
of `gymnasium.make` names or functions that make one environment each."""

_ENVS = (
    "a gymnasium.vector.VectorEnv, an EnvGroup of one, a sequence of them, or a list of gymnasium.make names or of "
    "functions that make one environment each"
)


def as_group(
    env: VectorEnv | EnvGroup | Sequence[str | Callable[[], Any]], *, first_env: int = 0, purpose: Purpose = "train"
) -> EnvGroup:
    """A new group over the environments of `env`, in the autoreset mode of a ready group or of the metadata.

    An object of a subclass of `EnvGroup` is used as it is, and only told its place (`EnvGroup.place`).
    A list of `gymnasium.make` names or of functions becomes one `SyncVectorEnv` in next-step autoreset, which the group
    owns.
    """
    if isinstance(env, EnvGroup) and type(env) is not EnvGroup:
        env.place(first_env, purpose)
        return env
    if isinstance(env, EnvGroup):
        return EnvGroup(
            env.env,
            autoreset_mode=env.autoreset_mode,
            mask_in_infos=env.mask_in_infos,
            first_env=first_env,
            purpose=purpose,
        )
    if isinstance(env, VectorEnv):
        return EnvGroup(env, first_env=first_env, purpose=purpose)
    if not isinstance(env, Sequence) or isinstance(env, (str, bytes)):
        raise TypeError(f"envs is a {type(env).__name__}; it must be {_ENVS}")
    made = make_vector_env(env)
    try:
        group = EnvGroup(made, first_env=first_env, purpose=purpose)
    except BaseException:
        made.close()
        raise
    group.owned = True
    return group


def as_groups(envs: Envs) -> list[EnvGroup]:
    """The user's environments, each a group, in the order given.

    Raises:
        ValueError, TypeError: there is none, or one does not keep the environment contract.
    """
    ready = isinstance(envs, Sequence) and any(isinstance(env, (VectorEnv, EnvGroup)) for env in envs)
    if not ready and envs:
        return [as_group(envs)]  # type: ignore[arg-type]
    if isinstance(envs, (str, bytes)) or not isinstance(envs, Sequence):
        raise TypeError(f"envs is a {type(envs).__name__}; it must be {_ENVS}")
    groups: list[EnvGroup] = []
    for env in envs:
        if not isinstance(env, (VectorEnv, EnvGroup)):
            raise TypeError(f"envs has a {type(env).__name__} among vector environments; it must be {_ENVS}")
        group = as_group(env, first_env=sum(group.num_envs for group in groups))
        if any(group.env.unwrapped is other.env.unwrapped for other in groups):
            raise ValueError(
                f"envs has the same {type(group.env.unwrapped).__name__} twice; each must be of environments of its own"
            )
        groups.append(group)
    if not groups:
        raise ValueError(f"envs is empty; it must be {_ENVS}")
    return groups
