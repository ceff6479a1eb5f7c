"""Statistics over training runs, as Agarwal et al. 2021 define them ("Deep Reinforcement Learning at the Edge of the
Statistical Precipice", arXiv 2108.13264): few runs say little, and these say how little.

Scores come as strata: one sequence of runs for each environment. Bootstrap samples are drawn within each, so an
environment's share is fixed. All take scores that may be compared across environments; scale them first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Strata = Sequence[Sequence[float]]
SAMPLES = 2000
"""Bootstrap samples."""


@dataclass(frozen=True)
class Interval:
    """An estimate and the percentile interval of its bootstrap distribution."""

    value: float
    low: float
    high: float


def mean_std(scores: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, divided by the number of runs."""
    values = _runs(scores, "scores")
    return float(values.mean()), float(values.std())


def iqm(scores: Sequence[float]) -> float:
    """Interquartile mean: of what is left when the lowest and the highest quarter of the runs are gone.

    A quarter is rounded down to whole runs, so of fewer than four it is the mean.
    """
    return float(_trimmed_mean(_runs(scores, "scores")[None])[0])


def mean_interval(strata: Strata, *, confidence: float = 0.95, samples: int = SAMPLES, seed: int = 0) -> Interval:
    """The mean over environments of each one's mean, with its stratified bootstrap interval."""
    return _bootstrap(
        lambda drawn: np.mean([x.mean(axis=1) for x in drawn], axis=0), [strata], confidence, samples, seed
    )


def iqm_interval(strata: Strata, *, confidence: float = 0.95, samples: int = SAMPLES, seed: int = 0) -> Interval:
    """The interquartile mean of all runs of all environments, with its stratified bootstrap interval."""
    return _bootstrap(lambda drawn: _trimmed_mean(np.concatenate(drawn, axis=1)), [strata], confidence, samples, seed)


def difference_interval(
    ours: Sequence[float], theirs: Sequence[float], *, confidence: float = 0.95, samples: int = SAMPLES, seed: int = 0
) -> Interval:
    """The mean of `ours` less that of `theirs`, runs of one environment, with its bootstrap interval."""
    return _bootstrap(
        lambda drawn: drawn[0].mean(axis=1) - drawn[1].mean(axis=1), [[ours], [theirs]], confidence, samples, seed
    )


def permutation_p(ours: Sequence[float], theirs: Sequence[float], *, samples: int = 20_000, seed: int = 0) -> float:
    """How often means differ as much as these if it makes no difference which runs are whose; exact of few runs.

    Holds for any number of runs and any distribution, where an interval of few runs is too narrow: the share of the
    divisions of all runs into groups of these sizes, this one among them, whose means are at least as far apart. Above
    `samples` divisions, of so many drawn at random.
    """
    first, second = _runs(ours, "ours"), _runs(theirs, "theirs")
    runs, n = np.concatenate([first, second]), len(first)
    if math.comb(len(runs), n) <= samples:
        chosen = np.array(list(itertools.combinations(range(len(runs)), n)))
    else:
        random = np.random.default_rng(seed)
        chosen = np.array([np.arange(n), *(random.permutation(len(runs))[:n] for _ in range(samples))])
    sums = runs[chosen].sum(axis=1)
    differences = np.abs(sums / n - (runs.sum() - sums) / (len(runs) - n))
    observed = abs(first.mean() - second.mean())
    return float((differences >= observed - 1e-9 * max(1.0, observed)).mean())


def sign_flip_p(differences: Sequence[float], *, samples: int = 20_000, seed: int = 0) -> float:
    """How often pairs differ as much on the mean if it makes no difference which of a pair is whose; exact of few.

    The share of all choices of signs, these among them, with a mean at least as far from 0. Above `samples` choices, of
    so many drawn at random.
    """
    values = _runs(differences, "differences")
    n = len(values)
    if 2**n <= samples:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        drawn = np.random.default_rng(seed).choice((1.0, -1.0), size=(samples, n))
        signs = np.concatenate([np.ones((1, n)), drawn])
    observed = abs(values.sum())
    return float((np.abs(signs @ values) >= observed - 1e-9 * max(1.0, observed)).mean())


def probability_of_improvement(
    ours: Strata, theirs: Strata, *, confidence: float = 0.95, samples: int = SAMPLES, seed: int = 0
) -> Interval:
    """How likely a run of `ours` scores higher than one of `theirs` in an environment drawn at random.

    The mean over environments of P(X > Y) + P(X = Y) / 2 over all pairs of runs.

    Raises:
        ValueError: they are not of equally many environments.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"theirs has {len(theirs)} environments; it must have as many as ours, {len(ours)}")

    def statistic(drawn: Sequence[np.ndarray]) -> np.ndarray:
        pairs = zip(drawn[: len(ours)], drawn[len(ours) :], strict=True)
        return np.mean([_superiority(x, y) for x, y in pairs], axis=0)

    return _bootstrap(statistic, [ours, theirs], confidence, samples, seed)


def _superiority(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of pairs in which x is higher, ties half. x [B, n], y [B, m] -> [B]."""
    x, y = x[:, :, None], y[:, None, :]
    return ((x > y) + 0.5 * (x == y)).mean(axis=(1, 2))


def _trimmed_mean(scores: np.ndarray) -> np.ndarray:
    """Interquartile means along the last axis. [B, n] -> [B]."""
    count = scores.shape[1]
    cut = count // 4
    return np.sort(scores, axis=1)[:, cut : count - cut].mean(axis=1)


def _bootstrap(
    statistic: Callable[[Sequence[np.ndarray]], np.ndarray],
    groups: Sequence[Strata],
    confidence: float,
    samples: int,
    seed: int,
) -> Interval:
    """A statistic of strata [B, n] each -> [B], of the runs themselves and of samples drawn with replacement."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be above 0 and below 1")
    strata = [_runs(scores, "scores") for group in groups for scores in group]
    if not strata:
        raise ValueError("strata is empty; it must have the runs of at least one environment")
    random = np.random.default_rng(seed)
    drawn = [x[random.integers(len(x), size=(samples, len(x)))] for x in strata]
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(drawn), [tail, 1 - tail])
    return Interval(float(statistic([x[None] for x in strata])[0]), float(low), float(high))


def _runs(scores: Sequence[float], name: str) -> np.ndarray:
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name} has shape {values.shape}; it must be a sequence of at least one run")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{name} is {scores}; every score must be finite")
    return values
