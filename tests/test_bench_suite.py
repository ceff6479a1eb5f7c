"""The learning suite: its own environments need what they test, its jobs, and the report of made-up results."""

from __future__ import annotations

import importlib
import json
import types
from pathlib import Path

import numpy as np
import pytest
from bench_records import FACTS, in_place_of_run_jobs, write_records
from gymnasium import spaces

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A source distribution carries the tests and not what they look at here.
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")

CPU = {"cpu": "a CPU", "cores": 2, "cpu_capability": "avx2", "torch": "2.13"}


@pytest.fixture
def bench(monkeypatch):
    pytest.importorskip("envpool")
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("learning", "learning_report", "suite", "own_envs", "_report", "_page")
    return types.SimpleNamespace(**{name.strip("_"): importlib.import_module(name) for name in names})


# --- the environments -----------------------------------------------------------------------------------------------


def play(envs, choose, episodes=50, seed=3):
    """Mean return of the first episodes of all environments; `choose(obs)` gives actions."""
    obs, _ = envs.reset(seed=seed)
    returns, done = np.zeros(envs.num_envs), []
    while len(done) < episodes * envs.num_envs:
        obs, rewards, terminated, truncated, _ = envs.step(choose(obs))
        returns += rewards
        over = terminated | truncated
        done += list(returns[over])
        returns[over] = 0
    return np.mean(done)


def test_locks_want_each_number_right(bench):
    envs = bench.own_envs.Locks(8)
    random = np.random.default_rng(0)
    assert play(envs, lambda obs: envs.answers()) == pytest.approx(16)
    blind = play(envs, lambda obs: random.integers(envs.sizes, size=(8, 3)))
    assert blind == pytest.approx(16 * (1 / 3 + 1 / 5 + 1 / 4) / 3, abs=0.2)
    for part, size in enumerate(envs.sizes):  # one component drawn blindly

        def choose(obs, part=part):
            actions = envs.answers()
            actions[:, part] = random.integers(envs.sizes[part], size=8)
            return actions

        assert play(envs, choose) == pytest.approx(16 * (2 + 1 / size) / 3, abs=0.2)


def test_locks_are_not_linear_in_what_is_seen(bench):
    """What least squares makes of the observation stays well below the gate."""
    envs = bench.own_envs.Locks(4000)
    obs, _ = envs.reset(seed=0)
    features = np.concatenate([obs, np.ones((4000, 1))], axis=1)
    right = []
    for part, size in enumerate(envs.sizes):
        answers = envs.answers()[:, part]
        weights = np.linalg.lstsq(features, np.eye(size)[answers], rcond=None)[0]
        right.append(((features @ weights).argmax(axis=1) == answers).mean())
    assert 16 * np.mean(right) < 12


def ball_of(pictures):
    """Row and column of the ball that falls, [N] each."""
    return np.divmod(pictures[:, :-1].reshape(len(pictures), -1).argmax(axis=1), 12)


def follow(obs):
    """Go to where the ball will land, which both pictures tell."""
    (row, column), (_, before) = ball_of(obs[:, 0]), ball_of(obs[:, 1])
    paddle = obs[:, 0, -1].argmax(axis=1)
    path = column + (column - before) * (11 - row)  # as if there were no walls
    landing = 11 - np.abs(11 - path % 22)
    return 1 + np.sign(landing - paddle)


def test_catch_needs_the_picture(bench):
    envs = bench.own_envs.Catch(16)
    random = np.random.default_rng(0)
    assert play(envs, follow) == 1.0
    assert play(envs, lambda obs: random.integers(3, size=16)) < -0.7
    for blind in range(3):
        assert play(envs, lambda obs, blind=blind: np.full(16, blind)) < -0.7
    assert play(envs, lambda obs: follow(obs[random.permutation(16)])) < -0.5  # another environment's
    assert play(envs, lambda obs: follow(obs[:, [0, 0]])) < 0.8  # without the drift


