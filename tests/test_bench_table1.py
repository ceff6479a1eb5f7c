"""bench/paper/table1*.py: which runs there are, in which order, and the tables of made-up results."""

from __future__ import annotations

import importlib
import json
import types
from pathlib import Path

import pytest
from bench_records import in_place_of_run_jobs, write_records

from pyppo import Config

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A source distribution carries the tests and not what they look at here.
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")

DOCS = "# Results\n<!-- table1-X -->\n<!-- /table1-X -->\n<!-- table1-Y -->\n<!-- /table1-Y -->\n"


@pytest.fixture
def table1(monkeypatch):
    pytest.importorskip("envpool")
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.syspath_prepend(str(BENCH / "paper"))
    names = ("table1", "table1_report", "table1_settings", "_runs")
    return types.SimpleNamespace(**{name.strip("_"): importlib.import_module(name) for name in names})


def result(score, diverged=None):
    return {
        "score": score,
        "diverged": diverged,
        "curve": [[100, 200], [0.0, score]] if score is not None else [[], []],
    }


def made_up(table1, jobs, path, score):
    """Results of `score(variant, environment's number, seed)`; the random policy has 10 times the number."""
    order = {env_id: i for i, env_id in enumerate(table1.table1_settings.ENVIRONMENTS)}

    def outcome(job):
        if job.key.startswith("random/"):
            return {"score": 10.0 * order[job.arguments["env_id"]], "std": 1.0}
        _, variant, env_id, _ = job.key.split("/")
        found = score(variant, order[env_id], job.arguments["seed"])
        return found if found is None or isinstance(found, dict) else result(found)

    write_records(path, jobs, outcome)


def jobs_of(table1, settings, seeds, clip_seeds, steps=1_000_000):
    return table1.table1.jobs_of(settings, table1.table1_settings.ENVIRONMENTS, seeds, clip_seeds, steps)


def test_any_part_from_the_start_is_a_table_of_fewer_seeds(table1):
    jobs = jobs_of(table1, ["X", "Y"], range(1, 4), range(1, 11))
    keys = [job.key for job in jobs]
    assert len(keys) == len(set(keys)) == 7 + 2 * 7 * (11 * 3 + 3 * 7)
    assert [key.split("/")[0] for key in keys[:7]] == ["random"] * 7
    x = keys[7 : 7 + 7 * (11 * 3 + 3 * 7)]
    assert all(key.startswith("X/") for key in x)
    seeds = [int(key.rsplit("/s", 1)[1]) for key in x]
    assert seeds == sorted(seeds)
    assert seeds.count(1) == seeds.count(3) == 77
    assert seeds.count(4) == seeds.count(10) == 21


def test_every_variant_is_a_valid_config_of_the_papers_size(table1):
    settings = table1.table1_settings
    objectives = {}
    for setting in settings.SETTINGS:
        for variant in settings.VARIANTS:
            config = Config(env_id="Hopper-v4", seed=1, **table1.table1.fields_of(setting, variant, 1000))
            assert (config.batch_size, config.minibatch_size, config.update_epochs) == (2048, 64, 10)
            assert (config.learning_rate, config.ent_coef, config.log_std_init) == (3e-4, 0.0, 0.0)
            objectives[setting, variant] = (config.objective, config.clip_coef, config.kl_coef, config.kl_target)
    assert objectives["X", "no clipping"][0] == "unclipped"
    assert objectives["X", "clip 0.3"][:2] == ("clip", 0.3)
    assert objectives["Y", "adaptive KL 0.003"] == ("kl", 0.2, 1.0, 0.003)
    assert objectives["Y", "fixed KL 10"] == ("kl", 0.2, 10.0, None)


