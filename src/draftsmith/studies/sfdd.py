"""SFDD (arXiv 2601.18902): does a drafter lose anything when it is trained on the flattest half of its samples?

Every method chooses among the same samples, by a score or by chance, and trains the same head from the same start.
Seeds decide the head's start, the order of batches, and the random choice. Two accountings: *equal epochs*, the
paper's, in which half the samples are half the steps, and *equal steps*, in which they are seen twice as often.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from draftsmith.evaluation.bench import BenchOptions
from draftsmith.foundation import artefacts, console, options, seeding
from draftsmith.foundation.options import Options
from draftsmith.numerics.distributions import TokenStatistics
from draftsmith.selection.samples import ScoredSample, Selection, SelectionOptions, joined, select
from draftsmith.selection.scores import DRAFT_AWARE, SCORES, Evidence, token_scores
from draftsmith.studies import heads, sfdd_results
from draftsmith.studies.corpus import Corpus
from draftsmith.studies.figures import Drawing
from draftsmith.studies.grid import Setting, StudyOptions
from draftsmith.studies.rows import Row, replayed_rows, timed_rows
from draftsmith.studies.tables import Table
from draftsmith.target.model import HFTarget, load_target
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.dev import Dev
from draftsmith.training.overlaps import overlaps

Accounting = Literal["equal-epochs", "equal-steps"]
BATCH = "flatness-batch"
LENGTH_MATCHED = "flatness-length-matched"
AWARE = ("disagreement", "flatness-x-disagreement")
METHODS = ("full", "random", *(name for name in SCORES if name not in DRAFT_AWARE), BATCH, LENGTH_MATCHED, *AWARE)
FORWARD = 1 / 3  # of a training step's work


class Block(Options):
    """A rectangle of the grid: every method × share × accounting, for each seed."""

    methods: tuple[str, ...] = Field(min_length=1)
    keep: tuple[float, ...] = Field(default=(0.5,), min_length=1, description="shares of the samples to keep")
    accounting: tuple[Accounting, ...] = Field(default=("equal-epochs",), min_length=1)

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


class SfddOptions(StudyOptions):
    """The study's grid."""

    grid: tuple[Block, ...] = Field(default=(Block(methods=("random", "flatness")),), description="beside `full`")
    within_domains: bool = Field(
        default=True, description="choose in each domain by itself: a flat domain would crowd out a peaked one"
    )
    scout: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="share of the samples, drawn at random, on which the drafter that draft-aware methods ask is "
        "trained once",
    )
    timed: tuple[str, ...] = Field(
        default=(), description="methods whose drafters of the first seed are measured by the wall clock, too"
    )
    bench: BenchOptions = Field(default=BenchOptions(), description="that measurement, on the test prompts")
    strata: int = Field(default=8, ge=2, description=f"groups of like length of {LENGTH_MATCHED}")


