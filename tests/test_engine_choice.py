"""Which engine runs a policy, what the run says about it, and whole runs with either."""

import json
import logging
import sys

import numpy as np
import probes
import pytest
import torch
from engine_cases import SPACES, box_obs, masked_obs, settings
from gymnasium import spaces
from torch import nn

import pyppo
from pyppo import checkpoint
from pyppo.actions import Distribution
from pyppo.config import Config
from pyppo.engines import make_engine
from pyppo.engines.native_engine import NativeEngine, why_not
from pyppo.engines.torch_engine import TorchEngine
from pyppo.policy import ActorCriticPolicy, MLPPolicy, RecurrentPolicy
from pyppo.trainer import Trainer

envpool = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="EnvPool has wheels for Linux only")
CPU = torch.device("cpu")


def policy_for(space=SPACES["discrete"], cls=MLPPolicy, **policy_settings):
    how = {"hidden_sizes": (8, 8), **policy_settings}
    return cls(box_obs(), Distribution.from_space(space), **how)


class OwnHeads(MLPPolicy):
    def heads(self, obs):
        return super().heads(obs)


class OwnPrepare(MLPPolicy):
    def prepare(self, obs):
        return super().prepare(obs) * 2


class OwnParams(MLPPolicy):
    def _params(self, output, mask):
        return super()._params(output * 2, mask)


class OwnEvaluate(MLPPolicy):
    def evaluate(self, obs, actions, state=None):
        return super().evaluate(obs, actions)


class Auxiliary(MLPPolicy):
    def auxiliary_loss(self, minibatch):
        return sum((p**2).sum() for p in self.parameters())


class OnlyANameOfItsOwn(MLPPolicy):
    def act(self, obs, deterministic=False):
        return super().act(obs, True)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x).abs()


def image_policy():
    images = spaces.Dict(obs=spaces.Box(0, 255, (3, 16, 16), np.uint8))
    return ActorCriticPolicy(images, Distribution.from_space(SPACES["discrete"]), network="small_cnn")


def changed(change, **policy_settings):
    def make():
        policy = policy_for(**policy_settings)
        change(policy)
        return policy

    return make


def set_layer(part, i, module):
    return changed(lambda policy: getattr(policy, part).__setitem__(i, module))


def tie(policy):
    policy.critic[2].weight = policy.actor[2].weight


def turn(policy):
    policy.actor[2].weight.data = policy.actor[2].weight.data.T.contiguous().T


def replace_value(policy):
    policy.value = lambda obs: torch.zeros(len(obs))