def test_what_is_run_and_what_the_paper_says(table1):
    """The paper's section 6.1 and its table 1, once more; what sets the two settings apart; what all runs share."""
    settings = table1.table1_settings
    surrogates = {
        "no clipping": ("unclipped", 0.2, 1.0, None, -0.39),
        "clip 0.1": ("clip", 0.1, 1.0, None, 0.76),
        "clip 0.2": ("clip", 0.2, 1.0, None, 0.82),
        "clip 0.3": ("clip", 0.3, 1.0, None, 0.70),
        "adaptive KL 0.003": ("kl", 0.2, 1.0, 0.003, 0.68),
        "adaptive KL 0.01": ("kl", 0.2, 1.0, 0.01, 0.74),
        "adaptive KL 0.03": ("kl", 0.2, 1.0, 0.03, 0.71),
        "fixed KL 0.3": ("kl", 0.2, 0.3, None, 0.62),
        "fixed KL 1": ("kl", 0.2, 1.0, None, 0.71),
        "fixed KL 3": ("kl", 0.2, 3.0, None, 0.72),
        "fixed KL 10": ("kl", 0.2, 10.0, None, 0.69),
    }
    others = {  # reward normalisation, limits of gradient and value loss, whose moments normalise advantages
        "X": {"norm_reward": True, "clip_reward": 10.0, "max_grad_norm": 0.5, "clip_vloss": True,
              "norm_adv": "minibatch"},
        "Y": {"norm_reward": False, "clip_reward": 10.0, "max_grad_norm": None, "clip_vloss": False,
              "norm_adv": "batch"},
    }  # fmt: skip
    alike = {"num_envs": 8, "num_steps": 256, "num_minibatches": 32, "update_epochs": 10, "learning_rate": 3e-4,
             "gamma": 0.99, "gae_lambda": 0.95, "hidden_sizes": [64, 64], "activation": "tanh", "ent_coef": 0.0,
             "shared_trunk": False, "norm_obs": True, "log_std_init": 0.0, "anneal_lr": True}  # fmt: skip
    assert list(settings.VARIANTS) == list(settings.PAPER) == list(surrogates)
    for setting, own in others.items():
        for variant, (*expected, paper) in surrogates.items():
            (job,) = [
                job
                for job in jobs_of(table1, [setting], [1], [1])
                if job.key == f"{setting}/{variant}/Hopper-v4/s1"
            ]  # fmt: skip
            config = json.loads(json.dumps(Config(env_id="Hopper-v4", **job.arguments["fields"]).to_dict()))
            assert [config[name] for name in ("objective", "clip_coef", "kl_coef", "kl_target")] == expected
            assert {name: config[name] for name in own} == own
            assert {name: config[name] for name in alike} == alike
            assert (config["total_timesteps"], config["engine"]) == (1_000_000, "native")
            assert settings.PAPER[variant] == paper


def test_the_queue_is_run_and_reported(table1, tmp_path, monkeypatch):
    (tmp_path / "results.md").write_text(DOCS)
    asked, run_jobs = in_place_of_run_jobs(lambda job: result(1000.0))
    monkeypatch.setattr(table1.table1, "run_jobs", run_jobs)
    files = ["--results", str(tmp_path / "runs.jsonl"), "--docs", str(tmp_path)]
    table1.table1.main(["--settings", "Y", "Y", "--seeds", "2", "--only", "Hopper-v4", *files])
    variants = table1.table1_settings.VARIANTS  # the clip variants have the same seeds, where no others are asked for
    assert asked == ["random/Hopper-v4", *(f"Y/{variant}/Hopper-v4/s2" for variant in variants)]
    assert "11 of 378 runs of 1,000,000 steps" in (tmp_path / "results.md").read_text()
    asked.clear()
    table1.table1.main(["--settings", "X", "--seeds", "1", "--clip-seeds", "3", "--only", "Hopper-v4", *files])
    clips = [f"X/{variant}/Hopper-v4/s3" for variant in ("clip 0.1", "clip 0.2", "clip 0.3")]
    others = [f"X/{variant}/Hopper-v4/s1" for variant in variants if not variant.startswith("clip")]
    assert asked == ["random/Hopper-v4", *others, *clips]