class Sfdd:
    """The study; see `grid.Study`."""

    def __init__(self, given: SfddOptions, out: Path) -> None:
        self.options = given
        self.out = out

    def settings(self) -> list[Setting]:
        found: dict[str, Setting] = {}
        for seed in self.options.seeds:
            wanted = [Setting("full", seed=seed)]
            for block in self.options.grid:
                for accounting in block.accounting:
                    for keep in block.keep:
                        wanted += [Setting(m, accounting, keep, seed) for m in block.methods if m != "full"]
            found |= {setting.name: setting for setting in wanted}
        return list(found.values())

    def prepare(self) -> None:
        self.corpus.prepare()
        heads.pass_ratio(self.corpus, self.vocab, self.options.train)
        if any(setting.method in AWARE for setting in self.settings()):
            _ = self.overlaps

    def identity(self, setting: Setting) -> Mapping[str, object]:
        o = self.options
        included = {"drafter", "train", "growths", "within_domains", "strata"}
        if setting.method in AWARE:
            included.add("scout")
        if self._timed(setting):
            included.add("bench")
        return {
            "options": o.model_dump(mode="json", include=included),
            "target": self.target.spec.fingerprint,
            "inputs": self.corpus.identity,
        }

    def run(self, setting: Setting, folder: Path) -> list[Row]:
        o, corpus = self.options, self.corpus
        chosen = self.chosen(setting)
        train = o.train.model_copy(update={"seed": setting.seed})
        if setting.accounting == "equal-steps":
            train = train.model_copy(update={"epochs": None, "steps": heads.steps_of(corpus, corpus.train_ids, train)})
        console.say(
            f"{len(chosen.kept)} of {len(corpus.train_ids)} samples, {console.count(chosen.positions_kept)} of "
            f"{console.count(chosen.positions_total)} positions, {heads.steps_of(corpus, chosen.kept, train)} steps"
        )
        dev = Dev(self.target.spec, corpus.dev, o.growths[0].build())
        kept = hashlib.sha256(json.dumps(chosen.kept).encode()).hexdigest()[:16]
        meta: dict[str, object] = {"cell": setting.name, "inputs": corpus.identity, "kept": kept}
        head, cost = heads.trained_head(corpus, self.vocab, chosen.kept, train, dev, folder, meta)
        # scores and features come from one pass over all samples; what is drawn at random is all that has to be read
        scored = chosen.positions_total if setting.method not in ("full", "random") else 0
        read = chosen.positions_kept if setting.method == "random" else chosen.positions_total
        common = {
            "study": o.study,
            "method": setting.method,
            "accounting": setting.accounting,
            "keep": setting.keep,
            "seed": setting.seed,
            **cost.model_dump(),
            "scored_positions": scored,
            "target_positions": read,
            "scout_positions": self.scout_positions if setting.method in AWARE else 0,
            "extra": {
                "samples_kept": len(chosen.kept),
                "tokens_kept": chosen.tokens_kept,
                "positions_kept": chosen.positions_kept,
                "positions_total": chosen.positions_total,
            },
        }
        with console.timed("replaying the test answers"):
            rows = replayed_rows(head, head.device, o.growths, corpus.tests, self.target.spec, common)
        if self._timed(setting):
            sets = {benchmark: part for (_, benchmark), part in corpus.test_sets.items()}
            with console.timed("decoding test prompts"):
                rows = timed_rows(rows, self.target, head, o.growths[0], sets, o.bench, folder)
        if not o.keep_drafters:
            shutil.rmtree(folder)
        return rows

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return sfdd_results.tables(rows)

    def figures(self, rows: Sequence[Row]) -> list[Drawing]:
        return sfdd_results.figures(rows)

    def chosen(self, setting: Setting) -> Selection:
        """The samples that a setting trains on."""
        groups = list(self.corpus.groups.values())
        if not self.options.within_domains:
            everything = self.corpus.train_ids
            order = seeding.shuffled(len(everything), "study", self.options.corpus.seed)
            groups = [[everything[i] for i in order]]
        o = self.selection(setting)
        return joined([select([self._scored(i, o.method) for i in group], o) for group in groups])

    def selection(self, setting: Setting) -> SelectionOptions:
        """A setting as options of `select`."""
        method, keep = setting.method, setting.keep
        if method == "full":
            return SelectionOptions(method="full")
        if method == BATCH:
            return SelectionOptions(method="flatness", unit="batch", batch_size=4, ratio=keep)
        if method == LENGTH_MATCHED:
            return SelectionOptions(method="flatness", strata=self.options.strata, ratio=keep)
        return SelectionOptions(method=method, ratio=keep, seed=setting.seed)

    def _timed(self, setting: Setting) -> bool:
        return setting.method in self.options.timed and setting.seed == self.options.seeds[0]

    def _scored(self, name: str, method: str) -> ScoredSample:
        sample = self.corpus.training[name]
        rows = sample.answer_rows
        scores = {}
        if method in SCORES:
            columns = {column: values[rows] for column, values in sample.statistics.items()}
            asked = self.overlaps[name][rows] if method in AWARE else None
            evidence = Evidence(TokenStatistics(**columns, vocab_size=self.target.spec.vocab_size), asked)
            scores = {method: token_scores(method, evidence)}
        return ScoredSample(name, int(rows.sum()), len(sample.ids), scores, complete=sample.complete)

    @cached_property
    def overlaps(self) -> Mapping[str, Tensor]:
        """What the scout has of the target's distribution, `[T]` of each sample; rows that teach nothing count 1."""
        o = self.options
        train = o.train.model_copy(update={"epochs": 1, "seed": 0})
        meta = {**self.identity(Setting("scout")), "scout": o.scout}
        place = self.out / "shared" / f"scout-{options.digest(meta)[:8]}"
        known = place / "overlaps.safetensors"
        if not known.is_file():
            dev = Dev(self.target.spec, self.corpus.dev, o.growths[0].build())
            head, _ = heads.trained_head(self.corpus, self.vocab, self.scout_samples, train, dev, place, meta)
            asked = overlaps(heads.objective_of(self.corpus, head, train), self.corpus.training, self.corpus.train_ids)
            artefacts.save_tensors(known, {sample.id: found.nan_to_num(1.0) for sample, found in asked})
        return artefacts.load_tensors(known)

    @property
    def scout_samples(self) -> Sequence[str]:
        """What the scout is trained on."""
        return self.chosen(Setting("random", keep=self.options.scout)).kept

    @property
    def scout_positions(self) -> int:
        """Training positions that the scout took, its reading of all samples included."""
        known = dict(zip(self.corpus.training.ids, self.corpus.training.lengths, strict=True))
        read = FORWARD * sum(known[i] for i in self.corpus.train_ids)
        return round(sum(known[i] for i in self.scout_samples) + read)

    @cached_property
    def target(self) -> HFTarget:
        o = self.options.target
        if o.threads:
            torch.set_num_threads(o.threads)
        with console.timed(f"loading {o.name}"):
            return load_target(o.name, o.dtype, o.device)

    @cached_property
    def corpus(self) -> Corpus:
        layers = heads.layers_of(self.target, self.options.drafter)
        return Corpus(self.target, layers, self.options.corpus, self.out / "shared")

    @cached_property
    def vocab(self) -> VocabMap:
        return heads.vocabulary(self.corpus, self.options.drafter.draft_vocab_size)