UNFIT = {
    "another class": (lambda: nn.Linear(3, 4), "the policy is a Linear, not an MLPPolicy"),
    "recurrent": (lambda: RecurrentPolicy(box_obs(), Distribution.from_space(SPACES["discrete"])), "is recurrent"),
    "convolutions": (image_policy, "the policy's network is small_cnn, not an mlp"),
    "heads": (lambda: policy_for(cls=OwnHeads), "a OwnHeads, has a heads() of its own"),
    "prepare": (lambda: policy_for(cls=OwnPrepare), "has a prepare() of its own"),
    "parameters": (lambda: policy_for(cls=OwnParams), "has a _params() of its own"),
    "evaluate": (lambda: policy_for(cls=OwnEvaluate), "has a evaluate() of its own"),
    "value of one policy": (changed(replace_value), "has a value() of its own"),
    "auxiliary loss": (lambda: policy_for(cls=Auxiliary), "the policy has an auxiliary_loss()"),
    "another family": (lambda: policy_for(SPACES["box"]), "distribution is normal, not categorical of 4"),
    "other choices": (lambda: policy_for(spaces.Discrete(5)), "distribution is categorical of 5, not categorical of 4"),
    "GELU": (set_layer("actor", 1, nn.GELU()), "policy.actor[1] is a GELU, not a Tanh, ReLU, ELU or SiLU"),
    "ELU of another alpha": (set_layer("critic", 3, nn.ELU(0.5)), "policy.critic[3] is an ELU of alpha 0.5, not 1"),
    "two activations": (set_layer("critic", 1, nn.ReLU()), "policy.actor[1] is tanh and policy.critic[1] is relu"),
    "dropout": (set_layer("actor", 2, nn.Dropout()), "policy.actor[2] is a Dropout, not a Linear"),
    "a linear of its own": (set_layer("actor", 0, OwnLinear(3, 8)), "policy.actor[0] is a OwnLinear, not a Linear"),
    "weight norm": (
        changed(lambda policy: nn.utils.parametrizations.weight_norm(policy.actor[0])),
        "policy.actor[0] is a ParametrizedLinear",
    ),
    "no activation at the trunk's end": (
        changed(lambda policy: policy.trunk.append(nn.Linear(3, 3))),
        "policy.trunk ends with a Linear",
    ),
    "an activation at the actor's end": (
        changed(lambda policy: policy.actor.append(nn.Tanh())),
        "policy.actor ends with an activation",
    ),
    "no critic": (changed(lambda policy: setattr(policy, "critic", nn.Sequential())), "policy.critic is empty"),
    "widths that do not fit": (set_layer("actor", 2, nn.Linear(9, 8)), "policy.actor takes 9 inputs and gets 8"),
    "two values": (set_layer("critic", 4, nn.Linear(8, 2)), "policy.critic has 2 outputs, not 1"),
    "no bias": (set_layer("actor", 0, nn.Linear(3, 8, bias=False)), "policy.actor has no bias of shape [8]"),
    "frozen": (changed(lambda policy: policy.actor[0].requires_grad_(False)), "parameter actor.0.weight is frozen"),
    "tied": (changed(tie), "two layers share a parameter"),
    "turned": (changed(turn), "parameter actor.2.weight is not contiguous"),
    "half": (lambda: policy_for().bfloat16(), "parameter actor.0.weight is torch.bfloat16, not float32 or float64"),
    "two dtypes": (changed(lambda policy: policy.critic.double()), "parameter critic.0.weight is torch.float64, not"),
    "elsewhere": (lambda: policy_for().to("meta"), "parameter actor.0.weight is on meta, not on the CPU"),
    "hook": (changed(lambda policy: policy.actor.register_forward_hook(print)), "policy.actor has hooks"),
    "layer's hook": (
        changed(lambda policy: policy.actor[0].register_full_backward_hook(print)),
        "policy.actor[0] has hooks",
    ),
    "gradient's hook": (
        changed(lambda policy: policy.critic[0].bias.register_hook(lambda grad: grad)),
        "parameter critic.0.bias has hooks",
    ),
    "forward": (changed(lambda policy: setattr(policy.actor, "forward", abs)), "policy.actor has a forward() of its"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_native_says_why_it_cannot(name):
    make, reason = UNFIT[name]
    distribution = Distribution.from_space(SPACES["discrete"])
    assert reason in why_not(make(), CPU, distribution)
    with pytest.raises(ValueError, match="engine is 'native'; it must be 'auto' or 'torch', since") as error:
        make_engine(settings(engine="native"), make(), distribution)
    assert reason in str(error.value)


def test_native_wants_one_deviation_for_all_states():
    policy = policy_for(SPACES["box"])
    policy.log_std = nn.Parameter(torch.zeros(1))
    reason = why_not(policy, CPU, policy.distribution)
    assert reason == "policy.log_std is not a parameter of shape [2]"


def test_native_wants_a_deviation_for_every_mean():
    policy = policy_for(SPACES["box"], state_dependent_std=True)
    policy.actor[4] = nn.Linear(8, 2)
    assert why_not(policy, CPU, policy.distribution) == "policy.actor has 2 outputs, not 4"


def test_native_wants_no_mask_of_a_normal_distribution():
    distribution = Distribution.from_space(SPACES["box"])
    reason = why_not(MLPPolicy(masked_obs(SPACES["box"]), distribution), CPU, distribution)
    assert reason == "the observations have an action mask, and a normal distribution has no actions to forbid"


def test_native_wants_the_cpu_and_a_dtype_that_it_can_write():
    policy = policy_for(SPACES["box"])
    assert why_not(policy, torch.device("cuda", 0), policy.distribution) == "the device is cuda:0, not the CPU"
    half = Distribution.from_space(spaces.Box(-1, 1, (2,), np.float16))
    assert "the environment's actions are float16" in why_not(policy, CPU, half)


FIT = {
    "as it comes": policy_for,
    "double": lambda: policy_for().double(),
    "trunk": lambda: policy_for(shared_trunk=True),
    "linear": lambda: policy_for(hidden_sizes=()),
    "normalised": lambda: policy_for(norm_obs=True),
    "two layers of an ActorCriticPolicy": lambda: policy_for(cls=ActorCriticPolicy),
    "state-dependent deviation": lambda: policy_for(SPACES["box"], state_dependent_std=True),
    "masked": lambda: MLPPolicy(masked_obs(SPACES["discrete"]), Distribution.from_space(SPACES["discrete"])),
    "a class that changes nothing of the networks": lambda: policy_for(cls=OnlyANameOfItsOwn),
    "an actor of another depth": changed(
        lambda policy: setattr(policy, "actor", nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)))
    ),
    "a critic of one layer": changed(lambda policy: setattr(policy, "critic", nn.Linear(3, 1))),
    "rectified in place": changed(
        lambda policy: [setattr(part, "1", nn.ReLU(inplace=True)) for part in (policy.actor, policy.critic)],
        hidden_sizes=(8,),
    ),
}


