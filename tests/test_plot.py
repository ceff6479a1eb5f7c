"""Learning curves: what is drawn, and how runs are grouped."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from pyppo import plot, report
from pyppo.checkpoint import FORMAT, new_run_dir
from pyppo.config import Config


def run_with(tmp_path, returns, steps=None, **fields):
    path = new_run_dir(tmp_path, Config(**{"env_id": "Toy-v0", **fields}))
    metrics = report.MetricsFile(path / "metrics.jsonl")
    for step, value in zip(steps or range(10, 10 * len(returns) + 10, 10), returns, strict=True):
        metrics({"step": step, "episode_return": value})
    metrics.close()
    return path


def drawn(path):
    picture = imread(path)
    return picture.shape[0] > 200 and picture[..., :3].std() > 0.01


def test_one_history(tmp_path):
    path = plot.plot_history({"step": [1, 2, 3], "episode_return": [math.nan, 1.0, 2.0]}, tmp_path / "a" / "curve.png")
    assert drawn(path)
    with pytest.raises(ValueError, match="no finished episode"):
        plot.plot_history({"step": [1], "episode_return": [math.nan]}, tmp_path / "curve.png")


def test_seeds_become_one_curve_and_settings_a_label(tmp_path):
    runs = [
        run_with(tmp_path, [0.0, 10.0, 20.0], seed=1),
        run_with(tmp_path, [10.0, 20.0, 30.0], seed=2),
        run_with(tmp_path, [5.0, 5.0], seed=1, learning_rate=1e-3),
        run_with(tmp_path, [1.0], env_id="Other-v0"),
    ]
    groups = plot._group(runs)
    assert set(groups) == {"Toy-v0", "Other-v0"}
    assert {label: len(curves) for label, curves in groups["Toy-v0"].items()} == {
        "learning_rate 0.0003": 2, "learning_rate 0.001": 1,
    }  # fmt: skip
    assert list(groups["Other-v0"]) == [""]
    assert drawn(plot.plot_runs(runs, tmp_path / "curves.png"))


def test_the_label_counts_seeds_or_runs():
    assert [plot._count(seeds) for seeds in ([1], [1, 2], [1, 1], [1, 2, 2])] == [
        "1 seed",
        "2 seeds",
        "2 runs",
        "3 runs",
    ]


def test_the_number_of_groups_is_a_setting(tmp_path):
    runs = [run_with(tmp_path, [1.0], num_groups=groups) for groups in (1, 2)]
    assert set(plot._group(runs)["Toy-v0"]) == {"num_groups 1", "num_groups 2"}


def test_curves_meet_on_the_steps_that_all_have(tmp_path):
    first = np.array([0.0, 10.0, 20.0]), np.array([0.0, 10.0, 20.0])
    second = np.array([5.0, 30.0]), np.array([0.0, 25.0])
    steps, returns = plot._align([first, second])
    assert (steps[0], steps[-1]) == (5.0, 20.0)
    np.testing.assert_allclose(returns[0] - returns[1], 5.0)


def test_lines_are_named_once_where_all_pictures_have_the_same(tmp_path, monkeypatch):
    figures = []
    finish = plot._finish

    def kept(figure, *more):
        figures.append(figure)
        return finish(figure, *more)

    monkeypatch.setattr(plot, "_finish", kept)
    curve = (np.array([0.0, 10.0]), np.array([1.0, 3.0]))
    higher = (np.array([0.0, 10.0]), np.array([3.0, 7.0]))
    alike = {title: {"a": [curve, higher], "b": [curve]} for title in ("One", "Two")}
    plot.draw(alike, tmp_path / "alike.png")
    plot.draw({**alike, "Three": {"c": [curve]}}, tmp_path / "others.png")
    plot.draw({"One": alike["One"]}, tmp_path / "single.png")
    shared, others, single = figures
    assert [text.get_text() for legend in shared.legends for text in legend.get_texts()] == ["a", "b"]
    assert [axis.get_legend() for axis in shared.axes] == [None, None]
    for figure, names in ((others, [["a", "b"], ["a", "b"], ["c"]]), (single, [["a", "b"]])):
        assert figure.legends == []
        assert [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes] == names
    mean, one = shared.axes[0].lines
    assert [mean.get_ydata()[0], mean.get_ydata()[-1]] == [2.0, 5.0]
    assert list(one.get_ydata()) == [1.0, 3.0]


def test_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="runs is empty"):
        plot.plot_runs([], tmp_path / "x.png")
    with pytest.raises(ValueError, match="not a usable run folder"):
        plot.plot_runs([tmp_path], tmp_path / "x.png")
    begun = new_run_dir(tmp_path, Config("Toy-v0"))
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        plot.plot_runs([begun], tmp_path / "x.png")


def test_a_policy_or_environments_of_ones_own_are_another_setting(tmp_path):
    runs = [run_with(tmp_path, [1.0], seed=seed) for seed in (1, 2, 3, 4)]
    states = [{"class": "MLPPolicy"}, {"class": "mine.Policy"}, {"class": "MLPPolicy"}]
    for run, policy in zip(runs, states, strict=False):  # the last has no checkpoint yet
        folder = run / "checkpoints" / "step-000000000010"
        folder.mkdir(parents=True)
        state = {"format": FORMAT, "step": 10, "policy": policy, "sha256": "", "optimizer_sha256": ""}
        (folder / "state.json").write_text(json.dumps({**state, "own_envs": run == runs[2]}))
    counts = {label: len(curves) for label, curves in plot._group(runs)["Toy-v0"].items()}
    assert counts == {
        "policy built-in, own_envs False": 2, "policy mine.Policy, own_envs False": 1,
        "policy built-in, own_envs True": 1,
    }  # fmt: skip
    plain = plot._group([runs[0], runs[3]])["Toy-v0"]
    assert list(plain) == [""]


def test_a_path_without_a_suffix_gets_one(tmp_path):
    history = {"step": [1, 2], "episode_return": [1.0, 2.0]}
    assert plot.plot_history(history, tmp_path / "curve") == tmp_path / "curve.png"
    (tmp_path / "folder").mkdir()
    assert plot.plot_history(history, tmp_path / "folder") == tmp_path / "folder.png"
    assert drawn(tmp_path / "curve.png")
    assert drawn(tmp_path / "folder.png")
