"""The collector: observations, rewards, flags and validity aligned, across rollouts, groups and autoreset modes."""

import importlib.util

import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces

from pyppo.envpool_envs import make_envs
from pyppo.envs import EnvGroup
from pyppo.rollout import Collector, Episode, Rollout
from pyppo.warmup import random_rows

needs_envpool = pytest.mark.skipif(importlib.util.find_spec("envpool") is None, reason="EnvPool is not installed")


def scripted_act(rollout, t, rows):
    """Actions, log-probabilities and values that say where they come from; the value is the observation."""
    obs = rollout.obs["obs"][t, rows, 0]
    actions = (obs.long() + rollout.steps[rows]) % 2
    rollout.actions[t, rows] = actions
    rollout.logp[t, rows] = -0.5
    rollout.values[t, rows] = obs
    return actions.numpy()


def make_collector(envs, num_steps, same_step=False, act=scripted_act):
    first, groups = 0, []
    for env in envs:
        groups.append(EnvGroup(env, first_env=first))
        first += env.num_envs
    rollout = Rollout(num_steps, first, groups[0].obs_space, groups[0].action_space, same_step=same_step)
    collector = Collector(groups, rollout, act, lambda obs: obs["obs"][:, 0])
    collector.reset(seed=1)
    return collector


def column(tensor, row=0):
    return tensor[:, row].reshape(len(tensor)).int().tolist()


# --- alignment, by hand -----------------------------------------------------------------------------------------------


def test_next_step_alignment_over_two_rollouts():
    # Episodes of 2 (ends in itself), 3 (cut off) and 1 (cut off) steps. The observation is 100 * episode + step.
    collector = make_collector([probes.Scripted([[(2, "T"), (3, "C"), (1, "C")]])], num_steps=6)
    rollout = collector.rollout

    assert collector.collect() == 5
    # t:                                       0  1  2    3    4    5    6
    assert column(rollout.obs["obs"]) ==      [0, 1, 2, 100, 101, 102, 103]  # fmt: skip
    assert column(rollout.rewards) ==         [1, 2, 0,   1,   2,   3]  # fmt: skip
    assert column(rollout.terminated) ==      [0, 1, 0,   0,   0,   0]  # fmt: skip
    assert column(rollout.truncated) ==       [0, 0, 0,   0,   0,   1]  # fmt: skip
    assert column(rollout.valid) ==           [1, 1, 0,   1,   1,   1]  # fmt: skip
    # The value of the row after the cut is that of the final observation: bootstrap() writes it to row T.
    assert column(rollout.values)[:6] ==      [0, 1, 2, 100, 101, 102]  # fmt: skip
    assert collector.episodes == [Episode(3.0, 2, 2), Episode(6.0, 3, 5)]
    assert collector.valid_steps == 5

    # The flag of the cut at the last row makes row 0 of the next rollout a reset row.
    collector.episodes.clear()
    assert collector.collect() == 3
    assert column(rollout.obs["obs"]) ==    [103, 200, 201, 300, 301, 302, 400]  # fmt: skip
    assert column(rollout.rewards) ==         [0,   1,   0,   1,   2,   0]  # fmt: skip
    assert column(rollout.terminated) ==      [0,   0,   0,   0,   1,   0]  # fmt: skip
    assert column(rollout.truncated) ==       [0,   1,   0,   0,   0,   0]  # fmt: skip
    assert column(rollout.valid) ==           [0,   1,   0,   1,   1,   0]  # fmt: skip
    assert column(rollout.values)[:6] ==    [103, 200, 201, 300, 301, 302]  # fmt: skip
    assert collector.episodes == [Episode(1.0, 1, 6), Episode(3.0, 2, 8)]
    assert collector.valid_steps == 8
    assert rollout.steps.tolist() == [12]


