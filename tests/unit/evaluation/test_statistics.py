"""Intervals cover a simulated truth as often as they say; quantiles against tables; pairing shortens what it should."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from draftsmith.evaluation import statistics
from draftsmith.evaluation.statistics import (
    Interval,
    hierarchical_bootstrap,
    paired_bootstrap,
    ratio,
    ratio_of_ratios,
    speedup_interval,
)

Array = NDArray[np.float64]


def prompts(generator: np.random.Generator, n: int) -> Array:
    """Tokens, seconds, plain tokens, plain seconds of n prompts, whose τ differ."""
    tokens = generator.integers(30, 97, n).astype(float)
    plain = 0.1 + tokens * 0.02 * np.exp(0.05 * generator.standard_normal(n))
    tau = 2.2 * np.exp(0.15 * generator.standard_normal(n))
    seconds = 0.1 + tokens / tau * 0.028 * np.exp(0.05 * generator.standard_normal(n))
    return np.stack([tokens, seconds, tokens, plain], axis=1)


def log_speedup(sums: Array) -> Array:
    return np.log(ratio_of_ratios(sums))


TRUTH = float(ratio_of_ratios(prompts(np.random.default_rng(2024), 1_000_000).sum(axis=0)))


@pytest.mark.parametrize(
    ("method", "n"), [("studentised", 5), ("studentised", 12), ("studentised", 40), ("bca", 40), ("percentile", 40)]
)
def test_paired_intervals_cover_the_truth(method: Literal["studentised", "bca", "percentile"], n: int) -> None:
    generator = np.random.default_rng(n)
    truth = math.log(TRUTH)
    repeats = 800
    covered = below = 0
    for repeat in range(repeats):
        found = paired_bootstrap(prompts(generator, n), log_speedup, seed=repeat, resamples=400, method=method)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= truth <= found.high
        below += found.high < truth
    assert 0.93 <= covered / repeats <= 0.97
    assert 0.005 <= below / repeats <= 0.05  # it errs on both sides


@pytest.mark.parametrize(
    ("seeds", "n", "spread"), [(3, 30, (0.05, 0.01, 0.02)), (5, 40, (0.02, 0.15, 0.1)), (8, 20, (0.05, 0.1, 0.1))]
)
def test_hierarchical_intervals_cover_the_truth(seeds: int, n: int, spread: tuple[float, float, float]) -> None:
    """Effects of the seed, of the prompt and of both: the truth is about new seeds *and* new prompts."""
    by_seed, by_prompt, by_cell = spread
    generator = np.random.default_rng(seeds)
    repeats, covered, prompts_only = 600, 0, 0
    for repeat in range(repeats):
        effect = (
            by_seed * generator.standard_normal((seeds, 1))
            + by_prompt * generator.standard_normal((1, n))
            + by_cell * generator.standard_normal((seeds, n))
        )
        rounds = np.broadcast_to(generator.integers(20, 60, (1, n)).astype(float), (seeds, n))
        cells = np.stack([rounds * (2 + effect), rounds], axis=-1)
        found = hierarchical_bootstrap(cells, ratio, seed=repeat, resamples=300)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2 <= found.high
        naive = paired_bootstrap(cells.sum(axis=0), ratio, seed=repeat, resamples=300)
        assert naive.low is not None
        assert naive.high is not None
        prompts_only += naive.low <= 2 <= naive.high
    assert 0.93 <= covered / repeats <= 0.97
    assert prompts_only < covered  # leaving the seeds out claims too much


def test_estimate_is_the_ratio_of_sums() -> None:
    found = speedup_interval([90, 30], [1.0, 0.5], [90, 30], [2.0, 0.7])
    assert found.estimate == pytest.approx((120 / 1.5) / (120 / 2.7))
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.estimate < found.high


def test_same_data_same_interval_and_pairing_helps() -> None:
    data = prompts(np.random.default_rng(1), 20)
    columns = [list(column) for column in data.T]
    assert speedup_interval(*columns) == speedup_interval(*columns)
    assert speedup_interval(*columns, seed=1) != speedup_interval(*columns)
    broken = [*columns[:2], columns[2][::-1], columns[3][::-1]]  # plain decoding of other prompts
    assert _width(speedup_interval(*columns)) < _width(speedup_interval(*broken))
    assert _width(speedup_interval(*columns, level=0.8)) < _width(speedup_interval(*columns))


def _width(interval: Interval) -> float:
    assert interval.low is not None
    assert interval.high is not None
    return interval.high - interval.low


def test_little_data() -> None:
    one = speedup_interval([96], [1.0], [96], [1.5])
    assert (one.estimate, one.low, one.high) == (pytest.approx(1.5), None, None)
    assert hierarchical_bootstrap(np.ones((3, 1, 2)), ratio) == Interval(1.0, None, None)
    same = speedup_interval([96] * 5, [1.0] * 5, [96] * 5, [1.5] * 5)
    assert same.low == same.high == pytest.approx(1.5)
    data = prompts(np.random.default_rng(2), 9)
    assert hierarchical_bootstrap(data[None], ratio_of_ratios, seed=4) == paired_bootstrap(
        data, ratio_of_ratios, seed=4
    )
    two = paired_bootstrap(prompts(np.random.default_rng(3), 2), log_speedup)
    assert two.low is not None
    assert two.high is not None
    assert math.isfinite(two.low)
    assert two.low < two.high < math.inf
    for bad in (np.ones(3), np.ones((0, 2)), np.full((2, 2), np.nan)):
        with pytest.raises(ValueError, match="axes"):
            paired_bootstrap(bad, ratio)


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    # printed in every table of Student's t
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.30265),
        (0.975, 7, 2.36462),
        (0.95, 10, 1.81246),
        (0.975, 30, 2.04227),
        (0.975, 1e9, 1.95996),
    ],
)
def test_student_quantile(probability: float, freedom: float, expected: float) -> None:
    assert statistics.student_quantile(probability, freedom) == pytest.approx(expected, rel=3e-4)
    assert statistics.student_quantile(1 - probability, freedom) == pytest.approx(-expected, rel=3e-4)
    assert statistics.student_quantile(0.5, freedom) == 0


def test_two_way_variance_is_unbiased() -> None:
    generator = np.random.default_rng(5)
    shape = (2000, 4, 12)
    tables = (
        0.7 * generator.standard_normal((2000, 4, 1))
        + 0.9 * generator.standard_normal((2000, 1, 12))
        + generator.standard_normal(shape)
    )
    estimates = np.array([statistics.two_way_variance(table)[0] for table in tables])
    truth = 0.7**2 / 4 + 0.9**2 / 12 + 1 / 48
    assert np.mean(estimates) == pytest.approx(truth, rel=0.04)
    assert np.var(tables.mean(axis=(1, 2))) == pytest.approx(truth, rel=0.08)
