"""bench/paper/'s figure3, epochs, clipping, update_cost: which runs there are, what they measure, their tables."""

from __future__ import annotations

import importlib
import json
import math
import types
from pathlib import Path

import numpy as np
import probes
import pytest
import torch
from bench_records import MACHINE, in_place_of_run_jobs, write_records

from pyppo import Config, Trainer

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A source distribution carries the tests and not what they look at here.
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")

MARKS = ("figure3", "figure3-cost", "figure3-settings", "epochs", "clipping")
DOCS = "# Results\n" + "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in MARKS)
SMALL = {"num_envs": 8, "num_steps": 16, "num_minibatches": 4, "update_epochs": 3, "hidden_sizes": (16,)}
SMALL |= {"learning_rate": 1e-2, "run_dir": None, "device": "cpu", "engine": "native"}


@pytest.fixture
def paper(monkeypatch):
    pytest.importorskip("envpool")
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "paper"))
    names = ("figure3", "epochs", "clipping", "update_cost", "_clips_and_epochs", "_experiments", "_loop", "table1",
             "table1_settings")  # fmt: skip
    return types.SimpleNamespace(**{name.strip("_"): importlib.import_module(name) for name in names})


@pytest.fixture
def docs(tmp_path):
    (tmp_path / "results.md").write_text(DOCS)
    return tmp_path


def section(page, name):
    """What stands between the marks."""
    return page.read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def rows_of(text):
    """The cells of a Markdown table's lines, the head and the rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# --- what the runs measure --------------------------------------------------------------------------------------------


def train(make, env, **changes):
    config = Config(env_id="probe", total_timesteps=600, **{**SMALL, **changes})
    with make(config, env, quiet=True) as trainer:
        trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [probes.ObservationAction, probes.ContinuousAction])
def test_measuring_changes_nothing_and_is_the_engines_own_kl(paper, kind):
    # With objective "kl" the engine itself computes the exact KL; measured from outside it must be the same number.
    def measured(config, envs, **more):
        return paper.loop.EngineTrainer(config, envs, make_engine=paper.experiments.MeasuringEngine, **more)

    fields = {"objective": "kl", "kl_coef": 0.0, "norm_obs": True}
    own = train(Trainer, kind(), **fields)

    class Silent(paper.experiments.MeasuringEngine):
        """As if the objective were another, so that the engine keeps no KL."""

        def __init__(self, policy, config, device, distribution):
            super().__init__(policy, config.replace(objective="unclipped"), device, distribution)

    def from_outside(config, envs, **more):
        return paper.loop.EngineTrainer(config, envs, make_engine=Silent, **more)

    outside = train(from_outside, kind(), **fields)
    assert torch.equal(own.engine.flat.data, outside.engine.flat.data)
    assert max(own.history["kl"]) > 0.1
    np.testing.assert_allclose(outside.history["kl"], own.history["kl"], rtol=1e-4, atol=1e-6)
    plain = train(Trainer, kind(), clip_coef=0.1)
    clipped = train(measured, kind(), clip_coef=0.1)
    assert torch.equal(plain.engine.flat.data, clipped.engine.flat.data)
    assert np.isnan(plain.history["kl"]).all()
    assert np.isfinite(clipped.history["kl"]).all()


def test_a_measured_run(paper):
    fields = {**paper.clips_and_epochs.fields_of((2, 0.2), 600), "num_steps": 32, "num_minibatches": 4}
    found = paper.experiments.run_measured("InvertedPendulum-v4", 1, fields)
    assert found["diverged"] is None
    assert found["engine"] == "native"
    assert 0 < found["kl"] < found["kl_high"]
    assert found["best"] == pytest.approx(max(found["curve"][1]), abs=1e-4)
    assert 0 <= found["clip_fraction"] <= 1
    steps, kl = found["kl_curve"]
    assert len(steps) == len(kl) == -(-600 // (steps[1] - steps[0]))
    json.dumps(found, allow_nan=False)


def test_the_statistics_of_a_measured_run(paper, monkeypatch):
    """The median, what one update in ten exceeded, and a curve in which a single update's KL is no spike."""
    kl = [0.01] * 85 + [0.5] + [0.01] * 5 + [math.nan] + [0.2] * 9

    def train_run(config, callbacks, make):
        for step, x in enumerate(kl):
            callbacks[0]({"step": step, "kl": x, "approx_kl": 2 * x, "clip_fraction": 0.1})
        return {}

    monkeypatch.setattr(paper.experiments, "train_run", train_run)
    found = paper.experiments.run_measured("InvertedPendulum-v4", 1, {})
    assert found["kl"] == 0.01
    assert found["approx_kl"] == 0.02
    assert found["kl_high"] == pytest.approx(np.quantile([x for x in kl if x == x], 0.9))
    assert 0.5 not in found["kl_curve"][1]
    assert found["kl_curve"][1][0] == 0.01
    assert found["kl_curve"][1][-1] == 0.2
    assert np.isfinite(found["kl_curve"]).all()