def test_same_step_alignment_and_final_values():
    collector = make_collector([probes.Scripted([[(2, "T"), (3, "C"), (1, "C")]], same_step=True)], 6, same_step=True)
    rollout = collector.rollout

    assert collector.collect() == 6
    assert column(rollout.obs["obs"]) ==      [0, 1, 100, 101, 102, 200, 300]  # fmt: skip
    assert column(rollout.rewards) ==         [1, 2,   1,   2,   3,   1]  # fmt: skip
    assert column(rollout.terminated) ==      [0, 1,   0,   0,   0,   0]  # fmt: skip
    assert column(rollout.truncated) ==       [0, 0,   0,   0,   1,   1]  # fmt: skip
    assert column(rollout.valid) ==           [1, 1,   1,   1,   1,   1]  # fmt: skip
    # Values of the final observations where an episode was cut off; where it ended in itself none is needed.
    assert column(rollout.final_values) ==    [0, 0,   0,   0, 103, 201]  # fmt: skip
    assert collector.episodes == [Episode(3.0, 2, 2), Episode(6.0, 3, 5), Episode(1.0, 1, 6)]

    assert collector.collect() == 6  # no reset row after the cut at the edge
    assert column(rollout.obs["obs"]) ==    [300, 301, 400, 401, 402, 500, 600]  # fmt: skip
    assert column(rollout.final_values) ==    [0,   0,   0,   0, 403, 501]  # fmt: skip


def test_both_autoreset_modes_see_the_same_experience():
    endings = [[(2, "T"), (3, "C")], [(4, "C")], [(1, "B"), (5, "T")]]
    experience = {}
    for same_step in (False, True):
        collector = make_collector([probes.Scripted(endings, same_step)], 7, same_step)
        seen = {row: [] for row in range(3)}
        for _ in range(6):
            collector.collect()
            rollout = collector.rollout
            for t, row in rollout.valid.nonzero().tolist():
                cut = bool(rollout.truncated[t, row] & ~rollout.terminated[t, row])
                after = rollout.final_values[t, row] if same_step else rollout.obs["obs"][t + 1, row, 0]
                flags = rollout.terminated[t, row].item(), rollout.truncated[t, row].item()
                obs, reward = rollout.obs["obs"][t, row, 0].item(), rollout.rewards[t, row].item()
                seen[row].append((obs, reward, *flags, float(after) if cut else None))
        experience[same_step] = seen, [(e.episode_return, e.length) for e in collector.episodes]
    for row in range(3):
        short, long = sorted((experience[mode][0][row] for mode in (False, True)), key=len)
        assert len(short) > 15
        assert short == long[: len(short)]


def test_reset_drops_what_was_unfinished_but_not_the_counters():
    collector = make_collector([probes.Scripted([[(4, "C")]])], num_steps=3)
    collector.collect()
    collector.reset(seed=1)
    collector.collect()
    assert collector.episodes == []  # three of four steps, twice
    assert column(collector.rollout.valid) == [1, 1, 1]
    assert collector.valid_steps == 6
    assert collector.rollout.steps.tolist() == [6]


def test_episodes_longer_than_rollouts_are_summed_over_them():
    collector = make_collector([probes.Scripted([[(10, "C")], [(7, "T")]])], num_steps=4)
    for _ in range(3):
        collector.collect()
    # Row 1's rewards are 1,000 more. It ends at time 7 (14 valid steps), row 0 at time 10 (19: one was a reset).
    assert collector.episodes == [Episode(7 * 1000 + 28.0, 7, 14), Episode(55.0, 10, 19)]


# --- groups -----------------------------------------------------------------------------------------------------------


ENDINGS = [[(2, "T"), (3, "C")], [(4, "C")], [(1, "B"), (5, "T")], [(6, "T"), (1, "C")]]


def collected(collector, rollouts=4):
    """Everything that some rollouts hold, as one list of arrays."""
    result = []
    for _ in range(rollouts):
        collector.collect()
        rollout = collector.rollout
        names = ("actions", "logp", "rewards", "terminated", "truncated", "valid", "values", "raw_rewards", "steps")
        tensors = [getattr(rollout, name) for name in names] + list(rollout.obs.values())
        tensors += [] if rollout.final_values is None else [rollout.final_values]
        result += [tensor.cpu().numpy().copy() for tensor in tensors]
    return result, collector.episodes


