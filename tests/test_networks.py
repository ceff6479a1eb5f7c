"""The networks of the built-in policies: which one for which observations, their layers, and what goes in and out."""

import json
import math

import numpy as np
import pytest
import torch
from engine_cases import T, act_in, filled, schedule, settings
from gymnasium import spaces
from torch import nn

from pyppo.actions import Distribution
from pyppo.engines import make_engine
from pyppo.parts import make_policy
from pyppo.policy import ActorCriticPolicy, MLPPolicy, RecurrentPolicy, choose_network, policy_from_recipe
from pyppo.policy.actor_critic import LOG_STD_LIMIT
from pyppo.rollout import Rollout

ATARI = spaces.Box(0, 255, (4, 84, 84), np.uint8)
MINIGRID = spaces.Box(0, 255, (7, 7, 3), np.uint8)
GRID = spaces.Box(0.0, 1.0, (10, 10, 4), np.float32)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)
MASK = spaces.MultiBinary(2)
DISCRETE = Distribution.from_space(spaces.Discrete(2))

CHOICES = [
    ({"obs": VECTOR}, "mlp"), ({"obs": spaces.Discrete(3)}, "mlp"), ({"obs": spaces.Box(0, 9, (4, 4))}, "mlp"),
    ({"obs": ATARI}, "nature_cnn"), ({"obs": spaces.Box(0, 255, (36, 40, 1), np.uint8)}, "nature_cnn"),
    ({"obs": MINIGRID}, "small_cnn"), ({"obs": GRID, "action_mask": MASK}, "small_cnn"),
    ({"obs": spaces.Box(0, 1, (2, 2, 8))}, "mlp"),
    ({"image": MINIGRID, "direction": spaces.Discrete(4)}, "combined"), ({"a": ATARI, "b": MINIGRID}, "combined"),
]  # fmt: skip


def policy_for(entries, cls=ActorCriticPolicy, space=None, **how):
    return cls(spaces.Dict(entries), Distribution.from_space(space or spaces.Discrete(2)), **how)


def random_obs(obs_space, *rows):
    """Tensors as a rollout stores them, within the space."""
    obs_space.seed(0)
    samples = [obs_space.sample() for _ in range(math.prod(rows))]
    return {
        key: torch.from_numpy(np.array([sample[key] for sample in samples])).view(*rows, *(space.shape or ()))
        for key, space in obs_space.items()
    }


@pytest.mark.parametrize(("entries", "network"), CHOICES)
def test_auto_goes_by_the_observations(entries, network):
    assert choose_network("auto", spaces.Dict(entries)) == network
    policy = make_policy(settings(), spaces.Dict(entries), DISCRETE)
    assert policy.network == network
    assert type(policy) is (MLPPolicy if network == "mlp" else ActorCriticPolicy)
    recurrent = make_policy(settings(recurrent="gru", num_minibatches=1), spaces.Dict(entries), DISCRETE)
    assert (type(recurrent), recurrent.network) == (RecurrentPolicy, network)


REFUSED = [
    ("nature_cnn", {"obs": MINIGRID}, "it takes images of at least 36 x 36, not Box"),
    ("small_cnn", {"obs": VECTOR}, "is not one image"),
    ("small_cnn", {"obs": spaces.MultiBinary((5, 5))}, "is not one image"),
    (
        "small_cnn",
        {"image": MINIGRID, "way": spaces.Discrete(4)},
        "must be 'auto', since image: Box.* is not one image",
    ),
    ("combined", {"obs": VECTOR}, "must be 'mlp' or 'auto', since obs: Box.* has no image"),
    ("resnet", {"obs": VECTOR}, "it must be one of auto, mlp, nature_cnn, small_cnn, combined"),
]


@pytest.mark.parametrize(("network", "entries", "message"), REFUSED)
def test_a_network_that_does_not_fit_says_what_does(network, entries, message):
    with pytest.raises(ValueError, match=f"network is '{network}'; .*{message}"):
        policy_for(entries, network=network)


def test_nature_cnn_is_mnihs_with_orthogonal_weights():
    policy = policy_for({"obs": ATARI}, space=spaces.Discrete(6))
    layers = [m for m in policy.encoder.networks[0].layers if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert [tuple(m.weight.shape) for m in layers] == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    assert [m.stride for m in layers[:3]] == [(4, 4), (2, 2), (1, 1)]
    assert sum(p.numel() for p in policy.parameters()) == 1_687_719  # CleanRL's, for six actions
    for layer in layers:
        w = layer.weight.flatten(1)
        torch.testing.assert_close(w @ w.T, 2.0 * torch.eye(len(w)), atol=1e-4, rtol=0)
        assert (layer.bias == 0).all()
    torch.testing.assert_close(policy.actor[0].weight.norm(dim=1), torch.full((6,), 0.01))
    images = random_obs(policy.obs_space, 2)["obs"]
    x = images / 255.0
    for layer in layers[:3]:
        x = torch.relu(nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride))
    hidden = torch.relu(layers[3](x.flatten(1)))
    torch.testing.assert_close(policy.value({"obs": images}), policy.critic[0](hidden).squeeze(1))


