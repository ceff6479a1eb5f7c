"""How the environments are stepped: the candidates, the choice, and equal results."""

import importlib.util
import logging
import os

import numpy as np
import pytest

from pyppo import Config, Trainer, stepping
from pyppo.checkpoint import parameter_sha256
from pyppo.stepping import Way, choose

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed"),
    pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound to cores here"),
]
needs_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core leaves nothing to choose")


def config_for(**fields):
    return Config.for_env("CartPole-v1", **{"num_envs": 4, "num_steps": 16, "run_dir": None, **fields})


@pytest.fixture
def cores(monkeypatch):
    """Says that there are so many."""
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


# --- candidates and choice --------------------------------------------------------------------------------------------


def test_candidates(cores):
    cores(2)
    one = [Way(1, 1, True), Way(1, 1, False), Way(1, 2, False)]
    assert stepping._ways(config_for(), allow_groups=False) == one
    two = [Way(2, 1, False), Way(2, 2, False), Way(2, 1, True, at_once=True)]
    assert stepping._ways(config_for(), allow_groups=True) == [*one, *two]
    assert stepping._ways(config_for(num_envs=5), allow_groups=True) == one  # two groups do not divide 5
    assert stepping._ways(config_for(num_envs=1), allow_groups=True) == one[:2]
    cores(16)
    ways = stepping._ways(config_for(num_envs=64), allow_groups=True)
    in_turn = [(way.num_groups, way.env_threads) for way in ways[1:] if not way.at_once]
    assert in_turn == [(1, 1), (1, 16), (2, 1), (2, 8), (2, 16)]
    assert [way for way in ways if way.at_once] == [Way(n, 1, True, at_once=True) for n in (4, 8)]
    ways = stepping._ways(config_for(num_envs=12), allow_groups=True)
    assert [way.num_groups for way in ways if way.at_once] == [2, 4]
    assert stepping._usual(config_for(num_groups=2, one_core=True), True) == Way(2, 1, True, at_once=True)
    fixed = config_for(num_groups=2, one_core=True)
    assert stepping._ways(fixed, allow_groups=True) == [Way(2, 1, True, at_once=True)]  # two threads would share a core
    ways = stepping._ways(config_for(num_envs=64, one_core=False), allow_groups=True)
    assert not any(way.one_core or way.at_once for way in ways)
    cores(1)
    assert stepping._ways(config_for(), allow_groups=True) == [Way(1, 1, False)]


@pytest.mark.parametrize("num_groups", ["auto", 1, 2, 4])
@pytest.mark.parametrize("env_threads", ["auto", 1, 3])
@pytest.mark.parametrize("one_core", ["auto", True, False])
def test_fixed_fields_are_kept(cores, num_groups, env_threads, one_core):
    fixed = {"num_groups": num_groups, "env_threads": env_threads, "one_core": one_core}
    cores(2)
    config = config_for(**fixed)
    for way in [*stepping._ways(config, allow_groups=True), stepping._usual(config, allow_groups=True)]:
        assert all(value in ("auto", getattr(way, name)) for name, value in fixed.items())
        assert config.num_envs % way.num_groups == 0
    if "auto" not in fixed.values():
        at_once = one_core and num_groups == 2  # each on a core of its own; four have to share the two cores
        assert stepping._ways(config, allow_groups=True) == [Way(num_groups, env_threads, one_core, at_once)]
        assert stepping._ways(config, allow_groups=False) == [Way(num_groups, env_threads, one_core)]


@needs_cores
def test_the_trial_measures_and_says_what_it_chose(caplog):
    calls = []

    def act(rollout, t, rows):
        calls.append(rows)

    with caplog.at_level(logging.INFO, "pyppo"):
        found = choose(config_for(), act, allow_groups=True)
    assert found.way in stepping._ways(config_for(), allow_groups=True)
    assert set(found.rows_per_second) == set(stepping._ways(config_for(), allow_groups=True))
    assert all(speed > 0 for speed in found.rows_per_second.values())
    assert 0 < found.seconds < 30
    assert {(rows.start, rows.stop) for rows in calls} == {(0, 4), (0, 2), (2, 4)}
    assert f"stepped in {found.way} (rows a second in a trial of" in caplog.text


@needs_cores
def test_the_fastest_way_wins_and_the_usual_one_where_they_are_alike(monkeypatch):
    def chosen(speeds):
        ways = stepping._ways(config_for(), allow_groups=False)
        monkeypatch.setattr(stepping, "_measure", lambda *_: dict(zip(ways, speeds, strict=True)))
        return ways.index(choose(config_for(), None, allow_groups=False).way)

    assert chosen([2.0, 1.0, 1.5]) == 0
    assert chosen([1.02, 1.0, 1.02]) == 1  # what is usual
    assert chosen([1.0, 1.2, 1.5]) == 2


@pytest.mark.parametrize("why", ["short run", "one core", "all fixed", "slow to make"])
def test_no_trial_where_it_would_not_pay(monkeypatch, cores, why):
    fields = {
        "short run": {"total_timesteps": 10 * 64},
        "all fixed": {"num_groups": 2, "env_threads": 1, "one_core": True},
    }.get(why, {})
    monkeypatch.setattr(stepping._Trial, "measure", None)
    if why == "one core":
        cores(1)
    if why == "slow to make":
        monkeypatch.setattr(stepping, "_MAKING_SECONDS", 0.0)
    found = choose(config_for(**fields), None, allow_groups=True)
    at_once = len(os.sched_getaffinity(0)) >= 2
    assert found.way == (Way(2, 1, True, at_once) if fields.get("one_core") else Way(1, 1, False))
    assert found.rows_per_second == {}


