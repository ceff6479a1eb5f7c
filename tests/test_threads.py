"""The kernels' own threads: the same bits for any number of them, from any Python thread, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FAMILIES, PLAIN, cast, coin, environment, generator, integers, loss_case, normal, surrogate_case

from pyppo import ops

OPTIONS = {**PLAIN, "value_clip_coef": 0.2, "norm_adv": True}
# A second thread joins above about 100 microseconds of work; the large size is well above, and no multiple of a block.
SIZES = {"small": 130, "large": 70_003}


def run_gae(rows: int) -> list[torch.Tensor]:
    g = generator(1)
    steps, envs = (13, 10) if rows < 1000 else (40, 5003)
    masks = [coin(g, 0.1, steps, envs) for _ in range(2)]
    rewards, values = normal(g, steps, envs).float(), normal(g, steps + 1, envs).float()
    moments = torch.zeros(2, 3, dtype=torch.float64)
    plain = ops.gae(rewards, values, *masks)
    return [*plain, *ops.gae(rewards, values, *masks, valid=coin(g, 0.9, steps, envs), moments=moments), moments]


def run_ppo_loss(family: str, dtype: torch.dtype, rows: int) -> list[torch.Tensor]:
    case = cast(loss_case(2, family, rows, 6, OPTIONS, weights="float"), dtype)
    if family == "normal":
        case["log_std"] = case["log_std"][0] if case["log_std"].dim() == 2 else case["log_std"]
    loss, metrics, grads = ops.ppo_loss_grad(**case)
    return [loss, metrics.stats, *(x for x in grads if x is not None)]


def run_surrogate_loss(rows: int) -> list[torch.Tensor]:
    case = cast(surrogate_case(3, (rows,), OPTIONS, weights="float"), torch.float32)
    case["logp"].requires_grad_()
    loss, metrics = ops.surrogate_loss(**case)
    loss.backward()
    return [loss.detach(), metrics.stats, case["logp"].grad]


def run_sample(family: str, rows: int) -> list[torch.Tensor]:
    parameters = {
        "categorical": {"logits": normal(generator(4), rows, 7)},
        "multi_categorical": {"logits": normal(generator(4), rows, 7), "nvec": (3, 4)},
        "bernoulli": {"logits": normal(generator(4), rows, 7), "distribution": "bernoulli"},
        "normal": {"mean": normal(generator(4), rows, 7), "log_std": torch.zeros(7, dtype=torch.float64)},
    }[family]
    return list(ops.sample(**cast(parameters, torch.float32), seed=9, step=1))


def run_adam(rows: int) -> list[torch.Tensor]:
    size = 10 * rows
    params, grads = normal(generator(5), size).float(), normal(generator(6), size).float()
    moments = torch.zeros(2, size)
    step = torch.zeros(1, dtype=torch.int64)
    norms = [ops.adam(params, grads, *moments, step, learning_rate=1e-3, max_grad_norm=0.5) for _ in range(3)]
    return [params, moments, torch.stack(norms)]


def run_gather(rows: int) -> list[torch.Tensor]:
    columns = [normal(generator(7), rows, 33).float(), integers(generator(8), 9, rows)]
    out = [torch.zeros(rows, *x.shape[1:], dtype=x.dtype) for x in columns]
    weights, order = torch.zeros(rows), ops.permutation(rows, seed=1)
    one, zero = torch.tensor([rows - 5]), torch.tensor([0])
    ops.gather_minibatch(
        columns, torch.arange(rows), order.clamp(max=rows - 6), count=one, part=zero, num_parts=1, out=out,
        weights=weights,
    )  # fmt: skip
    return [*out, weights]


def run_normalize(rows: int) -> list[torch.Tensor]:
    g = generator(9)
    return [ops.normalize(normal(g, rows, 11), normal(g, 11), normal(g, 11).square(), clip=1.0)]


KERNELS: dict[str, Callable[[int], list[torch.Tensor]]] = {
    "gae": run_gae,
    "surrogate_loss": run_surrogate_loss,
    "adam": run_adam,
    "permutation": lambda rows: [ops.permutation(rows, seed=1, iteration=2, epoch=3)],
    "gather_minibatch": run_gather,
    "normalize": run_normalize,
    **{f"sample {family}": lambda rows, f=family: run_sample(f, rows) for family in FAMILIES},
    **{f"ppo_loss {family}": lambda rows, f=family: run_ppo_loss(f, torch.float32, rows) for family in FAMILIES},
    "ppo_loss float64": lambda rows: run_ppo_loss("categorical", torch.float64, rows),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits(kernel: str, size: str, kernel_threads: Callable[[int], None]) -> None:
    results = []
    for threads in (1, 2, 3, 1):
        kernel_threads(threads)
        assert ops.get_num_threads() == threads
        results.append(KERNELS[kernel](SIZES[size]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_work_is_shared(kernel_threads: Callable[[int], None]) -> None:
    """The sizes above do reach the pool: its threads exist in the process afterwards."""
    kernel_threads(1)
    run_adam(SIZES["large"])
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("needs /proc to count threads")
    kernel_threads(6)
    before = len(list(tasks.iterdir()))
    for kernel in KERNELS.values():
        kernel(SIZES["small"])
    assert len(list(tasks.iterdir())) <= before  # small work wakes nobody
    run_adam(SIZES["large"])
    assert len(list(tasks.iterdir())) >= before + 3


@pytest.mark.parametrize("count", [1, 2])
def test_number_of_threads_is_kept(count: int, kernel_threads: Callable[[int], None]) -> None:
    kernel_threads(count)
    run_adam(SIZES["large"])
    assert ops.get_num_threads() == count


def test_callers_on_several_python_threads(kernel_threads: Callable[[int], None]) -> None:
    kernel_threads(3)
    expected = {
        name: KERNELS[name](SIZES["large"]) for name in ("gae", "adam", "ppo_loss categorical", "sample normal")
    }
    problems: list[Any] = []

    def work(name: str) -> None:
        try:
            for _ in range(4):
                result = KERNELS[name](SIZES["large"])
                if not all(torch.equal(a, b) for a, b in zip(result, expected[name], strict=True)):
                    problems.append(f"{name} gave other bits")
        except Exception as error:
            problems.append(error)

    callers = [threading.Thread(target=work, args=(name,)) for name in expected]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert not any(caller.is_alive() for caller in callers), "a caller hangs"
    assert not problems


FORK = """
import os, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from test_threads import KERNELS, SIZES, ops
ops.set_num_threads(3)
names = ("gae", "adam", "ppo_loss categorical", "surrogate_loss", "sample normal", "permutation")
expected = {{name: KERNELS[name](SIZES["large"]) for name in names}} if {used} else None
children = []
for _ in range(3):
    child = os.fork()
    if child == 0:
        results = {{name: KERNELS[name](SIZES["large"]) for name in names}}
        same = expected is None or all(torch.equal(a, b) for n in names for a, b in zip(results[n], expected[n]))
        os._exit(0 if same else 7)
    children.append(child)
    if {used}:
        KERNELS["adam"](SIZES["large"])  # the parent goes on
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
assert codes == [0, 0, 0], codes
for name in names:
    KERNELS[name](SIZES["large"])
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("used", [False, True], ids=["before first use", "with the pool running"])
def test_kernels_work_in_a_forked_child(used: bool) -> None:
    """A child has none of its parent's worker threads; a pool that waited for them would hang, hence the time limit."""
    code = FORK.format(tests=str(Path(__file__).parent), used=used)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_process_ends_with_the_pool_running() -> None:
    code = FORK.format(tests=str(Path(__file__).parent), used=True).split("children = []")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("text", "expected"), [("1", 1), ("3", 3)])
def test_number_of_threads_from_the_environment(text: str, expected: int) -> None:
    code = "from pyppo import ops; print(ops.get_num_threads())"
    variables = environment(PYPPO_NUM_THREADS=text)
    found = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert int(found.stdout) == expected