def test_random_is_0_and_the_best_mean_1(table1):
    report, settings = table1.table1_report, table1.table1_settings
    env_id, other = settings.ENVIRONMENTS[:2]
    scores = {variant: {e: [] for e in settings.ENVIRONMENTS} for variant in settings.VARIANTS}
    scores["clip 0.1"][env_id] = [100.0, 300.0]
    scores["clip 0.2"][env_id] = [150.0, 150.0]
    scores["no clipping"][env_id] = [-200.0]
    assert report.best_of(scores) == report.best_run_of(scores) == {}  # none was run in all
    for variant in ("clip 0.1", "clip 0.2", "no clipping"):
        for e in settings.ENVIRONMENTS[1:]:
            scores[variant][e] = [-5.0 if variant == "clip 0.1" else -15.0]
    scores["fixed KL 1"][env_id] = [1e6]  # not run in all: it sets no scale
    best = report.best_of(scores)
    assert best == {env_id: (200.0, "clip 0.1"), **dict.fromkeys(settings.ENVIRONMENTS[1:], (-5.0, "clip 0.1"))}
    assert report.best_run_of(scores)[env_id] == 300.0
    random = dict.fromkeys(settings.ENVIRONMENTS, -25.0) | {env_id: 100.0}
    found = report.scaled(scores, random, {e: top for e, (top, _) in best.items()})
    assert found["clip 0.1"][env_id] == [0.0, 2.0]
    assert found["clip 0.2"][env_id] == [0.5, 0.5]
    assert found["no clipping"][env_id] == [-3.0]
    assert found["clip 0.1"][other] == [1.0]
    assert found["no clipping"][other] == [0.5]
    assert "fixed KL 1" not in found
    scores["clip 0.2"][other] = [-5.0]
    assert report.best_of(scores)[other] == (-5.0, "2 of them")


