"""Is a flat token worth more? The same training on the flat, the peaked or a random half of the answer tokens.

Every sample is read whole, so nothing but the loss differs: it counts only the chosen half of the tokens, twice. What
was gained is the overlap Σ min(p, q) with the target on held-out tokens, after training less before, by decile of their
flatness, and acceptance length by replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.data.features import FeatureStore, StoredSample
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.drafters.unrolled import StepOut
from draftsmith.foundation import console, seeding
from draftsmith.numerics.distributions import flatness_from_log_norm
from draftsmith.studies import heads
from draftsmith.studies.figures import Drawing, Point, lines
from draftsmith.studies.grid import Setting
from draftsmith.studies.rows import Row, replayed_rows
from draftsmith.studies.sfdd import Sfdd, SfddOptions
from draftsmith.studies.tables import Table, acceptance, percent, relative, shown, where
from draftsmith.training.batches import TrainBatch
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.eagle3 import Eagle3Objective
from draftsmith.training.overlaps import overlaps

ALL, FLAT, PEAKED, RANDOM = "tokens-all", "tokens-flat", "tokens-peaked", "tokens-random"
PARTS = (ALL, RANDOM, FLAT, PEAKED)
DECILES = 10
MARK = "taught"


@dataclass(frozen=True)
class Marked:
    """A store whose samples carry which rows are taught, 1 or 0, among their statistics."""

    store: FeatureStore
    marks: Mapping[str, Tensor]

    @property
    def ids(self) -> Sequence[str]:
        return self.store.ids

    @property
    def lengths(self) -> Sequence[int]:
        return self.store.lengths

    def outline(self, name: str) -> StoredSample:
        return self.store.outline(name)

    def fetch(self, ids: Sequence[str], step: int) -> list[StoredSample]:
        return [
            replace(s, statistics={**s.statistics, MARK: self.marks[s.id].float()}) for s in self.store.fetch(ids, step)
        ]


@dataclass(frozen=True)
class MarkedObjective(Eagle3Objective):
    """EAGLE-3's loss over the marked rows alone, scaled by `scale`."""

    scale: float = 1.0

    def token_losses(self, out: StepOut, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        values, at = super().token_losses(out, batch)
        row, start = at[:, 0], at[:, 1]
        taught = batch.unroll.starts[row, start] + 1 + out.step
        return values * batch.statistics[MARK][row, taught] * self.scale, at


class Probe:
    """The study; see `grid.Study`. It shares the data of the SFDD study of the same options."""

    def __init__(self, given: SfddOptions, out: Path) -> None:
        self.options = given
        self.sfdd = Sfdd(given, out)

    def settings(self) -> list[Setting]:
        return [Setting(m, keep=1.0 if m == ALL else 0.5, seed=seed) for seed in self.options.seeds for m in PARTS]

    def prepare(self) -> None:
        self.sfdd.prepare()

    def identity(self, setting: Setting) -> Mapping[str, object]:
        return {**self.sfdd.identity(setting), "probe": DECILES}

    def run(self, setting: Setting, folder: Path) -> list[Row]:
        corpus, target, o = self.sfdd.corpus, self.sfdd.target, self.options
        train = o.train.model_copy(update={"seed": setting.seed})
        marks = self.marks(setting)
        dev = Dev(target.spec, corpus.dev, o.growths[0].build())
        meta: dict[str, object] = {"cell": setting.name, "inputs": corpus.identity}

        def objective(head: Eagle3) -> Eagle3Objective:
            plain = heads.objective_of(corpus, head, train)
            return MarkedObjective(**vars(plain), scale=1 / setting.keep)

        head, cost = heads.trained_head(
            corpus,
            self.sfdd.vocab,
            corpus.train_ids,
            train,
            dev,
            folder,
            meta,
            Marked(corpus.training, marks),
            objective,
        )
        common = {
            "study": "sfdd-probe",
            "method": setting.method,
            "accounting": setting.accounting,
            "keep": setting.keep,
            "seed": setting.seed,
            **cost.model_dump(),
            "target_positions": sum(len(m) for m in marks.values()),
        }
        with console.timed("replaying the test answers and comparing distributions"):
            start = heads.fresh_head(corpus, self.sfdd.vocab, setting.seed)
            rows = replayed_rows(head, head.device, o.growths, corpus.tests, target.spec, common)
            return [row.model_copy(update={"extra": self.by_decile(row, start, head)}) for row in rows]

    def marks(self, setting: Setting) -> dict[str, Tensor]:
        """Which rows of each training sample are taught, `[T]` bool; about as many in each half."""
        store = self.sfdd.corpus.training
        samples = [store[i] for i in self.sfdd.corpus.train_ids]
        flat = {s.id: self.flatness(s) for s in samples}
        middle = torch.cat([flat[s.id][s.answer_rows] for s in samples]).median()
        match setting.method:
            case "tokens-flat":
                return {name: values > middle for name, values in flat.items()}
            case "tokens-peaked":
                return {name: values <= middle for name, values in flat.items()}
            case "tokens-random":
                return {name: _draws(setting.seed, name, len(values)) < 0.5 for name, values in flat.items()}
        return {name: torch.ones_like(values, dtype=torch.bool) for name, values in flat.items()}

    def flatness(self, sample: StoredSample) -> Tensor:
        """`[T]` float32."""
        return flatness_from_log_norm(sample.statistics["log_norm"], self.sfdd.target.spec.vocab_size)

    @cached_property
    def edges(self) -> dict[float, Tensor]:
        """At each temperature the borders between the deciles of the test answers' flatness, `[9]`."""
        found = {}
        for temperature in self.options.corpus.temperatures:
            store = self.sfdd.corpus.test_store(temperature)
            values = torch.cat([self.flatness(s)[s.answer_rows] for s in store]).double()
            levels = torch.arange(1, DECILES, dtype=torch.float64) / DECILES
            found[temperature] = torch.quantile(values, levels).float()
        return found

    def by_decile(self, row: Row, start: Eagle3, trained: Eagle3) -> dict[str, str | int | float]:
        """Held-out tokens of a row's answers, and their summed overlap before and after, by decile of flatness."""
        corpus = self.sfdd.corpus
        store = corpus.test_store(row.temperature)
        found: dict[str, str | int | float] = {}
        for name, head in (("before", start), ("after", trained)):
            objective = heads.objective_of(corpus, head, self.options.train)
            sums, counts = torch.zeros(DECILES, dtype=torch.float64), torch.zeros(DECILES, dtype=torch.int64)
            for sample, values in overlaps(objective, store, row.prompts):
                known = ~values.isnan()
                place = torch.bucketize(self.flatness(sample)[known], self.edges[row.temperature])
                sums.index_add_(0, place, values[known].double())
                counts += place.bincount(minlength=DECILES)
            found |= {f"{name}_{d + 1}": round(float(sums[d]), 4) for d in range(DECILES)}
            found |= {f"tokens_{d + 1}": int(counts[d]) for d in range(DECILES)}
        return found

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return tables(rows)

    def figures(self, rows: Sequence[Row]) -> list[Drawing]:
        return figures(rows)


def _draws(seed: int, name: str, count: int) -> Tensor:
    return seeding.uniform(torch.tensor(seeding.key("probe", seed, name)), count)


def gains(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """(overlap before, overlap gained) of a held-out token in each decile of flatness, over all given rows."""

    def total(name: str, decile: int) -> float:
        return sum(float(row.extra.get(f"{name}_{decile}", 0)) for row in rows)

    found = []
    for decile in range(1, DECILES + 1):
        tokens = total("tokens", decile) or float("nan")
        before = total("before", decile) / tokens
        found.append((before, total("after", decile) / tokens - before))
    return found


def tables(rows: Sequence[Row]) -> list[Table]:
    """Acceptance length of each half, and what held-out tokens gained from it, by decile of flatness."""
    first = where(rows, growth=rows[0].growth, node_budget=rows[0].node_budget) if rows else []
    there = [part for part in PARTS if where(first, method=part)]
    found: list[Table] = []
    for t in sorted({row.temperature for row in first}):
        here = where(first, temperature=t)
        body = []
        for part in there:
            mine, random = where(here, method=part), where(here, method=RANDOM)
            compared = "–" if part == RANDOM else percent(relative(mine, random), less=1)
            body.append([part, str(len({row.seed for row in mine})), shown(acceptance(mine)), compared])
        note = "Losses count only on the part named; 95 % intervals over seeds and prompts, differences paired by both."
        columns = ["trained on", "seeds", "τ", "against a random half"]
        found.append(Table(f"Flat against peaked tokens: acceptance length, T={t:g}", columns, body, note))
        each = {part: gains(where(here, method=part)) for part in there}
        if each:
            before = next(iter(each.values()))
            body = [
                [str(d + 1), f"{before[d][0]:.3f}", *(f"{each[part][d][1]:+.4f}" for part in there)]
                for d in range(DECILES)
            ]
            note = "Mean overlap Σ min(p, q) of held-out answer tokens with the target; decile 10 is the flattest."
            columns = ["decile", "before", *there]
            found.append(Table(f"Overlap gained by decile of flatness, T={t:g}", columns, body, note))
    return found


def figures(rows: Sequence[Row]) -> list[Drawing]:
    """What held-out tokens gained, by decile of flatness."""
    found = []
    for t in sorted({row.temperature for row in rows}):
        here = where(rows, temperature=t, growth=rows[0].growth, node_budget=rows[0].node_budget)
        series = [
            [Point(part, float(d), gain) for d, (_, gain) in enumerate(gains(where(here, method=part)), start=1)]
            for part in PARTS
            if where(here, method=part)
        ]
        title = f"Overlap gained by decile of flatness, T={t:g}"
        caption = "Held-out answer tokens; decile 10 is the flattest."
        found.append(lines(f"probe-{t:g}", title, caption, series, "decile of flatness", "overlap gained"))
    return found