@pytest.mark.parametrize("name", ["a2c", "trpo", "vpg"])
def test_a_run_of_each_algorithm(paper, name):
    one = paper.figure3.ALGORITHMS[name]
    rows = min(one.fields["num_steps"], 16)
    fields = {**one.fields, "total_timesteps": 500, "num_steps": rows, "num_groups": 1, "env_threads": 1}
    found = paper.experiments.run_algorithm(name, "InvertedPendulum-v4", 1, fields, one.settings)
    assert found["engine"] == "torch"
    assert found["steps"] >= 500
    assert 0 < found["phases"]["update"] < found["seconds"]
    assert found["updates"] >= 500 / (8 * rows)
    assert 0 < found["score"] < 100
    json.dumps(found, allow_nan=False)


# --- which runs there are ---------------------------------------------------------------------------------------------


def test_figure_3_is_run_seed_by_seed(paper):
    cells = paper.figure3.cells_of(["ppo", "trpo"], ["Hopper-v4", "Reacher-v4"], (1, 2), 1000)
    jobs = [job for _, job in cells]
    assert [job.key for job in jobs] == [
        f"{name}/{env_id}/s{seed}"
        for seed in (1, 2)
        for env_id in ("Hopper-v4", "Reacher-v4")
        for name in ("X/clip 0.2", "trpo")
    ]
    table1 = {job.identity for job in paper.table1.jobs_of(["X"], ["Hopper-v4", "Reacher-v4"], (1,), (1, 2), 1000)}
    assert all((job.identity in table1) == (name == "ppo") for (name, _), job in cells)  # nothing is run twice
    assert jobs[1].arguments["settings"]["max_kl"] == 0.01
    assert all(job.arguments["fields"]["total_timesteps"] == 1000 for job in jobs)
    for job in jobs:  # the settings are ones that a run takes
        Config(env_id="Hopper-v4", **job.arguments["fields"])
    changed = paper.figure3.ALGORITHMS["trpo"]._replace(settings={"max_kl": 0.02})
    before = jobs[1].identity
    paper.figure3.ALGORITHMS["trpo"], kept = changed, paper.figure3.ALGORITHMS["trpo"]
    try:  # other settings are another run
        assert paper.figure3.job_of("trpo", "Hopper-v4", 1, 1000).identity != before
    finally:
        paper.figure3.ALGORITHMS["trpo"] = kept


def test_the_algorithms_share_what_is_not_theirs(paper):
    # What the page says is each one's own; and of PPO alone, what the other updates do not look at.
    own = {"num_steps", "gae_lambda", "norm_adv", "learning_rate", "anneal_lr", "vf_coef", "engine", "device"}
    ppos = {"clip_coef", "num_minibatches", "update_epochs", "adam_eps", "max_grad_norm", "clip_vloss"}
    ppo, *others = [Config(env_id="x", **one.fields).to_dict() for one in paper.figure3.ALGORITHMS.values()]
    for one in others:
        assert {name for name in one if one[name] != ppo[name]} <= own | ppos
    pinned = set(paper.figure3.SETTINGS["X"]) - own - ppos
    assert all(pinned <= set(one.fields) for one in paper.figure3.ALGORITHMS.values())  # no changed default moves one


