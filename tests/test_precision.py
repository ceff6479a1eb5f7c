"""`precision="bf16"`: which part is rounded to bfloat16, and which is not."""

import numpy as np
import probes
import pytest
import torch
from engine_cases import (
    FAMILY,
    SPACES,
    N,
    T,
    WithoutHeads,
    act_in,
    box_obs,
    engine_on,
    filled,
    on_graphs,
    schedule,
    settings,
    state_of,
)
from gymnasium import spaces
from torch import nn

import pyppo
from pyppo.actions import Distribution, log_prob_entropy
from pyppo.config import Config
from pyppo.engines import make_engine
from pyppo.engines.sequence_engine import SequenceEngine
from pyppo.engines.torch_engine import TorchEngine
from pyppo.policy import ActorCriticPolicy, MLPPolicy, RecurrentPolicy
from pyppo.rollout import Rollout
from pyppo.trainer import Trainer

# A product of two numbers that are rounded to 8 bits each is within this, relative to the largest of its sum.
ROUNDED = {"rtol": 0.02, "atol": 0.02}


def rounded_forward(policy, x, part):
    """A stack of layers as autocast computes it: bfloat16 in, weights and out; each product's sums are float32's."""
    for layer in getattr(policy, part):
        if isinstance(layer, nn.Linear):
            x, weight, bias = (y.bfloat16().double() for y in (x, layer.weight, layer.bias))
            x = (x @ weight.T + bias).bfloat16()
        else:
            x = layer(x.double()).bfloat16()
    return x.float()


@pytest.mark.parametrize("captured", [False, True])
@FAMILY
def test_networks_are_rounded_and_what_is_made_of_them_is_not(name, captured):
    space, config = SPACES[name], settings(precision="bf16")
    engine = engine_on("torch", space, config)
    engine = on_graphs(engine) if captured else engine
    rollout = filled(engine, space)
    obs = rollout.obs["obs"][:T].flatten(0, 1)
    with torch.no_grad():
        outputs, values = (rounded_forward(engine.policy, obs, part) for part in ("actor", "critic"))
        exact = engine.policy.value({"obs": obs})
    values = values.squeeze(1)
    torch.testing.assert_close(rollout.values[:T].flatten(), values, rtol=0, atol=float(values.abs().max()) / 120)
    assert torch.equal(rollout.values[:T], rollout.values[:T].bfloat16().float())
    assert not torch.equal(rollout.values[:T].flatten(), exact)
    torch.testing.assert_close(rollout.values[:T].flatten(), exact, **ROUNDED)
    params = {"mean": outputs, "log_std": engine.policy.log_std} if name == "box" else {"logits": outputs}
    logp, _ = log_prob_entropy(engine.distribution, params, rollout.actions.flatten(0, 1))
    torch.testing.assert_close(rollout.logp.flatten(), logp, atol=0.05, rtol=0.02)
    if name != "multi-binary":  # whose rounding adds up to what bfloat16 has
        assert not torch.equal(rollout.logp, rollout.logp.bfloat16().float())


@pytest.mark.parametrize("captured", [False, True])
@FAMILY
def test_updates_are_near_those_of_float32(name, captured):
    space = SPACES[name]
    rough = engine_on("torch", space, settings(precision="bf16", objective="kl"))
    rough = on_graphs(rough) if captured else rough
    exact = engine_on("torch", space, settings(objective="kl"))
    rollout = filled(exact, space)
    ours, theirs = (engine.update(rollout, schedule(exact.config), 0) for engine in (rough, exact))
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, rtol=0.1, atol=0.03, err_msg=key)
    for key, x in state_of(rough).items():
        assert x.dtype in (torch.float32, torch.int64)
        if key in dict(exact.policy.named_parameters()):
            difference = (x - state_of(exact)[key]).abs().max()
            assert difference < 12 * 1e-3, key  # twelve steps of at most the learning rate each
    assert any(not torch.equal(x, state_of(exact)[key]) for key, x in state_of(rough).items() if key != "step")


def test_gradients_are_those_of_the_rounded_network():
    """One step, against autograd through the same autocast with the loss in plain float64."""
    space, config = (
        SPACES["discrete"],
        settings(precision="bf16", num_minibatches=1, update_epochs=1, norm_adv="none", ent_coef=0.0, clip_vloss=False),
    )
    engine = engine_on("torch", space, config)
    rollout = filled(engine, space)
    with torch.autocast("cpu", torch.bfloat16):
        params, value = engine.policy.heads({"obs": rollout.obs["obs"][:T].flatten(0, 1)})
    logp = params["logits"].double().log_softmax(1).gather(1, rollout.actions.view(-1, 1)).squeeze(1)
    advantages, returns = (x.flatten().double() for x in (rollout.advantages, rollout.returns))
    loss = (0.5 * 0.5 * (value.double() - returns) ** 2 - (logp - rollout.logp.flatten()).exp() * advantages).mean()
    expected = torch.autograd.grad(loss, list(engine.policy.parameters()))
    engine.update(rollout, schedule(config), 0)
    for (key, p), grad in zip(engine.policy.named_parameters(), expected, strict=True):
        scale = float(grad.abs().max())
        torch.testing.assert_close(
            p.grad, grad, rtol=0.02, atol=0.02 * scale, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_captured_steps_round_alike():
    space, config = SPACES["box"], settings(precision="bf16")
    ours, theirs = on_graphs(engine_on("torch", space, config)), engine_on("torch", space, config)
    results = []
    for engine in (ours, theirs):
        rollout = filled(engine, space)
        results.append((engine.update(rollout, schedule(config), 0), act_in(engine, rollout)))
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-2)
    for key, value in results[0][0].items():
        np.testing.assert_allclose(value, results[1][0][key], rtol=0.02, atol=2e-3, err_msg=key)