@pytest.mark.parametrize("shape", [(7, 7, 3), (3, 7, 7), (10, 10, 4), (9, 12)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int32, np.bool_])
def test_small_cnn_takes_channels_first_or_last_of_any_dtype(shape, dtype):
    box = spaces.Box(0, 1, shape, dtype)
    policy = policy_for({"obs": box}, network="small_cnn", image_scale=10.0)
    x = random_obs(policy.obs_space, 5)["obs"]
    network = policy.encoder.networks[0]
    channels = x[:, None] if len(shape) == 2 else x if shape[0] == 3 else x.movedim(-1, 1)
    scaled = channels.float() / (10.0 if dtype == np.uint8 else 1.0)
    torch.testing.assert_close(policy.value({"obs": x}), policy.critic(network.layers(scaled)).squeeze(1))
    assert network.layers[0].in_channels == {3: min(shape), 2: 1}[len(shape)]


@pytest.mark.parametrize("shape", [(7, 7, 3), (3, 7, 7)])
@pytest.mark.parametrize("network", ["small_cnn", "mlp"])
def test_symbols_are_one_hot_planes_of_their_channel(shape, network):
    policy = policy_for({"obs": spaces.Box(0, 255, shape, np.uint8)}, network=network, image_symbols=11)
    x = torch.randint(0, 11, (4, *shape), dtype=torch.uint8)
    hot = nn.functional.one_hot(x.long(), 11).float()
    if network == "mlp":
        torch.testing.assert_close(policy.prepare({"obs": x}), hot.flatten(1))
    else:
        planes = hot.permute(0, 3, 4, 1, 2) if shape[2] == 3 else hot.permute(0, 1, 4, 2, 3)
        layers = policy.encoder.networks[0].layers
        assert layers[0].in_channels == 33
        torch.testing.assert_close(
            policy.value({"obs": x}), policy.critic(layers(planes.reshape(4, 33, 7, 7))).squeeze(1)
        )
    x[2, 1, 1, 1] = 11
    with pytest.raises(ValueError, match=r"symbols from 0 to 11; image_symbols is 11, so they must be from 0 to 10"):
        policy.value({"obs": x})


def test_symbols_are_of_images_of_integers_alone():
    entries = {"a": MINIGRID, "b": spaces.Box(0, 1, (7, 7, 2), np.float32), "c": spaces.Box(0, 255, (4,), np.uint8)}
    policy = policy_for(entries, image_symbols=11)
    assert [net.layers[0].in_channels for net in policy.encoder.networks] == [33, 2]
    again = policy_from_recipe(json.loads(json.dumps({"class": type(policy).__name__, **policy.to_dict()})))
    again.load_state_dict(policy.state_dict())
    obs = {**random_obs(policy.obs_space, 3), "a": torch.randint(0, 11, (3, 7, 7, 3), dtype=torch.uint8)}
    assert torch.equal(again.value(obs), policy.value(obs))
    with pytest.raises(ValueError, match=r"image_symbols is 11; it must be None, since there is no image of integers"):
        policy_for({"obs": VECTOR}, image_symbols=11)


def test_images_are_prepared_as_they_are_and_the_rest_as_features():
    entries = {"action_mask": MASK, "image": MINIGRID, "speed": VECTOR, "way": spaces.Discrete(4)}
    policy = policy_for(entries, norm_obs=True, hidden_sizes=(16,))
    policy.normalizer.update({"speed": torch.randn(50, 3) * 3 + 1})
    obs = random_obs(policy.obs_space, 6)
    prepared = policy.prepare(obs)
    assert list(prepared) == ["image:image", "features", "action_mask"]
    assert prepared["image:image"] is obs["image"]
    assert prepared["features"].shape == (6, 3 + 4)
    assert policy.num_features == 128 + 7 == policy.actor[0].in_features
    torch.testing.assert_close(policy.value(prepared), policy.value(obs))
    params, _ = policy.heads(prepared)
    assert torch.equal(params["action_mask"], obs["action_mask"].bool())


def test_every_part_of_a_combined_observation_matters():
    entries = {"a": MINIGRID, "b": GRID, "bits": spaces.MultiBinary(2), "way": spaces.MultiDiscrete([3, 2])}
    policy = policy_for(entries, image_scale=10.0)
    obs = random_obs(policy.obs_space, 1)
    before = policy.value(obs)
    for key, x in obs.items():
        changed = {**obs, key: 1 - x.clamp(0, 1)}
        assert not torch.allclose(policy.value(changed), before), key


@pytest.mark.parametrize(("entries", "network"), CHOICES)
@pytest.mark.parametrize("recurrent", [False, True])
def test_recipes_make_the_same_module(entries, network, recurrent):
    how = {"recurrent": "lstm", "recurrent_size": 6} if recurrent else {}
    policy = policy_for(entries, RecurrentPolicy if recurrent else ActorCriticPolicy, image_scale=9.0, **how)
    recipe = json.loads(json.dumps({"class": type(policy).__name__, **policy.to_dict()}))
    assert recipe["network"] == network
    again = policy_from_recipe(recipe)
    again.load_state_dict(policy.state_dict())
    rows = (2, 3) if recurrent else (3,)
    state = (policy.initial_state(3),) if recurrent else ()
    obs = random_obs(policy.obs_space, *rows)
    assert torch.equal(again.value(obs, *state), policy.value(obs, *state))


