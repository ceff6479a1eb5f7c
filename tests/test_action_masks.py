"""Action masks through the built-in policy and TorchEngine: a forbidden action is never drawn and has no share."""

import json
import math

import numpy as np
import pytest
import torch
from engine_cases import T, allowed, filled, masks_for, schedule, settings
from gymnasium import spaces

from pyppo import reference
from pyppo.actions import Distribution, log_prob_entropy
from pyppo.engines import make_engine
from pyppo.policy import MLPPolicy

SPACES = {
    "discrete": spaces.Discrete(4),
    "multi-discrete": spaces.MultiDiscrete([2, 3]),
    "multi-binary": spaces.MultiBinary(3),
}
FAMILY = pytest.mark.parametrize("name", SPACES)


def obs_space(width):
    return spaces.Dict(obs=spaces.Box(-np.inf, np.inf, (3,), np.float32), action_mask=spaces.MultiBinary(width))


def policy_for(space, **how):
    distribution = Distribution.from_space(space)
    policy = MLPPolicy(obs_space(distribution.num_params), distribution, hidden_sizes=(8,), **how)
    with torch.no_grad():
        policy.actor[-1].weight.normal_(generator=torch.Generator().manual_seed(1))
    return policy


@FAMILY
def test_log_prob_and_entropy_are_the_references(name):
    distribution = Distribution.from_space(SPACES[name])
    mask = masks_for(distribution, 50)
    logits = torch.randn(50, distribution.num_params, dtype=torch.float64, requires_grad=True)
    family = (
        reference.make_distribution(**distribution.loss_arguments, logits=logits, action_mask=mask)
        if distribution.kind != "categorical"
        else reference.make_distribution(logits=logits, action_mask=mask)
    )
    low = torch.zeros(50, *SPACES[name].shape, dtype=torch.int64)
    if distribution.nvec is not None:
        choices = [part.long().argmax(1) for part in mask.split(distribution.nvec, dim=1)]
        low = torch.stack(choices, 1) if distribution.kind == "multi_categorical" else choices[0]
    logp, entropy = log_prob_entropy(distribution, {"logits": logits, "action_mask": mask}, low)
    torch.testing.assert_close(logp, family.log_prob(low))
    torch.testing.assert_close(entropy, family.entropy())
    (gradient,) = torch.autograd.grad((logp + entropy).sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((family.log_prob(low) + family.entropy()).sum(), logits)
    torch.testing.assert_close(gradient, wanted)
    assert (gradient[~mask] == 0).all()


def test_a_forbidden_bit_that_is_set_has_no_probability():
    distribution = Distribution.from_space(spaces.MultiBinary(2))
    params = {"logits": torch.zeros(1, 2), "action_mask": torch.tensor([[True, False]])}
    logp, entropy = log_prob_entropy(distribution, params, torch.tensor([[0, 1]]))
    assert logp.item() == -math.inf
    assert entropy.item() == pytest.approx(math.log(2))


@FAMILY
@pytest.mark.parametrize("deterministic", [False, True])
def test_act_takes_allowed_actions_only(name, deterministic):
    policy = policy_for(SPACES[name])
    mask = masks_for(policy.distribution, 200)
    obs = {"obs": np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32), "action_mask": mask.numpy()}
    actions = policy.act(obs, deterministic)
    assert allowed(policy.distribution, mask, torch.as_tensor(actions)).all()
    one = policy.act({key: x[0] for key, x in obs.items()}, deterministic)
    assert allowed(policy.distribution, mask[:1], torch.as_tensor(one)[None]).all()


@FAMILY
def test_the_mask_is_no_feature_and_is_handed_on(name):
    policy = policy_for(SPACES[name], norm_obs=True)
    assert policy.num_features == policy.actor[0].in_features == 3
    assert list(policy.normalizer.statistics) == ["obs"]
    mask = masks_for(policy.distribution, 6)
    prepared = policy.prepare({"obs": torch.randn(6, 3), "action_mask": mask.to(torch.int8)})
    assert list(prepared) == ["features", "action_mask"]
    assert torch.equal(prepared["action_mask"], mask)
    params, _ = policy.heads(prepared)
    assert torch.equal(params["action_mask"], mask)
    again = MLPPolicy.from_dict(json.loads(json.dumps(policy.to_dict())))
    again.load_state_dict(policy.state_dict())
    assert again.obs_space["action_mask"] == policy.obs_space["action_mask"]
    assert torch.equal(again.value(prepared), policy.value(prepared))


def masked_rollout(engine, space, *, flip=False):
    """A rollout that `engine` acted in under random masks; `flip` turns the masks of all rows after that."""
    rollout = filled(engine, space, obs_space=obs_space(engine.distribution.num_params))
    if flip:
        rollout.obs["action_mask"][:] = True
    return rollout


@FAMILY
@pytest.mark.parametrize("objective", ["clip", "kl"])
def test_every_ratio_is_one_at_first_and_only_with_the_mask(name, objective):
    config = settings(num_minibatches=1, update_epochs=1, clip_coef=1e-5, objective=objective, engine="torch")
    shares = []
    for flip in (False, True):
        engine = make_engine(config, policy_for(SPACES[name]), Distribution.from_space(SPACES[name]))
        rollout = masked_rollout(engine, SPACES[name], flip=flip)
        if not flip:
            mask = rollout.obs["action_mask"][:T].flatten(0, 1)
            assert allowed(engine.distribution, mask, rollout.actions.flatten(0, 1)).all()
        shares.append(engine.update(rollout, schedule(config), 0)["clip_fraction"])
    assert shares[0] == 0.0
    assert shares[1] > 0.5


@FAMILY
def test_a_forbidden_action_gets_no_gradient(name):
    config = settings(num_minibatches=1, update_epochs=1, engine="torch", max_grad_norm=None)
    engine = make_engine(config, policy_for(SPACES[name]), Distribution.from_space(SPACES[name]))
    rollout = masked_rollout(engine, SPACES[name])
    forbidden = 1  # in every row; each component has another choice
    rollout.obs["action_mask"][:, :, forbidden] = False
    rollout.obs["action_mask"][:, :, 0] = True
    if engine.distribution.kind != "bernoulli":
        rollout.actions.zero_()
        rollout.obs["action_mask"][:, :, 2] = True
    else:
        rollout.actions[..., forbidden] = 0
    engine.update(rollout, schedule(config), 0)
    gradient = engine.policy.actor[-1].weight.grad
    assert (gradient[forbidden] == 0).all()
    assert gradient.any()


@pytest.mark.parametrize("space", [spaces.MultiBinary(3), spaces.Box(0, 1, (4, 1), np.int8)])
def test_a_mask_of_another_shape_is_refused(space):
    entries = spaces.Dict(obs=spaces.Box(-1, 1, (3,), np.float32), action_mask=space)
    with pytest.raises(ValueError, match=r"obs_space\['action_mask'\] has shape .*; it must be \(4,\)"):
        MLPPolicy(entries, Distribution.from_space(spaces.Discrete(4)))


def test_a_mask_alone_is_no_observation():
    with pytest.raises(ValueError, match="it must have an entry that is not an action mask"):
        MLPPolicy(spaces.Dict(action_mask=spaces.MultiBinary(4)), Distribution.from_space(spaces.Discrete(4)))


def test_a_mask_that_allows_nothing_is_an_error():
    policy = policy_for(SPACES["discrete"])
    with pytest.raises(ValueError, match="allow no action in row 1"):
        policy.act({"obs": np.zeros((2, 3), np.float32), "action_mask": np.array([[1, 0, 0, 0], [0, 0, 0, 0]], bool)})
