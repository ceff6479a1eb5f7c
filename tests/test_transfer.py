"""Rollouts on their way to a GPU, on a simulated one whose copies come as late as they may."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_cases import ENDINGS, Pictures, answer, value_of
from simulated_gpu import SimulatedGpu

from pyppo.envs import EnvGroup
from pyppo.rollout import Collector, Rollout
from pyppo.transfer import Results, Uploads

NAMES = ("actions", "rewards", "terminated", "truncated", "valid", "values", "raw_rewards", "steps", "starts")


def contents(rollout):
    tensors = [getattr(rollout, name) for name in NAMES] + list(rollout.obs.values())
    tensors += [x for x in (rollout.final_values, rollout.states) if x is not None]
    return [x.numpy().copy() for x in (*tensors, rollout.valid_rows())] + [rollout.num_valid]


def collected(num_groups, same_step=False, memory=False, gpu=None, rollouts=3, fails=False, scale=None):
    """What some rollouts hold, and what an update that nobody waited for read of each."""
    size = 4 // num_groups
    groups = [EnvGroup(Pictures(ENDINGS[i : i + size], same_step, i), first_env=i) for i in range(0, 4, size)]
    rollout = Rollout(
        5, 4, groups[0].obs_space, groups[0].action_space, same_step=same_step, state_shape=(1,) if memory else None
    )
    seen, failed = [], []

    def act(rollout, t, rows):
        if fails and not failed and t == 3:
            failed.append(t)
            raise KeyboardInterrupt
        if gpu is None:
            return answer(rollout, t, rows).numpy()
        found = []
        gpu.compute().ask(lambda: found.append(answer(rollout, t, rows).numpy().copy()))
        gpu.work_until(lambda: found)  # the step's only wait
        return found[0]

    def update():
        return seen.append([x.numpy().copy() for x in rollout.obs.values()])

    final_value = (lambda obs, *states: value_of(obs) + sum(x[:, 0] for x in states)) if same_step else None
    collector = Collector(groups, rollout, act, final_value, scale=scale, device=gpu)
    collector.reset(seed=1)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            collector.collect()
        collector.reset(seed=1)
    held = []
    for i in range(rollouts):
        collector.collect()
        if gpu is None:
            update()
        else:
            gpu.compute().ask(update)
            if i % 2 == 0 or same_step:  # sometimes the next rollout begins while this one is still being read
                gpu.finish()
        held.append(contents(rollout) if gpu is None or i % 2 == 0 or same_step else None)
    collector.reset(seed=1)  # while the last rollout may still be read
    if gpu is not None:
        gpu.finish()
    update()
    return held, seen, collector.episodes


def assert_same(plain, simulated):
    assert plain[2] == simulated[2]
    for a, b in zip(plain[1], simulated[1], strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    for a, b in zip(plain[0], simulated[0], strict=True):
        for x, y in zip(a, b or [], strict=False):
            np.testing.assert_array_equal(x, y)
    assert any(simulated[0])


reluctant = st.sampled_from(["", "copies", "compute"])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), reluctant, st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(), st.booleans())
def test_late_copies_change_nothing(seed, reluctant, num_groups, same_step, memory, fails):
    kind = {"same_step": same_step, "memory": memory, "fails": fails, "rollouts": 4}
    plain = collected(1, **kind)
    assert_same(plain, collected(num_groups, **kind, gpu=SimulatedGpu(seed, reluctant)))


def test_groups_change_nothing_overlapped_or_in_turn():
    assert_same(collected(1, memory=True), collected(2, memory=True))
    assert_same(collected(1, same_step=True), collected(4, same_step=True))


# --- a simulated GPU that notices -------------------------------------------------------------------------------------


def differs(gpu):
    plain = collected(2, rollouts=4)
    try:
        assert_same(plain, collected(2, gpu=gpu, rollouts=4))
    except AssertionError:
        return True
    return False


def leave_out_the_wait(monkeypatch):
    """What computes does not wait for the copies."""
    monkeypatch.setattr("simulated_gpu.Stream.wait_event", lambda self, event: None)


def leave_out_the_fence(monkeypatch):
    """A rollout's copies overtake what still reads the last one."""
    monkeypatch.setattr(Uploads, "fence", lambda self: None)


def leave_out_the_host(monkeypatch):
    """Slots and page-locked flags are written again at once."""
    monkeypatch.setattr("simulated_gpu.Event.synchronize", lambda self: None)