def test_report_of_made_up_results(table1, tmp_path):
    jobs = jobs_of(table1, ["X"], range(1, 4), range(1, 11))
    ranks = {variant: i for i, variant in enumerate(table1.table1_settings.VARIANTS)}

    def score(variant, number, seed):
        if variant == "no clipping":
            return result(None, "not finite") if seed == 1 else result(10.0 * number - 50.0, "not finite")
        if variant == "fixed KL 10":
            return None if number == 0 else 10.0 * number + 50.0  # not run in one environment
        if variant == "clip 0.2":
            return 10.0 * number + (100.0 if seed == 1 else 91.0)
        return 10.0 * number + 5.0 * ranks[variant]

    made_up(table1, jobs, tmp_path / "table1.jsonl", score)
    (tmp_path / "results.md").write_text(DOCS)
    path, folder = str(tmp_path / "table1.jsonl"), str(tmp_path)
    table1.table1.main(["--report", "--settings", "X", "--results", path, "--docs", folder])
    page = (tmp_path / "results.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    aggregate = {row[0]: row[1:] for row in rows if len(row) == 8 and "(" not in row[2]}
    # Of each environment: the random policy 10 n, the best mean 91.9 above it, the best run 100, clip 0.1 always 5.
    mean, interquartile, same_seeds, by_run = aggregate["clip 0.2"][1:5]
    assert same_seeds == "1.02"  # 100, 91, 91
    assert mean.startswith("1.00 [0.9")
    assert interquartile.startswith("0.99 [0.99, ")  # 91 / 91.9: the one run of 100 is in the quarter left out
    assert by_run == "0.92"
    assert aggregate["clip 0.2"][0] == "0.82"
    assert aggregate["clip 0.2"][-2:] == ["70", "0"]
    assert aggregate["clip 0.1"][1] == "0.05 [0.05, 0.05]"
    assert aggregate["no clipping"][1].startswith("-0.36 [")  # a third of its runs have the random policy's score
    assert aggregate["no clipping"][-2:] == ["21", "21"]
    assert aggregate["fixed KL 10"] == ["0.69", "–", "–", "–", "–", "18", "0"]
    by_env = {row[0]: row[1:] for row in rows if len(row) == 8 and "(" in row[2]}
    assert by_env["clip 0.2"][1] == "101.9 ± 2.7 (10)"
    assert by_env["fixed KL 10"][0] == "–"
    scale = {row[0]: row[1:] for row in rows if len(row) == 5}
    assert scale["Hopper-v4"] == ["10.0", "101.9", "clip 0.2", "110.0"]
    settings = {row[0]: row[1] for row in rows if len(row) == 2}
    assert list(settings) == ["surrogate", "--", "all", *table1.table1_settings.VARIANTS]
    assert "num_envs 8, num_steps 256" in settings["all"]
    assert settings["adaptive KL 0.01"] == "objective kl, kl_coef 1.0, kl_target 0.01"
    compared = {(row[0], row[1]): row[2:] for row in rows if len(row) == 4}
    assert compared["clip 0.2", "clip 0.3"] == ["1.00 [1.00, 1.00]", "higher"]
    assert ("clip 0.2", "fixed KL 10") not in compared
    assert "375 of 378 runs of 1,000,000 steps" in page
    assert "a CPU, 2 cores" in page
    assert "commit abc" in page
    assert (tmp_path / "images/table1-X.png").stat().st_size > 1000
    assert "<!-- table1-Y -->\n<!-- /table1-Y -->" in page  # the other setting stays


def test_what_was_not_run_is_called_so(table1, tmp_path):
    (tmp_path / "results.md").write_text(DOCS)
    arguments = ["--report", "--results", str(tmp_path / "none.jsonl"), "--docs", str(tmp_path)]
    (tmp_path / "none.jsonl").touch()
    table1.table1.main(arguments)
    assert (tmp_path / "results.md").read_text().count("Not run yet.") == 2
    # Shorter runs are other runs.
    jobs = jobs_of(table1, ["X"], [1], [1], 4096)
    made_up(table1, jobs, tmp_path / "none.jsonl", lambda *_: 1000.0)
    table1.table1.main(arguments)
    assert (tmp_path / "results.md").read_text().count("Not run yet.") == 2
    table1.table1.main([*arguments, "--steps", "4096", "--seeds", "1-2", "--clip-seeds", "1-2"])
    page = (tmp_path / "results.md").read_text()
    assert "77 of 378 runs of 4,096 steps" in page  # of the whole plan, whatever was asked for
    assert "| clip 0.2 | clip 0.1 | 0.50 | too few runs |" in page


@pytest.mark.parametrize(
    ("left_out", "why"),
    [
        (lambda key: key.startswith("random/Hopper"), "the random policy has not been run in Hopper-v4"),
        (lambda key: key.startswith("X/") and "Reacher" in key, "no variant has been run in all environments"),
    ],
)
def test_scores_are_shown_where_nothing_scales_them(table1, tmp_path, left_out, why):
    (tmp_path / "results.md").write_text(DOCS)
    jobs = [job for job in jobs_of(table1, ["X"], [1], [1]) if not left_out(job.key)]
    made_up(table1, jobs, tmp_path / "some.jsonl", lambda *_: 1000.0)
    table1.table1.main(
        ["--report", "--settings", "X", "--results", str(tmp_path / "some.jsonl"), "--docs", str(tmp_path)]
    )
    page = (tmp_path / "results.md").read_text()
    assert f"No scale yet: {why}." in page
    assert "| clip 0.2 | 1000.0 (1) | 1000.0 (1) |" in page


def test_a_run_and_the_random_policy(table1):
    """Both jobs as the queue calls them, on the environment with the shortest episodes."""
    chance = table1.table1.random_policy("InvertedPendulum-v4", episodes=30)
    assert 2 < chance["score"] < 12  # it falls at once
    assert chance == table1.table1.random_policy("InvertedPendulum-v4", episodes=30)
    fields = table1.table1.fields_of("Y", "adaptive KL 0.01", 2048)
    found = table1.table1.train("InvertedPendulum-v4", 1, fields)
    assert found["engine"] == "native"
    assert found["diverged"] is None
    assert found["steps"] >= 2048
    assert found["score"] == pytest.approx(found["curve"][1][-1], abs=1e-4)
    assert json.loads(json.dumps(found)) == found


def test_a_run_that_diverges_has_the_score_that_it_had(monkeypatch, table1):
    training = importlib.import_module("_training")
    import pyppo

    step = pyppo.Trainer.step

    def breaks(self):
        if self.iteration == 2:
            raise FloatingPointError("the loss is nan")
        return step(self)

    monkeypatch.setattr(pyppo.Trainer, "step", breaks)
    fields = {"env_id": "CartPole-v1", "num_envs": 4, "num_steps": 128, "num_minibatches": 4, "run_dir": None}
    found = training.train_run(pyppo.Config(**fields), evaluate=lambda policy: pytest.fail("not of a broken policy"))
    assert found["diverged"] == "the loss is nan"
    assert len(found["curve"][0]) == 2
    assert found["score"] == pytest.approx(found["curve"][1][-1], abs=1e-4)
    assert found["steps"] == found["curve"][0][-1] < 2 * 4 * 128 + 1


@pytest.mark.parametrize("count", [1, 99, 100, 101, 250, 1000])
def test_thinned_curves_keep_the_end(table1, count):
    training = importlib.import_module("_training")
    steps, scores = training.thinned(range(1, count + 1), [float(i) for i in range(count)])
    assert len(steps) == len(scores) == min(count, 100)
    assert steps[-1] == count
    assert steps == sorted(set(steps))
    assert [step - 1 for step in steps] == scores
