"""A study's results: a row for each cell, benchmark, temperature and tree, with every prompt's counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field

from draftsmith.data.conversations import Conversation
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.decoding.trace import Generation
from draftsmith.drafters.base import Drafter
from draftsmith.evaluation import metrics
from draftsmith.evaluation.bench import BenchOptions, bench, results
from draftsmith.evaluation.replayed import replay
from draftsmith.foundation.options import Options
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import TargetSpec

if TYPE_CHECKING:
    from draftsmith.studies.corpus import AnswerSet


class TrainingCost(Options):
    """What a cell's training took. Seconds are those of a shared machine; ratios between cells come from positions."""

    training_seconds: float = Field(description="wall clock of the optimiser steps")
    training_steps: int
    training_positions: int = Field(description="tokens read by the drafter, over all epochs")
    training_cost: int = Field(description="training positions × unrolled steps")
    scored_positions: int = Field(default=0, description="tokens that were scored to choose the samples")
    target_positions: int = Field(default=0, description="tokens that the target read, for scores, features or both")
    pass_ratio: float = Field(
        default=0.0,
        description="seconds in which the target reads and scores a position ÷ seconds of training on one; AdaSPEC's "
        "study reckons it from multiply-adds",
    )
    scout_positions: int = Field(default=0, description="training positions of a drafter that only helps to choose")

    @property
    def charged_positions(self) -> float:
        """Training positions, with the target's passes and whatever the choice took charged as so many more."""
        return self.training_positions + self.scout_positions + self.target_positions * self.pass_ratio


class Row(TrainingCost):
    """One cell on one benchmark."""

    study: str
    method: str
    accounting: str
    keep: float
    seed: int
    domain: str
    benchmark: str
    temperature: float
    growth: str
    node_budget: int
    acceptance_length: float | None = Field(description="τ: committed tokens ÷ rounds, bonus included; micro average")
    alpha: float | None = Field(description="accepted ÷ (accepted + rejected) over all depths")
    alpha_by_depth: tuple[float | None, ...] = ()
    target_passes: int = Field(description="rounds: the target's passes over the answers, prefills left out")
    speedup: float | None = Field(default=None, description="measured by the wall clock, where that was asked for")
    prompts: tuple[str, ...] = Field(description="ids of the test answers; the counts below are in their order")
    committed: tuple[int, ...]
    rounds: tuple[int, ...]
    rejected: tuple[int, ...] = Field(default=(), description="rounds that ended with a refused token")
    extra: dict[str, str | int | float] = {}


def replayed_rows(
    drafter: Drafter,
    device: torch.device,
    growths: Sequence[GrowthOptions],
    tests: Iterable[AnswerSet],
    spec: TargetSpec,
    common: Mapping[str, object],
) -> list[Row]:
    """Acceptance on stored answers, a row for each test set and tree.

    Args:
        drafter: in the target's number format, on `device`.
        common: the fields that all of the cell's rows share.
    """
    rows = []
    for test in tests:
        for growth in growths:
            built = growth.build()
            generations = replay(Single(drafter, built), spec, test.answers, device=device)
            place = (test.domain, test.benchmark, test.temperature)
            rows.append(counted_row(common, *place, test.ids, growth.kind, built.budget, generations))
    return rows


def counted_row(
    common: Mapping[str, object],
    domain: str,
    benchmark: str,
    temperature: float,
    ids: Sequence[str],
    growth: str,
    node_budget: int,
    generations: Sequence[Generation],
) -> Row:
    """The row of one test set, from the rounds in which its answers were written or replayed.

    Args:
        common: the fields that all of the cell's rows share.
    """
    each = [metrics.count([g]) for g in generations]
    counts = metrics.count(generations)
    return Row.model_validate(
        {
            **common,
            "domain": domain,
            "benchmark": benchmark,
            "temperature": temperature,
            "growth": growth,
            "node_budget": node_budget,
            "acceptance_length": _number(counts.acceptance_length),
            "alpha": _number(metrics.adaspec(counts)),
            "alpha_by_depth": [_number(a) for a in counts.acceptance_by_depth],
            "target_passes": counts.rounds,
            "prompts": ids,
            "committed": [c.committed for c in each],
            "rounds": [c.rounds for c in each],
            "rejected": [sum(c.offered_at_depth) - sum(c.accepted_at_depth) for c in each],
        }
    )


def timed_rows(
    rows: Sequence[Row],
    target: HFTarget,
    drafter: Drafter,
    growth: GrowthOptions,
    sets: Mapping[str, Sequence[Conversation]],
    options: BenchOptions,
    folder: Path,
) -> list[Row]:
    """The rows, with the speed-up by the wall clock where it was measured: plain and speculative decoding interleaved.

    Args:
        sets: test prompts by benchmark.
        folder: where finished prompts are kept, so that a killed measurement goes on.
    """
    built = growth.build()
    measured = bench(target, Single(drafter, built), sets, options, folder / "bench.jsonl")
    found = {(result.set, result.temperature): result.speedup.estimate for result in results(measured)}
    main = (growth.kind, built.budget)
    return [
        row.model_copy(update={"speedup": found.get((row.benchmark, row.temperature))})
        if (row.growth, row.node_budget) == main
        else row
        for row in rows
    ]


def _number(value: float) -> float | None:
    return None if value != value else value