@pytest.mark.parametrize(
    ("env_id", "num_envs", "num_groups", "why"),
    [("CartPole-v1", 4, 1, "steps are cheap"), ("HalfCheetah-v4", 4, 2, "one steps while the policy acts on the GPU"),
     ("HalfCheetah-v4", 5, 1, "num_envs = 5 is odd")],
)  # fmt: skip
@pytest.mark.parametrize("timesteps", [10 * 64, 10_000_000])
def test_on_a_gpu_the_environments_say_how_many_groups(
    monkeypatch, cores, caplog, env_id, num_envs, num_groups, why, timesteps
):
    cores(2)
    ways = []
    monkeypatch.setattr(stepping, "_measure", lambda trials, _: ways.extend(trial.way for trial in trials) or {})
    monkeypatch.setattr(stepping, "_trial_size", lambda num_envs, *_: num_envs)
    config = config_for(num_envs=num_envs, total_timesteps=timesteps).replace(env_id=env_id)
    with caplog.at_level(logging.INFO, "pyppo"):
        found = choose(config, None, allow_groups=True, on_gpu=True)
    assert found.way.num_groups == num_groups
    assert {way.num_groups for way in ways} <= {num_groups}
    assert len(ways) == (0 if timesteps < 1000 else 3 if num_groups == 1 else 2)
    assert f"num_groups is {num_groups}: {why}" in caplog.text
    assert choose(config.replace(num_groups=num_envs), None, allow_groups=True, on_gpu=True).way.num_groups == num_envs


def test_a_trial_has_fewer_environments_where_they_take_long_to_make(cores):
    cores(2)
    assert stepping._trial_size(64, making=1e-5, most_groups=2) == 64
    assert stepping._trial_size(64, making=0.01, most_groups=2) == 16
    assert stepping._trial_size(8, making=0.02, most_groups=2) == 8
    assert stepping._trial_size(64, making=0.1, most_groups=2) == 0
    assert stepping._trial_size(100, making=0.005, most_groups=2) == 50
    assert stepping._trial_size(100, making=0.005, most_groups=4) == 100  # of 50, four groups would make 52


# --- results ----------------------------------------------------------------------------------------------------------


def trained(**fields):
    with Trainer(config_for(total_timesteps=4 * 64, **fields), quiet=True) as trainer:
        assert trainer.engine.name == fields.get("engine", "native")
        assert trainer.stepping.way.at_once == (fields.get("num_groups") == 2 and fields.get("one_core") is True)
        result = trainer.train()
        rollout = trainer.rollout
        arrays = [x.numpy().copy() for x in (rollout.obs["obs"], rollout.actions, rollout.rewards, rollout.valid)]
        return parameter_sha256(result.policy), result.history["episode_return"][-1], arrays


@needs_cores
@pytest.mark.parametrize(
    "way",
    [Way(1, 1, True), Way(1, 2, False), Way(2, 1, False), Way(2, 2, False), Way(2, 1, True, at_once=True)],
    ids=str,
)
def test_results_do_not_depend_on_the_way(way):
    whole = trained(num_groups=1, env_threads=1, one_core=False)
    other = trained(num_groups=way.num_groups, env_threads=way.env_threads, one_core=way.one_core)
    for a, b in zip(whole[2], other[2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole[:2] == other[:2]


@needs_cores
@pytest.mark.parametrize("fields", [{}, {"num_steps": 1}, {"norm_obs": True}], ids=str)
@pytest.mark.parametrize("env_id", ["Game2048-v1", "HalfCheetah-v4"])  # a mask beside features that the policy prepares
def test_at_once_gives_the_same_bits(env_id, fields):
    def run(**way):
        if env_id == "Game2048-v1" and "norm_obs" in fields:
            pytest.skip("nothing to normalise")
        settings = {"num_envs": 4, "num_steps": 16, "num_minibatches": 2, "run_dir": None, "warmup_rows": 64}
        config = Config.for_env(env_id, **{**settings, "num_groups": 2, "env_threads": 1, **fields, **way})
        with Trainer(config, quiet=True) as trainer:
            rows = [trainer.step() for _ in range(3)]
            rollout = trainer.rollout
            arrays = [*rollout.obs.values(), rollout.actions, rollout.logp, rollout.values, rollout.valid]
            arrays = [x.numpy().copy() for x in arrays]
            return trainer.stepping.way.at_once, parameter_sha256(trainer.policy), rows[-1]["step"], arrays

    in_turn, at_once = run(one_core=False), run(one_core=True)
    assert (in_turn[0], at_once[0]) == (False, True)
    assert in_turn[1:3] == at_once[1:3]
    for a, b in zip(in_turn[3], at_once[3], strict=True):
        np.testing.assert_array_equal(a, b)


@needs_cores
def test_results_do_not_depend_on_the_trial(monkeypatch):
    """A run that tries every way, acting in each, ends where one without a trial does."""
    plain = trained()
    monkeypatch.setattr(stepping, "_FEWEST_ROLLOUTS", 0)
    with_trial = trained()
    assert plain[:2] == with_trial[:2]


@needs_cores
def test_only_an_engine_whose_results_allow_it_is_grouped_by_speed(monkeypatch):
    monkeypatch.setattr(stepping, "_FEWEST_ROLLOUTS", 0)
    with Trainer(config_for(engine="torch"), quiet=True) as trainer:
        assert trainer.stepping.way.num_groups == 1
        assert all(way.num_groups == 1 for way in trainer.stepping.rows_per_second)
