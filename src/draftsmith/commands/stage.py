"""The commands that run a recipe: all of it, one stage, or its plan."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from draftsmith import finish
from draftsmith import recipe as recipes
from draftsmith.evaluation.report.report import write_report
from draftsmith.export.chains import best
from draftsmith.foundation import artefacts, console, ranks
from draftsmith.foundation.errors import UserError
from draftsmith.pipeline import STAGES, Run
from draftsmith.plan import check, show

RECIPE = "recipe.yaml"
ROWS = "bench.jsonl"
QUICKSTART = "quickstart"


def assignments(
    overrides: Sequence[str] | None, target: str | None, data: str | None, server: str | None = None
) -> list[str]:
    """The dotted assignments, short options first."""
    given = (("target.name", target), ("data.path", data), ("regenerate.server.url", server))
    # quoted: assignments are read as YAML, and a path may look like a number or hold a colon
    short = [f"{name}={json.dumps(value)}" for name, value in given if value is not None]
    return [*short, *(overrides or [])]


def opened(folder: Path, name: str | None, overrides: Sequence[str]) -> Run:
    """A run by its folder. Its recipe is the named one, else what it was begun with, else the quick start's."""
    kept = folder / RECIPE
    return Run(recipes.load(name or (str(kept) if kept.is_file() else QUICKSTART), overrides), folder)


def whole(
    folder: Path, name: str | None, overrides: Sequence[str], *, plan: bool, redo: Sequence[str], force: bool = False
) -> None:
    """Run all stages, or show the plan."""
    if unknown := [stage for stage in redo if stage not in STAGES]:
        near = difflib.get_close_matches(unknown[0], STAGES, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(STAGES)}"
        raise UserError(f"--redo {unknown[0]}: there is no such stage{hint}")
    run = Run(recipes.load(name or QUICKSTART, overrides), folder)
    if plan:
        show(run)
        return
    run.refuse_stale(STAGES, redo)
    check(run, force, anew=bool(redo), alone=False)
    _write_recipe(run)
    run.run_all(redo)
    console.say(f"\nreport:  {folder / finish.REPORT}")
    console.say(f"numbers: {folder / finish.SUMMARY}")
    console.say(f"talk:    draftsmith chat --run {folder}")


def one(
    stage: str,
    folder: Path,
    name: str | None,
    overrides: Sequence[str],
    *,
    plan: bool,
    redo: bool,
    force: bool = False,
) -> None:
    """Run one stage, or show the plan up to it."""
    run = opened(folder, name, overrides)
    if plan:
        show(run, stage)
        return
    run.require(stage, redo)
    if stage == "train":
        check(run, force, anew=redo)
    _write_recipe(run)
    run.run(stage, redo)


def report(folders: Sequence[Path], name: str | None, out: Path | None) -> None:
    """Write a page of a run, whose summary is written again too, of what a benchmark left, or of several."""
    if len(folders) > 1:
        page = write_report(folders, out or Path("comparison"))
    elif (folders[0] / ROWS).is_file() and not (folders[0] / RECIPE).is_file():
        page = write_report(folders[0], out or folders[0])
    else:
        run = opened(folders[0], name, [])
        _benched(run)
        finish.summarise(run)
        page = finish.report(run)
        if out:
            page = write_report(folders[0], out)
    console.say(f"report: {page}")


def export(
    folder: Path,
    name: str | None,
    overrides: Sequence[str],
    servers: Sequence[str],
    push: str | None = None,
    private: bool = True,
) -> None:
    """Export the run's drafter, into the run's folder or, where `push` names a repository, onto the hub."""
    run = opened(folder, name, overrides)
    _benched(run)
    if push is None:
        finish.export(run, servers)
    elif len(servers) != 1:
        raise UserError("--push: a repository holds one export: give one --to")
    else:
        finish.publish(run, servers[0], push, private)


def tokens(folder: Path, name: str | None, overrides: Sequence[str], most: int) -> None:
    """How many speculative tokens to give a server of chains."""
    run = opened(folder, name, overrides)
    for stage in STAGES:
        _made(run, stage)
        if stage == "train":
            break
    chosen = best(finish.speculative_tokens(run, most))
    if chosen.tokens:
        console.say(f'"num_speculative_tokens": {chosen.tokens} would be fastest, were the costs of the server these')
    else:
        console.say("by these costs no chain pays: leave speculation off")


def _benched(run: Run) -> None:
    for stage in STAGES:
        _made(run, stage)


def _made(run: Run, stage: str) -> None:
    if not run.made(stage):
        raise UserError(f"{run.path(stage)} is missing: run `draftsmith {stage} --run {run.folder}` first")


def _write_recipe(run: Run) -> None:
    """Write the recipe into the run's folder, where the stages' own commands find it again."""
    if ranks.rank() > 0:
        return
    if run.folder.exists() and not run.folder.is_dir():
        raise UserError(f"{run.folder} is a file: --run wants the run's folder")
    for torn in run.folder.glob(".*.tmp"):  # of a write that was killed
        torn.unlink(missing_ok=True)
    text = yaml.safe_dump(run.recipe.model_dump(mode="json"), sort_keys=False)
    path = run.folder / RECIPE
    if not path.is_file() or path.read_bytes() != text.encode():
        artefacts.write_text(path, text)
