"""Stable-Baselines3's PPO as a rival of `bench/rivals.py`: runs in an environment of its own, knows nothing of pyppo.

    python bench/sb3_loop.py '{"env_id": "CartPole-v1", "num_envs": 8, ...}' --threads 1 --envs envpool --seconds 4

The last line is JSON: {"steps_per_second": ...}, over whole iterations after the first.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from typing import Any

import envpool
import gymnasium
import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

ACTIVATIONS = {"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU, "elu": torch.nn.ELU, "silu": torch.nn.SiLU}


class EnvPoolVecEnv(VecEnv):
    """EnvPool as Stable-Baselines3 wants environments: a finished one is reset in the same step, float32 spaces."""

    def __init__(self, env_id: str, num_envs: int, threads: int, options: dict[str, Any]) -> None:
        self.pool = envpool.make(
            env_id, env_type="gymnasium", num_envs=num_envs, num_threads=threads, seed=1, **options
        )
        super().__init__(num_envs, _float32(self.pool.observation_space), _float32(self.pool.action_space))
        self.render_mode = None

    def reset(self) -> np.ndarray:
        return self.pool.reset()[0].astype(self.observation_space.dtype)

    def step_async(self, actions: np.ndarray) -> None:
        self.pool.send(actions)

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        obs, rewards, terminated, truncated, _ = self.pool.recv()
        obs, dones = obs.astype(self.observation_space.dtype), terminated | truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if len(ended := np.flatnonzero(dones).astype(np.int32)):
            for i in ended:
                infos[i] = {"terminal_observation": obs[i].copy(), "TimeLimit.truncated": bool(truncated[i])}
            obs[ended] = self.pool.reset(ended)[0]
        return obs, rewards, dones, infos

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [None] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None: ...

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs


def _float32(space: gymnasium.Space) -> gymnasium.Space:
    if isinstance(space, gymnasium.spaces.Box) and space.dtype == np.float64:
        return gymnasium.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32))
    return space


def make_envs(config: dict[str, Any], kind: str, threads: int) -> VecEnv:
    """EnvPool, or the gymnasium environment of that name in one process, as Stable-Baselines3's users have it."""
    if kind == "dummy":
        env: VecEnv = make_vec_env(config["env_id"], n_envs=config["num_envs"], vec_env_cls=DummyVecEnv)
    else:
        env = VecMonitor(EnvPoolVecEnv(config["env_id"], config["num_envs"], threads, config["env_options"]))
    if config["norm_obs"] or config["norm_reward"]:
        env = VecNormalize(env, norm_obs=config["norm_obs"], norm_reward=config["norm_reward"], gamma=config["gamma"])
    return env


class Meter(BaseCallback):
    """Notes when each iteration begins; ends after some seconds and two whole iterations beyond the first."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.starts = seconds, list[float]()

    def _on_rollout_start(self) -> None:
        self.starts.append(time.perf_counter())

    def _on_step(self) -> bool:
        return not (len(self.starts) > 3 and self.starts[-1] - self.starts[1] >= self.seconds)


def steps_per_second(config: dict[str, Any], kind: str, threads: int, seconds: float) -> float:
    torch.set_num_threads(threads)
    sizes = list(config["hidden_sizes"])
    model = PPO(
        "MlpPolicy",
        make_envs(config, kind, threads),
        n_steps=config["num_steps"],
        batch_size=config["num_envs"] * config["num_steps"] // config["num_minibatches"],
        n_epochs=config["update_epochs"],
        learning_rate=config["learning_rate"],
        gamma=config["gamma"],
        gae_lambda=config["gae_lambda"],
        clip_range=config["clip_coef"],
        ent_coef=config["ent_coef"],
        vf_coef=config["vf_coef"] / 2,  # its value loss has no 1/2
        max_grad_norm=config["max_grad_norm"] or 1e9,
        policy_kwargs={
            "net_arch": {"pi": sizes, "vf": sizes},
            "activation_fn": ACTIVATIONS[config["activation"]],
            "optimizer_kwargs": {"eps": config["adam_eps"]},
        },
        device="cpu",
        seed=1,
    )
    meter = Meter(seconds)
    model.learn(total_timesteps=10**9, callback=meter)
    elapsed = meter.starts[-1] - meter.starts[1]
    return (len(meter.starts) - 2) * config["num_envs"] * config["num_steps"] / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=json.loads, help="pyppo's Config as JSON")
    parser.add_argument("--envs", choices=["envpool", "dummy"], default="envpool")
    parser.add_argument("--threads", type=int, default=1, help="torch's and EnvPool's")
    parser.add_argument("--seconds", type=float, default=4.0)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    speed = steps_per_second(given.config, given.envs, given.threads, given.seconds)
    print(json.dumps({"steps_per_second": speed}))


if __name__ == "__main__":
    main()