def test_epochs_and_clipping_share_their_runs(paper):
    def keys(variants):
        runs = paper.clips_and_epochs.Runs(variants, ["Hopper-v4"], (1, 2), 1000, Path("none"))
        return {job.identity for job in runs.jobs}

    epochs = keys([(n, clip) for n in paper.epochs.EPOCHS for clip in paper.epochs.CLIPS])
    clips = keys([(10, clip) for clip in paper.clipping.CLIPS])
    assert (len(epochs), len(clips), len(epochs & clips)) == (16, 12, 4)  # of 10 epochs: clip 0.2 and none


def test_a_variant_changes_the_surrogate_and_nothing_else(paper):
    fields_of = paper.clips_and_epochs.fields_of
    configs = {
        variant: Config(env_id="x", **fields_of(variant, 1000)).to_dict()
        for variant in [(10, 0.2), (10, 0.5), (3, 0.2), (10, None)]
    }
    standard = configs.pop((10, 0.2))
    changed = {v: {name for name in standard if config[name] != standard[name]} for v, config in configs.items()}
    assert changed == {(10, 0.5): {"clip_coef"}, (3, 0.2): {"update_epochs"}, (10, None): {"objective"}}
    assert standard["clip_vloss"] is False  # its range would change too


def test_what_the_programs_are_run_with_and_what_the_paper_says(paper):
    """The sources' values once more (those of `figure3.ALGORITHMS`), and the paper's curves after 1M steps."""
    fields = {
        "a2c": {"num_steps": 8, "gae_lambda": 0.9, "norm_adv": "none", "learning_rate": 0.00096, "anneal_lr": True,
                "vf_coef": 0.8, "max_grad_norm": 0.5},
        "trpo": {"num_steps": 128, "gae_lambda": 0.98, "norm_adv": "batch"},
        "vpg": {"num_steps": 256, "gae_lambda": 0.95, "norm_adv": "batch", "learning_rate": 1e-3, "anneal_lr": False},
    }  # fmt: skip
    settings = {
        "a2c": {"decay": 0.99, "eps": 1e-5},
        "trpo": {"max_kl": 0.01, "cg_steps": 10, "damping": 0.1, "fisher_stride": 5, "max_backtracks": 10,
                 "critic_epochs": 5, "critic_minibatch": 64, "critic_learning_rate": 1e-3},
        "vpg": {"desired_kl": 0.002, "factor": 1.5, "bounds": (1e-8, 1), "critic_epochs": 10, "critic_minibatch": 64,
                "critic_learning_rate": 1e-3},
    }  # fmt: skip
    for name, expected in fields.items():
        one = paper.figure3.ALGORITHMS[name]
        assert {field: one.fields[field] for field in expected} == expected
        assert (one.fields["num_envs"], one.fields["gamma"], one.fields["norm_reward"]) == (8, 0.99, True)
        assert dict(one.settings) == settings[name]
    curves = {  # ppo, a2c, trpo, vpg
        "HalfCheetah-v4": (1830, 1003, 7, 631), "Hopper-v4": (2203, 628, 2064, 2324),
        "InvertedDoublePendulum-v4": (7910, 6681, 184, 219), "InvertedPendulum-v4": (963, 1000, 911, 974),
        "Reacher-v4": (-7, -25, -116, -11), "Swimmer-v4": (107, 27, 121, 63), "Walker2d-v4": (2909, 734, 1066, 1215),
    }  # fmt: skip
    assert {env_id: tuple(by_name.values()) for env_id, by_name in paper.figure3.PAPER.items()} == curves
    assert all(list(by_name) == ["ppo", "a2c", "trpo", "vpg"] for by_name in paper.figure3.PAPER.values())


