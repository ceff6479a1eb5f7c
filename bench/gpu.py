"""Everything about the CUDA kernels that only a GPU can show, in one call: build, test, sanitise, measure.

    python bench/gpu.py [--json gpu.json] [--only STAGE …] [--skip STAGE …] [--tools TOOL …]

Stages: build, tests, sanitize (memcheck, racecheck, initcheck, synccheck), bench (each kernel), train (whole training
loops, see bench/gpu_train.py). Each one's results are written as it ends, and one that fails or cannot run says why and
takes no other's along; with --json, stages of other runs that stand in the file stay.

Device times come from CUDA events around replays of a captured graph, so they hold no launch cost of the host's; "call"
is what a Python caller waits for when it launches one after the other. Inputs rotate through more memory than the L2
cache holds, up to 64 copies; what still fits is marked "cached". The limit is a device copy of the same total bytes,
measured the same way. Without a GPU only the build can run: any other stage ends it with status 2.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from _gpu_cases import Case

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("build", "tests", "sanitize", "bench", "train")
TRAINED = ("HalfCheetah-v4", "CartPole-v1", "Pong-v5")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Under a sanitiser: every kernel, each way it can be launched, but not the thousand launches or the large batches.
SANITIZED_TESTS = (
    "(matches or denominator or no_row or nan_does or noted or empty or skip or steps_of_torch or permutation_is "
    "or out_is) and not more_rows and not vocabulary and not large and not 3000001 and not 60003"
)
SANITIZED_FILES = [
    f"tests/cuda/test_cuda_{name}.py" for name in ("adam", "gae", "gather", "losses", "normalize", "sample")
]


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
    status, output, seconds = run(command, PYPPO_CUDA="1", PYPPO_WERROR="1", PYPPO_CUDA_PROFILE="1")
    if status != 0:
        run(command, PYPPO_CUDA="1")  # another compiler's warnings fail this stage, and not those that follow
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", output))
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", output)]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", output)]
    line = f"{len(registers)} kernels compiled, {spilled} bytes spilled, at most {max(registers, default=0)} registers "
    line += f"and {max(shared, default=0)} bytes of shared memory"
    if not registers and status == 0:
        line = "up to date"
    return report_stage("build", status or int(spilled > 0), output, seconds, line)


def test() -> dict[str, Any]:
    # The kernels' tests need no gymnasium.
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", "tests/cuda"]
    status, output, seconds = run(command)
    return report_stage("tests/cuda", status, output, seconds, last_line(output))


def find_sanitizer() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")


def sanitize(tools: Sequence[str] = TOOLS) -> dict[str, Any]:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("sanitizers             not run: there is no compute-sanitizer on PATH or in CUDA_HOME")
        return {"missing": "compute-sanitizer"}
    results = {}
    for tool in tools:
        # initcheck must see torch's kernels write our inputs; the others look at ours alone.
        chosen = [] if tool == "initcheck" else ["--kernel-name", "kns=pyppo"]
        tests = [sys.executable, "-m", "pytest", "-q", "-x", *SANITIZED_FILES, "-k", SANITIZED_TESTS]
        command = [sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", *chosen, *tests]
        # Without torch's cache of blocks each tensor is an allocation of its own, so reading past one is seen.
        status, output, seconds = run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        results[tool] = report_stage(tool, status, output, seconds, summary[-1] if summary else last_line(output))
    return results


# --- measuring --------------------------------------------------------------------------------------------------------


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
    torch.cuda.synchronize()  # the inputs are there
    with torch.cuda.stream(torch.cuda.Stream()):
        for call in calls:
            call()
    torch.cuda.synchronize()
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


# --- all cases --------------------------------------------------------------------------------------------------------


def bench() -> dict[str, Any]:
    print(f"\n{'kernel':22} {'size':26} {'device us':>10} {'call us':>9} {'GB/s':>8} {'of a copy':>10}")
    rows = []
    from _gpu_cases import cases, eager_loss  # now: the build comes first

    for case in cases():
        try:
            row = measure(case)
        except Exception as error:  # too little memory, say: the other figures are worth having
            rows.append({"kernel": case.kernel, "size": case.size, "error": f"{type(error).__name__}: {error}"})
            print(f"{case.kernel:22} {case.size:26} not measured: {error}", flush=True)
            torch.cuda.empty_cache()
            continue
        rows.append(asdict(row))
        print(
            f"{row.kernel:22} {row.size:26} {row.device_us:10.2f} {row.call_us:9.2f} {row.gigabytes_per_second:8.0f} "
            f"{row.share_of_copy:10.2f}{'  cached' if row.cached else ''}",
            flush=True,
        )
        torch.cuda.empty_cache()
    eager = {f"B={b} A={a}": round(call_us(eager_loss(b, a)), 1) for b, a in ((256, 4), (32768, 4), (262144, 18))}
    print("eager torch, the same loss and gradients, us a call: " + ", ".join(f"{k}: {v}" for k, v in eager.items()))
    from pyppo import ops

    failed = sum("error" in row for row in rows)
    return {"status": int(failed > 0), "rows": rows, "eager_loss_call_us": eager, "pyppo": ops.build_info()}


# --- all of it --------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    status, commit, _ = run(["git", "describe", "--always", "--dirty"]) if shutil.which("git") else (1, "", 0.0)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **device(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "envpool": importlib.metadata.version("envpool") if importlib.util.find_spec("envpool") else None,
        "python": platform.python_version(),
        "commit": commit.strip() if status == 0 else None,
    }


def device() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"device": None}
    properties = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    status, driver, _ = run(asked) if shutil.which("nvidia-smi") else (1, "", 0.0)
    return {
        "device": properties.name,
        "driver": driver.split()[0] if status == 0 and driver.split() else None,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_cache_mib": properties.L2_cache_size / 2**20,
    }


def train() -> dict[str, Any]:
    """Each environment in a process of its own, whose figures outlive a later one's failure."""
    results: dict[str, Any] = {}
    for name in TRAINED:
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "train.json"
            status, output, seconds = run(
                [sys.executable, "bench/gpu_train.py", name, "--json", figures], PYTHONPATH=str(ROOT)
            )
            result = report_stage(f"train {name}", status, output, seconds, "")
            result |= json.loads(figures.read_text()) if figures.exists() else {"output": output[-2000:]}
        if status == 0:
            print(output)
        results[name] = result
    return results