def test_catch_ends_when_the_ball_lands(bench):
    envs = bench.own_envs.Catch(2)
    obs, _ = envs.reset(seed=[5, 5])
    np.testing.assert_array_equal(obs[0], obs[1])
    for step in range(1, 11):
        assert (ball_of(obs[:, 0])[0] == step).all()
        assert (ball_of(obs[:, 1])[0] == step - 1).all()
        obs, rewards, terminated, truncated, infos = envs.step(np.array([1, 1]))
        assert terminated.all() == (step == 10)
        assert not truncated.any()
        assert (np.abs(rewards) == (step == 10)).all()
    final = infos["final_obs"]
    assert (final[:, 0, -1] == 255).sum(axis=1).tolist() == [1 if reward > 0 else 2 for reward in rewards]
    assert ((obs[:, 0] == 255).sum(axis=(1, 2)) == 2).all()  # a new ball, and a paddle


@pytest.mark.parametrize("name", ["Locks", "Catch"])
def test_own_environments_keep_the_contract(bench, name):
    envs = bench.own_envs.OWN[name](3)
    assert isinstance(envs.single_action_space, (spaces.MultiDiscrete, spaces.Discrete))
    first, _ = envs.reset(seed=7)
    random = np.random.default_rng(0)
    actions = [random.integers(0, 3, size=envs.action_space.shape) for _ in range(40)]
    told = []
    for _ in range(2):
        again, _ = envs.reset(seed=7)
        np.testing.assert_array_equal(again, first)
        told.append([envs.step(one) for one in actions])
    for (obs, rewards, *_), (other, others, *_) in zip(*told, strict=True):
        assert envs.observation_space.contains(obs)
        np.testing.assert_array_equal(obs, other)
        np.testing.assert_array_equal(rewards, others)
    assert not np.array_equal(envs.reset(seed=8)[0], first)


# --- jobs and report ------------------------------------------------------------------------------------------------


def test_suite_runs_seed_by_seed_on_the_engines_that_can(bench):
    jobs = bench.learning.jobs_of(bench.suite.SUITE, "auto", None, None)
    keys = [job.key for job in jobs]
    assert keys[:2] == ["CartPole-v1/native/s1", "Acrobot-v1/native/s1"]
    assert "MiniGrid-Empty-5x5-v0/torch/s1" in keys
    assert "Catch/torch/s5" in keys
    assert "Locks/native/s5" in keys
    assert "HalfCheetah-v4/native/s10" in keys
    assert "Hopper-v4/native/s6" not in keys
    assert [job.arguments["config"]["seed"] for job in jobs] == sorted(int(key.split("/s")[1]) for key in keys)
    native = bench.learning.jobs_of(bench.suite.SUITE, "native", [3], 4096)
    assert len(native) == sum(task.native for task in bench.suite.SUITE) == 10
    assert {job.arguments["config"]["total_timesteps"] for job in native} == {4096}
    torch = bench.learning.jobs_of(bench.suite.SUITE, "torch", [3], None)
    assert {job.arguments["config"]["engine"] for job in torch} == {"torch"}


def test_suite_has_what_is_asked_of_it(bench):
    gates = {task.env_id: task for task in bench.suite.SUITE}
    assert (gates["CartPole-v1"].gate, gates["CartPole-v1"].every, gates["CartPole-v1"].seeds) == (495, True, 10)
    assert (gates["HalfCheetah-v4"].gate, gates["HalfCheetah-v4"].seeds) == (2200, 10)
    assert gates["LunarLander-v3"].of == "evaluation"
    assert all(task.seeds >= 5 for task in bench.suite.SUITE)
    assert {env_id: task.gate for env_id, task in gates.items()} == {
        "CartPole-v1": 495, "Acrobot-v1": -90, "LunarLander-v3": 220, "Pendulum-v1": -200, "Hopper-v4": 2200,
        "HalfCheetah-v4": 2200, "Walker2d-v4": 2678, "Swimmer-v4": 65, "InvertedDoublePendulum-v4": 7584,
        "MiniGrid-Empty-5x5-v0": 0.9, "Locks": 15, "Catch": 0.9,
    }  # fmt: skip
    assert bench.suite.config_of(gates["HalfCheetah-v4"], "native", 2).log_std_init == -1.0  # the preset's
    assert bench.suite.config_of(gates["MiniGrid-Empty-5x5-v0"], "torch", 2).total_timesteps == 60_000


