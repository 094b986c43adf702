"""Tables of a study: acceptance with intervals over seeds and prompts, and comparisons paired by both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from draftsmith.evaluation.statistics import Interval, hierarchical_bootstrap, ratio, ratio_of_ratios
from draftsmith.foundation import console
from draftsmith.studies.rows import Row

Key = tuple[str, str]
"""A test answer: benchmark and id."""


@dataclass(frozen=True)
class Table:
    """Text cells, with what has to be known to read them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: int = 1

    def markdown(self) -> str:
        """A section with a table; the first `left` columns are text, the others numbers."""
        rule = ["---" if i < self.left else "--:" for i in range(len(self.columns))]
        lines = [f"## {self.title}", "", *(f"{self.note}\n" for _ in range(bool(self.note)))]
        lines += [f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows)]
        return "\n".join(lines) + "\n"

    def print(self) -> None:
        """The same on the terminal."""
        console.table(self.title, self.columns, self.rows, align_right_from=self.left)
        if self.note:
            console.say(self.note)


def where(rows: Sequence[Row], **values: object) -> list[Row]:
    """The rows whose fields have these values; a callable is asked."""

    def fits(row: Row, name: str, wanted: object) -> bool:
        found = getattr(row, name)
        return bool(wanted(found)) if callable(wanted) else bool(found == wanted)

    return [row for row in rows if all(fits(row, name, wanted) for name, wanted in values.items())]


def counts(rows: Sequence[Row]) -> dict[int, dict[Key, tuple[int, int]]]:
    """(committed, rounds) of every test answer by seed."""
    found: dict[int, dict[Key, tuple[int, int]]] = {}
    for row in rows:
        of_seed = found.setdefault(row.seed, {})
        for name, committed, rounds in zip(row.prompts, row.committed, row.rounds, strict=True):
            of_seed[row.benchmark, name] = (committed, rounds)
    return found


def acceptance(rows: Sequence[Row]) -> Interval | None:
    """τ over all seeds and answers of some rows of one method, with its interval; None without a round."""
    cells = paired([counts(rows)])
    return None if cells is None else _exponential(hierarchical_bootstrap(cells, lambda sums: np.log(ratio(sums))))


def relative(rows: Sequence[Row], reference: Sequence[Row]) -> Interval | None:
    """τ of some rows ÷ τ of others, paired by seed and answer: what only one side has is left out."""
    cells = paired([counts(rows), counts(reference)])
    if cells is None:
        return None
    return _exponential(hierarchical_bootstrap(cells, lambda sums: np.log(ratio_of_ratios(sums))))


def paired(parts: Sequence[dict[int, dict[Key, tuple[int, int]]]]) -> NDArray[np.float64] | None:
    """`[S, n, 2·parts]` of the seeds and answers that all parts have; answers without a round in any teach nothing."""
    seeds = sorted(set.intersection(*(set(part) for part in parts)))
    if not seeds:
        return None
    each = [part[seed] for part in parts for seed in seeds]
    names = sorted(set.intersection(*map(set, each)))
    names = [name for name in names if all(of_seed[name][1] for of_seed in each)]
    if not names:
        return None
    found = [[[x for part in parts for x in part[seed][name]] for name in names] for seed in seeds]
    return np.asarray(found, np.float64)


def _exponential(found: Interval) -> Interval:
    low, high = (None if end is None else math.exp(end) for end in (found.low, found.high))
    return Interval(math.exp(found.estimate), low, high)


def cost(rows: Sequence[Row], charge: bool = True) -> float | None:
    """Positions trained on in a cell, mean over seeds; `charge`: with what else the training took, as positions."""
    by_seed = {row.seed: row.charged_positions if charge else float(row.training_positions) for row in rows}
    return sum(by_seed.values()) / len(by_seed) if by_seed else None


def seconds(rows: Sequence[Row]) -> float | None:
    """Wall-clock seconds of training, median over seeds: one cell on a busy machine says little."""
    by_seed = {row.seed: row.training_seconds for row in rows}
    return median(by_seed.values()) if by_seed else None


def shown(value: Interval | None, form: str = ".3f", unit: str = "") -> str:
    """`"2.413 [2.380, 2.447]"`, or a dash."""
    if value is None:
        return "–"
    low, high = value.low, value.high
    ends = f" [{low:{form}}, {high:{form}}]" if low is not None and high is not None else ""
    return f"{value.estimate:{form}}{unit}{ends}"


def percent(value: Interval | None, less: float = 0.0) -> str:
    """A ratio in percent; `less=1` for a difference: `"+2.9 % [+0.4, +5.5]"`."""
    if value is None:
        return "–"
    scaled = [None if x is None else 100 * (x - less) for x in (value.estimate, value.low, value.high)]
    form = "+.1f" if less else ".1f"
    ends = f" [{scaled[1]:{form}}, {scaled[2]:{form}}]" if scaled[1] is not None and scaled[2] is not None else ""
    return f"{scaled[0]:{form}} %{ends}"
