"""Pairs of engines on equal policies, the rollouts that they act in, and how their results are compared."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.engines import Schedule, make_engine
from pyppo.engines.captured import Graphs
from pyppo.engines.cuda_graph_engine import CudaGraphEngine
from pyppo.masks import MASK
from pyppo.policy import MLPPolicy
from pyppo.rollout import Rollout

T, N, FEATURES = 6, 11, 3

SPACES = {
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 5, 3]),
    "multi-binary": spaces.MultiBinary(3),
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
}

MASKABLE = [name for name, space in SPACES.items() if not isinstance(space, spaces.Box)]

DOUBLE = pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
FAMILY = pytest.mark.parametrize("name", SPACES)


class WithoutHeads(nn.Module):
    """An MLPPolicy that shows nothing but the protocol's two methods."""

    def __init__(self, policy):
        super().__init__()
        self.inner = policy

    def evaluate(self, obs, actions, state=None):
        return self.inner.evaluate(obs, actions)

    def act(self, obs, deterministic=False):
        return self.inner.act(obs, deterministic)


def box_obs(features=FEATURES):
    return spaces.Dict({"obs": spaces.Box(-np.inf, np.inf, (features,), np.float32)})


def masked_obs(space, features=FEATURES):
    """Plain observations and an action mask for this action space."""
    flags = Distribution.from_space(space).num_params
    return spaces.Dict(**box_obs(features).spaces, action_mask=spaces.MultiBinary(flags))


def masks_for(distribution, rows, seed=0):
    """Random masks that allow something of every component; bool [rows, A]."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, distribution.num_params, generator=generator) < 0.5
    if distribution.nvec is not None:
        for part in mask.split(distribution.nvec, dim=1):
            part[torch.arange(rows), torch.randint(part.shape[1], (rows,), generator=generator)] = True
    return mask


def allowed(distribution, mask, actions):
    """Whether the mask allows each action, bool [B]."""
    actions = actions.reshape(len(actions), -1)
    if distribution.kind == "bernoulli":
        return (mask | ~actions.bool()).all(1)
    parts = mask.split(distribution.nvec, dim=1)
    columns = actions.long().unbind(1)
    return torch.stack([part.gather(1, a[:, None])[:, 0] for part, a in zip(parts, columns, strict=True)]).all(0)


def settings(**fields):
    return Config(**{
        "env_id": "none", "num_envs": N, "num_steps": T, "num_minibatches": 4, "update_epochs": 3, "ent_coef": 0.01,
        "learning_rate": 1e-3, "device": "cpu", "run_dir": None, **fields,
    })  # fmt: skip


def engine_on(name, space, config, *, obs_space=None, double=False, **policy_settings):
    """An engine of this name, on a policy whose initial weights are the same for every engine."""
    distribution = Distribution.from_space(space, config.action_bounds)
    policy = MLPPolicy(obs_space or box_obs(), distribution, **{"hidden_sizes": (8,), **policy_settings})
    with torch.no_grad():  # a policy head of gain 0.01 would hide most of what can go wrong
        for p in policy.actor[-1].parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.5)
    if policy.normalizer is not None:
        generator = torch.Generator().manual_seed(3)
        shapes = {key: shape for key, shape in policy.obs_shapes.items() if key != MASK}
        rows = {key: torch.randn(50, *shape, generator=generator) * 3 + 1 for key, shape in shapes.items()}
        policy.normalizer.update(rows)
    if double:
        policy.double()
    return make_engine(config.replace(engine=name), policy, distribution)


def engine_pair(space, config, **how):
    """A NativeEngine and a TorchEngine on equal policies."""
    return engine_on("native", space, config, **how), engine_on("torch", space, config, **how)


class Rehearsing(Graphs):
    """Calls a step as often as a capture does, and then the step itself is what is run."""

    def capture(self, step, start):
        for _ in range(2):
            start()
            step()
        start()
        return step


def on_graphs(general, graphs=Rehearsing, **fields):
    """A CudaGraphEngine on the policy of another engine, which is used no more."""
    config = general.config.replace(**{"engine": "cuda_graph", **fields})
    kind = type("OnTheCpu", (CudaGraphEngine,), {"new_graphs": staticmethod(graphs)})
    return kind(general.policy, config, torch.device("cpu"), general.distribution)


def new_rollout(engine, space, *, steps=T, rows=N, obs_space=None):
    """A rollout for `engine` with random observations, among them an action mask, and nothing else."""
    rollout = Rollout(steps, rows, obs_space or box_obs(), space, store_dist=engine.dist_shapes, device=engine.device)
    generator = torch.Generator().manual_seed(0)
    for key, x in rollout.obs.items():
        if key == MASK:
            x.copy_(masks_for(engine.distribution, (steps + 1) * rows).view(x.shape))
        elif x.is_floating_point():
            x.copy_(torch.randn(x.shape, generator=generator) * 2)
        else:
            x.copy_(torch.randint(0, 255, x.shape, generator=generator))
    rollout.steps.copy_(torch.arange(rows) * 7)
    return rollout


def act_in(engine, rollout, parts=None):
    """Let `engine` act in all of a rollout, in parts of these sizes; what was sent, [T, N, *shape]."""
    edges = np.cumsum([0, *(parts or [rollout.num_envs])])
    sent = []
    for t in range(rollout.num_steps):
        slices = [slice(int(first), int(stop)) for first, stop in pairwise(edges)]
        sent.append(np.concatenate([engine.act(rollout, t, rows) for rows in slices]))
        rollout.steps += 1
    engine.bootstrap(rollout)
    return np.stack(sent)


def filled(engine, space, *, valid=None, drift=0.0, **shape):
    """A rollout that `engine` acted in, with random advantages and returns.

    `drift` moves the old log-probs and values off what the policy says, so that the clip ranges matter at once.
    """
    rollout = new_rollout(engine, space, **shape)
    act_in(engine, rollout)
    generator = torch.Generator().manual_seed(1)
    for x in (rollout.advantages, rollout.returns):
        x.copy_(torch.randn(x.shape, generator=generator))
    for x in (rollout.logp, rollout.values):
        x += drift * torch.randn(x.shape, generator=generator).to(x)
    rollout.valid.copy_(torch.tensor(True) if valid is None else valid)
    return rollout


def some_valid(steps=T, rows=N):
    """Four rows in five."""
    return torch.rand(steps, rows, generator=torch.Generator().manual_seed(1)) < 0.8


def schedule(config):
    return Schedule(config.learning_rate, config.clip_coef, config.ent_coef, config.kl_coef)


def state_of(engine):
    """Parameters and optimiser, by name."""
    return {**{name: p.detach().clone() for name, p in engine.policy.named_parameters()}, **engine.state_dict()}


def assert_same_state(native, general, *, rtol, atol):
    ours, theirs = state_of(native), state_of(general)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_metrics(ours, theirs, *, rtol, atol):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=rtol, atol=atol, err_msg=name)
