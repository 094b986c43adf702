"""A study as a grid of runs: which cells there are, what is done, and how to go on after a kill or a spent time budget.

A study is a `Study`: it lists its settings, brings to done what they share, and runs one. The grid keeps a folder a
cell, named by what decides its result, so a command can be killed at any moment, and the next goes on where it was:

    OUT/shared/…              prompts, answers, feature stores: one for all cells
    OUT/cells/<cell>/         a cell's rows (an artefact, kind "study-cell"); beside it what it needs to go on
    OUT/locks/                who makes a cell now: commands that run at the same time share the cells out
    OUT/results/              rows.jsonl, study.json, table.md, figures
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field, field_validator

from draftsmith.decoding.growth import GrowthOptions
from draftsmith.foundation import artefacts, console, options, provenance
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.recipe import DrafterOptions, TargetOptions
from draftsmith.studies.corpus import CorpusOptions
from draftsmith.studies.figures import Drawing
from draftsmith.studies.rows import Row
from draftsmith.studies.tables import Table
from draftsmith.training.options import TrainOptions

KIND = "study-cell"
ROWS = "rows.jsonl"
RING_AGAIN = 20.0  # seconds: to save a state; and an exception raised in a finaliser is swallowed


class StudyOptions(Options):
    """What every study needs; a study adds its grid."""

    study: str = Field(description="its name: sfdd")
    expected: str = Field(default="", description="how long it takes, and where that was measured or reckoned")
    target: TargetOptions = TargetOptions()
    corpus: CorpusOptions = CorpusOptions()
    drafter: DrafterOptions = DrafterOptions()
    train: TrainOptions = Field(
        default=TrainOptions(epochs=2, evaluations=1),
        description="of every drafter; epochs are counted over all samples",
    )
    growths: tuple[GrowthOptions, ...] = Field(
        default=(GrowthOptions(node_budget=15, depth=5, width=4), GrowthOptions(kind="chain", depth=5)),
        min_length=1,
        description="what test answers are replayed with; the first is the tables'",
    )
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1, description="initialisation, batch order, random choice")
    keep_drafters: bool = Field(default=True, description="leave each cell's drafter beside its rows")

    @field_validator("train", mode="before")
    @classmethod
    def _last_checkpoint(cls, given: Any) -> Any:
        # one evaluation, at the end: the last checkpoint is kept for every method alike
        return {"evaluations": 1, **given} if isinstance(given, Mapping) else given

    @field_validator("train")
    @classmethod
    def _epochs(cls, train: TrainOptions) -> TrainOptions:
        if train.epochs is None:
            raise ValueError("a study counts in epochs: give train.epochs, not steps or seconds")
        return train


@dataclass(frozen=True)
class Setting:
    """A cell of the grid: what is different about it. `extra` is for what only one study has."""

    method: str
    accounting: str = "equal-epochs"
    keep: float = 1.0
    seed: int = 0
    extra: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        more = "".join(f"-{value}" for value in self.extra.values())
        return f"{self.method}-{round(100 * self.keep)}-{self.accounting}{more}-seed{self.seed}"


class Study(Protocol):
    """What a study brings; `sfdd.py` is the example."""

    @property
    def options(self) -> StudyOptions: ...

    def settings(self) -> list[Setting]:
        """The cells, in the order in which they run; from the options alone."""
        ...

    def prepare(self) -> None:
        """Bring to done what cells share (target, prompts, answers, stores); called again, it goes on where it was."""
        ...

    def identity(self, setting: Setting) -> Mapping[str, object]:
        """What decides a cell's rows beside its setting: options and checksums, JSON. After `prepare`."""
        ...

    def run(self, setting: Setting, folder: Path) -> list[Row]:
        """Train and evaluate one cell. What is left in `folder` by a killed call is there for the next."""
        ...

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """The study's tables, the paper's figures beside ours, of as many rows as there are."""
        ...

    def figures(self, rows: Sequence[Row]) -> list[Drawing]:
        """The study's figures."""
        ...


class TimeUp(BaseException):
    """The time budget is spent. No `Exception`, so that nothing on the way takes it for a failure of its own."""


@contextmanager
def time_box(seconds: float | None) -> Iterator[None]:
    """End the block with `TimeUp` after so many seconds; only in the main thread, where signals arrive.

    A training is asked to end by SIGTERM first: it saves its state. What does not listen is interrupted.
    """
    if seconds is None or not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return
    rung = False

    def ring(*_: object) -> None:
        nonlocal rung
        if not rung and callable(signal.getsignal(signal.SIGTERM)):
            rung = True
            signal.raise_signal(signal.SIGTERM)
            return
        raise TimeUp

    before = signal.signal(signal.SIGALRM, ring)
    started = time.monotonic()
    delay, interval = signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN)
    try:
        yield
    except SystemExit as ended:
        if rung and not ended.code:
            raise TimeUp from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        # whoever had set an alarm gets it, late if need be
        signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - started), 0.01) if delay else 0, interval)