def record(bench, env_id, engine, seed, score, evaluation=None):
    task = next(task for task in bench.suite.SUITE if task.env_id == env_id)
    config = bench.suite.config_of(task, engine, seed).to_dict()
    curve = [[1000, 2000], [0.0, score]] if score is not None else [[], []]
    result = {"score": score, "evaluation": evaluation, "seconds": 10.0, "sps": 100.0, "curve": curve, "diverged": None}
    return f"{env_id}/{engine}/s{seed}", {"arguments": {"config": config}, "result": result, **FACTS}


def test_gates_are_of_the_score_that_they_name(bench):
    report, tasks = bench.learning_report, {task.env_id: task for task in bench.suite.SUITE}

    def verdict(env_id, scores, evaluations=None, engine="native"):
        evaluations = evaluations or [None] * len(scores)
        pairs = enumerate(zip(scores, evaluations, strict=True), start=1)
        runs = [record(bench, env_id, engine, seed, score, value)[1] for seed, (score, value) in pairs]
        return report.verdict(tasks[env_id], runs)

    assert verdict("CartPole-v1", [500.0] * 10) == "met (10 of 10 runs alone)"
    assert verdict("CartPole-v1", [500.0] * 9 + [494.0]) == "missed (9 of 10 runs alone)"
    assert verdict("Hopper-v4", [1000.0, 4000.0, 2300.0, 2300.0, 2300.0]) == "met (4 of 5 runs alone)"
    assert verdict("Hopper-v4", [2300.0]) == "met so far (1 of 1 runs alone, 4 to come)"
    assert verdict("Hopper-v4", [2300.0], engine="torch") == "met (1 of 1 runs alone)"  # the suite asks for none there
    assert verdict("Catch", [1.0], engine="torch") == "met so far (1 of 1 runs alone, 4 to come)"
    assert verdict("Hopper-v4", [2300.0, None, 2300.0, 2300.0, 2300.0]) == "missed (4 of 5 runs alone)"
    assert verdict("LunarLander-v3", [100.0] * 5, [250.0] * 5) == "met (5 of 5 runs alone)"
    assert verdict("LunarLander-v3", [300.0] * 5, [200.0] * 5) == "missed (0 of 5 runs alone)"


def test_a_run_that_diverged_meets_no_gate(bench):
    task = next(task for task in bench.suite.SUITE if task.env_id == "Hopper-v4")
    runs = [record(bench, "Hopper-v4", "native", seed, 2500.0)[1] for seed in range(1, 6)]
    runs[2]["result"]["diverged"] = "the loss is nan"
    assert bench.learning_report.verdict(task, runs) == "missed (4 of 5 runs alone)"
    assert bench.learning_report.row(task, "native", runs)[3] == "5, 1 diverged"


def test_report_of_made_up_results(bench, tmp_path):
    done = dict([
        *(record(bench, "HalfCheetah-v4", "native", i, score, 5e3) for i, score in enumerate([1700, 3000, 5000], 1)),
        *(record(bench, "CartPole-v1", engine, 1, 500.0) for engine in ("native", "torch")),
    ])  # fmt: skip
    (tmp_path / "results.md").write_text("<!-- suite -->\nold\n<!-- /suite -->\n")
    bench.learning_report.write(done, bench.page.Page(tmp_path))
    page = (tmp_path / "results.md").read_text()
    assert "\nold\n" not in page
    assert "HalfCheetah-v4 (native): 2 of 3 runs end above 2500, 1 below." in page
    assert "| HalfCheetah-v4 | native | 1,000,000 | 3 | 3233.3 ± 1357.3 | 5000.0 ± 0.0 | 3233.3 [1700.0, " in page
    assert "| CartPole-v1 | torch | 500,000 | 1 | 500.0 |" in page
    assert "Not run yet: Acrobot-v1," in page
    assert "| HalfCheetah-v4 | native | 1, 2, 3 | 1700.0, 3000.0, 5000.0 |" in page
    assert "5 runs, 2026-11-23, commit abc; a CPU" in page
    assert "4 min of CPU time within 60 s." in page
    assert "| CartPole-v1 | 500.0 (1) | – | – | – | 0.000 (1) | too few pairs |" in page
    assert "| HalfCheetah-v4 | 3233.3 ± 1357.3 (3) |" not in page  # on one engine only
    settings = [line for line in page.splitlines() if line.startswith("| InvertedDoublePendulum-v4 | ")]
    assert len(settings) == 1  # of what has not been run too
    assert "norm_adv none" in settings[0]
    assert "activation" not in settings[0]  # Config's own
    assert (tmp_path / "images/suite.png").stat().st_size > 1000
    assert bench.learning_report.report({}) == "Not run yet."


