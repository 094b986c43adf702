"""Several runs as one: their measurements under the runs' names, for the sections that compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from draftsmith.evaluation.measured import PLAIN
from draftsmith.evaluation.report import views
from draftsmith.evaluation.report.inputs import Run
from draftsmith.evaluation.summary import Result, Summary


class Matrix(NamedTuple):
    """Results as a table: who drafted across, sets and temperatures down; None where one was not measured."""

    columns: list[str]
    rows: list[tuple[str, list[Result | None]]]

    def best(self, row: Sequence[Result | None]) -> Result | None:
        """The fastest of a row."""
        return max((r for r in row if r is not None), key=lambda r: r.speedup.estimate, default=None)


def names(folders: Sequence[Path]) -> list[str]:
    """Names that tell folders apart: each one's own, with as much of what is above it as that takes."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        found = ["/".join(p[-depth:]) for p in parts]
        if max(Counter(found).values(), default=1) == 1:
            return found
    return [f"{p[-1]} ({number})" for number, p in enumerate(parts, start=1)]  # one folder twice


def merged(runs: Mapping[str, Run]) -> Run:
    """The measurements of several runs in one, a run's drafters under its name (and their own, if it has several)."""
    drafters = {name: _drafters(run) for name, run in runs.items()}
    alone = all(len(own) <= 1 for own in drafters.values())

    def under(name: str, own: str) -> str:
        return name if alone else f"{name}: {own}"

    whole = Run(Path())
    results: list[Result] = []
    for name, run in runs.items():
        for result in run.summary.results if run.summary else []:
            results.append(result.model_copy(update={"drafters": under(name, result.drafters)}))
        for a in run.answers:
            # each run's plain answers stay its own: others may have been measured on another day
            own, base = (f"{name}: {d}" if d == PLAIN else under(name, d) for d in (a.drafters, a.against))
            members = a.members or tuple(part.strip() for part in a.drafters.split("+"))
            whole.answers.append(replace(a, drafters=own, against=base, members=members))
    order = list(dict.fromkeys((r.set, r.temperature) for r in results))
    results.sort(key=lambda r: order.index((r.set, r.temperature)))
    whole.summary = Summary(schema=1, results=results) if results else None
    whole.missing = set.intersection(*(run.missing for run in runs.values()))
    whole.provenance = {"time": max(str(run.provenance.get("time", "")) for run in runs.values())}
    return whole


def _drafters(run: Run) -> set[str]:
    measured = {r.drafters for r in run.summary.results} if run.summary else set()
    return measured | {a.drafters for a in run.answers if a.speculative}


def matrix(results: Sequence[Result]) -> Matrix:
    """Results by set and temperature, and by who drafted, in order of appearance."""
    columns = list(dict.fromkeys(r.drafters for r in results))
    places = list(dict.fromkeys((r.set, r.temperature) for r in results))
    at = {(r.set, r.temperature, r.drafters): r for r in results}
    return Matrix(columns, [(views.label(*place), [at.get((*place, c)) for c in columns]) for place in places])