def write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go as JSON")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="the stages to run")
    parser.add_argument("--skip", nargs="+", choices=STAGES, default=[], help="stages to leave out")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS), help="of the stage sanitize")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    chosen = [name for name in STAGES if name in options.only and name not in options.skip]
    if chosen != ["build"] and not torch.cuda.is_available():
        print(
            "bench/gpu.py needs a CUDA device, but for --only build: torch.cuda.is_available() is False here. "
            "Nothing was run."
        )
        return 2
    report: dict[str, Any] = json.loads(options.json.read_text()) if options.json and options.json.exists() else {}
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()) + "\n")
    sys.path.insert(0, str(ROOT))
    sanitized = report.get("sanitize", {})

    def sanitize_with() -> dict[str, Any]:
        """Beside what other tools found in runs before."""
        earlier = {tool: sanitized[tool] for tool in TOOLS if tool in sanitized}
        return earlier | sanitize(options.tools)

    stages = dict(zip(STAGES, (build, test, sanitize_with, bench, train), strict=True))
    for name in chosen:
        try:
            report[name] = stages[name]()
        except Exception as error:
            traceback.print_exc()
            report[name] = {"status": 1, "error": f"{type(error).__name__}: {error}"}
        report[name]["machine"] = facts  # a stage's own: another run may have been on another machine
        write(options.json, report)
    failed = [name for name in chosen if has_failed(report[name])]
    print(f"failed: {', '.join(failed)}" if failed else "all stages that ran passed")
    return 1 if failed else 0


def has_failed(result: dict[str, Any]) -> bool:
    """A stage's own status, or that of any of its parts."""
    parts = [result, *(part for part in result.values() if isinstance(part, dict))]
    return any(part.get("status", 0) != 0 for part in parts)


if __name__ == "__main__":
    sys.exit(main())
