"""Everything about the CUDA kernels that only a GPU can show, in one call: build, test, sanitise, measure.

    python bench/gpu.py [--json gpu.json] [--skip build tests sanitize bench]

Device times come from CUDA events around replays of a captured graph, so they hold no launch cost of the host's; "call"
is what a Python caller waits for when it launches one after the other. Inputs rotate through more memory than the L2
cache holds, up to 64 copies; what still fits is marked "cached". The limit is a device copy of the same total bytes,
measured the same way. Without a GPU the script says so and exits with status 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "tests", "sanitize", "bench")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Under a sanitiser: every kernel, each way it can be launched, but not the thousand launches or the large batches.
SANITIZED_TESTS = "(matches or nan_does or noted or empty or skip) and not more_rows and not vocabulary and not shape3"


# --- stages that are other programs -----------------------------------------------------------------------------------


def run(command: Sequence[str | Path], **environment: str) -> tuple[int, str, float]:
    """Runs a command from the repository's root -> exit status, output, seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, time.perf_counter() - began


def report_stage(name: str, status: int, output: str, seconds: float, line: str) -> dict[str, Any]:
    print(f"{name:22} {'ok' if status == 0 else f'FAILED ({status})':14} {seconds:7.1f} s  {line}", flush=True)
    if status != 0:
        print(output[-6000:])
    return {"status": status, "seconds": round(seconds, 1), "summary": line}


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


def build() -> dict[str, Any]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, output, seconds = run(command, PYPPO_CUDA="1", PYPPO_WERROR="1", PYPPO_PTXAS_VERBOSE="1")
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", output))
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    line = f"{len(registers)} kernels compiled, {spilled} bytes spilled, at most {max(registers, default=0)} registers"
    if not registers and status == 0:
        line = "up to date"
    return report_stage("build", status, output, seconds, line)


def test() -> dict[str, Any]:
    status, output, seconds = run([sys.executable, "-m", "pytest", "-q", "tests/cuda"])
    return report_stage("tests/cuda", status, output, seconds, last_line(output))


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def sanitize() -> dict[str, Any]:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("sanitizers             not run: there is no compute-sanitizer on PATH or in CUDA_HOME")
        return {"missing": "compute-sanitizer"}
    results = {}
    for tool in TOOLS:
        # initcheck must see torch's kernels write our inputs; the others look at ours alone.
        chosen = [] if tool == "initcheck" else ["--kernel-name", "kns=pyppo"]
        tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/cuda", "-k", SANITIZED_TESTS]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", *chosen, *tests]
        # Without torch's cache of blocks each tensor is an allocation of its own, so reading past one is seen.
        status, output, seconds = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        results[tool] = report_stage(tool, status, output, seconds, summary[-1] if summary else last_line(output))
    return results


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """A kernel at one size: `make(i)` gives the call of the i-th copy of its inputs."""

    kernel: str
    size: str
    bytes_moved: int
    make: Callable[[int], Callable[[], Any]]


@dataclass
class Row:
    kernel: str
    size: str
    bytes_moved: int
    cached: bool
    device_us: float
    call_us: float
    gigabytes_per_second: float
    share_of_copy: float


