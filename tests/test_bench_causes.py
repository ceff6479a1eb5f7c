"""bench/causes.py: what each question changes, which runs it shares with the suite, its tables."""

from __future__ import annotations

import importlib
import types
from pathlib import Path

import pytest
from bench_records import in_place_of_run_jobs

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A source distribution carries the tests and not what they look at here.
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")


@pytest.fixture
def bench(monkeypatch):
    pytest.importorskip("envpool")
    monkeypatch.syspath_prepend(str(BENCH))
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in ("causes", "learning", "suite")})


@pytest.mark.parametrize("name", ["swimmer", "inverted-double-pendulum", "halfcheetah", "pendulum", "catch"])
def test_a_variant_changes_what_it_says_and_nothing_else(bench, name):
    question = bench.causes.QUESTIONS[name]
    task = next(task for task in bench.suite.SUITE if task.env_id == question.env_id)
    preset = bench.suite.config_of(task, "native" if task.native else "torch", 1).to_dict()
    seen = set()
    for title, changes in question.variants.items():
        jobs = bench.causes.jobs_of(question, title, question.planned)
        assert [job.arguments["config"]["seed"] for job in jobs] == list(question.planned)
        config = jobs[0].arguments["config"]
        changed = {**question.base, **changes}
        assert {name for name in config if config[name] != preset[name]} <= set(changed)
        assert {name: config[name] for name in changed} == changed
        seen.add(jobs[0].identity)
    assert len(seen) == len(question.variants)
    suites = {job.identity for job in bench.learning.jobs_of(bench.suite.SUITE, "auto", None, None)}
    if not question.base:  # what changes nothing is the suite's own run, and is not made again
        assert len(seen & suites) == 1


def test_runs_variant_by_variant_and_reports_all(bench, tmp_path, monkeypatch):
    causes = bench.causes
    question = causes.QUESTIONS["swimmer"]

    def result(job):
        seed = job.arguments["config"]["seed"]
        return {"score": None if seed == 2 else 48.0 + 2 * seed, "best": 60.0, "evaluation": 55.0}

    asked, run_jobs = in_place_of_run_jobs(result)
    monkeypatch.setattr(causes, "run_jobs", run_jobs)
    page = tmp_path / "results.md"
    page.write_text("".join(f"<!-- cause-{name} -->\n<!-- /cause-{name} -->\n" for name in causes.QUESTIONS))
    causes.main(["swimmer", "--seeds", "1-3", "--results", str(tmp_path / "runs.jsonl"), "--docs", str(tmp_path)])
    assert asked == [f"Swimmer-v4/native/s{seed}" for _ in question.variants for seed in (1, 2, 3)]
    text = page.read_text().split("<!-- cause-swimmer -->")[1].split("<!-- /")[0]
    assert "9 runs, 2026-11-23, commit abc" in text
    assert "| training, seeds 1, 2, 3 |" in text
    assert "| γ 0.999: the preset | 52.0 ± 2.0 | 60.0 ± 0.0 | 55.0 ± 0.0 | 50.0, –, 54.0 |" in text
    assert "Not run yet" in page.read_text().split("<!-- cause-catch -->")[1]
    beyond = question.seeds + 2  # the page has what goes beyond the plan
    causes.main(
        ["swimmer", "--seeds", f"1-{beyond}", "--results", str(tmp_path / "more.jsonl"), "--docs", str(tmp_path)]
    )
    assert f"{3 * beyond} runs, 2026-11-23" in page.read_text()
    with pytest.raises(SystemExit, match="'walker' is no question; it must be of swimmer"):
        causes.main(["walker", "--report"])
