"""Every instruction set's kernels: the tests against the reference again, in a process that PYPPO_CPU holds to one."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from cases import environment

from pyppo import ops

HERE = Path(__file__).parent
PATHS = ("avx512", "avx2", "portable")
NEEDS = {"avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"}, "avx2": {"avx2", "fma"}, "portable": set()}
# What each path runs: every comparison with the float64 reference and the cases worked out by hand; the engine as well.
SELECTED = "(reference or hand or torch or philox or strides or edges or numerics or native_masks) and not scalar"
FILES = (
    "test_gae.py",
    "test_ppo_loss.py",
    "test_ppo_loss_by_hand.py",
    "test_loss_edges.py",
    "test_surrogate_loss.py",
    "test_sample.py",
    "test_adam.py",
    "test_numerics.py",
    "test_native_masks.py",
)


def run(command: list[str], path: str | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=environment(PYPPO_CPU=path),
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )


def lacking(path: str) -> set[str]:
    """The instruction sets that a path needs and this CPU does not have."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return NEEDS[path]
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("cannot tell this CPU's instruction sets without /proc/cpuinfo")
    flags = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    return NEEDS[path] - set(flags.split())


@pytest.mark.parametrize("path", PATHS)
def test_path_matches_reference(path: str) -> None:
    missing = lacking(path)
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}, which the {path} kernels need")
    chosen = run(["-c", "from pyppo import ops; print(ops.cpu_capability())"], path)
    assert chosen.stdout.strip() == path, chosen.stderr
    if path == ops.cpu_capability():
        return  # those tests run on this path in this process
    options = ["-x", "-p", "no:cacheprovider", "-o", "addopts=", "-k", SELECTED]
    done = run(["-m", "pytest", *options, *FILES], path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
    assert " failed" not in done.stdout


def test_best_path_is_the_default() -> None:
    best = next(path for path in PATHS if not lacking(path))
    found = run(["-c", "from pyppo import ops; print(ops.cpu_capability())"], None)
    assert found.stdout.strip() == best


@pytest.mark.parametrize("path", ["avx1024", "AVX2", *(p for p in PATHS if p != "portable")])
def test_what_cannot_run_is_refused(path: str) -> None:
    if path in NEEDS and not lacking(path):
        pytest.skip(f"this CPU runs {path}")
    refused = run(["-c", "import torch; from pyppo import ops; ops.permutation(3, seed=1, iteration=1, epoch=1)"], path)
    assert refused.returncode == 1
    assert "PYPPO_CPU" in refused.stderr
    assert path in refused.stderr


def test_this_process_uses_what_it_was_told() -> None:
    assert ops.cpu_capability() == os.environ.get("PYPPO_CPU", ops.cpu_capability())
    assert ops.cpu_capability() in PATHS
