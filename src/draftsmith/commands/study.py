"""`draftsmith study`: run a preset's grid, go on with it, or print its tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from draftsmith.data import benchmarks
from draftsmith.foundation import console, options
from draftsmith.foundation.errors import UserError
from draftsmith.studies import grid
from draftsmith.studies.adaspec import Adaspec, AdaspecOptions
from draftsmith.studies.grid import Study, StudyOptions
from draftsmith.studies.probe import Probe
from draftsmith.studies.sfdd import Sfdd, SfddOptions
from draftsmith.studies.taps import Taps, TapsOptions

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Known:
    """A study by its name: what its preset is checked against, and what makes it."""

    options: type[StudyOptions]
    build: Callable[..., Study]
    probe: Callable[..., Study] | None = None


STUDIES: Mapping[str, Known] = {
    "sfdd": Known(SfddOptions, Sfdd, Probe),
    "adaspec": Known(AdaspecOptions, Adaspec),
    "taps": Known(TapsOptions, Taps),
}


def study(
    name: str,
    preset: str,
    out: Path | None,
    overrides: Sequence[str],
    *,
    time_budget: str | None,
    data: Path | None,
    plan: bool,
    table: bool,
    probe: bool = False,
) -> None:
    """Run a study, or show its plan or its tables; `probe`: its side question."""
    if name not in STUDIES:
        raise UserError(f"there is no study {name!r}: choose {', '.join(STUDIES)}")
    seconds = None if time_budget is None else duration(time_budget)
    if data is not None:
        os.environ[benchmarks.VARIABLE] = str(data)
    known = STUDIES[name]
    given = options.override(options.load_yaml(grid.find_preset(name, preset)), overrides)
    checked = options.validate(known.options, given, "the command line")
    folder = out or Path("runs", "studies", f"{name}-{Path(preset).stem}")
    build = known.probe if probe else known.build
    if build is None:
        raise UserError(f"the study {name} has no probe")
    made = build(checked, folder)
    if probe and not (folder / grid.ROWS).is_file():
        folder = folder / "probe"
    if table:
        results = grid.results_folder(folder)
        grid.show(made, grid.read_rows(results / grid.ROWS), results)
    elif plan:
        show_plan(made, checked, folder)
    else:
        found = grid.run(made, folder, seconds)
        if found.done == found.total:
            results = grid.results_folder(folder)
            grid.show(made, grid.read_rows(results / grid.ROWS), results)
            console.say(f"all {found.total} cells are done; results: {folder / 'results'}")


def show_plan(made: Study, checked: StudyOptions, folder: Path) -> None:
    """What would run, and what is there."""
    settings = made.settings()
    there = sorted(path.name for path in (folder / "cells").glob("*") if grid.finished(path))
    body = []
    for setting in settings:
        found = any(name.startswith(f"{setting.name}-") for name in there)
        method = " ".join([setting.method, *map(str, setting.extra.values())])
        body.append([method, setting.accounting, f"{setting.keep:.0%}", setting.seed, "there" if found else ""])
    console.table(f"{checked.study}: {len(settings)} cells", ["method", "accounting", "keep", "seed", "rows"], body)
    if checked.expected:
        console.say(checked.expected)
    console.say(f"folder: {folder}; a cell that is there counts if it was made with the same options and inputs")


def duration(text: str) -> float:
    """Seconds of `"8m"`, `"90s"`, `"1.5h"` or a plain number of seconds.

    Raises:
        UserError: it is none of these.
    """
    unit = UNITS.get(text[-1:], 1.0)
    number = text[:-1] if text[-1:] in UNITS else text
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"--time-budget {text}: give a time such as 8m, 90s or 1.5h")
    return seconds
