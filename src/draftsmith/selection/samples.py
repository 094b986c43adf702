"""Which samples to train on: SFDD, its baselines, and what the paper leaves out (length, duplicates, garbage, cost).

`select` ranks samples by the mean of their answer's token scores (SFDD eq. 8, the paper's text) or consecutive batches
of them (its code), and keeps the best by ratio, number, answer tokens or training time.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.selection.cleaning import Guard, garbage, near_duplicates
from draftsmith.selection.scores import SCORES

METHODS = ("full", "random", *SCORES)
"""What `SelectionOptions.method` may be: everything, a keyed draw, or a token score."""

NO_TOKENS = "no answer tokens"
NOT_CHOSEN = "not chosen"


class SelectionOptions(Options):
    """How samples are chosen. At most one of `ratio`, `number`, `tokens` and `seconds`; none means `ratio` 0.5."""

    method: str = Field("flatness", description="A token score, or the baselines `full` and `random`.")
    unit: Literal["sample", "batch"] = Field(
        "sample", description="Rank samples (SFDD's text), or consecutive groups of `batch_size` of them (its code)."
    )
    batch_size: int = Field(4, ge=1, description="Samples in a group, with `unit` batch.")
    aggregate: Literal["mean", "median"] = Field("mean", description="Of a unit's answer tokens.")
    ratio: float | None = Field(None, gt=0.0, le=1.0, description="Keep this share of the units.")
    number: int | None = Field(None, ge=1, description="Keep at most so many samples.")
    tokens: int | None = Field(None, ge=1, description="Keep at most so many answer tokens.")
    seconds: float | None = Field(None, gt=0.0, description="Keep what trains within this time.")
    positions_per_second: float | None = Field(
        None, gt=0.0, description="Measured training rate, prompt and answer counted; needed by `seconds`."
    )
    epochs: int = Field(1, ge=1, description="How often training will see each sample; used by `seconds`.")
    strata: int = Field(1, ge=1, description="Choose within so many groups of like length, so that length is no score.")
    near_duplicates: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="Drop answers first whose 5-word runs overlap this much with another's.",
    )
    guard: Guard | None = Field(None, description="First drop garbage; none: keep it.")
    seed: int = Field(0, description="Of `random`.")

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"no method is called {method!r}{hint} There are {', '.join(METHODS)}")
        return method

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        limits = [name for name in ("ratio", "number", "tokens", "seconds") if getattr(self, name) is not None]
        if len(limits) > 1:
            raise ValueError(f"only one of ratio, number, tokens and seconds can be given, not {' and '.join(limits)}")
        if limits and self.method == "full":
            raise ValueError(f"method full keeps every sample; leave {limits[0]} out")
        if self.seconds is not None and self.positions_per_second is None:
            raise ValueError("seconds needs positions_per_second, the measured rate of training")
        return self


@dataclass(frozen=True, eq=False)
class ScoredSample:
    """A sample with the token scores of its answer.

    Attributes:
        id: unique among the samples.
        tokens: answer tokens, those that teach.
        positions: all its tokens, prompt included: what training has to read.
        scores: name of a token score to `[tokens]`, higher = more valuable; empty for `full` and `random`.
        text: the answer, for the duplicates and the guard.
        complete: False where the answer was cut at the length limit.
    """

    id: str
    tokens: int
    positions: int
    scores: Mapping[str, Tensor]
    text: str = ""
    complete: bool = True


@dataclass(frozen=True)
class Selection:
    """What was chosen, what was not and why.

    Attributes:
        kept: ids in the order of the input.
        dropped: id to reason: "not chosen", "no answer tokens", "near-duplicate of …", or the guard's.
        scores: id to the score of its unit, for every sample that was ranked.
        thresholds: the lowest score kept in each length group (one without `strata`), None where nothing was kept;
            empty for method full.
        tokens_kept, tokens_total: answer tokens.
        positions_kept, positions_total: tokens, prompts included.
    """

    kept: tuple[str, ...]
    dropped: Mapping[str, str]
    scores: Mapping[str, float]
    thresholds: tuple[float | None, ...]
    tokens_kept: int
    tokens_total: int
    positions_kept: int
    positions_total: int

    def to_rows(self) -> list[dict[str, object]]:
        """JSON rows: one of counts, then one a sample, kept ones first."""
        head: dict[str, object] = {name: getattr(self, name) for name in _COUNTS}
        rows: list[dict[str, object]] = [head | {"thresholds": list(self.thresholds)}]
        for name in (*self.kept, *self.dropped):
            row: dict[str, object] = {"id": name, "kept": name not in self.dropped}
            if name in self.scores:
                row["score"] = self.scores[name]
            if name in self.dropped:
                row["reason"] = self.dropped[name]
            rows.append(row)
        return rows

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Selection:
        """The way back from `to_rows`; UserError where the rows are no selection."""
        try:
            head, *samples = rows
            return cls(
                kept=tuple(row["id"] for row in samples if row["kept"]),
                dropped={row["id"]: row["reason"] for row in samples if not row["kept"]},
                scores={row["id"]: row["score"] for row in samples if "score" in row},
                thresholds=tuple(head["thresholds"]),
                **{name: head[name] for name in _COUNTS},
            )
        except (KeyError, ValueError, TypeError) as problem:
            raise UserError(f"these rows are no selection ({problem!r}): was the file written by `select`?") from None


_COUNTS = ("tokens_kept", "tokens_total", "positions_kept", "positions_total")


@dataclass(frozen=True, eq=False)
class _Unit:
    """What is kept or dropped as a whole: a sample, or a batch of them. `order` settles ties."""

    members: Sequence[ScoredSample]
    score: float
    order: str | int

    @property
    def tokens(self) -> int:
        return sum(sample.tokens for sample in self.members)

    @property
    def positions(self) -> int:
        return sum(sample.positions for sample in self.members)


def select(scored: Sequence[ScoredSample], options: SelectionOptions) -> Selection:
    """Chooses samples to train on.

    Garbage goes first, then near-duplicates, then what the score and the limit leave out. Equal scores are settled by
    id, those of batches by their place, so the same samples and options always choose the same.

    Raises:
        UserError: an id occurs twice, a score is missing, not a number or of the wrong length, nothing is left, or the
            limit is smaller than the best sample.
    """
    _check(scored, options)
    dropped = _cleaned(scored, options)
    candidates = [sample for sample in scored if sample.id not in dropped]
    if not any(sample.tokens for sample in candidates):
        raise UserError(f"nothing to choose from: of {len(scored)} samples none with answer tokens passed the checks")
    units = _units(candidates, options)
    teaching = [unit for unit in units if unit.tokens]
    dropped |= {sample.id: NO_TOKENS for unit in units if not unit.tokens for sample in unit.members}
    thresholds: list[float | None] = []
    chosen = teaching
    if options.method != "full":
        chosen, thresholds = _best(teaching, options, len(units))
    kept = {sample.id for unit in chosen for sample in unit.members}
    dropped |= {sample.id: NOT_CHOSEN for unit in teaching for sample in unit.members if sample.id not in kept}
    keeping = [sample for sample in scored if sample.id in kept]
    return Selection(
        kept=tuple(sample.id for sample in keeping),
        dropped={sample.id: dropped[sample.id] for sample in scored if sample.id not in kept},
        scores={sample.id: unit.score for unit in teaching for sample in unit.members if options.method != "full"},
        thresholds=tuple(thresholds),
        tokens_kept=sum(sample.tokens for sample in keeping),
        tokens_total=sum(sample.tokens for sample in scored),
        positions_kept=sum(sample.positions for sample in keeping),
        positions_total=sum(sample.positions for sample in scored),
    )


def best_first(chosen: Selection, group_of: Mapping[str, str]) -> list[str]:
    """The kept samples, best first: by how many of their own group (a domain) score higher, so that groups stay mixed.

    Raises:
        UserError: nothing ranked them (method full).
    """
    groups: dict[str, list[str]] = {}
    for name in chosen.kept:
        if name not in chosen.scores:
            raise UserError("pruning rounds need ranked samples: choose by a score (select.method=flatness)")
        groups.setdefault(group_of[name], []).append(name)
    place: dict[str, float] = {}
    for group in groups.values():
        ranked = sorted(group, key=lambda name: (-chosen.scores[name], name))
        place |= {name: (above + 0.5) / len(ranked) for above, name in enumerate(ranked)}
    return sorted(place, key=lambda name: (place[name], name))


def _check(scored: Sequence[ScoredSample], options: SelectionOptions) -> None:
    seen: set[str] = set()
    for sample in scored:
        if sample.id in seen:
            raise UserError(f"the sample {sample.id!r} occurs twice: ids must be unique")
        seen.add(sample.id)
        if options.method in ("full", "random"):
            continue
        values = sample.scores.get(options.method)
        if values is None:
            there = ", ".join(sample.scores) or "none"
            raise UserError(f"the sample {sample.id!r} has no scores {options.method!r}; there are {there}")
        if values.shape != (sample.tokens,):
            raise UserError(f"the sample {sample.id!r} has {sample.tokens} answer tokens and {values.numel()} scores")
        if not bool(values.isfinite().all()):
            raise UserError(f"a score {options.method!r} of the sample {sample.id!r} is not a number: score it again")


def _cleaned(scored: Sequence[ScoredSample], options: SelectionOptions) -> dict[str, str]:
    """Ids that are out before anything is ranked, with the reason."""
    dropped: dict[str, str] = {}
    if options.guard is not None:
        for sample in scored:
            reason = garbage(sample.text, sample.complete, options.guard)
            if reason is not None:
                dropped[sample.id] = reason
    if options.near_duplicates is not None:
        # among what the guard let through: else garbage could stand for its sound copies
        texts = {sample.id: sample.text for sample in scored if sample.id not in dropped}
        found = near_duplicates(texts, options.near_duplicates)
        dropped |= {name: f"near-duplicate of {other}" for name, other in found.items()}
    if options.unit == "sample":
        dropped |= {sample.id: NO_TOKENS for sample in scored if not sample.tokens and sample.id not in dropped}
    return dropped


def _units(samples: Sequence[ScoredSample], options: SelectionOptions) -> list[_Unit]:
    if options.unit == "sample":
        return [_Unit([sample], _score([sample], options), sample.id) for sample in samples]
    starts = range(0, len(samples), options.batch_size)
    groups = [samples[start : start + options.batch_size] for start in starts]
    return [_Unit(group, _score(group, options), place) for place, group in enumerate(groups)]


def _score(members: Sequence[ScoredSample], options: SelectionOptions) -> float:
    """A unit's score: every answer token of its samples weighs the same. 0 without any, and for method full."""
    if options.method == "full":
        return 0.0
    if options.method == "random":
        # keyed by name: a sample's luck depends on no other sample, and a larger ratio keeps what a smaller one kept
        name = seeding.key("select", options.seed, members[0].id)
        return float(seeding.uniform(torch.tensor(name), 1))
    values = torch.cat([sample.scores[options.method].double() for sample in members])
    if not len(values):
        return 0.0
    if options.aggregate == "mean":
        return float(values.mean())
    ordered = values.sort().values
    return float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2)