@pytest.mark.parametrize("name", FIT)
def test_auto_takes_native_where_it_can(name, caplog):
    policy = FIT[name]()
    with caplog.at_level(logging.INFO, "pyppo"):
        engine = make_engine(settings(), policy, policy.distribution)
    assert isinstance(engine, NativeEngine)
    assert caplog.messages == ["engine: native on cpu (an MLP on the CPU)"]


def test_a_replaced_network_is_what_runs():
    """Structure is read from the modules, not from the settings that the policy was made with."""
    policy = policy_for()
    policy.actor = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    policy.critic = nn.Linear(3, 1)
    engine = make_engine(settings(engine="native"), policy, policy.distribution)
    rollout = pyppo.rollout.Rollout(2, 3, box_obs(), SPACES["discrete"])
    rollout.obs["obs"].normal_()
    engine.act(rollout, 0, slice(0, 3))
    params, value = policy.heads({"obs": rollout.obs["obs"][0]})
    logp = params["logits"].log_softmax(1).gather(1, rollout.actions[0, :, None]).squeeze(1)
    torch.testing.assert_close(rollout.logp[0], logp)
    torch.testing.assert_close(rollout.values[0], value)
    policy.actor[1] = nn.GELU()
    with pytest.raises(ValueError, match=r"the policy was changed .*: policy\.actor\[1\] is a GELU"):
        engine.act(rollout, 0, slice(0, 3))


def test_auto_takes_torch_elsewhere_and_says_why(caplog):
    policy = policy_for(cls=Auxiliary)
    with caplog.at_level(logging.INFO, "pyppo"):
        engine = make_engine(settings(), policy, policy.distribution)
    assert isinstance(engine, TorchEngine)
    assert caplog.messages == ["engine: torch on cpu (native cannot: the policy has an auxiliary_loss())"]


def test_the_engine_that_is_asked_for_runs(caplog):
    for name, cls in (("torch", TorchEngine), ("native", NativeEngine)):
        policy = policy_for()
        with caplog.at_level(logging.INFO, "pyppo"):
            engine = make_engine(settings(engine=name), policy, policy.distribution)
        assert isinstance(engine, cls)
        assert caplog.messages[-1] == f"engine: {name} on cpu (as asked for)"


# --- whole runs -------------------------------------------------------------------------------------------------------


def config_for(**fields):
    return Config(**{
        "env_id": "probe", "total_timesteps": 600, "num_steps": 16, "num_minibatches": 2, "update_epochs": 2,
        "hidden_sizes": (8,), "run_dir": None, "device": "cpu", **fields,
    })  # fmt: skip


