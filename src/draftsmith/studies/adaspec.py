"""AdaSPEC (arXiv 2510.19779): is a draft better for being trained only on the tokens that one of its size can learn?

Drafts of one domain each, out of the target's own layers, trained on the target's answers. DistillSpec trains on all
answer tokens; AdaSPEC first trains a reference the same way, then on the share k of tokens on which the draft is worse
than the reference by most. Three accountings:

- *equal epochs*, the paper's text: every draft sees its samples equally often; the reference is for nothing.
- *equal tokens*, the paper's code: as many tokens count in the loss, so a draft that keeps k sees 1/k times as many.
- *equal cost*: every method may take what AdaSPEC takes at equal epochs: a reference, its losses, and a draft.

Seeds decide the order of batches (and a head's start; a draft out of layers begins as the target's).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator

from draftsmith.decoding.growth import GrowthOptions
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.drafters.standalone import Standalone
from draftsmith.evaluation.bench import BenchOptions
from draftsmith.foundation import console
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.numerics import losses
from draftsmith.studies import adaspec_results, heads
from draftsmith.studies.chains import chain_rows
from draftsmith.studies.corpus import Corpus
from draftsmith.studies.drafts import METHODS, PLAIN_LOSS, Lesson, School, Spent, canonical
from draftsmith.studies.figures import Drawing
from draftsmith.studies.grid import Setting, StudyOptions
from draftsmith.studies.rows import Row, replayed_rows, timed_rows
from draftsmith.studies.tables import Table
from draftsmith.target.model import HFTarget, load_target
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.algorithms import Kind
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.distillation import DistillationObjective
from draftsmith.training.options import TrainOptions

EMA = 0.95
Accounting = Literal["equal-epochs", "equal-tokens", "equal-cost"]


class Block(Options):
    """A rectangle of the grid: every method × k × loss × accounting × domain, for each seed."""

    methods: tuple[str, ...] = Field(min_length=1)
    keep: tuple[float, ...] = Field(default=(0.4,), min_length=1, description="k, for methods that keep a share")
    accounting: tuple[Accounting, ...] = Field(default=("equal-epochs",), min_length=1)
    losses: tuple[str, ...] = Field(default=(PLAIN_LOSS,), min_length=1, description="divergences that are trained")
    drafter: Literal["standalone", "eagle3"] = Field(default="standalone", description="what is trained")
    domains: tuple[str, ...] | None = Field(default=None, description="default: all of the study's")

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [m for m in methods if m not in METHODS]:
            raise ValueError(f"no method is called {unknown[0]!r}; there are {', '.join(METHODS)}")
        return methods

    @field_validator("keep")
    @classmethod
    def _shares(cls, keep: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [share for share in keep if not 0 < share <= 1]:
            raise ValueError(f"a share to keep is above 0 and at most 1, not {wrong[0]}")
        return keep

    @field_validator("losses")
    @classmethod
    def _divergences(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            try:
                losses.by_name(name)
            except UserError as problem:
                raise ValueError(str(problem)) from None
        return names

    @model_validator(mode="after")
    def _sensible(self) -> Block:
        mixed = [m for m in self.methods if METHODS[m].mixed]
        if mixed and (self.drafter != "standalone" or set(self.accounting) != {"equal-epochs"}):
            raise ValueError(
                f"{mixed[0]}: what the draft's own texts will cost is not known before; only standalone drafts write "
                "them, at equal-epochs"
            )
        return self


class AdaspecOptions(StudyOptions):
    """The study's grid."""

    train: TrainOptions = Field(
        default=TrainOptions(epochs=2, evaluations=1, ema=EMA),
        description="of every draft: epochs at equal epochs; `weights` says scope and normalisation of ΔL, `ema` the "
        "averaged weights of methods that have them",
    )
    grid: tuple[Block, ...] = Field(default=(Block(methods=("distillspec", "adaspec")),), min_length=1)
    chains: tuple[int, ...] = Field(
        default=(4, 2, 6, 8), min_length=1, description="drafted tokens of a round; the first is the tables'"
    )
    timed: tuple[str, ...] = Field(
        default=(), description="methods whose drafts of the first seed are measured by the wall clock, too"
    )
    bench: BenchOptions = Field(default=BenchOptions(), description="that measurement, on the test prompts")

    @field_validator("train", mode="before")
    @classmethod
    def _averaged(cls, given: Any) -> Any:
        return {"ema": EMA, **given} if isinstance(given, Mapping) else given

    @field_validator("chains")
    @classmethod
    def _positive(cls, chains: tuple[int, ...]) -> tuple[int, ...]:
        if min(chains) < 1 or len(set(chains)) != len(chains):
            raise ValueError("chains: different numbers of drafted tokens, at least 1 each")
        return chains

    @model_validator(mode="after")
    def _sound(self) -> AdaspecOptions:
        if not self.train.ema and any(METHODS[m].ema for block in self.grid for m in block.methods):
            raise ValueError("train.ema is 0, and a method of the grid asks for averaged weights")
        for block in self.grid:
            for name in block.domains or ():
                if name not in self.corpus.domains:
                    raise ValueError(f"grid: {name} is none of the domains {', '.join(self.corpus.domains)}")
        return self


