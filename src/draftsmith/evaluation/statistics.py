"""Intervals for ratios of sums: paired bootstrap over prompts, hierarchical bootstrap over seeds and prompts.

A statistic is a function of column sums (tokens, seconds, rounds, …), so a resample is a vector of how often each
prompt was drawn, and thousands of resamples are one matrix product. Prompts are drawn together with all that belongs
to them (plain and speculative, every method), which makes every interval a paired one.

Prompts are few here (8 in the quick start), where percentile and BCa intervals are too short, even widened by Student's
quantile as Hesterberg proposes ("What Teachers Should Know About the Bootstrap", 2015, sec. 5.3). The studentised
bootstrap (Efron and Tibshirani 1993, sec. 12.5) on the logarithm of a ratio holds its level from about 8 prompts on;
the tests measure it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from draftsmith.foundation.seeding import key

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Of column sums `[..., k]`, for each leading index: `[...]`."""

RESAMPLES = 4000
_BLOCK = 1 << 22  # numbers held at once while resampling
_FEW = 6  # below this many prompts, too many resamples are one prompt over and over
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its interval; `low` and `high` are None where a single prompt allows none."""

    estimate: float
    low: float | None
    high: float | None


def ratio(sums: Array) -> Array:
    """Column 0 ÷ column 1; `[..., 2]` to `[...]`."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def ratio_of_ratios(sums: Array) -> Array:
    """(column 0 ÷ column 1) ÷ (column 2 ÷ column 3); `[..., 4]` to `[...]`."""
    return np.asarray(sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3]))


def speedup_interval(
    tokens: Sequence[float],
    seconds: Sequence[float],
    plain_tokens: Sequence[float],
    plain_seconds: Sequence[float],
    *,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """The speed-up (Σ tokens ÷ Σ seconds, over the same of plain decoding) with a paired interval over prompts.

    Args:
        tokens, seconds, plain_tokens, plain_seconds: one number for each prompt, prompts in the same order in all four.
        seed: of the resampling.
        level: the interval's coverage.
    """
    columns = np.stack([np.asarray(c, np.float64) for c in (tokens, seconds, plain_tokens, plain_seconds)], axis=1)
    interval = paired_bootstrap(columns, lambda sums: np.log(ratio_of_ratios(sums)), seed=seed, level=level)
    low, high = (None if end is None else math.exp(end) for end in (interval.low, interval.high))
    return Interval(math.exp(interval.estimate), low, high)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, seed: int = 0, level: float = 0.95
) -> Interval:
    """A ratio of sums of positive numbers (Σ tokens ÷ Σ rounds) with an interval over prompts, one number for each."""
    columns = np.stack([np.asarray(c, np.float64) for c in (numerators, denominators)], axis=1)
    interval = paired_bootstrap(columns, lambda sums: np.log(ratio(sums)), seed=seed, level=level)
    low, high = (None if end is None else math.exp(end) for end in (interval.low, interval.high))
    return Interval(math.exp(interval.estimate), low, high)


