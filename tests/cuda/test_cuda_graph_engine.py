"""CudaGraphEngine, captured: against TorchEngine there and on the CPU; what an update may not do; failures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import probes
import pytest
import torch
from engine_cases import (
    FAMILY,
    MASKABLE,
    SPACES,
    N,
    act_in,
    assert_same_metrics,
    box_obs,
    engine_on,
    filled,
    masked_obs,
    new_rollout,
    schedule,
    settings,
    some_valid,
    state_of,
)
from gpu_cases import DEVICE
from gymnasium import spaces
from torch import Tensor, nn

from pyppo import library
from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.engines import make_engine
from pyppo.engines.captured import CaptureError, Graphs
from pyppo.engines.cuda_graph_engine import CudaGraphEngine
from pyppo.engines.torch_engine import TorchEngine
from pyppo.policy import ActorCriticPolicy, MLPPolicy
from pyppo.trainer import Trainer

IMAGES = spaces.Dict(obs=spaces.Box(0, 255, (3, 36, 36), np.uint8))
NEAR = {"rtol": 1e-6, "atol": 1e-8}  # in float64; the rollout keeps float32
ROUGH = {"rtol": 1e-3, "atol": 1e-4}  # in float32


def engines_on(space: spaces.Space, config: Config, **how: Any) -> tuple[CudaGraphEngine, TorchEngine, TorchEngine]:
    """Captured, eager, and on the CPU, with equal policies."""
    on_gpu = config.replace(device=DEVICE)
    captured, eager = engine_on("cuda_graph", space, on_gpu, **how), engine_on("torch", space, on_gpu, **how)
    return captured, eager, engine_on("torch", space, config, **how)


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.cpu() for name, x in tensors.items()}


def assert_same_states(engines: Any, tolerance: dict[str, float]) -> None:
    ours, *others = (on_cpu(state_of(engine)) for engine in engines)
    for theirs in others:
        for name, x in ours.items():
            torch.testing.assert_close(x, theirs[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def assert_updates_alike(
    space: spaces.Space, config: Config, *, tolerance: dict[str, float] = NEAR, double: bool = True, **how: Any
) -> dict[str, float]:
    """All three update the same rollout, and then what they have acted in; the metrics of the first."""
    engines = engines_on(space, config, double=double, **how)
    obs_space = how.get("obs_space")
    rollouts = [filled(engine, space, valid=some_valid(), drift=0.3, obs_space=obs_space) for engine in engines]
    results: list[dict[str, float]] = []
    for iteration in range(2):
        results = [
            engine.update(rollout, schedule(config), iteration)
            for engine, rollout in zip(engines, rollouts, strict=True)
        ]
        for theirs in results[1:]:
            assert_same_metrics(results[0], theirs, **tolerance)
        assert_same_states(engines, tolerance)
        sent = [act_in(engine, rollout) for engine, rollout in zip(engines, rollouts, strict=True)]
        np.testing.assert_allclose(sent[0], sent[1], **tolerance)
    assert engines[0].name == "cuda_graph"
    return results[0]


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- the same results -------------------------------------------------------------------------------------------------


@FAMILY
@pytest.mark.parametrize("parts", [[N], [4, N - 4]], ids=["whole", "two"])
def test_acts_alike(name: str, parts: list[int]) -> None:
    space = SPACES[name]
    engines = engines_on(space, settings(objective="kl"), norm_obs=True, double=True)
    rollouts = [new_rollout(engine, space) for engine in engines]
    for _ in range(3):  # the first time it is captured
        sent = [act_in(engine, rollout, parts) for engine, rollout in zip(engines, rollouts, strict=True)]
        for theirs in sent[1:]:
            np.testing.assert_allclose(sent[0], theirs, **NEAR)
        for key in ("actions", "logp", "values", "steps"):
            first, *rest = (getattr(rollout, key).cpu() for rollout in rollouts)
            for theirs in rest:
                torch.testing.assert_close(first, theirs, rtol=1e-6, atol=1e-6)


@FAMILY
def test_updates_alike(name: str) -> None:
    assert_updates_alike(SPACES[name], settings(norm_obs=True), norm_obs=True)


FIELDS = [
    {"norm_adv": "none"}, {"clip_vloss": False}, {"max_grad_norm": None}, {"objective": "kl", "kl_coef": 0.7},
    {"num_minibatches": 1}, {"num_minibatches": 5}, {"num_minibatches": 66}, {"target_kl": 0.01, "learning_rate": 0.05},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("name", ["discrete", "box"])
def test_every_setting_is_kept(name: str, fields: dict[str, Any]) -> None:
    assert_updates_alike(SPACES[name], settings(**fields))


@pytest.mark.parametrize("name", MASKABLE)
def test_masks(name: str) -> None:
    assert_updates_alike(SPACES[name], settings(), obs_space=masked_obs(SPACES[name]))


@pytest.mark.parametrize("policy", [{"shared_trunk": True}, {"state_dependent_std": True}], ids=str)
def test_policies_in_float32(policy: dict[str, Any]) -> None:
    assert_updates_alike(SPACES["box"], settings(update_epochs=1), double=False, tolerance=ROUGH, **policy)


def image_engine(name: str, config: Config) -> Any:
    distribution = Distribution.from_space(SPACES["discrete"])
    policy = ActorCriticPolicy(IMAGES, distribution, network="nature_cnn")
    return make_engine(config.replace(engine=name), policy, distribution)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_are_channels_last(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    space, config = SPACES["discrete"], settings(update_epochs=1, precision=precision, device=DEVICE)
    engines = image_engine("cuda_graph", config), image_engine("torch", config)
    engines += (image_engine("torch", config.replace(device="cpu")),)
    weight = engines[0].policy.encoder.networks[0].layers[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    tolerance = ROUGH if precision == "fp32" else {"rtol": 0.05, "atol": 0.02}
    results = []
    for engine in engines:
        rollout = filled(engine, space, obs_space=IMAGES, valid=some_valid())
        results.append(engine.update(rollout, schedule(config), 0))
    for theirs in results[1:]:
        assert_same_metrics(results[0], theirs, **tolerance)
    if precision == "fp32":
        assert_same_states(engines, ROUGH)


@FAMILY
def test_bfloat16(name: str) -> None:
    """Captured as eager; the CPU rounds other sums."""
    space, config = SPACES[name], settings(precision="bf16", update_epochs=1)
    captured, eager, _ = engines_on(space, config)
    results = [engine.update(filled(engine, space), schedule(config), 0) for engine in (captured, eager)]
    assert_same_metrics(*results, rtol=0.02, atol=5e-3)
    assert captured.name == "cuda_graph"


def test_rates_and_coefficients_follow_the_schedule() -> None:
    space, config = SPACES["box"], settings(objective="kl", kl_target=0.01)
    engines = engines_on(space, config, double=True)
    rollouts = [filled(engine, space, valid=some_valid()) for engine in engines]
    changes = [{}, {"learning_rate": 5e-4}, {"kl_coef": 2.0}, {"kl_coef": 0.25, "ent_coef": 0.3}, {"clip_coef": 0.05}]
    for iteration, change in enumerate(changes):
        now = schedule(config)._replace(**change)
        for engine, rollout in zip(engines, rollouts, strict=True):
            engine.update(rollout, now, iteration)
        assert_same_states(engines, NEAR)


def test_the_number_of_valid_rows_changes() -> None:
    space, config = SPACES["discrete"], settings()
    engines = engines_on(space, config, double=True)
    rollouts = [filled(engine, space) for engine in engines]
    for iteration, share in enumerate((0.0, 0.03, 0.6, 1.0)):
        valid = torch.rand(rollouts[0].valid.shape, generator=torch.Generator().manual_seed(2)) < share
        for engine, rollout in zip(engines, rollouts, strict=True):
            rollout.valid.copy_(valid)
            engine.update(rollout, schedule(config), iteration)
        assert_same_states(engines, NEAR)


def test_the_order_of_groups_does_not_matter() -> None:
    space = SPACES["box"]
    results = []
    for order in ((0, 4, N), (4, 0, N)):
        engine = engine_on("cuda_graph", space, settings(device=DEVICE))
        rollout = new_rollout(engine, space)
        slices = {0: slice(0, 4), 4: slice(4, N)}
        for t in range(rollout.num_steps):
            for first in order[:2]:
                engine.act(rollout, t, slices[first])
            rollout.steps += 1
        results.append((rollout.actions, rollout.logp, rollout.values))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_run_is_torchs(groups: int) -> None:
    """Through the collector, with its pinned slots, one group or two in turn."""
    results = []
    for name in ("cuda_graph", "torch"):
        config = Config(
            "probe", total_timesteps=600, num_steps=16, num_minibatches=3, update_epochs=2, run_dir=None, device=DEVICE,
            norm_obs=True, norm_reward=True, learning_rate=1e-3, engine=name,
        )  # fmt: skip
        distribution = Distribution.from_space(probes.ContinuousAction().single_action_space)
        obs_space = spaces.Dict(obs=probes.ContinuousAction().single_observation_space)
        policy = MLPPolicy(obs_space, distribution, hidden_sizes=(8,), norm_obs=True).double()
        with Trainer(config, [probes.ContinuousAction() for _ in range(groups)], policy, quiet=True) as trainer:
            results.append(trainer.train())
            assert trainer.engine.name == name
    ours, theirs = (on_cpu(result.policy.state_dict()) for result in results)
    for key, x in ours.items():
        torch.testing.assert_close(x, theirs[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["cuda_graph", "torch"])
def test_the_first_call_on_a_device_may_be_a_run_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes the error flags in inference mode; they are reset outside it."""
    monkeypatch.setattr(library, "error_flags", {})
    config = Config(
        "probe", total_timesteps=200, num_steps=16, num_minibatches=2, update_epochs=1, run_dir=None, device=DEVICE,
        engine=name,
    )  # fmt: skip
    with Trainer(config, [probes.ContinuousAction()], quiet=True) as trainer:
        trainer.train()
        assert trainer.engine.name == name