@dataclass(frozen=True)
class Progress:
    """How far a study is."""

    done: int
    total: int


def run(study: Study, out: Path, seconds: float | None = None) -> Progress:
    """Run the cells that are not done, and write the results of those that are.

    The same command may run several times at once (side by side where memory allows, or on several devices): what they
    share is made by one while the others wait, and a cell that another is making is passed over.

    Args:
        seconds: time budget. When it is spent, the command ends cleanly: what was done stays done, a training goes on
            from its last saved state.
    """
    settings = study.settings()
    if doubled := {s.name for s in settings if sum(t.name == s.name for t in settings) > 1}:
        raise UserError(f"the grid has the cell {sorted(doubled)[0]} more than once: give each method once a setting")
    places: list[Path] = []
    try:
        with time_box(seconds):
            with claimed(out / "locks" / "shared", wait=True):
                study.prepare()
            places = [place(study, setting, out) for setting in settings]
            for number, (setting, folder) in enumerate(zip(settings, places, strict=True), start=1):
                with claimed(out / "locks" / folder.name) as free:
                    if not free or finished(folder):
                        continue
                    console.heading(f"cell {number} of {len(settings)}: {setting.name}")
                    rows = study.run(setting, folder.with_name(folder.name + ".work"))
                    with artefacts.writing(folder, KIND, _meta(study, setting)) as scratch:
                        artefacts.write_jsonl(scratch / ROWS, (row.model_dump(mode="json") for row in rows))
                write_results(study, out, places)
    except TimeUp:
        done = sum(map(finished, places))
        console.say(
            f"the time budget is spent: {len(settings) - done} of {len(settings)} cells left; the same command goes on"
        )
        return Progress(done, len(settings))
    write_results(study, out, places)
    done = sum(map(finished, places))
    if done < len(settings):
        console.say(f"{len(settings) - done} of {len(settings)} cells are being made by other commands")
    return Progress(done, len(settings))


@contextmanager
def claimed(path: Path, wait: bool = False) -> Iterator[bool]:
    """Whether nobody else holds the lock of this name; it is held while the block runs, and goes with the process.

    Args:
        wait: until it is free. Without a kind of lock on this system everybody gets it.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def place(study: Study, setting: Setting, out: Path) -> Path:
    """Where a cell's rows stand: a cell with other options or inputs is another cell."""
    return out / "cells" / f"{setting.name}-{options.digest(_meta(study, setting))[:8]}"


def finished(folder: Path) -> bool:
    """Whether a cell's rows are there, whole."""
    return (folder / artefacts.MANIFEST).is_file()


def _meta(study: Study, setting: Setting) -> dict[str, object]:
    return {"study": study.options.study, "cell": setting.name, **study.identity(setting)}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `run` wrote.

    Raises:
        UserError: a row is not valid; names file and line.
    """
    return [
        options.validate(Row, row, f"{path}:{number}") for number, row in enumerate(artefacts.read_jsonl(path), start=1)
    ]


def results_folder(out: Path) -> Path:
    """Where results stand: in a study's folder, or the folder itself where it is a copy of the results alone."""
    return out if (out / ROWS).is_file() else out / "results"


def write_results(study: Study, out: Path, places: Sequence[Path]) -> None:
    """Write rows, tables and figures of the cells that are done; one command at a time."""
    results = out / "results"
    about = {"options": study.options.model_dump(mode="json"), "cells": len(places), "provenance": provenance.collect()}
    with claimed(out / "locks" / "results", wait=True):
        rows: list[Row] = []
        for folder in filter(finished, places):
            artefacts.opened(folder, KIND, checksums=False)
            rows += read_rows(folder / ROWS)
        artefacts.write_jsonl(results / ROWS, (row.model_dump(mode="json") for row in rows))
        artefacts.write_json(results / "study.json", about)
        show(study, rows, results, say=False)


def show(study: Study, rows: Sequence[Row], results: Path, say: bool = True) -> None:
    """Write table.md and the figures of some rows into a folder; `say`: print the tables too."""
    if not rows:
        return
    tables = study.tables(rows)
    artefacts.write_text(results / "table.md", "\n".join(table.markdown() for table in tables))
    for drawing in study.figures(rows):
        drawing.save(results)
    for table in tables if say else ():
        table.print()


def find_preset(study: str, preset: str) -> Path:
    """A preset by path, or by name among those that draftsmith brings for a study.

    Raises:
        UserError: there is none of that name; lists those there are.
    """
    path = Path(preset)
    if path.is_file():
        return path
    here = Path(__file__).parent
    places = [here / "presets", here.parents[2] / "studies" / "presets"]
    for folder in places:
        if (folder / f"{study}-{preset}.yaml").is_file():
            return folder / f"{study}-{preset}.yaml"
    known = sorted({p.stem.removeprefix(f"{study}-") for folder in places for p in folder.glob(f"{study}-*.yaml")})
    raise UserError(f"{preset}: the study {study} has no such preset; there are {', '.join(known) or 'none'}")
