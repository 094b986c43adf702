"""A run: stages from prompts to a checkpoint that a server loads, each a folder with a fingerprint.

A stage is *done* (its artefact is there, made with the same options from the same inputs), *partial* (interrupted: it
goes on), *fresh*, or *stale*: something that changes its result is different now, which is refused with the field's
name unless `redo` is said. One process runs them all; the target is loaded when the first stage needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from draftsmith import stages
from draftsmith.finish import finish
from draftsmith.foundation import artefacts, console, ranks
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.recipe import Recipe
from draftsmith.target import chat
from draftsmith.target.model import HFTarget, load_target

Status = str


@dataclass(frozen=True)
class Stage:
    """One arrow of the run.

    Attributes:
        name: as a subcommand; folder: its artefact in the run's folder; kind: of the artefact.
        inputs: stages whose artefacts it reads.
        options: the recipe's options, or groups of them, that change its result, dotted.
        work: makes the artefact at a path with an identity.
        note: what it does, in a few words.
        shared: ranks share its work; of any other stage rank 0 does all.
        source: fingerprint of what comes from outside the run (the user's files, the templates of made prompts); None
            where that can't be told, which is no difference.
    """

    name: str
    folder: str
    kind: str
    inputs: tuple[str, ...]
    options: tuple[str, ...]
    work: Callable[[Run, Path, dict[str, object]], None]
    note: str
    source: Callable[[Recipe], str | None] | None = None
    shared: bool = False


class Run:
    """A recipe in a folder."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe = recipe
        self.folder = folder
        self._whole = True
        if recipe.target.threads:
            torch.set_num_threads(recipe.target.threads)

    @cached_property
    def target(self) -> HFTarget:
        """The target; loading it is not a stage: it is converted once into the user's cache."""
        ranks.join()  # each takes its own device
        with console.timed(f"loading {self.recipe.target.name}"):
            o = self.recipe.target
            target = load_target(o.name, o.dtype, o.device, kernels=o.kernels, whole=self._whole)
        chat.settle(target.tokenizer, o.template or {})
        return target

    @contextmanager
    def states_are_stored(self) -> Iterator[None]:
        """While the block runs nobody asks the target to read: where it is not loaded yet, it is without its layers."""
        loaded = "target" in self.__dict__
        self._whole = loaded
        try:
            yield
        finally:
            self._whole = True
            if not loaded:
                self.__dict__.pop("target", None)

    def path(self, stage: str) -> Path:
        """Where a stage's artefact stands."""
        return self.folder / STAGES[stage].folder

    def made(self, stage: str) -> bool:
        """Whether there is an artefact of a stage, of whatever options."""
        return (self.path(stage) / artefacts.MANIFEST).is_file()

    def identity(self, stage: Stage) -> dict[str, object]:
        """What decides a stage's result: options by name, its inputs' content, and what comes from outside."""
        out: dict[str, object] = {"recipe": self._options(stage)}
        if all(map(self.made, stage.inputs)):
            out["inputs"] = {name: artefacts.checksum(self.path(name)) for name in stage.inputs}
        if stage.source is not None and (found := stage.source(self.recipe)) is not None:
            out["source"] = found
        return out

    def _options(self, stage: Stage) -> dict[str, object]:
        values = self.recipe.model_dump(mode="json")
        out: dict[str, object] = {}
        for dotted in stage.options:
            group, _, name = dotted.partition(".")
            if name:
                within = out.setdefault(group, {})
                assert isinstance(within, dict)
                within[name] = values[group][name]
            else:
                out[group] = values[group]
        return out

    def status(self, name: str) -> Status:
        """`done`, `partial`, `fresh`, `stale` or `waiting` (an input is not done)."""
        if any(self.status(needed) != "done" for needed in STAGES[name].inputs):
            return "waiting"
        if not self.made(name):
            return "partial" if artefacts.partial(self.path(name)).exists() else "fresh"
        return "stale" if self.refusal(name) else "done"

    def refusal(self, name: str) -> StaleError | None:
        """Why the artefact that a stage has can't be taken for what the recipe asks for; None if it can."""
        stage, path = STAGES[name], self.path(name)
        if not self.made(name):
            return None
        try:
            artefacts.opened(path, stage.kind, self.identity(stage), checksums=False)
        except StaleError as problem:
            part, _, field = problem.field.partition(".")
            again = f"make it again (`draftsmith {name} --redo`, or `draftsmith quickstart --redo {name}`)"
            if part == "recipe":
                text = f"was made with {field} {problem.stored}, and that is {problem.wanted} now: {again}, or change "
                return StaleError(f"{path} {text}{field} back", field, problem.stored, problem.wanted)
            if part == "inputs":
                return StaleError(f"{path} was made from another {self.path(field)} than there is now: {again}", field)
            origin = self.recipe.data.path or "draftsmith's own templates"
            return StaleError(f"{path} was made before {origin} changed: {again}", problem.field)
        return None

    def refuse_stale(self, names: Collection[str], redo: Collection[str] = ()) -> None:
        """Check before anything is done that no stage of `names` has an artefact of other options.

        Raises:
            StaleError: one has, and neither it nor one of its inputs is in `redo`.
        """
        anew: set[str] = set()
        for name in STAGES:
            if name in redo or anew & set(STAGES[name].inputs):
                anew.add(name)
            elif name in names and (refusal := self.refusal(name)):
                raise refusal

    def require(self, name: str, redo: bool = False) -> None:
        """Check before anything is done that a stage can run.

        Raises:
            UserError, StaleError: as `run`.
        """
        for needed in needs(name):
            if not self.made(needed):
                raise UserError(f"{self.path(needed)} is missing: run `draftsmith {needed} --run {self.folder}` first")
        self.refuse_stale([*needs(name), name], [name] if redo else [])

    def run(self, name: str, redo: bool = False) -> None:
        """Bring one stage to `done`.

        Raises:
            UserError: an input is missing.
            StaleError: its artefact or an input was made otherwise, and `redo` was not said.
        """
        stage, path = STAGES[name], self.path(name)
        self.require(name, redo)
        # rank 0 looks, before it begins to move anything
        if ranks.first(self.made(name) and not redo):
            artefacts.opened(path, stage.kind)
            if ranks.rank() == 0:
                artefacts.tidy(path)
            console.say(f"{name}: done before")
            return
        console.heading(f"{name}: {stage.note}")
        anew = redo and not artefacts.partial(path).exists()
        started = time.perf_counter()
        try:
            if stage.shared or ranks.rank() == 0:
                stage.work(self, path, self.identity(stage))
            ranks.barrier()
        finally:
            self.spent(name, time.perf_counter() - started, anew)

    def run_all(self, redo: Collection[str] = ()) -> None:
        """All stages in order; those that are done are passed over, an interrupted one goes on.

        What was made from a stage in `redo` is made again too, where that has become another.
        """
        self.refuse_stale(STAGES, redo)
        anew: set[str] = set()
        for name, stage in STAGES.items():
            again = name in redo or (bool(anew & set(stage.inputs)) and self.status(name) == "stale")
            self.run(name, redo=again)
            if again:
                anew.add(name)
        if ranks.rank() == 0:
            finish(self)

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds spent in each stage so far, interruptions included.

        The file is for people: where it was lost or edited, the count begins again.
        """
        try:
            found = artefacts.read_json(self.folder / "stages.json")
            return {str(name): max(0.0, float(value)) for name, value in found.items()}
        except (UserError, OSError, AttributeError, TypeError, ValueError):
            return {}

    def spent(self, name: str, seconds: float, anew: bool = False) -> None:
        """Add to a stage's time (`anew`: begin its count again). What can't be written down is not counted."""
        if ranks.rank() > 0:
            return
        known = self.seconds()
        known[name] = round((0.0 if anew else known.get(name, 0.0)) + seconds, 3)
        with suppress(UserError, OSError):
            artefacts.write_json(self.folder / "stages.json", known)


def needs(name: str) -> list[str]:
    """The stages whose artefacts a stage is made from, directly or not, in order."""
    found = set(STAGES[name].inputs)
    for other in reversed(list(STAGES)):
        if other in found:
            found |= set(STAGES[other].inputs)
    return [other for other in STAGES if other in found]


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
            stages.source,
        ),
        Stage(
            "regenerate",
            "answers",
            "conversations",
            ("prompts",),
            ("target.name", "target.dtype", "target.template", "regenerate", "data.keep_answers"),
            stages.regenerate,
            "the target answers them",
            shared=True,
        ),
        Stage(
            "score",
            "scores",
            "features",
            ("regenerate",),
            ("features", "drafter.kind", "drafter.layers"),
            stages.score,
            "statistics of every token, one target pass",
            shared=True,
        ),
        Stage("select", "selection", "selection", ("score",), ("select",), stages.select, "which samples to train on"),
        Stage(
            "features",
            "features",
            "features",
            ("regenerate", "select"),
            ("features", "drafter.kind", "drafter.layers"),
            stages.features,
            "hidden states of what is kept",
            shared=True,
        ),
        Stage(
            "train",
            "drafter",
            "drafter",
            ("features", "select"),
            ("drafter", "growth", "deploy", "train", "eagle", "hass"),
            stages.train,
            "the head",
            shared=True,
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