# --- what an update may not do ----------------------------------------------------------------------------------------


def test_an_update_neither_waits_nor_allocates() -> None:
    space, config = SPACES["box"], settings(device=DEVICE, target_kl=0.5)
    engine = engine_on("cuda_graph", space, config, norm_obs=True)
    rollout = filled(engine, space, valid=some_valid())
    engine.update(rollout, schedule(config), 0)
    rows, update = rollout.valid_rows(), engine._updating
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        update.launch(rows, 1e-3, 1)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert update.read()["updates"] > 0


def test_acting_waits_for_the_actions_only() -> None:
    space = SPACES["box"]
    engine = engine_on("cuda_graph", space, settings(device=DEVICE), norm_obs=True)
    rollout = new_rollout(engine, space)
    engine.act(rollout, 0, slice(0, N))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_waiting():
        sent = engine.act(rollout, 1, slice(0, N))
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    np.testing.assert_array_equal(sent, rollout.actions[1].clamp(-1, 1).cpu().numpy())


def test_the_same_update_gives_the_same_bits() -> None:
    space, config = SPACES["box"], settings(device=DEVICE)
    states = []
    for _ in range(3):
        engine = engine_on("cuda_graph", space, config)
        engine.update(filled(engine, space, valid=some_valid()), schedule(config), 0)
        states.append(state_of(engine))
    for other in states[1:]:
        assert all(torch.equal(x, other[name]) for name, x in states[0].items())