@pytest.mark.parametrize(
    ("fault", "reluctant"), [(leave_out_the_wait, "copies"), (leave_out_the_fence, "compute"), (None, "copies")]
)
def test_what_is_out_of_order_shows(monkeypatch, fault, reluctant):
    if fault is not None:
        fault(monkeypatch)
    assert differs(SimulatedGpu(1, reluctant)) == (fault is not None)


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("fault", [None, leave_out_the_host])
def test_a_slot_is_written_again_only_after_its_copy(monkeypatch, num_slots, fault):
    """Steps that nobody reads in between: nothing but the slots makes the host wait."""
    if fault is not None:
        fault(monkeypatch)
    gpu = SimulatedGpu(1, "copies")
    storage = torch.zeros(9, 6, 2)
    uploads = Uploads([storage], slice(2, 5), gpu, num_slots)
    for t in range(9):
        uploads.begin()
        uploads.columns[0][t] = np.full((3, 2), t + 1, np.float64)
        uploads.send(t)
    assert gpu.waits == (0 if fault else 9 - num_slots)
    gpu.finish()
    right = bool((storage[:, 2:5] == torch.arange(1.0, 10.0).reshape(9, 1, 1)).all())
    assert right == (fault is None)
    assert (storage[:, :2] == 0).all()
    assert (storage[:, 5:] == 0).all()


@pytest.mark.parametrize("fault", [None, leave_out_the_host])
def test_a_rollouts_results_are_written_again_only_after_their_copies(monkeypatch, fault):
    if fault is not None:
        fault(monkeypatch)
    gpu, rng = SimulatedGpu(1), np.random.default_rng(1)
    flags, rewards = torch.zeros(3, 64, dtype=torch.bool), torch.zeros(3, 4)
    results = Results(flags, rewards, gpu)
    sent, held, kept = [], [], []
    for _ in range(4):
        results.begin()
        for column in results.flags:
            column[...] = rng.random((3, 4)) < 0.5
        new = torch.from_numpy(rng.normal(size=(3, 4)))
        sent.append((np.stack(results.flags), new.float().numpy()))
        kept.append((np.flatnonzero(results.flags[2]), results.send(new)))
        gpu.compute().ask(lambda: held.append((flags[:, :12].reshape(3, 3, 4).clone(), rewards.clone())))
    gpu.finish()
    pairs = [pair for a, b in zip(sent, held, strict=True) for pair in zip(a, b, strict=True)]
    assert all(np.array_equal(a, b.numpy()) for a, b in pairs) == (fault is None)
    assert all(np.array_equal(a, b.numpy()) for a, b in kept)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_observations_travel_once_and_as_they_are():
    gpu = SimulatedGpu()
    collected(2, gpu=gpu, rollouts=1)
    picture, number, mask = 2 * 6, 2 * 4, 2 * 2  # a group's two rows: bytes, float32, bool
    steps = [size for stream, size in gpu.copied if stream == "copies"]
    assert steps == [mask, number, picture] * 2 * 7  # two groups; five steps and two resets
    carried_over = [2 * mask, 2 * number, 2 * picture]
    flags, rewards = 3 * 64, 5 * 4 * 4
    assert [size for stream, size in gpu.copied if stream == "compute"] == [*carried_over, flags, rewards]


def test_the_host_waits_once_a_step_and_group():
    gpu = SimulatedGpu(reluctant="copies")
    collected(2, memory=True, gpu=gpu, rollouts=1)
    assert gpu.waits == 2 * 5  # for the actions: no slot, flag or reward made it wait


def test_scaled_rewards_are_all_that_is_sent():
    def scale(rewards, terminated, truncated, valid):
        assert all(x.shape == (5, 4) for x in (rewards, terminated, truncated, valid))
        assert rewards.dtype == torch.float64
        return torch.where(valid, rewards * 2 + (terminated | truncated), 0.0).float()

    plain, simulated = collected(1, scale=scale), collected(2, scale=scale, gpu=SimulatedGpu())
    assert_same(plain, simulated)
    rewards, raw, valid = (plain[0][0][NAMES.index(name)] for name in ("rewards", "raw_rewards", "valid"))
    ended = plain[0][0][NAMES.index("terminated")] | plain[0][0][NAMES.index("truncated")]
    np.testing.assert_array_equal(rewards, np.where(valid, raw * 2 + ended, 0.0).astype(np.float32))


def test_the_valid_rows_are_known_without_a_look():
    gpu = SimulatedGpu()
    groups = [EnvGroup(Pictures(ENDINGS))]
    rollout = Rollout(5, 4, groups[0].obs_space, groups[0].action_space)
    collector = Collector(groups, rollout, lambda *_: np.zeros(4, np.int64), device=gpu)
    collector.reset()
    count = collector.collect()
    assert rollout.num_valid == count  # though `valid` is not even there yet
    assert not rollout.valid.any()
    known = rollout.valid_rows()
    gpu.finish()
    assert known.tolist() == rollout.valid.flatten().nonzero().squeeze(1).tolist()
    rollout.valid[0, 0] = False
    assert rollout.valid_rows() is not known
