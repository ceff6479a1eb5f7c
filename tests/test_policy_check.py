"""What a policy of one's own is told when what it gives is wrong: once, at the start, by name."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from memory_envs import TMaze
from probes import ContinuousAction, ObservationAction
from torch import nn
from trainer_cases import OwnPolicy, config_for

from pyppo.actions import Distribution
from pyppo.engines.policy_check import check_policy
from pyppo.policy import MLPPolicy, Policy, RecurrentPolicy, StatefulPolicy
from pyppo.trainer import Trainer

OBS = spaces.Dict({"obs": spaces.Box(-1, 1, (1,), np.float32)})
DISCRETE, NORMAL = (Distribution.from_space(s) for s in (spaces.Discrete(2), spaces.Box(-1, 1, (2,), np.float32)))


class Heads(nn.Module):
    """Right, but for what a test changes of it."""

    def __init__(self, outputs=2, change=lambda params, value: (params, value)):
        super().__init__()
        self.layer, self.critic, self.change = nn.Linear(1, outputs), nn.Linear(1, 1), change
        self.register_buffer("calls", torch.zeros(()))

    def heads(self, obs):
        self.calls += 1
        return self.change({"logits": self.layer(obs["obs"])}, self.critic(obs["obs"]).squeeze(1))

    def evaluate(self, obs, actions, state=None):
        raise AssertionError("heads serves")

    def act(self, obs, deterministic=False):
        params, _ = self.heads({"obs": torch.as_tensor(obs)})
        return next(iter(params.values())).detach().numpy().argmax(1)


class Normal(Heads):
    def heads(self, obs):
        params = {"mean": self.layer(obs["obs"]), "log_std": torch.zeros(2)}
        return self.change(params, self.critic(obs["obs"]).squeeze(1))

    def act(self, obs, deterministic=False):
        return self.layer(torch.as_tensor(obs)).detach().numpy()


def nan(x):
    return torch.full_like(x, float("nan"))


HEADS = [
    (lambda p, v: p, ValueError, r"heads\(\) gave a dict; it must give a tuple of params, value"),
    (lambda p, v: (p, v, v), ValueError, r"heads\(\) gave 3 values; it must give a tuple of params, value"),
    (lambda p, v: (p["logits"], v), TypeError, r"heads\(\) gave params, a tensor .*; it must be a dict with logits"),
    (lambda p, v: ({"probs": p["logits"]}, v), ValueError, r"gave params \['probs'\]; they must be 'logits', for cat"),
    (lambda p, v: ({**p, "std": v}, v), ValueError, r"gave params \['logits', 'std'\]; they must be 'logits'"),
    (lambda p, v: ({"logits": p["logits"][:, :1]}, v), ValueError, r"logits of shape \(3, 1\); .* shape \(3, 2\)"),
    (lambda p, v: ({"logits": p["logits"].double()}, v), TypeError, r"logits of dtype torch.float64; .*torch.float32"),
    (lambda p, v: ({"logits": nan(p["logits"])}, v), ValueError, "logits that is not finite: nan"),
    (lambda p, v: ({"logits": [[0.0, 1.0]]}, v), TypeError, r"gave logits, a list; it must be a tensor of shape"),
    (lambda p, v: (p, v[:, None]), ValueError, r"gave a value of shape \(3, 1\); it must be a tensor of shape \(3,\)"),
    (lambda p, v: (p, v.squeeze()), ValueError, r"gave a value of shape \(\); it must be a tensor of shape \(1,\)"),
    (lambda p, v: (p, nan(v)), ValueError, "gave a value that is not finite: nan"),
    (lambda p, v: (p, v / 0), ValueError, "gave a value that is not finite"),
    (lambda p, v: ({**p, "action_mask": p["logits"] > 9.0}, v[:, None]), ValueError, "a value of shape"),
    (lambda p, v: ({**p, "action_mask": p["logits"]}, v), ValueError, "action_mask, a tensor torch.float32"),
    (lambda p, v: (p, v.x), ValueError, r"heads\(\) of the policy, a Heads, failed on observations .* AttributeError"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), HEADS)
def test_heads_that_give_something_else(change, error, message):
    with pytest.raises(error, match=message):
        check_policy(Heads(change=change), OBS, DISCRETE, torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, v: ({"mean": p["mean"]}, v), r"params \['mean'\]; they must be 'mean' and 'log_std', for normal"),
        (lambda p, v: ({**p, "log_std": torch.zeros(3)}, v), r"log_std of shape \(3,\); it must be .* or \(2,\)"),
        (lambda p, v: ({**p, "log_std": torch.tensor([0, float("inf")])}, v), "log_std that is not finite: inf"),
    ],
)
def test_a_normal_that_is_none(change, message):
    with pytest.raises(ValueError, match=message):
        check_policy(Normal(change=change), OBS, NORMAL, torch.device("cpu"))


@pytest.mark.parametrize("policy", [Heads(), OwnPolicy()])
def test_what_is_right_passes_and_is_left_as_it_was(policy):
    before, state = {k: x.clone() for k, x in policy.state_dict().items()}, torch.get_rng_state()
    check_policy(policy, OBS, DISCRETE, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[k]) for k, x in policy.state_dict().items())
    assert isinstance(policy, Policy)


@pytest.mark.parametrize(
    ("policy", "distribution", "act", "error", "message"),
    [
        (Heads, DISCRETE, lambda x: np.zeros((len(x), 1), int), ValueError, r"actions of shape \(3, 1\); .* \(3,\)"),
        (Heads, DISCRETE, lambda x: np.zeros(len(x)), TypeError, r"actions of dtype float64; it must be integers"),
        (Heads, DISCRETE, lambda x: x.nothing, ValueError, r"act\(\) of the policy, a Heads, failed on observations"),
        (Heads, DISCRETE, lambda x: torch.zeros(len(x), requires_grad=True), TypeError, "a NumPy array, or wh"),
        (Normal, NORMAL, lambda x: np.zeros((len(x), 2), int), TypeError, r"dtype int64; it must be floating point"),
        (Normal, NORMAL, lambda x: np.full((len(x), 2), np.nan), ValueError, "an action that is not finite: nan"),
    ],
)  # fmt: skip
def test_act_is_asked_where_heads_serve(policy, distribution, act, error, message):
    probed = policy()
    check_policy(probed, OBS, distribution, torch.device("cpu"))
    probed.act = act
    with pytest.raises(error, match=message):
        check_policy(probed, OBS, distribution, torch.device("cpu"))


@pytest.mark.parametrize(
    ("policy", "space", "action_bounds", "message"),
    [
        (
            Normal,
            spaces.Box(0, 10, (2,), np.float32),
            "rescale",
            r"it must be \[.*for the mean that heads\(\) gives",
        ),
        (Heads, spaces.Discrete(2, start=5), "clip", r"it must be actions of .* from 5 to 6"),
    ],
)
def test_act_gives_what_the_environments_take(policy, space, action_bounds, message):
    distribution = Distribution.from_space(space, action_bounds)
    with pytest.raises(ValueError, match=r"act\(deterministic=True\) gave .*" + message):
        check_policy(policy(), OBS, distribution, torch.device("cpu"))


class NoBias(Normal):
    """As orthogonal weights and biases of zero begin: the mean of zero is 0, in any symmetric coordinates."""

    def __init__(self, **settings):
        super().__init__(**settings)
        nn.init.zeros_(self.layer.bias)


@pytest.mark.parametrize("limit", [2.0, 5e-4])
def test_coordinates_are_asked_where_the_mean_is_not_zero(limit):
    distribution = Distribution.from_space(spaces.Box(-limit, limit, (2,), np.float32), "rescale")
    with pytest.raises(ValueError, match="the environments' action for the mean"):
        check_policy(NoBias(), OBS, distribution, torch.device("cpu"))
    check_policy(NoBias(), OBS, NORMAL, torch.device("cpu"))


def test_a_policy_that_is_random_in_any_mode_is_not_asked():
    random = Normal()
    random.act = lambda obs, deterministic=False: np.random.default_rng().normal(size=(len(obs), 2))
    check_policy(random, OBS, NORMAL, torch.device("cpu"))


def test_act_in_the_environments_coordinates_passes():
    distribution = Distribution.from_space(spaces.Box(0, 10, (2,), np.float32), "rescale")
    right = Normal()
    plain = right.act
    right.act = lambda obs, deterministic=False: distribution.to_env(plain(obs))
    check_policy(right, OBS, distribution, torch.device("cpu"))
    shifted = Distribution.from_space(spaces.Discrete(2, start=5))
    right = Heads()
    plain_heads = right.act
    right.act = lambda obs, deterministic=False: plain_heads(obs) + 5
    check_policy(right, OBS, shifted, torch.device("cpu"))


class NoMode(Heads):
    def act(self, obs):
        return super().act(obs)


class Extra(Heads):
    def get_extra_state(self):
        return {"note": "kept"}

    def set_extra_state(self, state):
        pass


def test_what_would_fail_after_the_training_fails_before_it():
    with pytest.raises(ValueError, match="unexpected keyword argument 'deterministic'"):
        check_policy(NoMode(), OBS, DISCRETE, torch.device("cpu"))
    with pytest.raises(TypeError, match=r"state_dict\(\)\['_extra_state'\], a dict; it must be a tensor, to be saved"):
        check_policy(Extra(), OBS, DISCRETE, torch.device("cpu"))
    check_policy(Extra(), OBS, DISCRETE, torch.device("cpu"), saved=False)


def test_a_reseed_that_gives_nothing_back_is_called_once():
    policy, calls = Heads(), []
    policy.reseed = lambda seed, step=0: calls.append(seed)
    check_policy(policy, OBS, DISCRETE, torch.device("cpu"))
    assert calls == [0]


class Whole(Heads):
    """Of integers from 1 to 6."""

    def __init__(self):
        super().__init__()
        self.layer, self.critic = nn.Embedding(6, 2), nn.Embedding(6, 1)

    def heads(self, obs):
        symbols = (obs["obs"][:, 0] % 7 - 1).long()
        return {"logits": self.layer(symbols)}, self.critic(symbols).squeeze(1)

    def act(self, obs, deterministic=False):
        return self.heads({"obs": torch.as_tensor(obs)})[0]["logits"].detach().numpy().argmax(1)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.uint8])
def test_integers_are_asked_about_as_the_space_and_the_rollout_have_them(dtype):
    obs = spaces.Dict({"obs": spaces.Box(1, 6, (1,), dtype)})
    check_policy(Whole(), obs, DISCRETE, torch.device("cpu"))


def test_the_noise_of_a_built_in_policy_is_left_as_it_was():
    first, second = (MLPPolicy(OBS, DISCRETE, seed=3) for _ in range(2))
    check_policy(first, OBS, DISCRETE, torch.device("cpu"))
    obs = np.zeros((50, 1), np.float32)
    assert np.array_equal(first.act(obs), second.act(obs))


def test_logits_of_minus_infinity_forbid_an_action():
    change = lambda p, v: ({"logits": p["logits"] + torch.tensor([0.0, -torch.inf])}, v)  # noqa: E731
    check_policy(Heads(change=change), OBS, DISCRETE, torch.device("cpu"))


class Own(OwnPolicy):
    """A policy without heads, with something wrong."""

    def __init__(self, wrong):
        super().__init__()
        self.wrong = wrong

    def evaluate(self, obs, actions, state=None):
        logp, entropy, value = super().evaluate(obs, actions)
        if self.wrong == "value":
            return logp, entropy, value[:, None]
        if self.wrong == "gradient":
            return logp.detach(), entropy.detach(), value.detach()
        return (logp, value) if self.wrong == "two" else (logp, entropy, value)

    def act(self, obs, deterministic=False):
        actions = super().act(obs, deterministic)
        return actions[:, None] if self.wrong == "actions" else actions

    def prepare(self, obs):
        return obs["obs"][0] if self.wrong == "prepare" else obs


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("value", r"evaluate\(\) gave value of shape \(3, 1\); it must be a tensor of shape \(3,\)"),
        ("gradient", r"evaluate\(\) gave logp and value that no gradient goes through"),
        ("two", r"evaluate\(\) gave 2 values; it must give a tuple of logp, entropy, value"),
        ("actions", r"act\(\) gave actions of shape \(3, 1\); it must be \(3,\)"),
        ("prepare", r"prepare\(\) gave the result, a tensor torch.float32 of shape \(1,\); it must be"),
    ],
)  # fmt: skip
def test_a_policy_without_heads_that_gives_something_else(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_policy(Own(wrong), OBS, DISCRETE, torch.device("cpu"))


class Recurrent(RecurrentPolicy):
    wrong = ""

    def heads(self, obs, state, starts=None):
        params, value, state = super().heads(obs, state, starts)
        if self.wrong == "two":
            return params, value
        return params, value[0] if self.wrong == "value" else value, state[:1] if self.wrong == "state" else state


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("two", r"heads\(\) gave 2 values; it must give a tuple of params, value, state"),
        ("value", r"heads\(\) gave a value of shape \(3,\); it must be a tensor of shape \(2, 3\)"),
        ("state", r"heads\(\) gave a state of shape \(1, 128\); it must be a tensor of shape \(3, 128\)"),
    ],
)
def test_a_policy_with_a_state_that_gives_something_else(wrong, message):
    policy = Recurrent(OBS, DISCRETE)
    assert isinstance(policy, StatefulPolicy)
    check_policy(policy, OBS, DISCRETE, torch.device("cpu"))
    policy.wrong = wrong
    with pytest.raises(ValueError, match=message):
        check_policy(policy, OBS, DISCRETE, torch.device("cpu"))


def test_a_state_shape_must_be_one():
    policy = Recurrent(OBS, DISCRETE)
    policy.state_shape = 128
    with pytest.raises(TypeError, match="state_shape is 128; it must be a tuple of integers above 0"):
        check_policy(policy, OBS, DISCRETE, torch.device("cpu"))


@pytest.mark.parametrize("envs", [TMaze, ContinuousAction])
def test_the_trainer_looks_before_anything_is_collected(envs):
    """A network for other observations, or other actions, than the environment's."""
    with pytest.raises(ValueError, match="failed on observations|they must be 'mean'"):
        Trainer(config_for(), envs=envs(), policy=Heads())
    Trainer(config_for(), envs=ObservationAction(), policy=Heads())


