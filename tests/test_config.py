"""Config: every field's rule, the presets, and the way to JSON and back."""

import ast
import dataclasses
import inspect
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyppo import presets
from pyppo.config import Config, preset_for
from pyppo.config_rules import RULES

BAD_VALUES = [
    ("env_id", ""),
    ("env_id", "  "),
    ("total_timesteps", 0),
    ("total_timesteps", -1),
    ("seed", -1),
    ("seed", 2**63),
    ("num_envs", 0),
    ("num_envs", 2**20 + 1),
    ("num_steps", 0),
    ("num_groups", 0),
    ("num_groups", 3),  # does not divide 8
    ("env_threads", -1),
    ("env_threads", 10**6),
    ("one_core", "yes"),
    ("env_options", {"a": float("nan")}),
    ("learning_rate", 0.0),
    ("learning_rate", -1e-3),
    ("learning_rate", float("nan")),
    ("learning_rate", float("inf")),
    ("adaptive_lr_kl", 0.0),
    ("adaptive_lr_kl", 0.01),  # anneal_lr is on
    ("adam_eps", 0.0),
    ("max_grad_norm", 0.0),
    ("gamma", -0.1),
    ("gamma", 1.1),
    ("gae_lambda", 1.5),
    ("num_minibatches", 0),
    ("num_minibatches", 8 * 256 + 1),
    ("update_epochs", 0),
    ("norm_adv", "global"),
    ("objective", "ppo"),
    ("clip_coef", 0.0),
    ("clip_coef", 1.5),
    ("clip_coef_high", 0.0),
    ("dual_clip", 1.0),
    ("ent_coef", -0.01),
    ("vf_coef", -1.0),
    ("target_kl", 0.0),
    ("kl_coef", -1.0),
    ("kl_target", -0.01),
    ("kl_target", 0.01),  # objective is "clip"
    ("clip_obs", 0.0),
    ("warmup_rows", -1),
    ("clip_reward", -10.0),
    ("hidden_sizes", (64, 0)),
    ("activation", "gelu"),
    ("network", "resnet"),
    ("log_std_init", float("inf")),
    ("image_scale", 0.0),
    ("image_symbols", 1),
    ("recurrent", "rnn"),
    ("recurrent_size", 0),
    ("action_bounds", "squash"),
    ("engine", "jax"),
    ("precision", "fp16"),
    ("device", "gpu"),
    ("device", "cuda:x"),
    ("torch_threads", 0),
    ("torch_threads", 10**9),
    ("run_dir", ""),
    ("save_interval", -1),
]