def assert_same(first, second):
    assert first[1] == second[1]
    for a, b in zip(first[0], second[0], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_groups", [2, 4])
@pytest.mark.parametrize("same_step", [False, True])
def test_groups_change_nothing(num_groups, same_step):
    def run(count):
        size = 4 // count
        starts = range(0, 4, size)
        envs = [probes.Scripted(ENDINGS[first : first + size], same_step, first_row=first) for first in starts]
        return collected(make_collector(envs, 7, same_step))

    assert_same(run(1), run(num_groups))


@needs_envpool
@pytest.mark.parametrize("num_groups", [2, 4])
def test_envpool_groups_change_nothing(num_groups):
    def act(rollout, t, rows):
        actions = (rollout.obs["obs"][t, rows, 2] > 0).long()
        rollout.actions[t, rows] = actions
        return actions.numpy()

    def run(count):
        size = 4 // count
        envs = [make_envs("CartPole-v1", size, seed=1, first_env=first) for first in range(0, 4, size)]
        return collected(make_collector(envs, 50, act=act))

    whole = run(1)
    assert len(whole[1]) > 5
    assert_same(whole, run(num_groups))


@needs_envpool
def test_envpool_is_deterministic_by_seed():
    def act(rollout, t, rows):
        return np.zeros((2, 1), np.float32)

    def run(seed):
        return collected(make_collector([make_envs("Pendulum-v1", 2, seed=seed)], 250, act=act), rollouts=2)

    first = run(1)
    assert_same(first, run(1))
    assert not np.array_equal(first[0][-1], run(2)[0][-1])
    # 200 steps an episode, by its limit; the float32 rewards are summed in float64.
    assert [episode.length for episode in first[1]] == [200] * 4
    assert all(-2000 < episode.episode_return < -100 for episode in first[1])


def test_groups_are_served_in_turn():
    calls = []

    class Recorded(EnvGroup):
        def send(self, actions):
            calls.append(("send", self.first_env))
            super().send(actions)

        def recv(self):
            calls.append(("recv", self.first_env))
            return super().recv()

    groups = [Recorded(probes.ConstantReward(num_envs=1), first_env=i) for i in range(2)]
    rollout = Rollout(2, 2, groups[0].obs_space, groups[0].action_space)
    collector = Collector(groups, rollout, scripted_act)
    collector.reset()
    collector.collect()
    # Group 0 is stepping whenever the policy acts for group 1.
    assert calls == [("send", 0), ("send", 1), ("recv", 0), ("send", 0), ("recv", 1), ("send", 1),
                     ("recv", 0), ("recv", 1)]  # fmt: skip


def test_the_environment_gets_what_act_returns():
    env = probes.Scripted([[(3, "T")], [(3, "T")]])
    collector = make_collector([env], 4, act=lambda rollout, t, rows: np.array([t % 2, 1]))
    collector.collect()
    assert [list(actions) for actions in env.received] == [[0, 1], [1, 1], [0, 1], [1, 1]]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("same_step", [False, True])
def test_storage_on_a_gpu_holds_the_same(same_step):
    def act(rollout, t, rows):
        actions = (rollout.obs["obs"][t, rows, 0].long() + rollout.steps[rows]) % 2
        rollout.actions[t, rows] = actions
        return actions.cpu().numpy()

    def run(device):
        group = EnvGroup(probes.Scripted(ENDINGS, same_step))
        rollout = Rollout(7, 4, group.obs_space, group.action_space, device=device, same_step=same_step)
        collector = Collector([group], rollout, act, lambda obs: obs["obs"][:, 0])
        collector.reset(seed=1)
        return collected(collector)

    assert_same(run("cpu"), run("cuda"))


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "shape", "dtype"),
    [
        (spaces.Discrete(3), (5, 2), torch.int64),
        (spaces.MultiDiscrete([2, 3]), (5, 2, 2), torch.int64),
        (spaces.MultiBinary(4), (5, 2, 4), torch.int64),
        (spaces.Box(-1.0, 1.0, (3,), np.float64), (5, 2, 3), torch.float32),
    ],
)
def test_action_storage(space, shape, dtype):
    rollout = Rollout(5, 2, spaces.Box(-1, 1, (4,)), space)
    assert rollout.actions.shape == shape
    assert rollout.actions.dtype == dtype


