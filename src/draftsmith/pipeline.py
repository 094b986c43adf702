"""A run: stages from prompts to a checkpoint that a server loads, each a folder with a fingerprint.

A stage is *done* (its artefact is there, made with the same options from the same inputs), *partial* (interrupted: it goes on),
*fresh*, or *stale*: something that changes its result is different now, which is refused with the field's name unless `redo` is said.
One process runs them all; the target is loaded when the first stage needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from draftsmith import stages
from draftsmith.data.prompts import templates_digest
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.recipe import Recipe
from draftsmith.target.model import HFTarget, load_target

Status = str


@dataclass(frozen=True)
class Stage:
    """One arrow of the run.

    Attributes:
        name: as a subcommand; folder: its artefact in the run's folder; kind: of the artefact.
        inputs: stages whose artefacts it reads.
        options: names of the recipe's parts that change its result.
        work: makes the artefact at a path with an identity.
        note: what it does, in a few words.
        brings: fingerprint of what the package itself puts in (the templates of made prompts).
    """

    name: str
    folder: str
    kind: str
    inputs: tuple[str, ...]
    options: tuple[str, ...]
    work: Callable[[Run, Path, dict[str, object]], None]
    note: str
    brings: Callable[[], str] | None = None


class Run:
    """A recipe in a folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        if recipe.target.threads:
            torch.set_num_threads(recipe.target.threads)

    @cached_property
    def target(self) -> HFTarget:
        """The target; loading it is not a stage: it is converted once into the user's cache."""
        with console.timed(f"loading {self.recipe.target.name}"):
            o = self.recipe.target
            return load_target(o.name, o.dtype, o.device)

    def path(self, stage: str) -> Path:
        """Where a stage's artefact stands."""
        return self.folder / STAGES[stage].folder

    def identity(self, stage: Stage) -> dict[str, object]:
        """What decides a stage's result: options by name, and its inputs' content."""
        options = {name: getattr(self.recipe, name).model_dump(mode="json") for name in stage.options}
        brings = {"brings": stage.brings()} if stage.brings else {}
        return {
            **brings,
            "recipe": options,
            "inputs": {name: artefacts.checksum(self.path(name)) for name in stage.inputs},
        }

    def status(self, name: str) -> Status:
        """`done`, `partial`, `fresh`, `stale` or `waiting` (an input is not done)."""
        stage = STAGES[name]
        if any(self.status(needed) != "done" for needed in stage.inputs):
            return "waiting"
        path = self.path(name)
        if not (path / artefacts.MANIFEST).is_file():
            return "partial" if artefacts.partial(path).exists() else "fresh"
        try:
            artefacts.opened(path, stage.kind, self.identity(stage), checksums=False)
        except StaleError:
            return "stale"
        return "done"

    def run(self, name: str, redo: bool = False) -> None:
        """Bring one stage to `done`.

        Raises:
            UserError: an input is missing; StaleError: the artefact was made otherwise and `redo` was not said.
        """
        stage = STAGES[name]
        for needed in stage.inputs:
            if not (self.path(needed) / artefacts.MANIFEST).is_file():
                raise UserError(f"{self.path(needed)} is missing: run `draftsmith {needed} --run {self.folder}` first")
        identity = self.identity(stage)
        path = self.path(name)
        if (path / artefacts.MANIFEST).is_file() and not redo:
            artefacts.opened(path, stage.kind, identity)
            console.say(f"{name}: done before")
            return
        console.heading(f"{name}: {stage.note}")
        started = time.perf_counter()
        try:
            stage.work(self, path, identity)
        finally:
            self.spent(name, time.perf_counter() - started)

    def run_all(self, redo: Sequence[str] = ()) -> None:
        """All stages in order; those that are done are passed over, an interrupted one goes on."""
        for name in STAGES:
            self.run(name, redo=name in redo)
        stages.finish(self)

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds spent in each stage so far, interruptions included."""
        path = self.folder / "stages.json"
        return dict(artefacts.read_json(path)) if path.is_file() else {}

    def spent(self, name: str, seconds: float, anew: bool = False) -> None:
        """Add to a stage's time (`anew`: begin its count again)."""
        known = self.seconds()
        known[name] = round((0.0 if anew else known.get(name, 0.0)) + seconds, 3)
        artefacts.write_json(self.folder / "stages.json", known)


STAGES: Mapping[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "prompts",
            "prompts",
            "prompts",
            (),
            ("data",),
            stages.prompts,
            "training, dev and test prompts",
            templates_digest,
        ),
        Stage(
            "regenerate",
            "answers",
            "conversations",
            ("prompts",),
            ("target", "regenerate"),
            stages.regenerate,
            "the target answers them",
        ),
        Stage(
            "score",
            "scores",
            "features",
            ("regenerate",),
            ("features",),
            stages.score,
            "statistics of every token, one target pass",
        ),
        Stage("select", "selection", "selection", ("score",), ("select",), stages.select, "which samples to train on"),
        Stage(
            "features",
            "features",
            "features",
            ("regenerate", "select"),
            ("features",),
            stages.features,
            "hidden states of what is kept",
        ),
        Stage(
            "train",
            "drafter",
            "drafter",
            ("features", "select"),
            ("drafter", "growth", "train"),
            stages.train,
            "the EAGLE-3 head",
        ),
        Stage(
            "tune",
            "growth",
            "growth",
            ("train", "features"),
            ("tune",),
            stages.tune,
            "the draft tree that pays here, chosen on dev",
        ),
        Stage(
            "bench",
            "bench",
            "bench",
            ("prompts", "train", "tune"),
            ("bench",),
            stages.bench,
            "plain against speculative on test",
        ),
    )
}
