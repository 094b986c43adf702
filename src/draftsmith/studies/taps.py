"""TAPS (arXiv 2603.27027): several specialists put together while decoding, or one drafter trained on everything?

Specialists of each domain and drafters of mixed data are trained from the same start; compositions put them together
and are replayed on the same stored answers, all at the same node budgets. Drafters lie under `shared/drafters`, named
by all that decides their weights: a cell asks for those it needs, and who asks first trains them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, field_validator, model_validator

from draftsmith.decoding.building import Available
from draftsmith.decoding.composition import Composition
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.decoding.specification import LearnedOptions, Member, names_in, parse
from draftsmith.decoding.stored import NGRAM
from draftsmith.drafters.base import Drafter
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.evaluation import fitting
from draftsmith.evaluation.bench import BenchOptions
from draftsmith.foundation import artefacts, console, options
from draftsmith.foundation.options import Options
from draftsmith.studies import composed, heads, taps_results
from draftsmith.studies.composed import WALL_CLOCK, Spec
from draftsmith.studies.corpus import Corpus
from draftsmith.studies.figures import Drawing
from draftsmith.studies.grid import Setting, StudyOptions
from draftsmith.studies.rows import Row, TrainingCost
from draftsmith.studies.tables import Table
from draftsmith.target.model import HFTarget, load_target
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training import algorithms
from draftsmith.training.algorithms import Kind
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.base import Objective
from draftsmith.training.objectives.eagle import EagleLossOptions
from draftsmith.training.objectives.hass import HassLossOptions

FITTED = Path("dev")  # `router=dev` in a specification: the study fits it
TREES = ("dynamic", "best-first")


class SweepOptions(Options):
    """Trees of other shapes at the first tree's node budget."""

    methods: tuple[str, ...] = Field(default=(), description="drafters and compositions that are swept")
    depths: tuple[int, ...] = Field(default=(), description="every depth × width is replayed")
    widths: tuple[int, ...] = ()


class TapsOptions(StudyOptions):
    """The study's grid."""

    kinds: tuple[Kind, ...] = Field(default=("eagle3",), min_length=1, description="heads; each kind is a grid")
    mixed: tuple[float, ...] = Field(
        default=(1.0, 2.0),
        description="drafters of mixed data, all domains in equal parts: as many specialists' worth of samples. 1 is "
        "`mixed`, 2 is `mixed-2x`",
    )
    compositions: dict[str, str] = Field(
        default={}, description="names and specifications; members are domains, mixed drafters and ngram"
    )
    averages: tuple[float, ...] = Field(
        default=(), description="λ of the first domain's drafter in averages of the first two: `average-0.1`, …"
    )
    sweep: SweepOptions = SweepOptions()
    timed: tuple[str, ...] = Field(
        default=(),
        description="drafters and compositions measured by the wall clock, too, with the first seed's drafters; "
        "`name@30`: with the tree of 30 nodes",
    )
    bench: BenchOptions = Field(default=BenchOptions(), description="that measurement, on the test prompts")
    round_ms: dict[str, float] = Field(
        default={}, description="milliseconds of a round with each drafter, for route:learned; default: all alike"
    )
    eagle: EagleLossOptions = EagleLossOptions()
    hass: HassLossOptions = HassLossOptions()

    @field_validator("growths")
    @classmethod
    def _budgets(cls, growths: tuple[GrowthOptions, ...]) -> tuple[GrowthOptions, ...]:
        if odd := next((g.kind for g in growths if g.kind not in TREES), None):
            raise ValueError(f"compositions are compared at equal node budgets, which {odd} has none of: use dynamic")
        if len({g.node_budget for g in growths}) < len(growths):
            raise ValueError("each growth needs a node budget of its own; other shapes belong into sweep")
        return growths

    @model_validator(mode="after")
    def _known(self) -> Self:
        domains = list(self.corpus.domains)
        if odd := next((m for m in self.mixed if not 0 < m <= len(domains)), None):
            raise ValueError(f"mixed: {odd:g} specialists' worth, and there are {len(domains)}")
        if self.averages and len(domains) < 2:
            raise ValueError("averages: there is one domain only")
        drafters = list(self.drafters)
        for name, spec in self.specs.items():
            if name in drafters or name == NGRAM:
                raise ValueError(f"compositions: {name} is a drafter's name; choose another")
            if odd_name := next((n for n in names_in(spec) if n not in (*drafters, NGRAM)), None):
                raise ValueError(f"compositions.{name}: there is no {odd_name}; there are {', '.join(drafters)}, ngram")
            routers = [o.router for o in composed.options_in(spec) if isinstance(o, LearnedOptions)]
            if any(router != FITTED for router in routers):
                raise ValueError(f"compositions.{name}: write router={FITTED}: the study fits it")
        known = [*drafters, *self.specs]
        for name in (*self.sweep.methods, *(timed.partition("@")[0] for timed in self.timed)):
            if name not in known:
                raise ValueError(f"sweep, timed: there is no {name}; there are {', '.join(known)}")
        for timed in self.timed:
            self.tree(timed)
        return self

    @property
    def drafters(self) -> dict[str, float]:
        """The drafters that are trained, with their data in specialists' worth."""
        mixed = {"mixed" if m == 1 else f"mixed-{m:g}x": m for m in self.mixed}
        return {**dict.fromkeys(self.corpus.domains, 1.0), **mixed}

    @property
    def specs(self) -> dict[str, Spec]:
        """The compositions, parsed, averages included."""
        first, second, *_ = [*self.corpus.domains, "", ""]
        lines = {f"average-{w:g}": f"average({first},{second},weights={w:g}/{1 - w:g})" for w in self.averages}
        return {name: parse(line, f"compositions.{name}") for name, line in {**self.compositions, **lines}.items()}

    def tree(self, timed: str) -> GrowthOptions:
        """The tree of an entry of `timed`."""
        nodes = timed.partition("@")[2]
        found = [g for g in self.growths if not nodes or str(g.node_budget) == nodes]
        if not found:
            raise ValueError(f"timed: {timed}: none of the growths has {nodes} nodes")
        return found[0]

    def swept(self, method: str) -> list[GrowthOptions]:
        """The shapes that a method is replayed with beside the growths."""
        shapes = [(d, w) for d in self.sweep.depths for w in self.sweep.widths]
        others = [self.growths[0].model_copy(update={"depth": d, "width": w}) for d, w in shapes]
        return [g for g in others if g != self.growths[0]] if method in self.sweep.methods else []