def test_storage_shapes():
    obs_space = spaces.Dict(
        image=spaces.Box(0, 255, (2, 3), np.uint8),
        place=spaces.Box(-1, 1, (), np.float64),
        count=spaces.Box(0, 9, (1,), np.int32),
    )
    rollout = Rollout(5, 2, obs_space, spaces.Discrete(3), store_dist={"logits": (3,)}, same_step=True)
    shapes = {name: (tuple(x.shape), x.dtype) for name, x in rollout.obs.items()}
    assert shapes == {
        "image": ((6, 2, 2, 3), torch.uint8),
        "place": ((6, 2), torch.float32),
        "count": ((6, 2, 1), torch.int32),
    }
    assert rollout.values.shape == (6, 2)
    assert rollout.dist_params["logits"].shape == (5, 2, 3)
    assert rollout.final_values.shape == (5, 2)
    plain = Rollout(5, 2, spaces.Box(-1, 1, (4,)), spaces.Discrete(3))
    assert list(plain.obs) == ["obs"]
    assert plain.final_values is plain.dist_params is None


def test_rewards_keep_float64_for_the_episode_return():
    class Odd(probes.ConstantReward):
        def advance(self, actions):
            return self.last, np.full(self.num_envs, 0.1), ~self._never, self._never

    collector = make_collector([Odd(num_envs=1)], 1)
    collector.collect()
    assert collector.episodes[0].episode_return == 0.1
    assert collector.rollout.rewards.item() == np.float32(0.1)


# --- refusals ---------------------------------------------------------------------------------------------------------


def group(env):
    return EnvGroup(env)


def rollout_for(num_envs=2, same_step=False):
    return Rollout(2, num_envs, spaces.Box(-10, 10, (1,)), spaces.Discrete(2), same_step=same_step)


def test_refusals():
    two, same = group(probes.ConstantReward(num_envs=2)), group(probes.ConstantReward(num_envs=2, same_step=True))
    with pytest.raises(ValueError, match="num_steps is 0; it must be at least 1"):
        Rollout(0, 2, spaces.Box(-1, 1, (1,)), spaces.Discrete(2))
    with pytest.raises(ValueError, match="groups have 2 environments; they must have num_envs = 3"):
        Collector([two], rollout_for(3), scripted_act)
    with pytest.raises(ValueError, match=r"different ways \(next_step, same_step\)"):
        Collector([two, same], rollout_for(4), scripted_act)
    with pytest.raises(ValueError, match="groups differ in their observation or action space"):
        Collector([two, group(probes.TerminalReward(num_envs=2))], rollout_for(4), scripted_act)
    with pytest.raises(ValueError, match="same-step autoreset needs both"):
        Collector([same], rollout_for(), scripted_act, final_value=lambda obs: obs["obs"])
    with pytest.raises(ValueError, match="same-step autoreset needs both"):
        Collector([same], rollout_for(same_step=True), scripted_act)
    with pytest.raises(RuntimeError, match="collect was called before reset"):
        Collector([two], rollout_for(), scripted_act).collect()


def test_a_reset_row_that_is_done_is_refused():
    class Mislabelled(probes.ConstantReward):
        """Resets in the same step, but says next-step."""

        def step(self, actions):
            return self.last.copy(), np.ones(self.num_envs), ~self._never, self._never, {}

    collector = make_collector([Mislabelled(num_envs=2)], 3)
    with pytest.raises(ValueError, match=r"environment 0 reports done at step 1, .* autoreset mode really next-step"):
        collector.collect()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_refused(bad):
    class Bad(probes.TruncationOnly):
        def advance(self, actions):
            obs, rewards, terminated, truncated = super().advance(actions)
            rewards[1] = bad if self.elapsed[1] == 3 else 1.0
            return obs, rewards, terminated, truncated

    collector = make_collector([Bad(num_envs=2)], 3)
    with pytest.raises(ValueError, match=f"environment 1 gave reward {bad} at step 2; it must be finite"):
        collector.collect()