class Normalized(Heads):
    """Batch normalisation takes no single row in training; logarithms take nothing below the space."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def heads(self, obs):
        x = self.norm(torch.log(obs["obs"]))
        return {"logits": self.layer(x)}, self.critic(x).squeeze(1)


def test_the_probe_stays_in_the_space_and_leaves_the_mode():
    policy = Normalized()
    above = spaces.Dict({"obs": spaces.Box(1, 2, (1,), np.float32)})
    check_policy(policy, above, DISCRETE, torch.device("cpu"))
    assert policy.training
    assert policy.norm.training
    assert policy.norm.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("name", "answer", "message"),
    [
        ("value", lambda obs: torch.zeros(3, 1), r"value\(\) gave a value of shape \(3, 1\); it must be .* \(3,\)"),
        ("auxiliary_loss", lambda m: m.values, r"auxiliary_loss\(\) gave .* shape \(3,\); it must be .* shape \(\)"),
        ("auxiliary_loss", lambda m: 0.0, r"auxiliary_loss\(\) gave a float; it must be a tensor of shape \(\)"),
        ("auxiliary_loss", lambda m: m.nothing, r"auxiliary_loss\(\) of the policy, a Heads, failed on observations"),
    ],
)
def test_what_is_optional_is_asked_too(name, answer, message):
    policy = Heads()
    object.__setattr__(policy, name, answer)
    with pytest.raises(ValueError, match=message):
        check_policy(policy, OBS, DISCRETE, torch.device("cpu"))


def test_a_mask_must_not_be_forgotten():
    masked = spaces.Dict({**OBS.spaces, "action_mask": spaces.MultiBinary(2)})
    with pytest.raises(ValueError, match=r"params \['logits'\]; the environments have an action mask, so they must"):
        check_policy(Heads(), masked, DISCRETE, torch.device("cpu"))


def test_a_lazy_module_says_that_it_has_no_shape_yet():
    policy = Heads()
    policy.layer = nn.LazyLinear(2)
    with pytest.raises(ValueError, match=r"parameter layer.weight has no shape yet \(a lazy module\)"):
        Trainer(config_for(), envs=ObservationAction(2, 4), policy=policy, quiet=True)


def test_heads_without_a_gradient_are_refused():
    """Training would go to its end and learn nothing."""
    policy = Heads()
    policy.heads = torch.no_grad()(policy.heads)
    with pytest.raises(ValueError, match=r"heads\(\) gave params and a value that no gradient goes through"):
        check_policy(policy, OBS, DISCRETE, torch.device("cpu"))
    frozen = Heads()
    frozen.critic.requires_grad_(False)  # a value that stands still may be meant
    check_policy(frozen, OBS, DISCRETE, torch.device("cpu"))
    frozen.layer.requires_grad_(False)
    with pytest.raises(ValueError, match="not all parameters frozen"):
        check_policy(frozen, OBS, DISCRETE, torch.device("cpu"))