# --- the reports ------------------------------------------------------------------------------------------------------


def algorithm_result(score, update, diverged=None):
    phases = {"act": 1.0, "env": 2.0, "gae": 0.5, "update": update, "other": 0.5}
    curve = [[500, 1000], [0.0, score]] if score is not None else [[], []]
    counts = {"steps": 1000, "seconds": 4 + update, "sps": 1000 / (4 + update), "updates": 10}
    return {"score": score, "curve": curve, "phases": phases, "diverged": diverged, **counts}


def test_figure_3s_report(paper, docs, tmp_path):
    figure3 = paper.figure3
    cells = figure3.cells_of(list(figure3.ALGORITHMS), figure3.ENVIRONMENTS, (1, 2), 1000)

    def result(job):
        *_, name, env_id, seed = job.key.split("/")
        if env_id != "Hopper-v4" or name == "vpg":
            return None
        if name == "a2c" and seed == "s2":
            return algorithm_result(None, 1.0, diverged="the loss is nan")
        return algorithm_result(100.0 * int(seed[1]), 4.0)

    results, table1 = tmp_path / "figure3.jsonl", tmp_path / "table1.jsonl"
    write_records(results, [job for (name, _), job in cells if name != "ppo"], result)
    write_records(table1, [job for (name, _), job in cells if name == "ppo"], result)
    figure3.main(["--report", "--seeds", "1-2", "--steps", "1000", "--results", str(results), "--docs", str(docs),
                  "--table1", str(table1), "--cost", str(tmp_path / "none.json")])  # fmt: skip
    page = docs / "results.md"
    assert "6 runs, 2026-11-23, commit abc" in section(page, "figure3")
    by_env = {row[0]: row[1:] for row in rows_of(section(page, "figure3"))}
    assert list(by_env) == list(figure3.ENVIRONMENTS)
    assert by_env["Hopper-v4"] == [
        "150.0 ± 50.0 (2)", "2203", "100.0 (2, 1 diverged, 1 without a score)", "628", "150.0 ± 50.0 (2)", "2064",
        "–", "2324",
    ]  # fmt: skip
    assert by_env["Reacher-v4"] == ["–", "-7", "–", "-25", "–", "-116", "–", "-11"]
    times = {row[0]: row[1:] for row in rows_of(section(page, "figure3-cost"))}
    assert list(times) == ["TRPO", "A2C"]  # in the order of their engines
    # TRPO: 8 s of updates of 16 s altogether, 20 updates.
    assert times["TRPO"] == ["1,024", "400", "50%", "4000", "125"]
    assert "Not measured yet" in section(page, "figure3-cost")
    all_alike, *own = rows_of(section(page, "figure3-settings"))
    assert len(own) == 4
    assert "gamma 0.99" in all_alike[1]
    assert not any("gamma 0.99" in row[1] for row in own)
    assert "num_steps 128" in next(row for row in own if row[0] == "TRPO")[1]
    assert (docs / "images/figure3.png").stat().st_size > 1000