def test_the_run_says_which_engine_and_why(tmp_path, capsys):
    run = Trainer(config_for(run_dir=str(tmp_path)), probes.ObservationAction()).train().run_dir
    assert "engine: native on cpu (an MLP on the CPU)" in capsys.readouterr().err
    state = checkpoint.load_checkpoint(run).state
    assert state["engine"] == {"name": "native", "reason": "an MLP on the CPU"}


def test_a_quiet_run_says_nothing(capsys):
    Trainer(config_for(), probes.ObservationAction(), quiet=True).train()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("order", [("native", "torch"), ("torch", "native")], ids="-".join)
def test_a_run_goes_on_with_the_other_engine(tmp_path, order):
    config = config_for(run_dir=str(tmp_path), engine=order[0], norm_obs=True, target_kl=0.5, objective="kl")
    run = Trainer(config, probes.ContinuousAction(), quiet=True).train().run_dir
    before = checkpoint.load_checkpoint(run)
    second = Trainer.resume(run, probes.ContinuousAction(), quiet=True, total_timesteps=1_200, engine=order[1])
    assert second.engine.name == order[1]
    assert second.engine.step.item() == before.optimizer["engine.step"].item() > 0
    assert second.train().history["step"][-1] >= 1_200
    assert checkpoint.load_checkpoint(run).state["engine"]["name"] == order[1]
    assert json.loads((run / "config.json").read_text())["engine"] == order[1]


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("probe", [probes.ObservationAction, probes.ContinuousAction, probes.TruncationOnly])
def test_engines_train_alike(probe, same_step):
    """A short run in either engine, in float64, ends with the same parameters and the same history."""
    results = []
    for name in ("native", "torch"):
        config = config_for(engine=name, norm_obs=True, norm_reward=True, learning_rate=1e-3, total_timesteps=300)
        distribution = Distribution.from_space(probe().single_action_space)
        obs_space = spaces.Dict(obs=probe().single_observation_space)
        policy = MLPPolicy(obs_space, distribution, hidden_sizes=(8,), norm_obs=True).double()
        with Trainer(config, probe(same_step=same_step), policy, quiet=True) as trainer:
            results.append(trainer.train())
    ours, theirs = (result.policy.state_dict() for result in results)
    for key, x in ours.items():
        torch.testing.assert_close(x, theirs[key], rtol=1e-5, atol=1e-6)
    columns = [{k: v for k, v in r.history.items() if not k.startswith(("time", "sps"))} for r in results]
    assert columns[0].keys() == columns[1].keys()
    for name, column in columns[0].items():
        np.testing.assert_allclose(column, columns[1][name], rtol=1e-4, atol=1e-5, err_msg=name)


SHORT = {"total_timesteps": 2_000, "num_steps": 64, "num_envs": 8, "num_minibatches": 8, "quiet": True, "run_dir": None}


@envpool
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_run_is_the_same_to_the_bit_however_it_is_divided(env_id, kernel_threads):
    """Twice, in groups, with more kernel threads."""
    hashes = set()
    for groups, threads in ((1, 1), (1, 1), (2, 1), (4, 1), (1, 2), (2, 7)):
        kernel_threads(threads)
        fields = {"norm_obs": True, "norm_reward": True, "num_groups": groups, **SHORT}
        result = pyppo.train(env_id, engine="native", **fields)
        hashes.add(checkpoint.parameter_sha256(result.policy))
    assert len(hashes) == 1


def test_a_broken_observation_is_named():
    """The engine refuses to draw; the trainer says where it came from."""

    class Broken(probes.ObservationAction):
        def advance(self, actions):
            obs, *rest = super().advance(actions)
            obs = obs.copy()
            obs[3] = np.nan
            return obs, *rest

        def begin(self, rows):
            return np.full_like(self.last, np.nan) if self.elapsed.any() else super().begin(rows)

    with pytest.raises(FloatingPointError, match="environment .* gave an observation 'obs' that is not finite"):
        Trainer(config_for(engine="native"), Broken(), quiet=True).train()