@pytest.mark.parametrize("entries", [{"obs": ATARI}, {"obs": GRID}, {"image": MINIGRID, "way": spaces.Discrete(4)}])
def test_every_ratio_is_one_at_first(entries):
    config = settings(num_minibatches=1, update_epochs=1, clip_coef=1e-5, num_envs=2, num_steps=3)
    policy = policy_for(entries)
    with torch.no_grad():
        policy.actor[-1].weight.normal_(generator=torch.Generator().manual_seed(1))
    engine = make_engine(config, policy, DISCRETE)
    assert engine.name == "torch"
    assert engine.reason == f"native cannot: the policy's network is {policy.network}, not an mlp"
    rollout = Rollout(3, 2, policy.obs_space, spaces.Discrete(2))
    for key, x in random_obs(policy.obs_space, 4, 2).items():
        rollout.obs[key].copy_(x)
    assert all(x.dtype == torch.uint8 for x in rollout.obs.values() if x.dim() > 4 and x.dtype != torch.float32)
    act_in(engine, rollout)
    rollout.advantages.normal_()
    rollout.returns.normal_()
    rollout.valid[:] = True
    assert engine.update(rollout, schedule(config), 0)["clip_fraction"] == 0.0
    before = engine.flat.data.clone()
    engine.update(rollout, schedule(config), 1)
    moved = engine.flat.split((engine.flat.data - before).abs())
    assert all(x.any() for x in moved.values())


def test_entries_may_have_any_name():
    names = ("items", "a.b", "training", "agent/pos", "features")
    entries = dict.fromkeys(names, VECTOR) | {"image:x": MINIGRID, "values": ATARI}
    policy = policy_for(entries, norm_obs=True)
    obs = random_obs(policy.obs_space, 4)
    policy.normalizer.update(obs)
    assert policy.network == "combined"
    again = policy_from_recipe({"class": "ActorCriticPolicy", **policy.to_dict()})
    again.load_state_dict(policy.state_dict())
    assert torch.equal(again.value(obs), policy.value(policy.prepare(obs)))


# --- state-dependent deviation ----------------------------------------------------------------------------------------

BOX = spaces.Box(-1, 1, (2,), np.float32)


def test_log_std_is_an_output_within_its_limit():
    policy = policy_for({"obs": VECTOR}, MLPPolicy, BOX, state_dependent_std=True, log_std_init=-1.5)
    assert not hasattr(policy, "log_std")
    assert policy.actor[-1].out_features == 4
    obs = {"obs": torch.randn(50, 3)}
    params, _ = policy.heads(obs)
    torch.testing.assert_close(params["log_std"], torch.full((50, 2), -1.5), atol=0.05, rtol=0)
    with torch.no_grad():
        policy.actor[-1].weight.normal_(std=100.0)
    params, _ = policy.heads(obs)
    assert (params["log_std"].abs() <= LOG_STD_LIMIT).all()
    assert params["log_std"].std() > 1
    again = policy_from_recipe({"class": "MLPPolicy", **policy.to_dict()})
    again.load_state_dict(policy.state_dict())
    assert torch.equal(again.heads(obs)[0]["log_std"], params["log_std"])


def test_log_std_init_must_lie_within_the_limit():
    with pytest.raises(ValueError, match=r"log_std_init is 5.0; it must be between -5.0 and 5.0 where state_dep"):
        policy_for({"obs": VECTOR}, MLPPolicy, BOX, state_dependent_std=True, log_std_init=5.0)


@pytest.mark.parametrize("objective", ["clip", "kl"])
def test_a_state_dependent_deviation_is_trained_and_has_its_exact_kl(objective):
    config = settings(num_minibatches=1, update_epochs=1, clip_coef=1e-5, objective=objective, engine="torch")
    policy = policy_for({"obs": VECTOR}, MLPPolicy, BOX, state_dependent_std=True)
    with torch.no_grad():
        policy.actor[-1].weight.normal_(generator=torch.Generator().manual_seed(1))
    engine = make_engine(config, policy, policy.distribution)
    rollout = filled(engine, BOX, obs_space=policy.obs_space)
    obs = {"obs": rollout.obs["obs"][:T].flatten(0, 1)}
    old = torch.distributions.Normal(*[x.detach() for x in spread(policy.heads(obs)[0])])
    metrics = engine.update(rollout, schedule(config), 0)
    assert metrics["clip_fraction"] == 0.0
    assert policy.actor[-1].weight.grad[2:].abs().sum() > 0
    if objective == "kl":
        new = torch.distributions.Normal(*spread(policy.heads(obs)[0]))
        wanted = torch.distributions.kl_divergence(old, new).sum(1).mean().item()
        assert metrics["kl"] == pytest.approx(wanted, rel=1e-3)


def spread(params):
    return params["mean"], params["log_std"].exp()