@pytest.mark.parametrize(("theirs", "said"), [(3.0, "1.00"), (6.0, "0.10")])
def test_the_engines_difference_and_how_often_chance_makes_it(bench, theirs, said):
    scores = {"native": [1.0, 3.0, 5.0], "torch": [theirs] * 3}  # 20 divisions; 2 are as far apart as 3 and 6
    done = dict(
        record(bench, "Hopper-v4", engine, i, score)
        for engine, ours in scores.items()
        for i, score in enumerate(ours, {"native": 1, "torch": 11}[engine])
    )
    line = bench.learning_report.engine_table(done).splitlines()[-1]
    assert line.endswith(f"| {said} | – | – |")
    assert f"| {3.0 - theirs:.3f} [" in line


def test_runs_of_one_seed_on_both_engines_are_no_independent_samples(bench):
    scores = {
        "native": {1: 1000.0, 2: 3000.0, 3: 2000.0},
        "torch": {2: 2900.0, 3: 2250.0, 11: 100.0, 12: 200.0, 13: 300.0, 14: None},
    }
    done = dict(
        record(bench, "Hopper-v4", engine, seed, score)
        for engine, runs in scores.items()
        for seed, score in runs.items()
    )
    line = bench.learning_report.engine_table(done).splitlines()[-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:3] == ["2000.0 ± 816.5 (3)", "200.0 ± 81.6 (3)"]
    assert cells[3].startswith("1800.0 [")
    assert cells[4:] == ["0.10", "-75.0 ± 175.0 (2)", "too few pairs"]
    for seed in range(20, 24):
        ours = {"native": 3300.0 + seed, "torch": 3000.0}
        done |= dict(record(bench, "Hopper-v4", engine, seed, score) for engine, score in ours.items())
    cells = [cell.strip() for cell in bench.learning_report.engine_table(done).splitlines()[-1].strip("|").split("|")]
    assert cells[5] == "189.3 ± 212.5 (6)"
    assert cells[6] == "0.09"  # 6 of 64: the four new ones alike, and not both of the others against them


def test_what_was_added_to_the_settings_since_does_not_lose_a_run(bench, tmp_path):
    runs = importlib.import_module("_runs")
    (job,) = bench.learning.jobs_of([next(t for t in bench.suite.SUITE if t.env_id == "Hopper-v4")], "auto", [1], None)
    config = dict(job.arguments["config"])
    assert config.pop("dual_clip") is None  # as of a version that had no such field
    older = {"key": job.key, "arguments": {**job.arguments, "config": config}, "result": {}, "seconds": 1.0}
    other = {**older, "arguments": {**job.arguments, "config": {**config, "gamma": 0.5}}}
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(other) + "\n")
    assert runs.finished([job], path) == {}
    path.write_text(json.dumps(older) + "\n" + json.dumps(other) + "\n")
    assert runs.finished([job], path)[job.key]["arguments"] == older["arguments"]


def test_what_a_probability_says(bench):
    statistics = importlib.import_module("_run_statistics")

    def said(ours, theirs):
        found = statistics.probability_of_improvement(ours, theirs)
        return bench.report.higher_or_lower(found, ours, theirs)

    low, high, both = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [0.0, 2.0, 9.0]
    assert said([high, high], [low, low]) == "higher"
    assert said([low], [high]) == "lower"
    assert said([low], [both]) == "not told apart"
    assert said([high, [9.0]], [low, low]) == "too few runs"


def test_time_of_runs_is_counted_once(bench):
    """Two at a time, then a pause, then one more."""
    ends = {"00:10:00": 600.0, "00:10:01": 300.0, "00:11:00": 120.0, "05:00:00": 60.0}
    records = [{"finished": f"2026-11-23T{end}+00:00", "seconds": seconds} for end, seconds in ends.items()]
    assert bench.report.elapsed(records) == 660 + 60
    assert bench.report.elapsed([]) == bench.report.elapsed([{"seconds": 3.0}]) == 0