def paired_bootstrap(
    columns: ArrayLike,
    statistic: Statistic,
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    method: Literal["studentised", "bca", "percentile"] = "studentised",
) -> Interval:
    """Bootstrap over prompts.

    Args:
        columns: `[n, k]`, one row for each prompt.
        statistic: of the column sums; smooth. For `"studentised"`, pass the logarithm of a ratio.
        seed: resampling is keyed by it: same data, same interval.
        level: the interval's coverage.
        resamples: how many.
        method: `"studentised"` (Student's interval below 6 prompts); `"bca"` (bias-corrected and accelerated; Efron
            1987) and `"percentile"`, both widened for few prompts, don't depend on the scale (ratio or logarithm) and
            suit a few dozen prompts or more.

    Returns:
        the estimate on all prompts and its interval; no interval for a single prompt.
    """
    data = _checked(columns, axes=2)
    n = len(data)
    total = data.sum(axis=0)
    estimate = float(statistic(total))
    if n < 2:
        return Interval(estimate, None, None)
    influence = (data - total / n) @ _gradient(statistic, total)
    if float((influence**2).sum()) <= (1e-12 * (1 + abs(estimate))) ** 2:
        return Interval(estimate, estimate, estimate)
    generator = np.random.default_rng(key("bootstrap", seed, n))
    blocks = _weights(generator, n, resamples)
    if method == "studentised":
        error = math.sqrt(n / (n - 1) * float((influence**2).sum()))
        if n < _FEW:
            reach = student_quantile(0.5 + level / 2, n - 1) * error
            return Interval(estimate, estimate - reach, estimate + reach)
        pivots = np.concatenate([_pivots(w, data, statistic, estimate, error) for w in blocks])
        high, low = np.quantile(pivots, [0.5 - level / 2, 0.5 + level / 2])
        return Interval(estimate, estimate - float(low) * error, estimate - float(high) * error)
    draws = np.concatenate([statistic(w @ data) for w in blocks])
    reach = student_quantile(0.5 + level / 2, n - 1) * math.sqrt(n / (n - 1))
    bias, acceleration = 0.0, 0.0
    if method == "bca":
        below = (np.mean(draws < estimate) + np.mean(draws <= estimate)) / 2
        bias = _NORMAL.inv_cdf(float(np.clip(below, 1 / resamples, 1 - 1 / resamples)))
        acceleration = float((influence**3).sum()) / (6 * float((influence**2).sum()) ** 1.5)
    low, high = (float(np.quantile(draws, _bca_level(z, bias, acceleration))) for z in (-reach, reach))
    return Interval(estimate, low, high)


def hierarchical_bootstrap(
    cells: ArrayLike,
    statistic: Statistic,
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
) -> Interval:
    """Bootstrap over seeds and prompts, for runs of several seeds evaluated on the same prompts.

    Seeds and prompts are drawn independently of each other, each cell staying with its seed and its prompt (Owen
    2007, "The pigeonhole bootstrap"): a prompt that is hard is hard for every seed, so drawing new prompts for each
    seed would make intervals too short. That bootstrap counts what varies from cell to cell up to three times and a
    few seeds' own variance too little, so its draws are rescaled to the variance of a two-way analysis of variance of
    the cells' influence on the statistic, with Student's quantile at Satterthwaite's degrees of freedom.

    Args:
        cells: `[S, n, k]` for S seeds and n prompts.
        statistic: of the sums over seeds and prompts; smooth, and roughly symmetric in its errors (pass the logarithm
            of a ratio that isn't).
        seed, level, resamples: as in `paired_bootstrap`.

    Returns:
        the estimate on all cells and its interval. With one seed, `paired_bootstrap` over the prompts.
    """
    data = _checked(cells, axes=3)
    seeds, prompts, width = data.shape
    if seeds == 1:
        return paired_bootstrap(data[0], statistic, seed=seed, level=level, resamples=resamples)
    estimate = float(statistic(data.sum(axis=(0, 1))))
    if prompts < 2:
        return Interval(estimate, None, None)
    generator = np.random.default_rng(key("hierarchical bootstrap", seed, seeds, prompts))
    draws = []
    for over_prompts in _weights(generator, prompts, resamples, room=width):
        over_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(over_prompts)).astype(np.float64)
        by_prompt = (over_seeds @ data.reshape(seeds, -1)).reshape(-1, prompts, width)
        draws.append(statistic(np.einsum("rn,rnk->rk", over_prompts, by_prompt)))
    spread = np.concatenate(draws) - estimate
    influence = data @ _gradient(statistic, data.sum(axis=(0, 1))) * (seeds * prompts)
    variance, freedom = two_way_variance(influence)
    observed = float(spread.std())
    if observed == 0.0:
        return Interval(estimate, estimate, estimate)
    wanted = math.sqrt(variance) * student_quantile(0.5 + level / 2, freedom) / _NORMAL.inv_cdf(0.5 + level / 2)
    low, high = np.quantile(spread, [0.5 - level / 2, 0.5 + level / 2]) * (wanted / observed)
    return Interval(estimate, estimate + float(low), estimate + float(high))