class Taps:
    """The study; see `grid.Study`."""

    def __init__(self, given: TapsOptions, out: Path) -> None:
        self.options = given
        self.out = out
        self._loaded: dict[tuple[str, Kind, int], tuple[Drafter, TrainingCost]] = {}

    def settings(self) -> list[Setting]:
        o = self.options
        found = []
        for seed in o.seeds:
            for kind in o.kinds:
                extra = {"kind": kind}
                found += [Setting(name, seed=seed, extra=extra) for name in (*o.drafters, *o.specs)]
                if o.timed and seed == o.seeds[0]:
                    found.append(Setting(WALL_CLOCK, WALL_CLOCK, seed=seed, extra=extra))
        return found

    def prepare(self) -> None:
        self.corpus.prepare()
        if "eagle3" in self.options.kinds:
            heads.pass_ratio(self.corpus, self.vocab, self.options.train)

    def identity(self, setting: Setting) -> Mapping[str, object]:
        o, method = self.options, setting.method
        kind = _kind(setting)
        timed = o.timed if method == WALL_CLOCK else ()
        methods = {name: str(self._spec(name)) for name in ([t.partition("@")[0] for t in timed] or [method])}
        names = sorted({n for name in methods for n in self._members(name)})
        found: dict[str, object] = {
            "drafters": {n: self._made_of(n, kind, setting.seed) for n in names if n != NGRAM},
            "methods": methods,
            "growths": [g.model_dump(mode="json") for g in (*o.growths, *o.swept(method))],
            "target": self.target.spec.fingerprint,
            "inputs": self.corpus.identity,
        }
        if any(composed.learns(self._spec(name)) for name in methods):
            found["round_ms"] = o.round_ms
        if timed:
            found |= {"timed": timed, "bench": o.bench.model_dump(mode="json")}
        return found

    def run(self, setting: Setting, folder: Path) -> list[Row]:
        o, method, kind = self.options, setting.method, _kind(setting)
        if setting.method == WALL_CLOCK:
            rows = self._measured(setting, folder)
        else:
            ready = self._ready(method, kind, setting.seed, folder)
            with console.timed("replaying the test answers"):
                rows = composed.composed_rows(
                    lambda growth: ready(growth),
                    self.target.device,
                    o.growths,
                    self.corpus.tests,
                    self.target.spec,
                    self._common(method, kind, setting.seed),
                    self._about(method, kind),
                    o.swept(method),
                    o.corpus.seed,
                )
        last = [s for s in self.settings() if (s.seed, s.extra) == (setting.seed, setting.extra)][-1]
        if not o.keep_drafters and setting == last:
            for name in o.drafters:
                shutil.rmtree(self._place(name, kind, setting.seed), ignore_errors=True)
        return rows

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return taps_results.tables(rows, list(self.options.corpus.domains), list(self.options.drafters))

    def figures(self, rows: Sequence[Row]) -> list[Drawing]:
        return taps_results.figures(rows, list(self.options.drafters))

    def samples(self, name: str) -> list[str]:
        """What a drafter is trained on: its domain, or an equal part of each."""
        groups = self.corpus.groups
        if name in groups:
            return groups[name]
        share = self.options.drafters[name] / len(groups)
        return [i for group in groups.values() for i in group[: round(share * len(group))]]

    def drafter(self, name: str, kind: Kind, seed: int) -> tuple[Drafter, TrainingCost]:
        """A trained drafter and what it cost, trained now if nobody has asked for it yet."""
        wanted = (name, kind, seed)
        if wanted not in self._loaded:
            if any(known[1:] != (kind, seed) for known in self._loaded):
                self._loaded.clear()
            o, corpus = self.options, self.corpus
            kept = self.samples(name)
            train = o.train.model_copy(update={"seed": seed})
            dev = Dev(self.target.spec, corpus.dev, o.growths[0].build())
            unrolled = {"eagle3": train.unroll_steps, "hass": o.hass.steps}.get(kind, 1)
            place, meta = self._place(name, kind, seed), dict(self._made_of(name, kind, seed))
            if not (place / "drafter" / artefacts.MANIFEST).is_file():
                console.say(f"{name}: {len(kept)} samples, {heads.steps_of(corpus, kept, train)} steps")

            def begin() -> tuple[torch.nn.Module, Objective]:
                head = algorithms.fresh_head(kind, self.target, self.vocab, corpus.want.layers or None, seed)
                return head, algorithms.objective(kind, head, self.target, train, o.eagle, o.hass)

            found, cost = heads.trained(corpus, begin, kept, train, dev, place, meta, unrolled=unrolled)
            more: dict[str, float] = {"target_positions": self._positions(kept)}
            if kind == "eagle3":
                more["pass_ratio"] = heads.pass_ratio(corpus, self.vocab, o.train)
            self._loaded[wanted] = (found, cost.model_copy(update=more))
        return self._loaded[wanted]

    def _ready(self, method: str, kind: Kind, seed: int, folder: Path) -> Composer:
        """A method with its drafters trained, and what it needs fitted on dev."""
        o, device, dev = self.options, self.target.device, self.corpus.dev
        spec = self._spec(method)
        members = {}
        for name in self._members(method):
            trained = self._ngram if name == NGRAM else self.drafter(name, kind, seed)[0]
            members[name] = Available(trained)
        first = o.growths[0]
        if composed.calibrates(spec):
            with console.timed("temperatures on dev"):
                members = composed.calibrated(members, first, self.target.spec, dev, device)
        if composed.learns(spec):
            costs = {name: o.round_ms.get(name, 1.0) for name in members}
            with console.timed("a router on dev"):
                router = fitting.router(members, first.build(), costs, self.target.spec, dev, device)
            artefacts.write_json(folder / "router.json", router)
            spec = composed.with_router(spec, folder / "router.json")
        return Composer(spec, members, self.target)

    def _measured(self, setting: Setting, folder: Path) -> list[Row]:
        o, kind = self.options, _kind(setting)
        compositions, commons = {}, {}
        for timed in o.timed:
            method, growth = timed.partition("@")[0], o.tree(timed)
            name = f"{method}@{growth.node_budget}"
            compositions[name] = self._ready(method, kind, setting.seed, folder / method)(growth)
            about = {**self._about(method, kind), "depth": growth.depth, "width": growth.width}
            commons[name] = {**self._common(method, kind, setting.seed), "growth": growth.kind, "extra": about}
        sets = {benchmark: part for (_, benchmark), part in self.corpus.test_sets.items()}
        with console.timed("decoding test prompts"):
            return composed.wall_clock_rows(self.target, compositions, sets, o.bench, folder / "bench.jsonl", commons)

    def _common(self, method: str, kind: Kind, seed: int) -> dict[str, object]:
        """What all rows of a method share; a composition costs what its drafters cost together."""
        names = [n for n in self._members(method) if n != NGRAM]
        costs = [self.drafter(name, kind, seed)[1] for name in names]
        summed = {
            field: sum(getattr(cost, field) for cost in costs)
            for field in ("training_seconds", "training_steps", "training_positions", "training_cost")
        }
        together = {i for name in names for i in self.samples(name)}
        return {
            "study": self.options.study,
            "method": method,
            "accounting": "equal-epochs",
            "keep": 1.0,
            "seed": seed,
            **summed,
            "target_positions": self._positions(sorted(together)),
            "pass_ratio": max((cost.pass_ratio for cost in costs), default=0.0),
        }

    def _about(self, method: str, kind: Kind) -> dict[str, str | int | float]:
        names = [n for n in self._members(method) if n != NGRAM]
        together = {i for name in names for i in self.samples(name)}
        tokens = sum(self._answer_tokens[i] for i in together)
        return {"kind": kind, "spec": str(self._spec(method)), "tokens": tokens}

    @cached_property
    def _answer_tokens(self) -> dict[str, int]:
        return {i: int(self.corpus.training[i].answer_rows.sum()) for i in self.corpus.train_ids}

    def _positions(self, kept: Sequence[str]) -> int:
        known = dict(zip(self.corpus.training.ids, self.corpus.training.lengths, strict=True))
        return sum(known[i] for i in kept)

    def _spec(self, method: str) -> Spec:
        return self.options.specs.get(method) or Member(method)

    def _members(self, method: str) -> list[str]:
        return [] if method == WALL_CLOCK else names_in(self._spec(method))

    def _made_of(self, name: str, kind: Kind, seed: int) -> dict[str, object]:
        """All that decides a drafter's weights."""
        o = self.options
        found: dict[str, object] = {
            "name": name,
            "kind": kind,
            "layers": list(self.corpus.want.layers) if kind == "eagle3" else [],
            "vocabulary": self.vocab.digest,
            "kept": options.digest({"kept": self.samples(name)}),
            "training": self.corpus.identity["training"],
            "train": o.train.model_copy(update={"seed": seed}).model_dump(mode="json"),
            "target": self.target.spec.fingerprint,
        }
        if kind != "eagle3":
            found["loss"] = (o.hass if kind == "hass" else o.eagle).model_dump(mode="json")
        return found

    def _place(self, name: str, kind: Kind, seed: int) -> Path:
        made_of = options.digest(self._made_of(name, kind, seed))[:8]
        return self.out / "shared" / "drafters" / f"{name}-{kind}-seed{seed}-{made_of}"

    @cached_property
    def _ngram(self) -> NgramDrafter:
        return NgramDrafter(NgramOptions(), VocabMap.identity(self.target.spec.vocab_size))

    @cached_property
    def target(self) -> HFTarget:
        o = self.options.target
        if o.threads:
            torch.set_num_threads(o.threads)
        with console.timed(f"loading {o.name}"):
            return load_target(o.name, o.dtype, o.device)

    @cached_property
    def corpus(self) -> Corpus:
        reads = heads.layers_of(self.target, self.options.drafter) if "eagle3" in self.options.kinds else ()
        return Corpus(self.target, reads, self.options.corpus, self.out / "shared")

    @cached_property
    def vocab(self) -> VocabMap:
        return heads.vocabulary(self.corpus, self.options.drafter.draft_vocab_size)


class Composer:
    """Makes a composition for a tree, fresh at each call."""

    def __init__(self, spec: Spec, members: Mapping[str, Available], target: HFTarget) -> None:
        self.spec, self.members, self.target = spec, members, target

    def __call__(self, growth: GrowthOptions) -> Composition:
        return composed.composed(self.spec, growth, self.members, self.target.tokenizer.decode)


def _kind(setting: Setting) -> Kind:
    found: Kind = next(k for k in ("eagle3", "eagle", "hass") if k == setting.extra["kind"])
    return found