def setting_of(method: str, accounting: str, keep: float, seed: int, domain: str, loss: str, drafter: str) -> Setting:
    """A cell; those that train the same under another name are one (`canonical`)."""
    found = METHODS[method]
    extra: dict[str, str | int | float] = {"domain": domain}
    if loss != PLAIN_LOSS and found.loss is None:
        extra["loss"] = loss
    if drafter != "standalone":
        extra["drafter"] = drafter
    share = keep if found.keeps_share else 1.0
    return Setting(method, canonical(method, accounting, loss), share, seed, extra)


class Adaspec:
    """The study; see `grid.Study`."""

    def __init__(self, given: AdaspecOptions, out: Path) -> None:
        self.options = given
        self.out = out

    def settings(self) -> list[Setting]:
        found: dict[str, Setting] = {}
        for seed in self.options.seeds:
            for block in self.options.grid:
                for domain in block.domains or tuple(self.options.corpus.domains):
                    for accounting in block.accounting:
                        for loss in block.losses:
                            for keep in block.keep:
                                for method in block.methods:
                                    made = setting_of(method, accounting, keep, seed, domain, loss, block.drafter)
                                    found[made.name] = made
        return list(found.values())

    def prepare(self) -> None:
        self.corpus.prepare()
        if any(block.drafter == "standalone" for block in self.options.grid):
            _ = self.school.drafter

    def identity(self, setting: Setting) -> Mapping[str, object]:
        included = {"drafter", "train", "chains"} | ({"bench"} if self._timed(setting) else set())
        return {
            "options": self.options.model_dump(mode="json", include=included),
            "target": self.target.spec.fingerprint,
            "inputs": self.corpus.identity,
        }

    def lesson(self, setting: Setting) -> Lesson:
        """A setting as a training."""
        domain, loss = str(setting.extra["domain"]), str(setting.extra.get("loss", PLAIN_LOSS))
        kind = cast(Kind, setting.extra.get("drafter", "standalone"))
        lesson = Lesson(setting.method, domain, kind, loss, setting.keep, setting.seed)
        steps: int | None = None
        if setting.accounting == "equal-tokens":
            steps = round(self.school.epochs_steps(domain, setting.seed) / setting.keep)
        elif setting.accounting == "equal-cost":
            steps = self.school.steps_at_equal_cost(lesson)
        return Lesson(setting.method, domain, kind, loss, setting.keep, setting.seed, steps)

    def run(self, setting: Setting, folder: Path) -> list[Row]:
        o, corpus, lesson = self.options, self.corpus, self.lesson(setting)
        growths = [GrowthOptions(kind="chain", depth=n, node_budget=n) for n in o.chains]
        dev = Dev(self.target.spec, corpus.dev, growths[0].build())
        draft, spent = self.school.taught(lesson, dev, folder)
        assert isinstance(draft, Standalone | Eagle3)
        common, extra = self._told(setting, lesson, spent)
        tests = [test for test in corpus.tests if test.domain == lesson.domain]
        with console.timed("reading the test answers"):
            if isinstance(draft, Standalone):
                objective = self.school.objective("standalone", draft, o.train)
                assert isinstance(objective, DistillationObjective)
                stores = {t: corpus.test_store(t) for t in o.corpus.temperatures}
                eos = self.target.spec.eos_ids
                rows = chain_rows(objective, stores, tests, o.chains, eos, common, extra)
            else:
                given = {**common, "extra": extra}
                rows = replayed_rows(draft, draft.device, growths, tests, self.target.spec, given)
        if self._timed(setting):
            folder.mkdir(parents=True, exist_ok=True)
            sets = {o.corpus.domains[lesson.domain].test: corpus.prompts["test"][lesson.domain]}
            with console.timed("decoding test prompts"):
                rows = timed_rows(rows, self.target, draft, growths[0], sets, o.bench, folder)
        if not o.keep_drafters:
            shutil.rmtree(folder, ignore_errors=True)
        return rows

    def _told(
        self, setting: Setting, lesson: Lesson, spent: Spent
    ) -> tuple[dict[str, object], dict[str, str | int | float]]:
        """What all rows of a cell say of it."""
        work = self.school.work(lesson.kind, lesson.domain)
        beside = spent.training(work) - work.trained * spent.tokens
        common: dict[str, object] = {
            "study": self.options.study,
            "method": setting.method,
            "accounting": setting.accounting,
            "keep": setting.keep,
            "seed": setting.seed,
            "training_seconds": spent.seconds,
            "training_steps": spent.steps,
            "training_positions": spent.tokens,
            "training_cost": spent.tokens * (1 if lesson.kind == "standalone" else self.options.train.unroll_steps),
            "target_positions": spent.target_tokens,
            "pass_ratio": round(work.target / work.trained, 4),
            "scout_positions": round(beside / work.trained),
        }
        extra: dict[str, str | int | float] = {
            "loss": METHODS[setting.method].loss or lesson.loss,
            "drafter": lesson.kind,
            "draft_passes": spent.passes,
            "draft_tokens": spent.tokens,
            "reference_passes": spent.reference_passes,
            "reference_tokens": spent.reference_tokens,
            "judged_passes": spent.judged_passes,
            "judged_tokens": spent.judged_tokens,
            "written_tokens": spent.written_tokens,
            "target_texts": spent.target_texts,
            "target_tokens": spent.target_tokens,
            "training_work": spent.training(work),
            "work": spent.all(work),
        }
        return common, extra

    def _timed(self, setting: Setting) -> bool:
        return setting.method in self.options.timed and setting.seed == self.options.seeds[0]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return adaspec_results.tables(rows)

    def figures(self, rows: Sequence[Row]) -> list[Drawing]:
        return adaspec_results.figures(rows)

    @cached_property
    def target(self) -> HFTarget:
        o = self.options.target
        if o.threads:
            torch.set_num_threads(o.threads)
        with console.timed(f"loading {o.name}"):
            return load_target(o.name, o.dtype, o.device)

    @cached_property
    def corpus(self) -> Corpus:
        reading = any(block.drafter == "eagle3" for block in self.options.grid)
        layers = heads.layers_of(self.target, self.options.drafter) if reading else ()
        return Corpus(self.target, layers, self.options.corpus, self.out / "shared")

    @cached_property
    def vocab(self) -> VocabMap:
        return heads.vocabulary(self.corpus, self.options.drafter.draft_vocab_size)

    @cached_property
    def school(self) -> School:
        """What trains."""
        o = self.options
        return School(self.corpus, self.vocab, o.drafter, o.train, o.chains[0], self.out / "shared")
