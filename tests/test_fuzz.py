"""Garbage in any argument never takes the process down: a call returns or raises."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import environment

CALLS = 2500


def garbage(r: random.Random) -> Any:
    """Something that some caller will pass some day."""
    shape = r.choice(
        [(), (0,), (1,), (3,), (4,), (6,), (3, 2), (4, 3), (4, 5), (0, 3), (4, 0), (2, 3, 4), (1, 1, 1, 1)]
    )
    names = "float32 float64 float16 bfloat16 int64 int32 uint8 int8 bool complex64"
    dtype = getattr(torch, r.choice(names.split()))
    dense = torch.randint(-3, 4, shape).to(dtype)
    filled = torch.full(shape, r.choice([float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 0.0]))
    makers = [
        lambda: r.choice([None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1.5, -0.5]),
        lambda: r.choice(
            [float("nan"), float("inf"), -float("inf"), 1e308, 5e-324, 1j, "", "clip", "kl", "x" * 500, b"x"]
        ),
        lambda: r.choice(
            [[], [1, 2], (0.9, 0.999), (2, 3), (2**62, 2**62), {}, {"a": 1}, object(), int, len, ..., "\ud800"]
        ),
        lambda: dense,
        lambda: filled,
        lambda: filled.double(),
        lambda: dense.expand(5, *shape),
        lambda: dense.transpose(0, -1) if dense.dim() > 1 else dense,
        lambda: torch.zeros(2 * dense.numel() + 1, dtype=dtype).as_strided((dense.numel(),), (2,)),
        lambda: dense.to("meta"),
        lambda: dense.to_sparse() if dense.dim() else dense,
        lambda: filled.clone().requires_grad_(),
        lambda: torch.nn.Parameter(filled.clone()),
        lambda: np.array(dense.numpy()) if dtype != torch.bfloat16 else None,
        lambda: np.zeros(shape, r.choice([">f4", "O", "U2", "f2", "M8[s]", "i4,f4"])),
        lambda: np.float64(0.5),
        lambda: np.int64(3),
        lambda: np.zeros(40, np.uint8)[1:33].view(np.float32),  # not aligned
        lambda: memoryview(b"12345678"),
        lambda: [torch.zeros(2), torch.zeros(2)],
        lambda: (torch.zeros(3, 2), torch.zeros(3, 2)),
        lambda: (torch.zeros(3, 2), None),
    ]
    return r.choice(makers)()


def mutation(r: random.Random, x: Any) -> Any:
    """The right kind of thing with unusual contents or strides: most of these calls go through."""
    if isinstance(x, (int, float)):
        return r.choice([x, 0, -x, 2 * x, 0.5 * x, int(x), float(x), np.float32(x), torch.tensor(x)])
    if not isinstance(x, torch.Tensor):
        return r.choice([x, list(x) if isinstance(x, tuple) else x])
    wild = x.clone()
    wild[torch.rand(x.shape) < 0.3] = r.choice([0, 1, -1, 100, 2**31 - 1]) if not x.is_floating_point() else r.choice(
        [float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0]
    )  # fmt: skip
    strided = torch.stack([wild, wild], -1)[..., 0]
    return r.choice(
        [x, wild, wild, strided, x.flip(0), x.contiguous(), x.clone().requires_grad_(x.is_floating_point())]
    )


def fuzz(seed: int, calls: int, journal: Path) -> None:
    from good_calls import FUNCTIONS, GOOD

    from pyppo import ops

    targets = [(name, f) for name, f in FUNCTIONS.items() if name != "set_num_threads"]
    targets += [(name, ops.ppo_loss_grad) for name in ("categorical", "multi", "bernoulli", "normal")]
    optional = ("dual_clip", "clip_coef_high", "kl_coef", "objective", "old_logits", "old_mean", "old_log_std", "betas",
                "distribution", "nvec", "norm_adv", "deterministic", "eps", "weight_decay")  # fmt: skip
    returned = 0
    for i in range(seed, seed + calls):
        journal.write_text(str(i))  # what to replay after a crash
        r = random.Random(i)
        torch.manual_seed(i)
        name, function = r.choice(targets)
        arguments = GOOD[name]()
        for key in r.sample(list(dict.fromkeys([*arguments, *optional])), r.choice([1, 1, 2, 3])):
            if key == "n":  # a permutation of 2^31 would only show how much memory there is
                arguments[key] = r.randrange(-5, 5000)
                continue
            arguments[key] = mutation(r, arguments[key]) if key in arguments and r.random() < 0.5 else garbage(r)
        try:
            function(**arguments)
            returned += 1
        except Exception:
            pass
    print(returned)


def test_garbage_never_crashes(tmp_path: Path) -> None:
    journal = tmp_path / "call"
    command = [sys.executable, "-X", "faulthandler", __file__, "0", str(CALLS), str(journal)]
    # A safe path leaves out the script's own folder, where `cases` is.
    here = environment()
    here["PYTHONPATH"] += os.pathsep + str(Path(__file__).parent)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    call = journal.read_text() if journal.exists() else "none"
    assert done.returncode == 0, f"call {call}: exit {done.returncode}\n{done.stderr[-3000:]}"
    # Some garbage is good enough to run, most is not: a fuzz that only ever raised early would show nothing.
    assert 0.05 * CALLS < int(done.stdout.split()[-1]) < 0.9 * CALLS


if __name__ == "__main__":
    fuzz(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
