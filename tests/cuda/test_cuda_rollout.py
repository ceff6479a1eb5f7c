"""Rollouts on a GPU hold what rollouts on the CPU hold, bit for bit, however late either stream is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rollout_cases import ENDINGS, Pictures, answer, value_of

from pyppo import ops
from pyppo.config import Config
from pyppo.envs import EnvGroup
from pyppo.estimate import estimate
from pyppo.rollout import Collector, Rollout
from pyppo.transfer import Cuda, Uploads

CYCLES = 20_000_000  # about 10 ms


class Late(Cuda):
    """Copies, or what computes, come late by `torch.cuda._sleep`."""

    def __init__(self, late: str) -> None:
        super().__init__(torch.device("cuda"))
        self.late = late

    def copy(self, pairs: Any, stream: Any) -> None:
        if self.late == ("copies" if stream is self.copies else "compute"):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)
        super().copy(pairs, stream)


def held_of(
    device: str, num_groups: int, same_step: bool = False, memory: bool = False, late: str = "", rollouts: int = 4
) -> tuple[list[Any], Any]:
    """What rollouts hold, read when all are collected, through copies that nobody waits for in between."""
    size = 4 // num_groups
    groups = [EnvGroup(Pictures(ENDINGS[i : i + size], same_step, i), first_env=i) for i in range(0, 4, size)]
    rollout = Rollout(
        5, 4, groups[0].obs_space, groups[0].action_space,
        device=device, same_step=same_step, state_shape=(1,) if memory else None,
    )  # fmt: skip

    def act(rollout: Rollout, t: int, rows: slice) -> np.ndarray:
        return answer(rollout, t, rows).cpu().numpy()

    def final_value(obs: dict[str, torch.Tensor], *states: torch.Tensor) -> torch.Tensor:
        return value_of(obs) + sum(x[:, 0] for x in states)

    gpu = Late(late) if device == "cuda" else None
    collector = Collector(groups, rollout, act, final_value if same_step else None, device=gpu)
    collector.reset(seed=1)
    held = []
    for _ in range(rollouts):
        collector.collect()
        if device == "cuda" and late == "compute":
            torch.cuda._sleep(CYCLES)  # an update that still reads while the next rollout begins
        held.append(
            {name: x.clone() for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}
            | {name: x.clone() for name, x in rollout.obs.items()}
            | {"valid_rows": rollout.valid_rows(), "num_valid": rollout.num_valid}
        )
    collector.reset(seed=1)
    held.append({name: x.clone() for name, x in rollout.obs.items()})
    return held, collector.episodes


@pytest.mark.parametrize("late", ["", "copies", "compute"])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_a_rollout_on_a_gpu_is_the_cpus(memory: bool, same_step: bool, num_groups: int, late: str) -> None:
    plain, plain_episodes = held_of("cpu", 1, same_step, memory)
    ours, episodes = held_of("cuda", num_groups, same_step, memory, late)
    assert episodes == plain_episodes
    assert ours[0]["picture"].dtype == torch.uint8
    for there, here in zip(ours, plain, strict=True):
        assert there.keys() == here.keys()
        for name, x in there.items():
            if isinstance(x, int):
                assert x == here[name], name
                continue
            assert x.dtype == here[name].dtype, name
            np.testing.assert_array_equal(x.cpu().numpy(), here[name].numpy(), err_msg=name)


def test_on_another_stream() -> None:
    plain, _ = held_of("cpu", 2)
    with torch.cuda.stream(torch.cuda.Stream()):
        ours, _ = held_of("cuda", 2, late="copies")
        for there, here in zip(ours, plain, strict=True):
            np.testing.assert_array_equal(there["picture"].cpu().numpy(), here["picture"].numpy())


def test_a_slot_is_written_again_only_after_its_copy() -> None:
    storage = torch.zeros(40, 6, 1000, device="cuda")
    uploads = Uploads([storage], slice(1, 5), Late("copies"))
    for t in range(40):
        uploads.begin()
        uploads.columns[0][t] = np.full((4, 1000), t + 1.0)
        uploads.send(t)
    wanted = torch.zeros(40, 6, 1000)
    wanted[:, 1:5] = torch.arange(1.0, 41.0).reshape(40, 1, 1)
    assert torch.equal(storage.cpu(), wanted)


def test_what_is_not_finite_is_refused() -> None:
    class Infinite(Pictures):
        def in_full(self, obs: np.ndarray) -> dict[str, np.ndarray]:
            full = super().in_full(obs)
            full["number"][full["number"] == 1003] = np.inf
            return full

    group = EnvGroup(Infinite(ENDINGS))
    rollout = Rollout(5, 4, group.obs_space, group.action_space, device="cuda")
    collector = Collector([group], rollout, lambda rollout, t, rows: np.zeros(4, np.int64))
    collector.reset()
    with pytest.raises(ValueError, match="environment 1 gave an observation 'number' that is not finite, row 3"):
        collector.collect()


def test_the_end_of_a_rollout_does_not_wait() -> None:
    """Of a whole iteration's collect and estimate, the only waits are the actions and the check of observations."""
    group = EnvGroup(Pictures(ENDINGS))
    rollout = Rollout(5, 4, group.obs_space, group.action_space, device="cuda")
    act_waits = np.zeros(4, np.int64)
    collector = Collector([group], rollout, lambda rollout, t, rows: act_waits)
    collector.reset()
    collector.collect()
    looks = []
    total = torch.Tensor.__float__

    def look(x: torch.Tensor) -> float:
        torch.cuda.set_sync_debug_mode("default")
        looks.append(x)
        value = total(x)
        torch.cuda.set_sync_debug_mode("error")
        return value

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "__float__", look)
            collector.collect()
        assert len(looks) == 1
        explained = estimate(rollout, Config(env_id="probe", norm_adv="batch"))
        assert rollout.num_valid == len(rollout.valid_rows())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ops.check_errors(rollout.device)
    assert explained.isfinite()
    assert contents_agree(rollout)


def contents_agree(rollout: Rollout) -> bool:
    known, count = rollout.valid_rows(), rollout.num_valid
    rollout.know_valid(None)
    return torch.equal(known, rollout.valid_rows()) and count == rollout.num_valid