def test_images_under_bf16():
    images = spaces.Dict(obs=spaces.Box(0, 255, (3, 10, 12), np.uint8))
    space, config = SPACES["discrete"], settings(precision="bf16", update_epochs=1, engine="torch")
    policy = ActorCriticPolicy(images, Distribution.from_space(space), network="small_cnn")
    engine = make_engine(config, policy, policy.distribution)
    rollout = filled(engine, space, obs_space=images)
    with torch.no_grad():
        exact = policy.value({"obs": rollout.obs["obs"][T]})
    torch.testing.assert_close(rollout.values[T], exact, rtol=0.05, atol=0.03)
    assert not torch.equal(rollout.values[T], exact)
    assert engine.update(rollout, schedule(config), 0)["updates"] == 4


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_memory_s_state_stays_float32(kind):
    space, config = SPACES["discrete"], settings(precision="bf16", recurrent=kind, num_minibatches=2)
    policy = RecurrentPolicy(
        box_obs(), Distribution.from_space(space), recurrent=kind, recurrent_size=8, hidden_sizes=(8,)
    )
    engine = make_engine(config, policy, policy.distribution)
    assert isinstance(engine, SequenceEngine)
    rollout = Rollout(T, N, box_obs(), space, state_shape=engine.state_shape)
    rollout.obs["obs"].normal_(generator=torch.Generator().manual_seed(0))
    rollout.starts[0], rollout.starts[3, :4] = True, True
    act_in(engine, rollout)
    assert not torch.equal(rollout.states, rollout.states.bfloat16().float())
    exact = policy.initial_state(N)
    for t in range(T):
        exact[rollout.starts[t]] = 0
        with torch.no_grad():
            exact = policy.heads({"obs": rollout.obs["obs"][t : t + 1]}, exact)[2]
    torch.testing.assert_close(rollout.states[T], exact, rtol=0.02, atol=0.02)
    rollout.returns.normal_(generator=torch.Generator().manual_seed(1))
    rollout.valid[:] = True
    assert engine.update(rollout, schedule(config), 0)["updates"] == 6


def test_a_policy_without_heads():
    space, config = SPACES["box"], settings(precision="bf16")
    distribution = Distribution.from_space(space)
    engine = make_engine(config, WithoutHeads(MLPPolicy(box_obs(), distribution, hidden_sizes=(8,))), distribution)
    rollout = filled(engine, space)
    assert torch.equal(rollout.values, rollout.values.bfloat16().float())
    assert engine.update(rollout, schedule(config), 0)["updates"] == 12


# --- who takes it -----------------------------------------------------------------------------------------------------


def test_native_says_that_it_does_not():
    policy = MLPPolicy(box_obs(), Distribution.from_space(SPACES["discrete"]))
    why = "precision is 'bf16', and it computes in the parameters' own"
    with pytest.raises(ValueError, match=f"engine is 'native'; it must be 'auto' or 'torch', since {why}"):
        make_engine(settings(engine="native", precision="bf16"), policy, policy.distribution)
    engine = make_engine(settings(precision="bf16"), policy, policy.distribution)
    assert type(engine) is TorchEngine
    assert engine.reason == f"native cannot: {why}"


def test_parameters_must_be_float32():
    policy = MLPPolicy(box_obs(), Distribution.from_space(SPACES["discrete"])).double()
    with pytest.raises(ValueError, match=r"precision is 'bf16'; it must be 'fp32', .* parameters are torch\.float64"):
        make_engine(settings(precision="bf16"), policy, policy.distribution)


def test_a_run_learns_and_is_evaluated_in_float32(tmp_path):
    """What is loaded knows nothing of it."""
    config = Config(
        "probe", total_timesteps=1_000, num_steps=16, num_minibatches=2, update_epochs=4, learning_rate=0.01,
        anneal_lr=False, hidden_sizes=(16,), run_dir=str(tmp_path), device="cpu", precision="bf16", gamma=0.5,
    )  # fmt: skip
    with Trainer(config, probes.ObservationAction(), quiet=True) as trainer:
        result = trainer.train()
    loaded = pyppo.load(result.run_dir)
    obs = np.array([[-1.0], [1.0]], np.float32)
    np.testing.assert_array_equal(loaded.act(obs, deterministic=True), result.policy.act(obs, deterministic=True))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert not torch.is_autocast_enabled("cpu")
    assert result.history["loss"][-1] < result.history["loss"][0]