BAD_TYPES = [
    ("env_id", None),
    ("env_id", 3),
    ("total_timesteps", "1000"),
    ("total_timesteps", 10.5),
    ("total_timesteps", True),
    ("seed", None),
    ("num_envs", 8.5),
    ("env_options", ["a"]),
    ("env_options", {1: 2}),
    ("env_options", {"a": object()}),
    ("learning_rate", "3e-4"),
    ("learning_rate", None),
    ("learning_rate", False),
    ("anneal_lr", 1),
    ("anneal_lr", "yes"),
    ("clip_vloss", None),
    ("norm_adv", 1),
    ("hidden_sizes", 64),
    ("shared_trunk", 1),
    ("hidden_sizes", "64"),
    ("hidden_sizes", (64.5,)),
    ("device", 0),
    ("run_dir", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_that_breaks_the_rule_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is ") as error:
        Config(**{"env_id": "CartPole-v1", name: value})
    assert "must be" in str(error.value) or "must divide" in str(error.value)


@pytest.mark.parametrize(("name", "value"), BAD_TYPES)
def test_a_value_of_the_wrong_kind_is_named(name, value):
    with pytest.raises(TypeError, match=rf"^{name} is .*; it must be "):
        Config(**{"env_id": "CartPole-v1", name: value})


def test_every_field_has_a_rule_that_is_tested_and_a_docstring():
    names = [field.name for field in dataclasses.fields(Config)]
    assert set(RULES) == set(names)
    flags = {name for name in names if RULES[name].text == "True or False"}
    assert {name for name, _ in BAD_VALUES} | flags == set(names)

    body = ast.parse(inspect.getsource(Config)).body[0].body
    for statement, following in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign):
            assert isinstance(following, ast.Expr), statement.target.id
            assert isinstance(following.value.value, str)
            assert len(following.value.value) > 15


def test_values_are_brought_to_their_type():
    config = Config(
        "CartPole-v1",
        total_timesteps=1e6,
        num_envs=np.int64(4),
        learning_rate=np.float32(0.5),
        gamma=1,
        hidden_sizes=[32, 16],
        norm_obs=np.bool_(True),
        env_options={"a": (1, 2)},
    )
    assert (config.total_timesteps, type(config.total_timesteps)) == (1_000_000, int)
    assert type(config.num_envs) is int
    assert (config.learning_rate, type(config.learning_rate)) == (0.5, float)
    assert (config.gamma, type(config.gamma)) == (1.0, float)
    assert config.hidden_sizes == (32, 16)
    assert config.norm_obs is True
    assert config.env_options == {"a": [1, 2]}


def test_options_are_a_copy():
    options = {"frame_skip": 4}
    config = Config("Pong-v5", env_options=options)
    options["frame_skip"] = 1
    assert config.env_options == {"frame_skip": 4}


def test_frozen_and_hashable():
    config = Config("CartPole-v1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 2
    assert hash(config) == hash(Config("CartPole-v1"))
    assert config == Config("CartPole-v1") != config.replace(seed=2)


def test_sizes():
    config = Config("x", num_envs=3, num_steps=5, num_minibatches=4)
    assert config.batch_size == 15
    assert config.minibatch_size == 4  # 15 = 4 + 4 + 4 + 3


def test_replace_checks_again():
    with pytest.raises(ValueError, match="num_minibatches is 32; .* num_envs \\* num_steps = 8"):
        Config("x").replace(num_steps=1)
    with pytest.raises(ValueError, match="'gama' is no field of Config; did you mean gamma"):
        Config("x").replace(gama=0.9)


def test_dual_clip_goes_with_the_clipped_objective():
    assert Config("x", dual_clip=2.0).dual_clip == 2.0
    with pytest.raises(ValueError, match="dual_clip is 2.0; it must be None unless objective is 'clip'"):
        Config("x", dual_clip=2.0, objective="kl")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'lr' is no field"):
        Config.from_dict({"env_id": "x", "lr": 1.0})
    with pytest.raises(ValueError, match="'num_env' is no field of Config; did you mean num_envs"):
        Config.for_env("CartPole-v1", num_env=4)
    with pytest.raises(ValueError, match="env_id is missing"):
        Config.from_dict({"seed": 1})


valid_fields = st.fixed_dictionaries(
    {"env_id": st.sampled_from(["CartPole-v1", "own"])},
    optional={
        "total_timesteps": st.integers(1, 2**40),
        "seed": st.integers(0, 2**63 - 1),
        "num_envs": st.integers(32, 4096),
        "learning_rate": st.floats(1e-12, 10),
        "gamma": st.floats(0, 1),
        "max_grad_norm": st.none() | st.floats(1e-3, 1e3),
        "dual_clip": st.none() | st.floats(1.01, 10),
        "norm_adv": st.sampled_from(["minibatch", "batch", "none"]),
        "hidden_sizes": st.lists(st.integers(1, 512), max_size=4),
        "shared_trunk": st.booleans(),
        "env_options": st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()),
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
        "run_dir": st.none() | st.text(min_size=1),
    },
)


@given(valid_fields)
def test_json_round_trip(fields):
    config = Config(**fields)
    assert Config.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config


@pytest.mark.parametrize(
    ("env_id", "expected"),
    [
        # scores.md's settings; batch and minibatch sizes written out as the sources have them
        (
            "CartPole-v1",
            {
                "total_timesteps": 500_000,
                "num_envs": 4,
                "num_steps": 128,
                "minibatch_size": 128,
                "update_epochs": 4,
                "learning_rate": 2.5e-4,
                "anneal_lr": True,
                "ent_coef": 0.01,
                "clip_vloss": True,
                "vf_coef": 0.5,
                "gamma": 0.99,
                "gae_lambda": 0.95,
                "norm_adv": "minibatch",
                "norm_obs": False,
                "norm_reward": False,
            },
        ),
        (
            "Acrobot-v1",
            {"total_timesteps": 500_000, "num_envs": 4, "num_steps": 128, "minibatch_size": 128, "ent_coef": 0.01},
        ),
        (
            "LunarLander-v3",
            {
                "total_timesteps": 1_000_000,
                "num_envs": 16,
                "num_steps": 1024,
                "minibatch_size": 64,
                "gamma": 0.999,
                "gae_lambda": 0.98,
                "update_epochs": 4,
                "ent_coef": 0.01,
                "vf_coef": 1.0,
                "learning_rate": 3e-4,
                "anneal_lr": False,
                "clip_vloss": False,
                "max_grad_norm": 0.5,
            },
        ),
        (
            "Pendulum-v1",
            {
                "total_timesteps": 300_000,
                "num_envs": 4,
                "num_steps": 1024,
                "minibatch_size": 64,
                "gamma": 0.9,
                "gae_lambda": 0.95,
                "update_epochs": 10,
                "learning_rate": 5e-4,
                "vf_coef": 1.0,
                "ent_coef": 0.0,
                "anneal_lr": False,
                "clip_vloss": False,
            },
        ),
        ("MiniGrid-MemoryS7-v0", {"num_envs": 64, "num_steps": 32, "recurrent": "gru", "image_symbols": 11}),
        ("MiniGrid-DoorKey-5x5-v0", {"num_envs": 16, "num_steps": 128, "learning_rate": 1e-3, "image_scale": 10.0}),
        (
            "HalfCheetah-v4",
            {
                "total_timesteps": 1_000_000,
                "num_envs": 8,
                "num_steps": 256,
                "minibatch_size": 64,
                "vf_coef": 0.5,
                "update_epochs": 10,
                "learning_rate": 3e-4,
                "log_std_init": -1.0,
                "anneal_lr": True,
                "norm_obs": True,
                "norm_reward": True,
                "clip_obs": 10.0,
                "clip_reward": 10.0,
                "ent_coef": 0.0,
                "clip_coef": 0.2,
                "adam_eps": 1e-5,
            },
        ),
        ("HumanoidStandup-v5", {"num_envs": 8, "num_steps": 256, "norm_obs": True}),
        ("Swimmer-v3", {"norm_reward": True, "gamma": 0.999}),
    ],
)
def test_presets(env_id, expected):
    config = Config.for_env(env_id)
    assert config.env_id == env_id
    assert {name: getattr(config, name) for name in expected} == expected


def test_overrides_win_over_the_preset_and_the_rest_keeps_it():
    config = Config.for_env("CartPole-v1", num_envs=16, seed=3)
    assert (config.num_envs, config.seed, config.num_steps) == (16, 3, 128)


def test_other_environments_get_the_defaults():
    assert Config.for_env("Taxi-v3") == Config("Taxi-v3")
    assert preset_for("HopperX-v4") == preset_for("Hopper") == {}


def test_all_presets_are_valid():
    for name in presets._PRESETS:
        Config.for_env(f"{name}-v1")


@pytest.mark.parametrize(
    ("env_id", "given", "minibatches"),
    [
        ("Mine-v0", {}, 4),  # 8 environments, 32 minibatches by default
        ("CartPole-v1", {}, 2),
        ("LunarLander-v3", {}, 8),
        ("MiniGrid-Empty-5x5-v0", {}, 8),
        ("Mine-v0", {"num_envs": 1}, 1),
        ("Mine-v0", {"num_envs": 15}, 5),
        ("Mine-v0", {"num_minibatches": 8}, 8),
        ("Mine-v0", {"num_minibatches": 16}, 16),  # as asked for: the engine says what it must be
        ("Mine-v0", {"recurrent": "none"}, 32),
    ],
)
def test_minibatches_of_a_policy_with_a_memory(env_id, given, minibatches):
    assert Config.for_env(env_id, **{"recurrent": "gru", **given}).num_minibatches == minibatches


def test_a_run_dir_at_home():
    assert Config("x", run_dir="~/runs").run_dir == str(Path.home() / "runs")
    assert Config("x", run_dir="~runs").run_dir == "~runs"