def test_figure_3s_queue_is_run_and_ppos_runs_are_table_1s(paper, docs, tmp_path, monkeypatch):
    asked, run_jobs = in_place_of_run_jobs(lambda job: algorithm_result(100.0, 4.0))
    monkeypatch.setattr(paper.figure3, "run_jobs", run_jobs)
    paper.figure3.main(["--algorithms", "ppo", "trpo", "ppo", "--only", "Hopper-v4", "--seeds", "1-2",
                        "--results", str(tmp_path / "figure3.jsonl"), "--table1", str(tmp_path / "table1.jsonl"),
                        "--cost", str(tmp_path / "none.json"), "--docs", str(docs)])  # fmt: skip
    assert asked == ["X/clip 0.2/Hopper-v4/s1", "X/clip 0.2/Hopper-v4/s2", "trpo/Hopper-v4/s1", "trpo/Hopper-v4/s2"]
    lines = [(tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("table1", "figure3")]
    assert [[json.loads(line)["key"] for line in of_file] for of_file in lines] == [asked[:2], asked[2:]]
    row = next(row for row in rows_of(section(docs / "results.md", "figure3")) if row[0] == "Hopper-v4")
    assert row[1::2] == ["100.0 ± 0.0 (2)", "–", "100.0 ± 0.0 (2)", "–"]


def test_a_run_that_diverged_at_once_has_no_speed(paper):
    nothing = {**algorithm_result(None, 0.0, diverged="the loss is nan"), "steps": 0, "updates": 0}
    runs = {("trpo", "Hopper-v4"): [{"result": nothing}]}
    assert paper.figure3.time_table(runs) is None
    runs["trpo", "Hopper-v4"].append({"result": algorithm_result(1.0, 4.0)})
    assert rows_of(paper.figure3.time_table(runs))[0][:3] == ["TRPO", "1,024", "400"]


def test_the_report_of_nothing(paper, docs, tmp_path):
    nothing = ["--report", "--results", str(tmp_path / "none.jsonl"), "--docs", str(docs)]
    (tmp_path / "none.jsonl").touch()
    paper.figure3.main([*nothing, "--table1", str(tmp_path / "none.jsonl"), "--cost", str(tmp_path / "none.json")])
    paper.epochs.main(nothing)
    paper.clipping.main(nothing)
    for name in ("figure3", "epochs", "clipping"):
        assert section(docs / "results.md", name).startswith("Not run yet.")
    assert not (docs / "images").exists()


def measured_result(score, kl, diverged=None):
    curve = [[500, 1000], [kl, kl]]
    return {"score": score, "diverged": diverged, "kl": kl, "kl_high": 2 * kl, "approx_kl": kl / 2,
            "clip_fraction": 0.1, "kl_curve": curve}  # fmt: skip


def test_the_reports_of_epochs_and_clipping(paper, docs, tmp_path, monkeypatch):
    restraint = paper.clips_and_epochs
    variants = [(10, clip) for clip in paper.clipping.CLIPS] + [(1, 0.2)]
    runs = restraint.Runs(variants, restraint.ENVIRONMENTS, (1, 2), 1000, tmp_path / "clipping.jsonl")

    def result(job):
        fields, seed = job.arguments["fields"], job.arguments["seed"]
        if fields["objective"] == "unclipped":
            return measured_result(10.0, 1.0, diverged="the loss is nan")
        return measured_result(100.0 * seed, fields["clip_coef"] * seed / 10)

    write_records(tmp_path / "clipping.jsonl", runs.jobs, result)
    given = ["--report", "--seeds", "1-2", "--steps", "1000", "--docs", str(docs)]
    given += ["--results", str(tmp_path / "clipping.jsonl")]
    paper.clipping.main(given)
    paper.epochs.main(given)
    rows = rows_of(section(docs / "results.md", "clipping"))
    assert [row[1] for row in rows] == ["0.05", "0.1", "0.2", "0.3", "0.5", "none"] * 3
    standard = ["Hopper-v4", "0.2", "0.03 (0.02 to 0.04)", "0.06 (0.04 to 0.08)", "0.015 (0.01 to 0.02)",
                "0.1 (0.1 to 0.1)", "150.0 ± 50.0 (2)"]  # fmt: skip
    assert rows[8] == standard
    assert rows[11][5:] == ["–", "10.0 ± 0.0 (2, 2 diverged)"]
    rows = rows_of(section(docs / "results.md", "epochs"))
    assert rows[0][:4] == ["clip 0.2", "1", "150.0 ± 50.0 (2)", "0.03 (0.02 to 0.04)"]
    assert rows[1] == ["clip 0.2", "3", *["–"] * 6]
    assert rows[6][:4] == ["not clipped", "10", "10.0 ± 0.0 (2, 2 diverged)", "1 (1 to 1)"]
    for name in ("epochs", "clipping"):
        assert (docs / f"images/{name}.png").stat().st_size > 1000
    # What a call was of is not what the page is of; and other environments may have no runs yet.
    monkeypatch.setattr(restraint, "run_jobs", lambda jobs, *_, **__: asked.extend(job.key for job in jobs) or [])
    asked = []
    paper.clipping.main([*given[1:], "--only", "Hopper-v4"])
    assert {key.split("/")[1] for key in asked} == {"Hopper-v4"}
    rows = rows_of(section(docs / "results.md", "clipping"))
    assert rows[0][:3] == ["HalfCheetah-v4", "0.05", "0.0075 (0.005 to 0.01)"]
    hopper = [job for job in runs.jobs if job.arguments["env_id"] == "Hopper-v4"]
    write_records(tmp_path / "clipping.jsonl", hopper, result)
    for one in (paper.clipping, paper.epochs):
        one.main(given)
    assert rows_of(section(docs / "results.md", "clipping"))[0][2] == "–"


# --- what an update costs ---------------------------------------------------------------------------------------------


def test_the_cost_of_an_update(paper, docs, tmp_path, monkeypatch):
    short = {**paper.table1_settings.SETTINGS["X"], "num_steps": 16, "num_minibatches": 4, "update_epochs": 1}
    update_cost = paper.update_cost
    monkeypatch.setitem(update_cost.SETTINGS, "X", short)
    contenders = {
        name: (title, {**fields, "num_steps": min(16, fields["num_steps"]), "num_minibatches": 4}, make)
        for name, (title, fields, make) in update_cost.CONTENDERS.items()
    }
    monkeypatch.setattr(update_cost, "CONTENDERS", contenders)
    found = update_cost.measure("InvertedPendulum-v4", 0.1, 2)
    cost = {row["name"]: row for row in found["rows"]}
    assert list(cost) == list(contenders)
    assert all(row["same_ms"] > 0 and row["own_ms"] > 0 for row in found["rows"])
    assert cost["a2c"]["own_rows"] == 64
    assert cost["ppo native"]["own_rows"] == found["rows_same"] == 128
    assert cost["a2c"]["own_seconds_1m"] == pytest.approx(cost["a2c"]["own_ms"] / 1e3 * 1e6 / 64)
    facts = {"machine": {**MACHINE, "load": 0.1}, "date": "2026-11-23", "commit": "abc"}
    (tmp_path / "cost.json").write_text(json.dumps({**found, **facts}))
    text = paper.figure3.cost_table(tmp_path / "cost.json")
    assert [row[0] for row in rows_of(text)] == [title for title, _, _ in contenders.values()]


def test_an_update_that_takes_no_step_is_not_timed(paper):
    with pytest.raises(RuntimeError, match="these took no step: idle"):
        paper.update_cost.check({"busy": lambda: {"updates": 1.0}, "idle": lambda: {"updates": 0.0}})


def test_an_update_is_timed_from_the_policy_that_collected(paper):
    update_cost = paper.update_cost
    trainer, before = update_cost.collect("InvertedPendulum-v4", 2)
    spaces = trainer.groups[0].obs_space, trainer.groups[0].action_space
    rollout = update_cost.first_steps(trainer.rollout, 16, *spaces)
    update = update_cost.make_update("trpo", trainer, before, rollout)
    first, again = update(), update()
    assert first["policy_loss"] == again["policy_loss"]  # every call starts anew
    assert 0 < first["kl"] <= 0.01
    policy = trainer.policy
    policy.load_state_dict(before)
    obs = {name: x[:16].flatten(0, 1) for name, x in rollout.obs.items()}
    logp, _, _ = policy.evaluate(obs, rollout.actions.flatten(0, 1))
    torch.testing.assert_close(logp.detach()[rollout.valid.view(-1)], rollout.logp.view(-1)[rollout.valid.view(-1)])
