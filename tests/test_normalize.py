"""Running statistics against NumPy on everything seen, and the reward scale against a loop."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from pyppo.normalize import ObservationNormalizer, RewardScaler, RunningMeanStd


def test_before_the_first_row():
    statistics = RunningMeanStd((2,))
    assert statistics.mean.tolist() == [0, 0]
    assert statistics.var.tolist() == [1, 1]
    statistics.update(torch.zeros(0, 2))
    assert statistics.var.tolist() == [1, 1]
    assert statistics.count == 0


def test_by_hand():
    statistics = RunningMeanStd()
    statistics.update(torch.tensor([1.0, 3.0]))
    assert (statistics.mean, statistics.var, statistics.count) == (2, 1, 2)
    # 1 3 5 5: mean 3.5, squared distances 6.25 .25 2.25 2.25 = 11 in sum
    statistics.update(torch.tensor([5.0, 5.0]))
    assert (statistics.mean, statistics.var, statistics.count) == (3.5, 2.75, 4)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(-1e6, 1e6), st.integers(0, 2**31))
def test_batches_merge_to_the_whole(sizes, offset, seed):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(offset, 3, size=(n, 2, 3)) for n in sizes]
    statistics = RunningMeanStd((2, 3))
    for batch in batches:
        statistics.update(torch.from_numpy(batch))
    everything = np.concatenate(batches)
    if len(everything):
        np.testing.assert_allclose(statistics.mean, everything.mean(0), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(statistics.var, everything.var(0), rtol=1e-9, atol=1e-9)
    assert statistics.count == len(everything)


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"rows has shape \(5, 3\); it must be \('n', 2\)"):
        RunningMeanStd((2,)).update(torch.zeros(5, 3))


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.float(), lambda m: m.to(torch.bfloat16)])
def test_statistics_stay_float64(convert):
    module = torch.nn.Sequential(ObservationNormalizer(spaces.Box(-1, 1, (2,))), RewardScaler(3, 0.9))
    module[0].update({"obs": torch.tensor([[1 / 3, 2.0], [5.0, 6.0]])})
    before = {name: x.clone() for name, x in module.state_dict().items()}
    after = convert(module).state_dict()
    assert all(x.dtype == torch.float64 for x in after.values())
    assert all(torch.equal(after[name], x) for name, x in before.items())


def dict_space():
    return spaces.Dict(
        {
            "image": spaces.Box(0, 255, (2, 2), np.uint8),
            "position": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "speed": spaces.Box(-1, 1, (), np.float32),
        }
    )


def test_observations():
    normalizer = ObservationNormalizer(dict_space(), clip=1.5)
    image = torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2)
    rows = {
        "image": image,
        "position": torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]]),
        "speed": torch.tensor([-1.0, 0.0, 1.0]),
    }
    unchanged = normalizer(rows)
    assert torch.equal(unchanged["speed"], rows["speed"])
    normalizer.update(rows)
    result = normalizer({**rows, "speed": torch.tensor([100.0, 0.0, -100.0])})
    assert result["image"] is image
    # position 0: mean 2, variance 8/3; position 1 is constant: 0 / 1e-4. The speed is far out: clipped.
    expected = 2 / np.sqrt(8 / 3)
    np.testing.assert_allclose(result["position"], [[-expected, 0], [0, 0], [expected, 0]], rtol=1e-6)
    assert result["position"].dtype == torch.float32
    assert result["speed"].tolist() == [1.5, 0.0, -1.5]


def test_no_clip_and_bad_clip():
    normalizer = ObservationNormalizer(spaces.Box(-1, 1, (1,)), clip=None)
    assert normalizer({"obs": torch.full((1, 1), 1e6)})["obs"].item() == pytest.approx(1e6)
    for make in (lambda: ObservationNormalizer(spaces.Box(-1, 1, (1,)), 0.0), lambda: RewardScaler(1, 0.9, -1.0)):
        with pytest.raises(ValueError, match="clip is .*; it must be above 0, or None"):
            make()


def test_acting_changes_no_statistics():
    normalizer = ObservationNormalizer(spaces.Box(-1, 1, (2,)))
    normalizer.update({"obs": torch.randn(10, 2)})
    before = copy.deepcopy(normalizer.state_dict())
    normalizer.train()
    normalizer({"obs": torch.randn(10, 2)})
    assert all(torch.equal(x, before[name]) for name, x in normalizer.state_dict().items())


def test_state_dict_restores_the_statistics():
    normalizer, other = (ObservationNormalizer(spaces.Box(-1, 1, (2,))) for _ in range(2))
    normalizer.update({"obs": torch.randn(10, 2)})
    other.load_state_dict(normalizer.state_dict())
    x = {"obs": torch.randn(3, 2)}
    assert torch.equal(normalizer(x)["obs"], other(x)["obs"])


# --- rewards ----------------------------------------------------------------------------------------------------------


def flags(rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_reward_scale_by_hand():
    scaler = RewardScaler(1, gamma=0.5, clip=None)
    # The third row is done and the fourth carries the reset: skipped, whatever it says.
    rewards = torch.tensor([[1.0], [1.0], [2.0], [99.0], [4.0]], dtype=torch.float64)
    done, none, valid = flags([[0], [0], [1], [0], [0]]), flags([[0]] * 5), flags([[1], [1], [1], [0], [1]])
    scaled = scaler.scale(rewards, none, done, valid)
    # returns: 1, .5 + 1 = 1.5, .75 + 2 = 2.75, then anew: 4
    expected = np.array([1, 1, 2, 0, 4]) / np.sqrt(np.var([1, 1.5, 2.75, 4]) + 1e-8)
    np.testing.assert_allclose(scaled[:, 0], expected, rtol=1e-6)
    assert scaled.dtype == torch.float32
    assert scaler.returns.tolist() == [4.0]
    # The next rollout goes on from 4; its own returns are in the scale already.
    scaled = scaler.scale(torch.ones(1, 1, dtype=torch.float64), none[:1], none[:1], flags([[1]]))
    assert scaled.item() == pytest.approx(1 / np.sqrt(np.var([1, 1.5, 2.75, 4, 3]) + 1e-8))
    scaler.reset()
    assert scaler.returns.tolist() == [0.0]
    assert scaler.statistics.count == 5


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 5), st.sampled_from([None, 0.5]))
def test_reward_scale_against_a_loop(seed, T, N, clip):
    rng = np.random.default_rng(seed)
    scaler = RewardScaler(N, gamma=0.9, clip=clip)
    running, seen = np.zeros(N), []
    for _ in range(3):
        rewards = rng.normal(size=(T, N))
        terminated, truncated, valid = rng.random((3, T, N)) < np.array([0.2, 0.2, 0.8])[:, None, None]
        scaled = scaler.scale(*map(torch.from_numpy, (rewards, terminated, truncated, valid)))
        for t in range(T):
            for n in range(N):
                if valid[t, n]:
                    running[n] = running[n] * 0.9 + rewards[t, n]
                    seen.append(running[n])
                    if terminated[t, n] or truncated[t, n]:
                        running[n] = 0.0
        expected = rewards / np.sqrt((np.var(seen) if seen else 1.0) + 1e-8)
        expected = expected if clip is None else expected.clip(-clip, clip)
        np.testing.assert_allclose(scaled, np.where(valid, expected, 0), rtol=1e-5, atol=1e-6)


def test_reward_clip():
    scaler = RewardScaler(2, gamma=0.9, clip=0.25)
    rewards = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    none = flags([[0, 0]] * 2)
    assert scaler.scale(rewards, none, none, ~none).abs().max() == 0.25
