"""bench/_runs.py: what is finished stays finished, whatever happens to the rest."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import bench_jobs
import pytest

import pyppo

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A source distribution carries the tests and not what they look at here.
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")

# What they start imports neither torch nor what the test has imported: it is there at once.
TWO_CALLS = """
if __name__ == "__main__":
    import sys; sys.path[:0] = {paths!r}
    from pathlib import Path
    import _runs, bench_jobs
    jobs = [_runs.Job(f"{{x}}", bench_jobs.double, {{"x": x}}) for x in range(4)]
    _runs.run_jobs(jobs, Path({file!r}), parallel=2)
"""
BROKEN_OFF = """
if __name__ == "__main__":
    import signal, sys; sys.path[:0] = {paths!r}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background is born without it
    from pathlib import Path
    import _runs, bench_jobs
    jobs = [_runs.Job("quick", bench_jobs.double, {{"x": 1}}),
            _runs.Job("slow", bench_jobs.sleep, {{"seconds": 600, "started": {started!r}}})]
    _runs.run_jobs(jobs, Path({file!r}), parallel=1)
"""


@pytest.fixture
def runs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("_runs")


def doubles(runs, *numbers, **changes):
    return [runs.Job(f"double/{x}", bench_jobs.double, {"x": x}, **changes) for x in numbers]


def keys(path: Path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_runs_what_is_missing_and_nothing_twice(runs, tmp_path, capsys):
    path = tmp_path / "folder" / "results.jsonl"
    assert runs.run_jobs(doubles(runs, 1, 2), path, parallel=2) == []
    assert sorted(keys(path)) == ["double/1", "double/2"]
    assert runs.run_jobs(doubles(runs, 1, 2, 3), path) == []
    assert keys(path)[2:] == ["double/3"]
    assert "3/3 double/3" in capsys.readouterr().out
    records = runs.finished(doubles(runs, 3, 1, 4), path)
    assert {key: record["result"] for key, record in records.items()} == {
        "double/3": {"twice": 6},
        "double/1": {"twice": 2},
    }
    assert list(records) == ["double/3", "double/1"]
    assert all(record["cpu_seconds"] > 0 and record["seconds"] > 0 for record in records.values())
    assert all(record["finished"] and record["machine"] for record in records.values())


def test_each_run_has_the_commit_that_it_began_with(runs, tmp_path, monkeypatch):
    commits = iter(["first", "second"])
    monkeypatch.setattr(runs, "commit", lambda: next(commits))
    path = tmp_path / "results.jsonl"
    runs.run_jobs(doubles(runs, 1, 2), path)
    assert [record["commit"] for record in runs.read_records(path)] == ["first", "second"]


def test_a_record_says_what_the_run_had(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "machine", lambda: {"cpu": "a CPU", "cores": 64, "kernel_threads": 64})
    path, extension = tmp_path / "results.jsonl", tmp_path / "_C.so"
    extension.write_bytes(b"code")
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=str(extension)))
    (one,) = doubles(runs, 1)
    cores = len(os.sched_getaffinity(0))
    runs.run_jobs([one], path, parallel=2)
    record = runs.finished([one], path)[one.key]
    share = -(-cores // 2)  # the first of two shares
    threads = max(1, cores // 2)
    assert record["machine"] == {"cpu": "a CPU", "cores": share, "kernel_threads": threads, "torch_threads": threads}
    assert record["parallel"] == 2
    assert record["extension"] == hashlib.sha256(b"code").hexdigest()[:16]
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    assert runs.extension() == "none"


def test_a_commit_says_whether_code_has_changed_since(runs, tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    for name in ("bench/_runs.py", "pyppo/a.py", "csrc/a.cpp", "bench/results/a.jsonl", "docs/a.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "bench/_runs.py"))
    assert runs.commit() == "unknown"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = runs.commit()
    assert re.fullmatch("[0-9a-f]{10}", clean)
    for name in ("bench/results/a.jsonl", "docs/a.md", "docs/new.md"):  # no code
        (tmp_path / name).write_text("second")
    assert runs.commit() == clean
    for name in ("pyppo/a.py", "csrc/a.cpp", "bench/_runs.py", "pyppo/new.py"):
        path = tmp_path / name
        before = path.read_text() if path.exists() else None
        path.write_text("second")
        assert runs.commit() == f"{clean}+", name
        path.unlink() if before is None else path.write_text(before)
    assert runs.commit() == clean


def test_other_arguments_are_another_run(runs, tmp_path):
    path = tmp_path / "results.jsonl"
    runs.run_jobs([runs.Job("one", bench_jobs.double, {"x": 1})], path)
    changed = runs.Job("one", bench_jobs.double, {"x": 5})
    assert runs.finished([changed], path) == {}
    runs.run_jobs([changed], path)
    assert runs.finished([changed], path)["one"]["result"] == {"twice": 10}
    assert runs.finished([runs.Job("one", bench_jobs.double, {"x": 1})], path)["one"]["result"] == {"twice": 2}


def test_failures_are_told_and_tried_again(runs, tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    jobs = [
        runs.Job("raises", bench_jobs.fail_once, {"mark": str(tmp_path / "mark")}),
        runs.Job("dies", bench_jobs.die),
        runs.Job("no json", bench_jobs.no_json),
        runs.Job("half a word", bench_jobs.half_a_word),
        *doubles(runs, 1),
    ]
    failures = {failure.key: failure.why for failure in runs.run_jobs(jobs, path)}
    assert keys(path) == ["double/1"]
    assert "RuntimeError: not this time" in failures["raises"]
    assert failures["dies"] == "the process ended without a result, exit status 7"
    assert "not JSON serializable" in failures["no json"]
    assert failures["half a word"] == "the process ended without a result, exit status 8"
    assert "raises failed: RuntimeError: not this time" in capsys.readouterr().out
    assert runs.run_jobs(jobs[:1], path) == []
    assert keys(path) == ["double/1", "raises"]


@pytest.mark.parametrize(
    "half",
    [
        '{"key": "double/2", "argu',
        '{"key": 3}',
        "[1]",
        "nonsense\n\n",
        '{"key": ["double/2"], "arguments": {"x": 2}, "result": {}, "seconds": 1.0}',
        '{"key": "double/2", "arguments": {"x": 2}, "result": {}, "seconds": "1"}',
    ],
)
def test_a_half_written_line_loses_only_itself(runs, tmp_path, capsys, half):
    path = tmp_path / "results.jsonl"
    whole = {"key": "double/1", "arguments": {"x": 1}, "result": {"twice": 2}, "seconds": 1.0}
    path.write_text(json.dumps(whole) + "\n" + half)
    assert list(runs.finished(doubles(runs, 1, 2), path)) == ["double/1"]
    assert "1 broken line" in capsys.readouterr().out
    locks = runs._Locks(path)
    runs._append(path, {**whole, "key": "double/2", "arguments": {"x": 2}}, locks)
    locks.close()
    assert list(runs.finished(doubles(runs, 1, 2), path)) == ["double/1", "double/2"]
    assert len(runs.read_records(path)) == 2


def test_each_process_gets_its_share_of_the_cores(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    path = tmp_path / "results.jsonl"
    job = runs.Job("threads", bench_jobs.threads)
    runs.run_jobs([job], path, parallel=3)
    assert runs.finished([job], path)["threads"]["result"] == {"PYPPO_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    assert os.environ["OMP_NUM_THREADS"] == "5"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core cannot be shared out")
def test_processes_side_by_side_have_cores_of_their_own(runs, tmp_path):
    path, before = tmp_path / "results.jsonl", os.sched_getaffinity(0)
    jobs = [runs.Job(f"cores/{i}", bench_jobs.cores, {"i": i}) for i in range(4)]
    runs.run_jobs(jobs, path, parallel=2)
    seen = [set(record["result"]["cores"]) for record in runs.finished(jobs, path).values()]
    shares = [set(sorted(before)[i::2]) for i in range(2)]
    assert all(cores in shares for cores in seen)
    assert all(share in seen for share in shares)
    assert os.sched_getaffinity(0) == before
    many = len(before) + 1
    runs.run_jobs([job := runs.Job("all", bench_jobs.cores, {"i": 0})], path, parallel=many)
    assert set(runs.finished([job], path)["all"]["result"]["cores"]) == before


def test_refuses_what_it_cannot_keep_apart(runs, tmp_path):
    with pytest.raises(ValueError, match="'double/1' twice"):
        runs.run_jobs(doubles(runs, 1, 2, 1), tmp_path / "results.jsonl")
    with pytest.raises(ValueError, match="parallel is 0"):
        runs.run_jobs([], tmp_path / "results.jsonl", parallel=0)


def script(tmp_path, text: str, **values: str) -> list[str]:
    paths = [str(BENCH), str(Path(__file__).parent), str(Path(pyppo.__file__).parents[1])]
    path = tmp_path / "call.py"
    path.write_text(text.format(paths=paths, **values))
    return [sys.executable, str(path)]


def test_several_calls_share_a_file(runs, tmp_path):
    path = tmp_path / "results.jsonl"
    command = script(tmp_path, TWO_CALLS, file=str(path))
    calls = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [call.communicate(timeout=300)[0] for call in calls]
    assert [call.returncode for call in calls] == [0, 0], said
    assert sorted(keys(path)) == ["0", "1", "2", "3"]  # each once, every line whole


def broken_off(tmp_path) -> tuple[subprocess.Popen, int]:
    """A call in the middle of its second job, and the process that runs the job."""
    started = tmp_path / "started"
    command = script(tmp_path, BROKEN_OFF, file=str(tmp_path / "results.jsonl"), started=str(started))
    call = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (started.exists() and started.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    return call, int(started.read_text())


def runs_still(pid: int) -> bool:
    """Whether a process is there; one that has ended and that nobody has asked about is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_keeps_what_is_finished(runs, tmp_path):
    call, _ = broken_off(tmp_path)
    call.send_signal(signal.SIGINT)
    said, _ = call.communicate(timeout=300)
    assert call.returncode == 130
    assert "broken off; the same command goes on from here" in said
    assert keys(tmp_path / "results.jsonl") == ["quick"]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_call_leaves_no_run_behind(runs, tmp_path, how):
    call, job = broken_off(tmp_path)
    assert runs_still(job)
    call.send_signal(how)
    call.communicate(timeout=300)
    end = time.monotonic() + 60
    while runs_still(job) and time.monotonic() < end:
        time.sleep(0.05)
    assert not runs_still(job)
    assert keys(tmp_path / "results.jsonl") == ["quick"]


def test_time_left_goes_by_weight(runs, capsys):
    jobs = [*doubles(runs, 1, weight=1.0), *doubles(runs, 2, 3, weight=30.0)]
    progress = runs._Progress(jobs, {}, parallel=2)
    progress.add(jobs[0], 10.0)
    assert capsys.readouterr().out.splitlines()[-1] == "1/3 double/1: 10 s; 5 min left"
    progress = runs._Progress(jobs, {jobs[0].key: {"seconds": 60.0}}, parallel=2)  # of another day
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 3 runs are done; 30 min left"
    progress.add(jobs[1], 360.0)
    assert capsys.readouterr().out.splitlines()[-1] == "2/3 double/2: 360 s; 3 min left"
    assert runs.duration(90) == "90 s"
    assert runs.duration(3 * 3600 + 120) == "3 h 02 min"
