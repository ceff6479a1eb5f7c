"""One scripted MDP in every form and autoreset mode: on every real row the advantages that are worked out by hand."""

import numpy as np
import pytest
import torch
from scripted_envs import FORMS

from pyppo import ops
from pyppo.envs import EnvGroup
from pyppo.rollout import Collector, Episode, Rollout

ENDINGS = [[(2, "T"), (3, "C")], [(4, "C")], [(1, "C"), (5, "T")], [(6, "T"), (1, "T")]]
GAMMA, LAMBDA = 0.9, 0.8


def value(obs):
    """Any function of the observation; the final observation of an episode is worth something else than the next."""
    return np.sin(np.asarray(obs, np.float64) / 7.0) * 50.0


def stream(row, count):
    """The first transitions of a row: observation, reward, the observation after it, and how that ended (or "")."""
    out, episode = [], 0
    while len(out) < count:
        length, how = ENDINGS[row][episode % len(ENDINGS[row])]
        first = 1000.0 * row + 100.0 * episode
        for step in range(length):
            end = how if step == length - 1 else ""
            out.append((first + step, step + 1 + 1000.0 * row, first + step + 1, end))
        episode += 1
    return out[:count]


def advantages_by_hand(transitions):
    """Schulman et al. 2016, eq. 16, over transitions that a rollout cuts off after the last."""
    result, following = [], 0.0
    for obs, reward, after, end in reversed(transitions):
        delta = reward + (0.0 if end == "T" else GAMMA * value(after)) - value(obs)
        following = delta + (0.0 if end else GAMMA * LAMBDA * following)
        result.append(following)
    return result[::-1]


def collected(env, num_steps, rollouts):
    """For each rollout and row: the observations and advantages of its real rows, in order; and the episodes."""
    group = EnvGroup(env)
    same_step = group.autoreset == "same_step"
    rollout = Rollout(num_steps, 4, group.obs_space, group.action_space, same_step=same_step)

    def act(storage, t, rows):
        storage.values[t, rows] = torch.from_numpy(value(storage.obs["obs"][t, rows, 0]))
        return np.zeros(rows.stop - rows.start, np.int64)

    collector = Collector([group], rollout, act, lambda obs: torch.from_numpy(value(obs["obs"][:, 0])))
    collector.reset(seed=1)
    seen = []
    for _ in range(rollouts):
        collector.collect()
        rollout.values[-1] = torch.from_numpy(value(rollout.obs["obs"][-1, :, 0]))
        advantages, _ = ops.gae(
            rollout.rewards, rollout.values, rollout.terminated, rollout.truncated, gamma=GAMMA, gae_lambda=LAMBDA,
            valid=rollout.valid, final_values=rollout.final_values,
        )  # fmt: skip
        real = rollout.valid.numpy()
        obs = rollout.obs["obs"][:-1, :, 0].numpy()
        seen.append([(obs[real[:, row], row], advantages.numpy()[real[:, row], row]) for row in range(4)])
    return seen, collector.episodes


@pytest.mark.parametrize("num_steps", [60, 5, 1])
@pytest.mark.parametrize("form", FORMS)
def test_advantages_are_those_worked_out_by_hand(form, num_steps):
    seen, episodes = collected(FORMS[form](ENDINGS), num_steps, 120 // num_steps)
    for row in range(4):
        done, transitions = 0, stream(row, 200)
        for one in seen:
            obs, advantages = one[row]
            expected = transitions[done : done + len(obs)]
            assert obs.tolist() == [transition[0] for transition in expected]
            np.testing.assert_allclose(advantages, advantages_by_hand(expected), rtol=1e-4, atol=2e-3)
            done += len(obs)
        assert done >= 60
    lengths = [episode.length for episode in episodes if episode.episode_return < 1000.0]  # row 0's
    assert lengths[:4] == [2, 3, 2, 3]


def test_all_forms_count_the_same_episodes():
    def of_rows(form):
        _, episodes = collected(FORMS[form](ENDINGS), 40, 3)
        return {(episode.episode_return, episode.length) for episode in episodes}

    expected = of_rows("next-step")
    assert len(expected) == 7  # the different ones of the script
    assert all(of_rows(form) == expected for form in FORMS)


def test_disabled_autoreset_resets_only_the_rows_that_are_done():
    group = EnvGroup(FORMS["gymnasium disabled"]([[(2, "T")], [(3, "C")]]))
    group.reset()
    steps = []
    for _ in range(3):
        group.send(np.zeros(2, np.int64))
        steps.append(group.recv())
    assert [step.obs["obs"][:, 0].tolist() for step in steps] == [[1, 1001], [100, 1002], [101, 1100]]
    finals = [step.final_obs and step.final_obs["obs"].tolist() for step in steps]
    assert finals == [None, [[2.0]], [[1003.0]]]
    assert steps[1].terminated.tolist() == [True, False]  # the reset has not taken it back
    assert steps[2].truncated.tolist() == [False, True]


def test_disabled_autoreset_reports_episodes():
    _, episodes = collected(FORMS["gymnasium disabled"](ENDINGS), 4, 1)
    assert episodes == [Episode(2001.0, 1, 4), Episode(3.0, 2, 8), Episode(4010.0, 4, 16)]