def two_way_variance(influence: Array) -> tuple[float, float]:
    """Variance of the mean of a crossed table, rows and columns random, and its degrees of freedom (Satterthwaite).

    Args:
        influence: `[S, n]`.

    Returns:
        (MS_rows + MS_columns - MS_cells) ÷ (S n), at least MS_cells ÷ (S n); degrees of freedom.
    """
    seeds, prompts = influence.shape
    centred = influence - influence.mean()
    rows, columns = centred.mean(axis=1, keepdims=True), centred.mean(axis=0, keepdims=True)
    left = (seeds - 1) * (prompts - 1)
    ms_rows = prompts * float((rows**2).sum()) / (seeds - 1)
    ms_columns = seeds * float((columns**2).sum()) / (prompts - 1)
    ms_cells = float(((centred - rows - columns) ** 2).sum()) / left
    total = ms_rows + ms_columns - ms_cells
    if total <= ms_cells:
        return ms_cells / influence.size, float(left)
    freedom = total**2 / (ms_rows**2 / (seeds - 1) + ms_columns**2 / (prompts - 1) + ms_cells**2 / left)
    return total / influence.size, max(freedom, float(min(seeds, prompts) - 1))


def student_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t: with t = √ν·tan θ its density is proportional to cos(θ)^(ν-1), integrated here."""
    half = np.linspace(0.0, math.pi / 2, 20_001)
    # beyond a few thousand degrees of freedom t is normal to five digits, and the peak would outrun the grid
    freedom = min(freedom, 5000.0)
    density = np.cos(half) ** (freedom - 1)
    areas = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    theta = float(np.interp(abs(probability - 0.5) * 2 * areas[-1], areas, half))
    return math.copysign(math.sqrt(freedom) * math.tan(theta), probability - 0.5)


def _weights(generator: np.random.Generator, n: int, resamples: int, room: int = 1) -> list[Array]:
    """How often each of `n` is drawn, `[block, n]` for each block of resamples."""
    block = max(1, min(resamples, _BLOCK // (n * room)))
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return [generator.multinomial(n, np.full(n, 1 / n), size=size).astype(np.float64) for size in sizes]


def _gradient(statistic: Statistic, sums: Array) -> Array:
    """Derivatives of the statistic by each column sum, central differences: `[..., k]` to `[..., k]`.

    A row's share in them is its influence on the statistic (the infinitesimal jackknife).
    """
    slopes = []
    for column in range(sums.shape[-1]):
        step = np.zeros_like(sums)
        step[..., column] = np.maximum(np.abs(sums[..., column]), 1e-6) * 1e-5
        slopes.append((statistic(sums + step) - statistic(sums - step)) / (2 * step[..., column]))
    return np.stack(slopes, axis=-1)


def _pivots(weights: Array, data: Array, statistic: Statistic, estimate: float, error: float) -> Array:
    """(resampled - estimate) ÷ the resample's own standard error, for each row of weights `[block, n]`."""
    n = len(data)
    sums = weights @ data
    slopes = _gradient(statistic, sums)
    influence = slopes @ data.T - (slopes * sums).sum(axis=1, keepdims=True) / n
    own = np.sqrt(n / (n - 1) * (weights * influence**2).sum(axis=1))
    # a resample of one prompt only has no spread of its own: a small floor keeps the quotient finite
    return np.asarray((statistic(sums) - estimate) / np.maximum(own, 1e-3 * error))


def _bca_level(z: float, bias: float, acceleration: float) -> float:
    shifted = bias + z
    damping = 1 - acceleration * shifted
    # the transformation breaks down where the damping changes sign; no level can lie beyond the draws anyway
    return _NORMAL.cdf(bias + shifted / damping) if damping > 0 else (0.0 if z < 0 else 1.0)


def _checked(values: ArrayLike, axes: int) -> Array:
    data = np.asarray(values, np.float64)
    if data.ndim != axes or data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"wanted {axes} axes of finite numbers, got shape {data.shape}")
    return data
