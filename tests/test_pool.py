"""The kernels' threads when the system or the caller is difficult: results stay right, and nothing hangs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from pyppo import ops

FEW_THREADS = """
import os, resource
import torch
from pyppo import ops
if os.getuid() == 0:
    os.setuid(65534)  # root's threads are not counted
resource.setrlimit(resource.RLIMIT_NPROC, ({limit}, {limit}))
torch.set_num_threads(1)  # its OpenMP would end the process
ops.set_num_threads(8)
p, g = torch.ones(1_000_000), torch.ones(1_000_000)
m, v, step = torch.zeros(1_000_000), torch.zeros(1_000_000), torch.zeros(1, dtype=torch.int64)
ops.adam(p, g, m, v, step, learning_rate=0.5)
assert step.item() == 1 and torch.allclose(p, torch.full_like(p, 0.5)), p
print("done")
"""


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_fewer_threads_than_asked_for_still_do_the_work(limit: int) -> None:
    run = [sys.executable, "-c", FEW_THREADS.format(limit=limit)]
    result = subprocess.run(run, capture_output=True, text=True, timeout=60)
    assert result.stdout == "done\n", result.stderr


@pytest.mark.parametrize("kernel", ["gae wide", "gae narrow", "permutation", "ppo_loss"])
def test_large_work_runs_on_other_threads(kernel: str) -> None:
    """The calling thread's processor time is less than the process's: another thread worked."""
    steps, envs = (2048, 1000) if kernel == "gae wide" else (65536, 30)
    rewards, values, flags = torch.randn(steps, envs), torch.randn(steps + 1, envs), torch.zeros(steps, envs).bool()
    logits, column = torch.randn(200_000, 8), torch.randn(200_000)
    calls = {
        "gae wide": lambda: ops.gae(rewards, values, flags, flags),
        "gae narrow": lambda: ops.gae(rewards, values, flags, flags),
        "permutation": lambda: ops.permutation(1_000_000, seed=1),
        "ppo_loss": lambda: ops.ppo_loss_grad(
            logits=logits, actions=torch.zeros(200_000, dtype=torch.int64), old_logp=column, advantages=column
        ),
    }
    before = ops.get_num_threads()
    ops.set_num_threads(2)
    try:
        calls[kernel]()
        process, thread = time.process_time(), time.thread_time()
        elsewhere, tries = 0.0, 0
        while elsewhere <= 0.001 and (tries := tries + 1) <= 200:  # on a busy machine the caller may do most of it
            calls[kernel]()
            elsewhere = (time.process_time() - process) - (time.thread_time() - thread)
    finally:
        ops.set_num_threads(before)
    assert elsewhere > 0.001
