"""bench/_run_statistics.py against closed forms and simple cases."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"
# A source distribution carries the tests and not what they look at here.
pytestmark = pytest.mark.skipif(not BENCH.is_dir(), reason="needs the repository")


@pytest.fixture
def statistics(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("_run_statistics")


def test_mean_and_deviation_are_those_of_all_runs(statistics):
    assert statistics.mean_std([1, 2, 3, 6]) == (3.0, pytest.approx(np.sqrt(14 / 4)))
    assert statistics.mean_std([5]) == (5.0, 0.0)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([7.0], 7.0),
        ([1, 2, 9], 4.0),  # three quarters of a run are none
        ([100, 2, 4, -50], 3.0),
        ([5, 1, 3, 2, 4], 3.0),
        ([0, 0, 1, 2, 3, 4, 1000, 1000], 2.5),
        (list(range(11)), 5.0),
    ],
)
def test_interquartile_mean_leaves_out_a_quarter_at_each_end(statistics, scores, expected):
    assert statistics.iqm(scores) == pytest.approx(expected)
    assert statistics.iqm(scores[::-1]) == pytest.approx(expected)


def test_interval_of_equal_runs_has_no_width(statistics):
    strata = [[2.0] * 5, [4.0] * 3]
    mean = statistics.mean_interval(strata)
    assert (mean.value, mean.low, mean.high) == (3.0, 3.0, 3.0)  # environments count alike, whatever their runs


def test_bootstrap_stays_within_environments(statistics):
    # Were runs drawn across environments, the mean would move; within, each environment has only one value.
    interval = statistics.iqm_interval([[0.0] * 4, [100.0] * 4])
    assert (interval.low, interval.value, interval.high) == (50.0, 50.0, 50.0)


def test_interval_of_a_mean_is_the_normal_one(statistics):
    scores = np.random.default_rng(1).normal(3.0, 2.0, 400)
    interval = statistics.mean_interval([scores], samples=4000)
    half = 1.96 * scores.std() / np.sqrt(len(scores))
    assert interval.value == pytest.approx(scores.mean())
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.1 * half)
    wider = statistics.mean_interval([scores], samples=4000, confidence=0.99)
    assert wider.low < interval.low < interval.high < wider.high


@pytest.mark.parametrize("estimate", ["mean_interval", "iqm_interval"])
@pytest.mark.parametrize(("runs", "held"), [(3, 0.75), (10, 0.90)])
def test_how_often_intervals_of_few_runs_hold_the_truth(statistics, runs, held, estimate):
    """Runs of a normal law, 95 %: percentile intervals of so few are too narrow, as docs/results.md says."""
    random = np.random.default_rng(5)
    interval = getattr(statistics, estimate)
    found = [interval([random.normal(size=runs)], samples=300) for _ in range(600)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(held, abs=0.04)  # 2 deviations


@pytest.mark.parametrize(
    ("estimate", "groups", "truth", "held"),
    [
        ("mean_interval", [3], 0.0, 0.84),
        ("iqm_interval", [3], 0.0, 0.87),
        ("probability_of_improvement", [10, 3], 0.5, 0.91),
        ("probability_of_improvement", [10, 10], 0.5, 0.94),
    ],
)
def test_how_often_intervals_over_seven_environments_hold_the_truth(statistics, estimate, groups, truth, held):
    """The same of what Table 1 reports: so many runs in each of seven environments."""
    random = np.random.default_rng(5)
    interval = getattr(statistics, estimate)
    found = [interval(*(random.normal(size=(7, runs)) for runs in groups), samples=300) for _ in range(600)]
    assert np.mean([one.low <= truth <= one.high for one in found]) == pytest.approx(held, abs=0.03)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([[1, 2, 3]], [[0, 0]], 1.0),
        ([[0, 0]], [[1, 2, 3]], 0.0),
        ([[1, 2]], [[1, 2]], 0.5),
        ([[1, 4]], [[2, 3]], 0.5),
        ([[2, 4]], [[1, 3]], 0.75),
        ([[5, 5], [0]], [[1], [1]], 0.5),  # all won in one environment, none in the other
    ],
)
def test_probability_of_improvement_counts_pairs(statistics, ours, theirs, expected):
    found = statistics.probability_of_improvement(ours, theirs)
    assert found.value == pytest.approx(expected)
    assert 0 <= found.low <= found.value <= found.high <= 1
    turned = statistics.probability_of_improvement(theirs, ours)
    assert turned.value == pytest.approx(1 - expected)


def test_probability_of_improvement_of_two_normal_laws(statistics):
    random = np.random.default_rng(3)
    ours, theirs = random.normal(1.0, 1.0, (2, 200)), random.normal(0.0, 1.0, (2, 200))
    found = statistics.probability_of_improvement(ours, theirs, samples=60)
    assert found.value == pytest.approx(0.7602, abs=0.04)  # the normal distribution function at 1 / sqrt(2)
    assert found.high - found.low < 0.15


def test_same_seed_same_interval(statistics):
    scores = [[1.0, 5.0, 2.0], [0.0, 1.0]]
    assert statistics.mean_interval(scores) == statistics.mean_interval(scores)
    assert statistics.mean_interval(scores, samples=50) != statistics.mean_interval(scores, samples=50, seed=1)


def test_refuses_what_means_nothing(statistics):
    with pytest.raises(ValueError, match="at least one run"):
        statistics.iqm([])
    with pytest.raises(ValueError, match="at least one environment"):
        statistics.mean_interval([])
    with pytest.raises(ValueError, match="must be finite"):
        statistics.mean_interval([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="must have as many as ours, 2"):
        statistics.probability_of_improvement([[1], [2]], [[1]])
    with pytest.raises(ValueError, match="confidence is 95"):
        statistics.iqm_interval([[1, 2]], confidence=95)


def test_permutations_of_few_runs_are_counted(statistics):
    assert statistics.permutation_p([1, 2, 3], [4, 5, 6]) == pytest.approx(
        2 / 20
    )  # this division, and its mirror image
    assert statistics.permutation_p([4, 6], [1, 2, 3]) == pytest.approx(1 / 10)  # sizes differ: it has no mirror image
    assert statistics.permutation_p([5, 5], [5, 5, 5]) == 1.0
    assert statistics.permutation_p([1, 5], [3]) == 1.0


def test_permutations_drawn_agree_with_those_counted(statistics):
    ours, theirs = [0.3, 1.9, 2.2, 3.0, 1.1], [2.4, 3.3, 4.1, 2.9, 3.6, 1.5]
    exact = statistics.permutation_p(ours, theirs)
    assert statistics.permutation_p(ours, theirs, samples=400) == pytest.approx(exact, abs=0.03)
    assert 0.01 < exact < 0.1


def test_signs_of_few_pairs_are_counted(statistics):
    assert statistics.sign_flip_p([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)  # as they are, and all turned
    assert statistics.sign_flip_p([1.0, -1.0]) == 1.0
    assert statistics.sign_flip_p([0.0, 0.0, 0.0]) == 1.0
    assert statistics.sign_flip_p([3.0, 1.0, -1.0]) == pytest.approx(6 / 8)  # sums of 5, 3, 3, and these mirrored


def test_signs_drawn_agree_with_those_counted(statistics):
    differences = [0.3, 1.9, -0.4, 2.0, 1.1, 0.6, -0.2, 1.4]
    exact = statistics.sign_flip_p(differences)
    assert statistics.sign_flip_p(differences, samples=200) == pytest.approx(exact, abs=0.04)
    assert 0.01 < exact < 0.1
    random = np.random.default_rng(3)
    found = [statistics.sign_flip_p(random.normal(size=8)) for _ in range(1000)]
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 0.02
    assert np.mean(np.array(found) <= 0.5) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("apart", "found"), [(1.0, 0.13), (2.0, 0.54)])
def test_how_often_a_difference_is_found(statistics, apart, found):
    """Of five runs and three, by deviations between their means, at 0.05: as docs/results.md says of the engines."""
    random = np.random.default_rng(7)
    ps = [statistics.permutation_p(random.normal(apart, 1, 5), random.normal(size=3)) for _ in range(1500)]
    assert np.mean(np.array(ps) <= 0.05) == pytest.approx(found, abs=0.04)


def test_chance_is_seldom_taken_for_a_difference(statistics):
    random = np.random.default_rng(3)
    found = [statistics.permutation_p(random.normal(size=5), random.normal(size=3)) for _ in range(1000)]
    assert np.mean(np.array(found) <= 0.05) <= 0.05 + 0.02
    assert np.mean(np.array(found) <= 0.5) == pytest.approx(0.5, abs=0.05)