def _best(units: Sequence[_Unit], options: SelectionOptions, count: int) -> tuple[list[_Unit], list[float | None]]:
    """The units to keep, and the lowest score kept in each length group. `count`: of all units, empty ones too.

    A group is kept from the best down to the first that no longer fits: none is skipped for its size.
    """
    limit, costs = _limit(units, options, count)
    total = math.fsum(costs.values())
    by_length = sorted(units, key=lambda unit: (unit.positions, str(unit.order)))
    chosen: list[_Unit] = []
    thresholds: list[float | None] = []
    left = 0.0
    for stratum in range(options.strata):
        first, last = (len(units) * edge // options.strata for edge in (stratum, stratum + 1))
        ranked = sorted(by_length[first:last], key=lambda unit: (-unit.score, unit.order))
        # what a group could not use is passed on to the next; the margin forgives the rounding of the shares
        left += limit * math.fsum(costs[unit.order] for unit in ranked) / total
        lowest: float | None = None
        for unit in ranked:
            if costs[unit.order] > left + 1e-9 * limit:
                break
            left -= costs[unit.order]
            chosen.append(unit)
            lowest = unit.score
        thresholds.append(lowest)
    if not chosen:
        raise UserError(f"the limit of {limit:g} is too small to keep even one {options.unit}: raise it")
    return chosen, thresholds


def _limit(units: Sequence[_Unit], options: SelectionOptions, count: int) -> tuple[float, dict[str | int, float]]:
    """What may be spent, and what each unit costs: units, samples, answer tokens or seconds."""
    if options.number is not None:
        return options.number, {unit.order: len(unit.members) for unit in units}
    if options.tokens is not None:
        return options.tokens, {unit.order: unit.tokens for unit in units}
    if options.seconds is not None and options.positions_per_second is not None:
        each = options.epochs / options.positions_per_second
        return options.seconds, {unit.order: unit.positions * each for unit in units}
    ratio = 0.5 if options.ratio is None else options.ratio
    return max(1, round(ratio * count)), dict.fromkeys((unit.order for unit in units), 1.0)


def joined(parts: Sequence[Selection], order: Sequence[str] | None = None) -> Selection:
    """Selections made within sets of samples, as one; kept samples in `order` (of all samples) where it is given."""
    kept = [i for part in parts for i in part.kept]
    if order is not None:
        known = set(kept)
        kept = [i for i in order if i in known]
    return Selection(
        kept=tuple(kept),
        dropped={i: reason for part in parts for i, reason in part.dropped.items()},
        scores={i: score for part in parts for i, score in part.scores.items()},
        thresholds=tuple(t for part in parts for t in part.thresholds),
        tokens_kept=sum(part.tokens_kept for part in parts),
        tokens_total=sum(part.tokens_total for part in parts),
        positions_kept=sum(part.positions_kept for part in parts),
        positions_total=sum(part.positions_total for part in parts),
    )
