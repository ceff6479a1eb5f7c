"""Action distributions, the MLP policy and the flat parameters."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from pyppo.actions import Distribution, log_prob_entropy, stream_seed
from pyppo.policy import FlatParameters, MLPPolicy, Policy

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
OBS = spaces.Dict({"obs": BOX})


def policy_for(action_space, obs_space=OBS, **settings):
    return MLPPolicy(obs_space, Distribution.from_space(action_space), **settings)


# --- distributions ----------------------------------------------------------------------------------------------------

SPACES = {
    "discrete": (spaces.Discrete(4), "categorical", 4),
    "discrete from 3": (spaces.Discrete(2, start=3), "categorical", 2),
    "multi-discrete": (spaces.MultiDiscrete([2, 3]), "multi_categorical", 5),
    "multi-binary": (spaces.MultiBinary(3), "bernoulli", 3),
    "box": (spaces.Box(-1.0, 2.0, (2,), np.float32), "normal", 2),
    "matrix": (spaces.Box(-1.0, 2.0, (2, 2), np.float64), "normal", 4),
}


@pytest.mark.parametrize("name", SPACES)
def test_a_space_gives_its_family_and_survives_json(name):
    space, kind, width = SPACES[name]
    distribution = Distribution.from_space(space)
    assert (distribution.kind, distribution.num_params, distribution.shape) == (kind, width, space.shape)
    again = Distribution.from_dict(json.loads(json.dumps(distribution.to_dict())))
    assert again.to_dict() == distribution.to_dict()


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_act_answers_in_the_space(name, deterministic):
    space = SPACES[name][0]
    policy = policy_for(space, log_std_init=2.0)
    batch = policy.act(np.zeros((5, 3), np.float32), deterministic)
    assert batch.shape == (5, *space.shape)
    assert all(space.contains(np.asarray(action, dtype=space.dtype)) for action in batch)
    single = policy.act(np.zeros(3, np.float32), deterministic)
    assert np.shape(single) == space.shape


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Box(0.0, 1.0, ())])
def test_other_spaces_are_refused(space):
    with pytest.raises(TypeError, match="action space .* is not supported"):
        Distribution.from_space(space)


def test_clip_sends_a_copy():
    distribution = Distribution.from_space(spaces.Box(-1.0, 1.0, (2,), np.float32))
    sampled = np.array([[-3.0, 0.5]], np.float32)
    np.testing.assert_array_equal(distribution.to_env(sampled), [[-1.0, 0.5]])
    np.testing.assert_array_equal(sampled, [[-3.0, 0.5]])


def test_rescale_stretches_bounded_components_only():
    space = spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([10.0, np.inf], np.float32))
    distribution = Distribution.from_space(space, "rescale")
    sampled = np.array([[-1.0, -7.0], [0.0, 7.0], [4.0, 0.0]], np.float32)
    np.testing.assert_allclose(distribution.to_env(sampled), [[0.0, -7.0], [5.0, 7.0], [10.0, 0.0]])


def test_limits_of_the_type_are_no_bounds():
    largest = np.finfo(np.float32).max
    distribution = Distribution.from_space(spaces.Box(-largest, largest, (1,), np.float32), "rescale")
    np.testing.assert_array_equal(distribution.to_env(np.array([[5.0]], np.float32)), [[5.0]])


def test_discrete_start_is_added():
    distribution = Distribution.from_space(spaces.Discrete(2, start=3))
    np.testing.assert_array_equal(distribution.to_env(np.array([0, 1])), [3, 4])


def test_log_prob_entropy_by_hand():
    # Two coins: P = 1/4 and 3/4; entropy of each -(1/4 log 1/4 + 3/4 log 3/4).
    logits = torch.tensor([[0.0, math.log(3.0), math.log(3.0), 0.0]])
    multi = Distribution.from_space(spaces.MultiDiscrete([2, 2]))
    logp, entropy = log_prob_entropy(multi, {"logits": logits}, torch.tensor([[0, 0]]))
    coin = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(logp, torch.tensor([math.log(0.25) + math.log(0.75)]))
    torch.testing.assert_close(entropy, torch.tensor([2 * coin]))
    # Standard normal in two dimensions, at (1, 0).
    normal = Distribution.from_space(spaces.Box(-1, 1, (2,), np.float32))
    params = {"mean": torch.zeros(1, 2), "log_std": torch.zeros(2)}
    logp, entropy = log_prob_entropy(normal, params, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(logp, torch.tensor([-0.5 - math.log(2 * math.pi)]))
    torch.testing.assert_close(entropy, torch.tensor([1 + math.log(2 * math.pi)]))


def test_streams_differ():
    seeds = {stream_seed(seed, stream) for seed in range(50) for stream in ("act", "minibatches", "policy")}
    assert len(seeds) == 150
    assert all(0 <= seed < 2**63 for seed in seeds)


# --- the MLP ----------------------------------------------------------------------------------------------------------


def test_orthogonal_gains_and_zero_biases():
    policy = policy_for(spaces.Discrete(4), hidden_sizes=(8, 8))
    for network, gain in ((policy.actor, 0.01), (policy.critic, 1.0)):
        layers = [m for m in network if isinstance(m, nn.Linear)]
        assert all((layer.bias == 0).all() for layer in layers)
        hidden = layers[1].weight
        torch.testing.assert_close(hidden @ hidden.T, 2.0 * torch.eye(8), atol=1e-5, rtol=0)
        last = layers[-1].weight
        torch.testing.assert_close(last @ last.T, gain**2 * torch.eye(len(last)), atol=1e-6, rtol=0)


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, second, other = (policy_for(spaces.Discrete(2), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.actor[0].weight, second.actor[0].weight)
    assert not torch.equal(first.actor[0].weight, other.actor[0].weight)


def test_act_changes_no_statistics_and_normalises():
    policy = policy_for(spaces.Discrete(2), norm_obs=True)
    policy.normalizer.update({"obs": torch.randn(100, 3) * 5 + 2})
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    policy.act(np.full((4, 3), 9.0, np.float32))
    assert all(torch.equal(x, before[name]) for name, x in policy.state_dict().items())
    raw = {"obs": torch.full((1, 3), 9.0)}
    features = policy.prepare(raw)
    assert not torch.allclose(features, raw["obs"])
    torch.testing.assert_close(policy.value(raw), policy.value(features))


def test_dict_and_image_observations():
    obs_space = spaces.Dict(image=spaces.Box(0, 255, (2, 2), np.uint8), speed=spaces.Box(-1, 1, (), np.float64))
    policy = policy_for(spaces.Discrete(2), obs_space, norm_obs=True)
    one = {"image": np.full((2, 2), 255, np.uint8), "speed": np.float64(0.5)}
    many = {"image": np.full((3, 2, 2), 255, np.uint8), "speed": np.full(3, 0.5)}
    assert np.shape(policy.act(one)) == ()
    assert policy.act(many).shape == (3,)
    features = policy.prepare({key: torch.as_tensor(x) for key, x in many.items()})
    torch.testing.assert_close(features[:, :4], torch.ones(3, 4))


def test_observations_of_another_shape_are_refused():
    policy = policy_for(spaces.Discrete(2))
    with pytest.raises(ValueError, match=r"obs\['obs'\] has shape \(4,\); it must be \(3,\) or \(batch, 3\)"):
        policy.act(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="the policy was trained on"):
        policy.act({"pixels": np.zeros(3, np.float32)})


def test_sampled_actions_follow_the_seed():
    policy = policy_for(spaces.Box(-9, 9, (2,), np.float32))
    obs = np.zeros((6, 3), np.float32)
    before = policy.reseed(7)
    first = policy.act(obs)
    assert not np.array_equal(first, policy.act(obs))
    policy.reseed(7)
    np.testing.assert_array_equal(first, policy.act(obs))
    policy.reseed(*before)
    np.testing.assert_array_equal(policy.act(obs, deterministic=True), policy.act(obs, deterministic=True))


def test_recipe_makes_the_same_module():
    policy = policy_for(spaces.Box(-1, 1, (2,), np.float32), norm_obs=True, clip_obs=5.0, hidden_sizes=(7,))
    again = MLPPolicy.from_dict(json.loads(json.dumps(policy.to_dict())))
    again.load_state_dict(policy.state_dict())
    obs = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(policy.act(obs, deterministic=True), again.act(obs, deterministic=True))
    assert again.normalizer.clip == 5.0
    assert isinstance(policy, Policy)


def test_a_shared_trunk_is_the_networks_hidden_part():
    """The hidden layers are one set of parameters; each head is linear, and has its own gain."""
    policy = policy_for(spaces.Discrete(4), hidden_sizes=(8, 6), shared_trunk=True)
    assert [name for name, _ in policy.named_parameters()] == [
        f"{part}.{kind}" for part in ("trunk.0", "trunk.2", "actor.0", "critic.0") for kind in ("weight", "bias")
    ]
    torch.testing.assert_close(policy.trunk[2].weight @ policy.trunk[2].weight.T, 2.0 * torch.eye(6))
    torch.testing.assert_close(policy.actor[0].weight @ policy.actor[0].weight.T, 1e-4 * torch.eye(4))
    torch.testing.assert_close(policy.critic[0].weight.norm(), torch.tensor(1.0))
    obs = {"obs": torch.randn(5, 3)}
    hidden = torch.tanh(policy.trunk[2](torch.tanh(policy.trunk[0](obs["obs"]))))
    params, value = policy.heads(obs)
    torch.testing.assert_close(params["logits"], policy.actor[0](hidden))
    torch.testing.assert_close(value, policy.critic[0](hidden).squeeze(1))
    assert torch.equal(policy.value(obs), value)
    again = MLPPolicy.from_dict(json.loads(json.dumps(policy.to_dict())))
    again.load_state_dict(policy.state_dict())
    assert torch.equal(again.value(obs), value)


def test_a_trunk_without_layers_is_linear():
    policy = policy_for(spaces.Discrete(4), hidden_sizes=(), shared_trunk=True)
    assert [name for name, _ in policy.named_parameters()] == [
        "actor.0.weight", "actor.0.bias", "critic.0.weight", "critic.0.bias",
    ]  # fmt: skip
    assert policy.value({"obs": torch.randn(5, 3)}).shape == (5,)


def test_recipes_from_before_there_was_a_trunk_are_read():
    policy = policy_for(spaces.Discrete(4))
    recipe = policy.to_dict()
    assert recipe.pop("shared_trunk") is False
    MLPPolicy.from_dict(recipe).load_state_dict(policy.state_dict())


LEAVES = spaces.Dict(
    bits=spaces.MultiBinary((2, 2)),
    image=spaces.Box(0, 255, (1, 2), np.uint8),
    kind=spaces.Discrete(3, start=-1),
    pair=spaces.MultiDiscrete([2, 3], start=[5, 0]),
    position=spaces.Box(-1, 1, (), np.float64),
    tile=spaces.Box(0, 9, (1,), np.int32),
)


def test_features_of_every_leaf():
    policy = policy_for(spaces.Discrete(2), LEAVES)
    obs = {
        "bits": np.array([[1, 0], [0, 1]], np.int8), "image": np.array([[255, 51]], np.uint8), "kind": np.int64(1),
        "pair": np.array([6, 0]), "position": np.float32(0.5), "tile": np.array([7], np.int32),
    }  # fmt: skip
    features = policy.prepare({key: torch.as_tensor(x)[None] for key, x in obs.items()})
    wanted = [1, 0, 0, 1, 1, 0.2, 0, 0, 1, 0, 1, 1, 0, 0, 0.5, 7]
    torch.testing.assert_close(features, torch.tensor([wanted]))
    assert policy.num_features == len(wanted)
    assert np.shape(policy.act(obs)) == ()
    again = MLPPolicy.from_dict(json.loads(json.dumps(policy.to_dict())))
    again.load_state_dict(policy.state_dict())
    assert np.array_equal(again.act(obs, deterministic=True), policy.act(obs, deterministic=True))
    assert {key: again.obs_space[key] for key in ("bits", "kind", "pair")} == {
        key: LEAVES[key] for key in ("bits", "kind", "pair")
    }


@pytest.mark.parametrize(("key", "value"), [("kind", 2), ("kind", -2), ("pair", [4, 0]), ("pair", [5, 3])])
def test_a_value_outside_its_finite_set_is_refused(key, value):
    policy = policy_for(spaces.Discrete(2), spaces.Dict({key: LEAVES[key]}))
    with pytest.raises(ValueError, match="an observation of .* it must lie in that space"):
        policy.act({key: np.array(value)})


def test_recipes_of_boxes_by_shape_and_dtype_are_read():
    policy = policy_for(spaces.Discrete(2), spaces.Dict(b=BOX, a=spaces.Box(0, 255, (2,), np.uint8)))
    recipe = policy.to_dict()
    del recipe["obs_space"]
    recipe["obs_shapes"], recipe["obs_dtypes"] = {"b": [3], "a": [2]}, {"b": "float32", "a": "uint8"}
    again = MLPPolicy.from_dict(recipe)
    again.load_state_dict(policy.state_dict())
    obs = {"a": torch.randint(0, 255, (4, 2), dtype=torch.uint8), "b": torch.randn(4, 3)}
    assert torch.equal(again.value(obs), policy.value(obs))


# --- flat parameters --------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Two layers that share one weight, a frozen layer and a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(5, 3).requires_grad_(False)
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x):
        return self.frozen(self.second(torch.tanh(self.first(x + self.shift))))


def test_parameters_are_views_at_padded_offsets():
    module = Tied()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    flat = FlatParameters(module)
    assert flat.names == ("first.weight", "first.bias", "second.bias")
    assert all(offset * 4 % 64 == 0 for offset in flat.offsets)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    flat.data.fill_(0.5)
    assert (module.second.weight == 0.5).all()
    assert torch.equal(module.frozen.weight, before["frozen.weight"])
    assert torch.equal(module.shift, before["shift"])


def test_gradients_land_in_the_flat_buffer():
    module, plain = Tied(), Tied()
    plain.load_state_dict(module.state_dict())
    flat = FlatParameters(module)
    x = torch.randn(4, 5)
    for _ in range(2):
        flat.grad.zero_()
        module(x).sum().backward()
    plain(x).sum().backward()
    for name, grad in flat.split(flat.grad).items():
        torch.testing.assert_close(grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("move", ["assign", "data", "zero_grad", "unfreeze"])
def test_check_binds_again_and_carries_buffers(move):
    module = Tied()
    flat = FlatParameters(module)
    moments = torch.arange(len(flat.data), dtype=torch.float32)
    named = flat.split(moments)
    assert flat.check(moments) == (moments,)
    if move == "assign":
        module.load_state_dict({k: v.clone() + 1 for k, v in module.state_dict().items()}, assign=True)
        module.second.weight = module.first.weight
    elif move == "data":
        module.first.weight.data = module.first.weight.data.clone()
    elif move == "zero_grad":
        module.zero_grad(set_to_none=True)
    else:
        module.frozen.weight.requires_grad_(True)
    (carried,) = flat.check(moments)
    again = flat.split(carried)
    assert all(torch.equal(again[name], x) for name, x in named.items())
    if move == "unfreeze":
        assert (again["frozen.weight"] == 0).all()
    flat.data.zero_()
    assert (module.first.weight == 0).all()


def test_a_copy_is_independent():
    module = Tied()
    flat = FlatParameters(module)
    copied = copy.deepcopy(module)
    flat.data.zero_()
    assert (copied.first.weight != 0).any()


def test_strides_are_kept():
    module = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    weight, stride = module.weight.detach().clone(), module.weight.stride()
    flat = FlatParameters(module)
    assert module.weight.stride() == stride
    assert torch.equal(module.weight, weight)
    assert torch.equal(flat.split(flat.data)["weight"], weight)
    flat.join({"weight": weight + 1}, flat.data)
    assert torch.equal(module.weight, weight + 1)


def test_a_stale_saved_tensor_is_an_error():
    module = nn.Linear(2, 1, bias=False)
    flat = FlatParameters(module)
    x = torch.ones(1, 2, requires_grad=True)
    out = module(x)
    flat.data.add_(1.0)
    flat.written()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_mixed_and_missing_parameters_are_refused():
    mixed = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double()])
    with pytest.raises(TypeError, match=r"parameter 1\.weight is torch\.float64"):
        FlatParameters(mixed)
    with pytest.raises(ValueError, match="no trainable parameter"):
        FlatParameters(nn.Linear(2, 2).requires_grad_(False))
