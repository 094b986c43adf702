"""Has something become worse? A summary against an earlier one, beyond what their intervals leave open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.evaluation.summary import Result
from draftsmith.foundation.errors import UserError

SAME = 1e-9  # relative: equal numbers that were written and read


@dataclass(frozen=True)
class Comparison:
    """What came of comparing.

    Attributes:
        worse: a sentence for each regression: which set, which figure, from what to what.
        compared: how many results are in both.
        missing: labels of earlier results that were not measured now.
        open: sentences for figures that are lower, where a single prompt allows no interval to judge by.
    """

    worse: list[str]
    compared: int
    missing: list[str]
    open: list[str]


@dataclass(frozen=True)
class _Figure:
    """A positive number and its interval, of an earlier and of the present result."""

    name: str
    before: tuple[float, float | None, float | None]
    now: tuple[float, float | None, float | None]


def compare(now: Sequence[Result], before: Sequence[Result], speed: bool = True) -> Comparison:
    """Regressions of `now` against `before`, results matched by set, temperature and drafters.

    A figure has become worse when it is lower by more than both 95 % intervals together explain: log(before ÷ now)
    beyond √(a² + b²), a and b being how far (in logarithms) the earlier interval reaches down and the present one up.
    Acceptance length and speed-up are judged, and answers that differ from plain decoding's without a near tie.

    Args:
        speed: judge the speed-up as well; counts alone compare between machines.

    Raises:
        UserError: no result is in both.
    """
    earlier = {_key(result): result for result in before}
    pairs = [(earlier[_key(result)], result) for result in now if _key(result) in earlier]
    if not pairs:
        raise UserError(
            f"nothing to compare: the earlier results are of {_labels(before)}, the present ones of {_labels(now)}"
        )
    worse: list[str] = []
    undecided: list[str] = []
    for old, new in pairs:
        for figure in _figures(old, new, speed):
            drop = math.log(figure.before[0] / figure.now[0])
            if drop <= SAME:
                continue
            reach = _reach(figure)
            said = f"{label(new)}: {figure.name} fell from {_text(figure.before)} to {_text(figure.now)}"
            if reach is None:
                undecided.append(f"{said}; one prompt allows no interval")
            elif drop > reach + SAME:
                worse.append(said)
        if (lost := new.lossless.different) > old.lossless.different:
            worse.append(
                f"{label(new)}: {lost} of {new.lossless.checked} answers differ from plain decoding's without a near "
                f"tie, {old.lossless.different} of {old.lossless.checked} did before"
            )
    keys = {_key(result) for result in now}
    return Comparison(worse, len(pairs), [label(r) for r in before if _key(r) not in keys], undecided)


def label(result: Result) -> str:
    """`gsm8k, T = 0, eagle3`."""
    return f"{result.set}, T = {result.temperature:g}, {result.drafters}"


def _figures(old: Result, new: Result, speed: bool) -> list[_Figure]:
    found = [_Figure("acceptance length", _acceptance(old), _acceptance(new))]
    if speed:
        a, b = old.speedup, new.speedup
        found.append(_Figure("speed-up", (a.estimate, a.low, a.high), (b.estimate, b.low, b.high)))
    return found


def _acceptance(result: Result) -> tuple[float, float | None, float | None]:
    return result.acceptance_length, result.acceptance_length_low, result.acceptance_length_high


def _reach(figure: _Figure) -> float | None:
    low, high = figure.before[1], figure.now[2]
    if low is None or high is None:
        return None
    return math.hypot(math.log(figure.before[0] / low), math.log(high / figure.now[0]))


def _text(figure: tuple[float, float | None, float | None]) -> str:
    value, low, high = figure
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f}–{high:.3f})"


def _key(result: Result) -> tuple[str, float, str]:
    return result.set, result.temperature, result.drafters


def _labels(results: Sequence[Result]) -> str:
    return "; ".join(label(r) for r in results) or "nothing"