class Infinite(probes.TerminalReward):
    """Episodes of four steps whose observation after step `at` is infinite in row 1."""

    at = 4

    def advance(self, actions):
        obs, *rest = super().advance(actions)
        obs[1, 2] = np.where(self.elapsed[1] == self.at, np.inf, obs[1, 2])
        return obs, *rest


def first_column_act(rollout, t, rows):
    return np.zeros(rows.stop - rows.start, np.int64)


@pytest.mark.parametrize(("num_steps", "at"), [(3, 2), (3, 3), (9, 1)])
def test_an_observation_that_is_not_finite_is_refused(num_steps, at):
    env = Infinite(num_envs=2)
    env.at = at
    collector = make_collector([env], num_steps, act=first_column_act)
    with pytest.raises(ValueError, match=rf"environment 1 gave an observation 'obs' .* row {at} of .* be finite"):
        collector.collect()


def test_random_rows_are_finite():
    env = Infinite(num_envs=2)
    random_rows([group(env)], 40, seed=1)  # the infinite one ends an episode
    env.at = 3
    with pytest.raises(ValueError, match="environment 1 gave an observation 'obs' that is not finite, under random"):
        random_rows([group(env)], 40, seed=1)


def test_a_final_observation_that_nothing_is_made_of_may_be_anything():
    collector = make_collector([Infinite(num_envs=2)], 4, act=first_column_act)
    for _ in range(3):
        collector.collect()
    assert len(collector.episodes) == 4


def test_a_failed_collect_asks_for_a_reset():
    class Broken(probes.TerminalReward):
        broken = True

        def advance(self, actions):
            if self.broken and self.elapsed[0] == 3:
                raise KeyboardInterrupt
            return super().advance(actions)

    env = Broken(num_envs=2)
    collector = make_collector([env], 6, act=first_column_act)
    with pytest.raises(KeyboardInterrupt):
        collector.collect()
    assert not collector.ready
    with pytest.raises(RuntimeError, match="after a collect that failed"):
        collector.collect()
    env.broken = False
    collector.reset()
    assert collector.collect() == 10
    assert collector.episodes == [Episode(1.0, 4, 8)] * 2


# --- random rows ------------------------------------------------------------------------------------------------------


def test_random_rows_are_valid_observations_in_order():
    # Row 0's final observations (2, 103) and row 1's (1004) do not appear: a reset row is not experience.
    obs = random_rows([group(probes.Scripted([[(2, "T"), (3, "C")], [(4, "C")]]))], 12, seed=3)["obs"][:, 0]
    assert obs.tolist() == [0, 1000, 1, 1001, 1002, 100, 1003, 101, 102, 1100, 1101, 200, 1102]


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=4),
        spaces.MultiDiscrete([2, 5]),
        spaces.MultiBinary(3),
        spaces.Box(np.array([-1, 0], np.float32), np.array([1, 9], np.float32)),
        spaces.Box(-np.inf, np.inf, (2,), np.float64),
        spaces.Box(0.0, np.inf, (2,)),
        spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (2,), np.float32),
    ],
)
def test_random_actions_suit_the_space_and_not_the_groups(space):
    class Recorder(probes.ConstantReward):
        def step(self, actions):
            assert all(action in space for action in actions)
            assert actions.dtype == space.dtype or space.dtype == np.int8
            assert np.abs(actions).max() < 20
            received.append(actions)
            return super().step(actions)

    runs = []
    for sizes in ([4], [2, 2]):
        received = []
        random_rows([group(Recorder(num_envs=size, action_space=space)) for size in sizes], 40, seed=5)
        runs.append(np.concatenate([step.reshape(len(step), -1) for step in received]))
    np.testing.assert_array_equal(*runs)


@needs_envpool
def test_random_rows_of_envpool():
    obs = random_rows([group(make_envs("HalfCheetah-v4", 4, seed=1, purpose="warmup"))], 100, seed=1)["obs"]
    assert obs.shape == (100, 17)
    assert obs.std(axis=0).min() > 0
