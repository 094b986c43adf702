"""The commands that run a recipe: all of it, one stage, or its plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from draftsmith import recipe as recipes
from draftsmith import stages
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import UserError
from draftsmith.pipeline import STAGES, Run
from draftsmith.plan import show

RECIPE = "recipe.yaml"


def assignments(overrides: Sequence[str] | None, target: str | None, data: str | None) -> list[str]:
    """The dotted assignments, short options first."""
    short = [f"{name}={value}" for name, value in (("target.name", target), ("data.path", data)) if value is not None]
    return [*short, *(overrides or [])]


def opened(folder: Path, name: str, overrides: Sequence[str]) -> Run:
    """A run by its folder; its recipe is what it was begun with, if that was written down, else the named one."""
    kept = folder / RECIPE
    return Run(recipes.load(str(kept) if kept.is_file() else name, overrides), folder)


def whole(folder: Path, name: str, overrides: Sequence[str], *, plan: bool, redo: Sequence[str]) -> None:
    """Run all stages, or show the plan."""
    if unknown := [stage for stage in redo if stage not in STAGES]:
        raise UserError(f"--redo {unknown[0]}: there is no such stage; there are {', '.join(STAGES)}")
    run = Run(recipes.load(name, overrides), folder)
    if plan:
        show(run)
        return
    _write_recipe(run)
    run.run_all(redo)
    console.say(f"\nreport:  {folder / 'report.html'}")
    console.say(f"numbers: {folder / 'summary.json'}")
    console.say(f"talk:    draftsmith chat --run {folder}")


def one(stage: str, folder: Path, name: str, overrides: Sequence[str], *, plan: bool, redo: bool) -> None:
    """Run one stage, or show the plan up to it."""
    run = opened(folder, name, overrides)
    if plan:
        show(run, stage)
        return
    _write_recipe(run)
    run.run(stage, redo)


def report(folder: Path, name: str, overrides: Sequence[str]) -> None:
    """Write summary and report again."""
    run = opened(folder, name, overrides)
    _finished(run)
    stages.summarise(run)
    console.say(f"report: {stages.report(run)}")


def export(folder: Path, name: str, overrides: Sequence[str], servers: Sequence[str]) -> None:
    """Export the run's drafter."""
    run = opened(folder, name, overrides)
    _finished(run)
    stages.export(run, servers)


def _finished(run: Run) -> None:
    if not (run.path("bench") / artefacts.MANIFEST).is_file():
        raise UserError(f"{run.path('bench')} is missing: run `draftsmith bench --run {run.folder}` first")


def _write_recipe(run: Run) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False)
    path = run.folder / RECIPE
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