def test_the_current_stream_counts() -> None:
    space, config = SPACES["box"], settings(device=DEVICE)
    plain, other = (engine_on("cuda_graph", space, config) for _ in range(2))
    expected = plain.update(filled(plain, space), schedule(config), 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert other.update(filled(other, space), schedule(config), 0) == expected
        assert torch.cuda.current_stream() == stream
    stream.synchronize()
    assert all(torch.equal(x, state_of(other)[name]) for name, x in state_of(plain).items())


def test_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA device: this needs two")
    space = SPACES["box"]
    results = []
    for device in ("cuda:0", "cuda:1"):
        config = settings(device=device)
        engine = engine_on("cuda_graph", space, config)
        results.append(engine.update(filled(engine, space), schedule(config), 0))
        assert torch.cuda.current_device() == 0
    assert results[0] == results[1]


@pytest.mark.parametrize("change", ["parameters", "rollout", "network", "clip"])
def test_captured_again_after_a_change(change: str) -> None:
    space, config = SPACES["discrete"], settings()
    engines = engines_on(space, config, norm_obs=True, double=True)
    rollouts = [filled(engine, space) for engine in engines]
    for i, engine in enumerate(engines):
        engine.update(rollouts[i], schedule(config), 0)
        policy = engine.policy
        if change == "parameters":
            policy.load_state_dict({k: v.clone() for k, v in policy.state_dict().items()}, assign=True)
        elif change == "rollout":
            rollouts[i] = filled(engine, space)
        elif change == "network":
            policy.actor[1] = nn.ReLU()
        else:
            policy.normalizer.clip = 0.5
        act_in(engine, rollouts[i])
        engine.update(rollouts[i], schedule(config), 1)
    assert_same_states(engines, NEAR)


# --- failures ---------------------------------------------------------------------------------------------------------


class Reading(MLPPolicy):
    """Reads a number back from the device, which no graph can."""

    def heads(self, obs: Any) -> Any:
        params, value = super().heads(obs)
        return params, value if float(value.detach().sum()) < 1e30 else value * 0


class Waiting(MLPPolicy):
    """Waits for the device in a way that shows only while a capture is under way."""

    def heads(self, obs: Any) -> Any:
        torch.cuda.synchronize()
        return super().heads(obs)


@pytest.mark.parametrize("cls", [Reading, Waiting])
def test_auto_goes_on_eagerly(cls: type[MLPPolicy]) -> None:
    space = SPACES["box"]
    results, engines = [], []
    for name, kind in (("auto", cls), ("torch", MLPPolicy)):
        config = settings(device=DEVICE, engine=name)
        policy = kind(box_obs(), Distribution.from_space(space), hidden_sizes=(8,))
        engine = make_engine(config, policy, policy.distribution)
        engines.append(engine)
        results.append(engine.update(filled(engine, space), schedule(config), 0))
    assert results[0] == results[1]
    assert_same_states(engines, {"rtol": 0, "atol": 0})
    assert engines[0].name == "torch"
    assert "cuda_graph cannot: the policy cannot be captured: " in engines[0].reason
    # The device, its allocator and later captures are none the worse for it.
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.rand(3, device=DEVICE).isfinite().all()
    assert_updates_alike(space, settings())


def test_asked_for_it_raises() -> None:
    policy = Reading(box_obs(), Distribution.from_space(SPACES["box"]), hidden_sizes=(8,))
    engine = make_engine(settings(device=DEVICE, engine="cuda_graph"), policy, policy.distribution)
    with pytest.raises(ValueError, match="the policy cannot be captured: RuntimeError"):
        engine.act(new_rollout(engine, SPACES["box"]), 0, slice(0, N))


def test_auto_takes_it_and_says_so() -> None:
    policy = MLPPolicy(box_obs(), Distribution.from_space(SPACES["box"]))
    engine = make_engine(settings(device=DEVICE), policy, policy.distribution)
    assert isinstance(engine, CudaGraphEngine)
    assert engine.reason == "a policy with heads()"
    policy.critic[0].register_forward_hook(lambda *given: None)
    engine = make_engine(settings(device=DEVICE), policy, policy.distribution)
    assert type(engine) is TorchEngine
    assert engine.reason == "cuda_graph cannot: policy.critic.0 has hooks, which a graph would not call"


def test_a_step_that_fails_leaves_no_capture_under_way() -> None:
    graphs, x = Graphs(torch.device(DEVICE, 0)), torch.zeros(3, device=DEVICE)
    for step in (lambda: x.add_(float(x.sum())), lambda: torch.cuda.synchronize()):
        with pytest.raises(CaptureError):
            graphs.capture(step, x.zero_)
        assert not torch.cuda.is_current_stream_capturing()
    graphs = Graphs(torch.device(DEVICE, 0))
    replay = graphs.capture(lambda: x.add_(1), x.zero_)
    for _ in range(3):
        replay()
    assert x.tolist() == [3, 3, 3]