def device_us(calls: Sequence[Callable[[], Any]], seconds: float = 0.3) -> float:
    """Microseconds of one call on the device: the calls, repeated to some length, as one graph."""
    repeats = max(1, 64 // len(calls))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []  # kept: each call writes to memory of its own
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            kept.append([call() for call in calls])
    times = []
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(times) < 5:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return sorted(times)[len(times) // 2] / (len(kept) * len(calls))


def call_us(call: Callable[[], Any], seconds: float = 0.2) -> float:
    """Microseconds of one eager call, launched one after the other."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            call()
        count += 10
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / count


def copies(bytes_moved: int) -> int:
    """How many copies of the inputs it takes to leave the L2 cache."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(1, math.ceil(3 * cache / bytes_moved)))


def copy_us(bytes_moved: int) -> float:
    def make() -> Callable[[], Any]:
        source = torch.empty(max(1, bytes_moved // 2), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return device_us([make() for _ in range(copies(bytes_moved))])


def measure(case: Case) -> Row:
    count = copies(case.bytes_moved)
    calls = [case.make(i) for i in range(count)]
    took = device_us(calls)
    return Row(
        case.kernel, case.size, case.bytes_moved,
        cached=count * case.bytes_moved < 2 * torch.cuda.get_device_properties(0).L2_cache_size,
        device_us=round(took, 2),
        call_us=round(call_us(calls[0]), 2),
        gigabytes_per_second=round(case.bytes_moved / took / 1e3, 1),
        share_of_copy=round(copy_us(case.bytes_moved) / took, 3),
    )  # fmt: skip


# --- the cases --------------------------------------------------------------------------------------------------------


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def gae_case(num_steps: int, num_envs: int) -> Case:
    from pyppo import ops

    def make(_: int) -> Callable[[], Any]:
        shape = (num_steps, num_envs)
        rewards, values = floats(*shape), floats(num_steps + 1, num_envs)
        terminated, truncated, valid = (torch.rand(shape, device="cuda") < p for p in (0.01, 0.01, 0.98))
        out = (torch.empty_like(rewards), torch.empty_like(rewards))
        return lambda: ops.gae(rewards, values, terminated, truncated, valid=valid, out=out)

    return Case("gae", f"T={num_steps} N={num_envs}", 19 * num_steps * num_envs, make)


def loss_inputs(batch: int) -> dict[str, torch.Tensor]:
    return {name: floats(batch) for name in ("advantages", "values", "returns")}


def categorical_case(batch: int, width: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    from pyppo import ops

    def make(_: int) -> Callable[[], Any]:
        inputs: dict[str, Any] = loss_inputs(batch)
        inputs["values"] = inputs["values"].to(dtype)
        inputs["logits"] = floats(batch, width).to(dtype)
        inputs["actions"] = torch.randint(0, width, (batch,), device="cuda")
        inputs["old_logp"] = torch.full((batch,), -math.log(width), device="cuda")
        return lambda: ops.ppo_loss_grad(**inputs, ent_coef=0.01, **options)

    said = "".join(f" {name}" for name in options) + (" bf16" if dtype == torch.bfloat16 else "")
    size = 2 * torch.finfo(dtype).bits // 8
    return Case("loss, categorical", f"B={batch} A={width}{said}", batch * (size * (width + 1) + 20), make)


def normal_case(batch: int, width: int) -> Case:
    from pyppo import ops

    def make(_: int) -> Callable[[], Any]:
        inputs: dict[str, Any] = {**loss_inputs(batch), "mean": floats(batch, width), "log_std": floats(width) - 1}
        inputs["actions"], inputs["old_logp"] = floats(batch, width), floats(batch) - width
        return lambda: ops.ppo_loss_grad(**inputs)

    return Case("loss, normal", f"B={batch} D={width}", batch * (12 * width + 20), make)


def surrogate_case(batch: int) -> Case:
    from pyppo import ops

    def make(_: int) -> Callable[[], Any]:
        inputs = {name: floats(batch) for name in ("logp", "old_logp", "advantages")}
        weights = floats(batch).abs()
        return lambda: ops.surrogate_loss(**inputs, weights=weights)

    return Case("surrogate loss", f"B={batch}", 20 * batch, make)


def sample_case(family: str, batch: int, width: int) -> Case:
    from pyppo import ops

    def make(i: int) -> Callable[[], Any]:
        if family == "normal":
            mean, log_std = floats(batch, width), floats(width) - 1
            return lambda: ops.sample(mean=mean, log_std=log_std, seed=i, step=1)
        logits = floats(batch, width)
        return lambda: ops.sample(logits=logits, distribution=family, seed=i, step=1)

    a_row = {"categorical": 4 * width + 16, "bernoulli": 12 * width + 8, "normal": 8 * width + 8}
    return Case(f"sample, {family}", f"B={batch} A={width}", batch * a_row[family], make)


def adam_case(size: int) -> Case:
    from pyppo import ops

    def make(_: int) -> Callable[[], Any]:
        params, grads, exp_avg, exp_avg_sq = floats(size), floats(size), floats(size), floats(size).square()
        step = torch.zeros(1, dtype=torch.int64, device="cuda")
        return lambda: ops.adam(params, grads, exp_avg, exp_avg_sq, step, learning_rate=1e-4, max_grad_norm=0.5)

    return Case("adam", f"P={size}", 32 * size, make)  # the gradient is read twice: its norm comes first


def permutation_case(n: int) -> Case:
    from pyppo import ops

    return Case("permutation", f"n={n}", 8 * n, lambda i: lambda: ops.permutation(n, seed=i, device="cuda"))


def cases() -> list[Case]:
    return [
        *(gae_case(t, n) for t, n in ((128, 8), (2048, 1), (128, 4096), (1024, 4096), (4096, 8192), (1 << 20, 1))),
        *(categorical_case(b, a) for b, a in ((256, 4), (32768, 4), (262144, 18), (4096, 1024), (512, 50257))),
        categorical_case(32768, 4, norm_adv=True),
        categorical_case(262144, 18, torch.bfloat16),
        *(normal_case(b, d) for b, d in ((32768, 6), (262144, 17), (32768, 64))),
        surrogate_case(1 << 20),
        *(sample_case("categorical", b, a) for b, a in ((1024, 4), (65536, 18), (4096, 1024))),
        sample_case("bernoulli", 65536, 8),
        sample_case("normal", 65536, 6),
        *(adam_case(p) for p in (10_000, 1_000_000, 50_000_000)),
        permutation_case(131072),
    ]


def eager_loss_us(batch: int, width: int) -> float:
    """The same categorical loss and gradients in eager torch, microseconds a call."""
    inputs = loss_inputs(batch)
    logits = floats(batch, width).requires_grad_()
    values = inputs["values"].requires_grad_()
    actions = torch.randint(0, width, (batch, 1), device="cuda")
    old_logp = torch.full((batch,), -math.log(width), device="cuda")

    def call() -> Any:
        log_p = logits.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        ratio = (log_p.gather(-1, actions).squeeze(-1) - old_logp).exp()
        policy = -torch.minimum(ratio * inputs["advantages"], ratio.clamp(0.8, 1.2) * inputs["advantages"])
        value = 0.5 * (values - inputs["returns"]).square()
        return torch.autograd.grad((policy + 0.5 * value - 0.01 * entropy).mean(), (logits, values))

    return call_us(call)


def bench() -> dict[str, Any]:
    print(f"\n{'kernel':22} {'size':26} {'device us':>10} {'call us':>9} {'GB/s':>8} {'of a copy':>10}")
    rows = []
    for case in cases():
        row = measure(case)
        rows.append(asdict(row))
        print(
            f"{row.kernel:22} {row.size:26} {row.device_us:10.2f} {row.call_us:9.2f} {row.gigabytes_per_second:8.0f} "
            f"{row.share_of_copy:10.2f}{'  cached' if row.cached else ''}",
            flush=True,
        )
        torch.cuda.empty_cache()
    eager = {f"B={b} A={a}": round(eager_loss_us(b, a), 1) for b, a in ((256, 4), (32768, 4), (262144, 18))}
    print("eager torch, the same loss and gradients, us a call: " + ", ".join(f"{k}: {v}" for k, v in eager.items()))
    return {"rows": rows, "eager_loss_call_us": eager}


# --- all of it --------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    status, commit, _ = run(["git", "describe", "--always", "--dirty"])
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_mib": properties.L2_cache_size / 2**20,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit.strip() if status == 0 else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="where the results go as JSON")
    parser.add_argument("--skip", nargs="+", choices=STAGES, default=[], help="stages to leave out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench/gpu.py needs a CUDA device: torch.cuda.is_available() is False here. Nothing was run.")
        return 2
    report: dict[str, Any] = {"machine": machine()}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()) + "\n")
    sys.path.insert(0, str(ROOT))
    for name, stage in zip(STAGES, (build, test, sanitize, bench), strict=True):
        if name not in options.skip:
            report[name] = stage()
    if "bench" in report:
        from pyppo import ops

        report["machine"]["build"] = ops.build_info()
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name in STAGES if has_failed(report.get(name, {}))]
    print(f"failed: {', '.join(failed)}" if failed else "all stages that ran passed")
    return 1 if failed else 0


def has_failed(result: dict[str, Any]) -> bool:
    """A stage's own status, or that of any of its parts."""
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]
    return any(part.get("status", 0) != 0 for part in parts)


if __name__ == "__main__":
    sys.exit(main())