def test_a_diverged_runs_curve_goes_to_the_end(bench):
    record = {"arguments": {"fields": {"total_timesteps": 1000}}, "result": {"curve": [[100, 200], [1.0, 3.0]]}}
    steps, returns = bench.report.curve_of(record)
    assert (steps.tolist(), returns.tolist()) == ([100, 200, 1000], [1.0, 3.0, 3.0])
    other = {"arguments": {"config": {"total_timesteps": 150}}, "result": record["result"]}
    assert bench.report.curve_of(other)[0].tolist() == [100, 200, 200]
    assert bench.report.curve_of({**record, "result": {"curve": [[], []]}}) is None


@pytest.mark.parametrize(("name", "engine"), [("Locks", "native"), ("Catch", "torch")])
def test_a_run_of_the_suite(bench, name, engine):
    task = next(task for task in bench.suite.SUITE if task.env_id == name)
    config = bench.suite.config_of(task, engine, 1, 2048)
    found = bench.learning.train(config.to_dict(), episodes=4)
    assert found["engine"] == engine
    assert found["steps"] >= 2048
    assert np.isfinite([found["score"], found["evaluation"], found["sps"]]).all()


def test_one_environment_with_settings_of_its_own(bench, tmp_path, capsys):
    path = tmp_path / "one.json"
    fields = ["total_timesteps=4096", "run_dir=None", "num_envs=8"]
    arguments = [
        "CartPole-v1",
        "--seeds",
        "2",
        "--solved",
        "1",
        "--at-least",
        "5",
        "--json",
        str(path),
        "--set",
        *fields,
    ]
    bench.learning.main(arguments)
    report = json.loads(path.read_text())
    assert report["runs"][0]["seed"] == 2
    assert report["summary"]["reached"] == 1
    assert report["config"]["num_envs"] == 8
    assert report["runs"][0]["solved_steps"] <= 4096
    assert "CartPole-v1: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel", "0"], "it is '0'; it must be an integer of at least 1"),
        (["--seeds", "1", "-3"], "it is '-3'; it must be"),
        (["--steps", "1.5"], "it is '1.5'; it must be"),
        (["Nonsense-v0"], "env_id is 'Nonsense-v0'; it must be one of EnvPool's"),
        (["CartPole-v1", "--set", "gamma=7"], "gamma is 7; it must be a number from 0 to 1"),
        (["--docs", "{folder}/none"], "none; it must be a folder with results.md"),
        (["--docs", "{folder}"], "has no section 'suite'; it must have <!-- suite -->"),
        (["--results", "{folder}"], "a folder; it must be a file"),
        (["--results", "/proc/none/runs.jsonl"], "it must be a file that can be written: "),
        (
            ["--report", "--results", "{folder}/none"],
            "none; it must be a file of runs, or --report has nothing",
        ),
        (["CartPole-v1", "--json", "{folder}"], "--json is"),
        (["CartPole-v1", "--kept", "{folder}"], "a folder; it must be a file"),
        (["CartPole-v1", "--evaluate", "-3"], "it is '-3'; it must be an integer of at least 0"),
        (["CartPole-v1", "--set", "seed=9"], "--set has seed=9; seeds are what --seeds takes"),
        (["CartPole-v1", "--docs", "{folder}"], "--docs are of the suite"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_runs(bench, tmp_path, capsys, arguments, message):
    (tmp_path / "results.md").write_text("nothing")
    with pytest.raises(SystemExit) as error:
        bench.learning.main([one.replace("{folder}", str(tmp_path)) for one in arguments])
    said = str(error.value) + capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_the_page_is_of_its_own_runs_alone(bench, tmp_path, monkeypatch):
    """Runs of another length, or of another file, are shown, unless a page of their own is named."""
    written = []
    monkeypatch.setattr(bench.learning_report, "write", lambda done, docs: written.append(docs))
    other = ["--results", str(tmp_path / "other.jsonl")]
    (tmp_path / "other.jsonl").touch()
    (tmp_path / "results.md").write_text("<!-- suite -->\n<!-- /suite -->\n")
    bench.learning.main(["--report", "--steps", "2048"])
    bench.learning.main(["--report", "--steps", "2048", "--docs", str(tmp_path)])
    bench.learning.main(["--report", *other])
    bench.learning.main(["--report", *other, "--docs", str(tmp_path)])
    bench.learning.main(["--report", "--only", "Hopper-v4", "--seeds", "12"])
    assert [page.folder and page.folder.name for page in written] == [None, tmp_path.name, None, tmp_path.name, "docs"]


def test_a_queue_is_run_and_the_whole_file_reported(bench, tmp_path, monkeypatch):
    (tmp_path / "results.md").write_text("<!-- suite -->\n<!-- /suite -->\n")
    files = ["--results", str(tmp_path / "runs.jsonl"), "--docs", str(tmp_path)]
    scored = {"score": 400.0, "evaluation": 1.0, "sps": 1.0, "curve": [[], []], "diverged": None}
    asked, run_jobs = in_place_of_run_jobs(lambda job: scored)
    monkeypatch.setattr(bench.learning, "run_jobs", run_jobs)
    bench.learning.main(["--only", "CartPole-v1", "Locks", "CartPole-v1", "--seeds", "2-3", "1", *files])
    assert asked == [f"{env_id}/native/s{seed}" for seed in (2, 3, 1) for env_id in ("CartPole-v1", "Locks")]
    bench.learning.main(["--only", "Catch", "--seeds", "7", *files])
    page = (tmp_path / "results.md").read_text()  # of what was there before, too
    assert "| CartPole-v1 | native | 500,000 | 3 | 400.0 ± 0.0 |" in page
    assert "| Catch | torch | 300,000 | 1 | 400.0 |" in page
    failure = importlib.import_module("_runs").Failure("Catch/torch/s7", "out of memory")
    monkeypatch.setattr(bench.learning, "run_jobs", lambda *_, **__: [failure])
    with pytest.raises(SystemExit, match="1 of the runs failed; the same command tries them again"):
        bench.learning.main(["--only", "Catch", *files])


def test_records_of_another_program_are_no_runs_of_the_suite(bench, tmp_path, monkeypatch):
    """Nor of this one, where their arguments have another shape: no traceback, and the others count."""
    (tmp_path / "results.md").write_text("<!-- suite -->\n<!-- /suite -->\n")
    path = tmp_path / "runs.jsonl"
    jobs = bench.learning.jobs_of(bench.suite.SUITE, "auto", [1], None)
    scored = {"score": 400.0, "evaluation": 1.0, "sps": 1.0, "curve": [[], []], "diverged": None}
    write_records(path, jobs[:1], lambda job: scored)
    strange = [
        (jobs[1].key, {}),
        (jobs[2].key, {"config": 3}),
        (["a"], {}),
        ("X/clip 0.2/Hopper-v4/s1", {"fields": {}}),
    ]
    with path.open("a") as file:
        for key, arguments in strange:
            file.write(json.dumps({"key": key, "arguments": arguments, "result": {}, "seconds": 1.0}) + "\n")
    bench.learning.main(["--report", "--results", str(path), "--docs", str(tmp_path)])
    assert "| CartPole-v1 | native | 500,000 | 1 | 400.0 |" in (tmp_path / "results.md").read_text()


def test_what_is_not_for_the_page_is_shown(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench.page.console, "_width", 60)  # no line of a table is broken
    page, drawn = bench.page.Page(None), []
    assert page.picture("suite.png", "Curves", drawn.append) == ""
    page.section("suite", "| a | [bold] |" + " b |" * 40)
    assert capsys.readouterr().out == "| a | [bold] |" + " b |" * 40 + "\n"
    assert drawn == []


def test_seeds_are_numbers_and_ranges(bench):
    assert bench.learning.parse(["--seeds", "4", "1-3", "2"]).seeds == [4, 1, 2, 3]
    assert bench.learning.parse([]).seeds is None
    for wrong in ("0", "3-1", "1-", "-", "1-2-3", "x"):
        with pytest.raises(SystemExit):
            bench.learning.parse(["--seeds", wrong])


def test_what_does_not_go_together_is_refused(bench):
    one = (["--set", "gamma=0.9"], ["--kept", "runs.jsonl"], ["--evaluate", "5"])  # are of one environment
    for arguments in (*one, ["--only", "Pong"], ["CartPole-v1", "--report"]):
        with pytest.raises(SystemExit, match="--"):
            bench.learning.main(arguments)
