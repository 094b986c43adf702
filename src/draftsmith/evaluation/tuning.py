"""Choose the draft tree that pays on this machine: acceptance by replay on dev, costs measured once.

    speed-up of a tree on a set = τ · verify(1 row) / (observe + passes · expand + verify(1 + nodes))

A tree that stops deepening where that promises little (`least_mass`) makes fewer draft passes on some sets than on
others; how many is counted on a few dev answers, decoded alone as in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from draftsmith.decoding import profile
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import DynamicGrowth, Growth, GrowthOptions
from draftsmith.drafters.base import Drafter, Frontier, Proposal
from draftsmith.evaluation import metrics
from draftsmith.evaluation.replayed import replay
from draftsmith.foundation import console
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.replay import StoredAnswer
from draftsmith.target.vocabulary import VocabMap

COST_NOISE = 0.03  # relative: between two measurements of a round's cost on a shared machine
COUNTED = 6  # answers of a set on which draft passes are counted


@dataclass(frozen=True)
class Tried:
    """A tree and what is expected of it: `acceptance_length`, `draft_ms` and `speedup` by set."""

    growth: GrowthOptions
    acceptance_length: Mapping[str, float]
    draft_ms: Mapping[str, float]
    verify_ms: float
    speedup: Mapping[str, float]

    @property
    def expected(self) -> float:
        """The geometric mean of the sets' speed-ups: a tree that is good for one set only is not taken."""
        return _geometric(self.speedup.values())

    @property
    def mean_length(self) -> float:
        return _geometric(self.acceptance_length.values())


@dataclass(frozen=True)
class Tuning:
    """All trees tried, the best of them, and milliseconds of a verification by its rows."""

    trees: Sequence[Tried]
    best: Tried
    verify_ms: Mapping[int, float]

    def to_json(self) -> dict[str, Any]:
        """As `profile.json` keeps it."""
        rows = [
            {
                "growth": tree.growth.model_dump(mode="json"),
                "acceptance_length": dict(tree.acceptance_length),
                "draft_ms": dict(tree.draft_ms),
                "verify_ms": tree.verify_ms,
                "speedup": dict(tree.speedup),
            }
            for tree in self.trees
        ]
        return {"verify_ms": {str(n): cost for n, cost in self.verify_ms.items()}, "growths": rows}


def tuned(
    target: HFTarget, drafter: Drafter, answers: Mapping[str, Sequence[StoredAnswer]], growths: Sequence[GrowthOptions]
) -> Tuning:
    """Try each growth on the dev answers of each set.

    Acceptance by replay is exact, costs measured in a few seconds are not: of what is equally fast within the noise,
    the tree that commits most is taken.
    """
    costs = profile.verify_cost(target)
    trees = []
    with console.progress("trying draft trees on dev", len(growths), "trees") as bar:
        for options in growths:
            trees.append(_tried(target, drafter, answers, options, costs))
            bar.advance(1)
    fastest = max(tree.expected for tree in trees)
    near = [tree for tree in trees if tree.expected >= (1 - COST_NOISE) * fastest]
    return Tuning(trees, max(near, key=lambda tree: tree.mean_length), costs)


def show(tuning: Tuning) -> None:
    """Print what was tried."""
    sets = list(tuning.best.speedup)

    def cell(tree: Tried, name: str) -> str:
        return f"{tree.acceptance_length[name]:.2f} · {tree.speedup[name]:.2f}×"

    console.table(
        "Draft trees on dev: acceptance length by replay · speed-up expected from costs measured here",
        ["nodes", "depth", "width", "least mass", *sets, "draft ms", "verify ms"],
        [
            [
                *(str(getattr(tree.growth, key)) for key in ("node_budget", "depth", "width", "least_mass")),
                *(cell(tree, name) for name in sets),
                "–".join(f"{ms:.1f}" for ms in sorted({round(v, 1) for v in tree.draft_ms.values()})),
                f"{tree.verify_ms:.1f}" + (" <" if tree is tuning.best else ""),
            ]
            for tree in tuning.trees
        ],
    )


def _tried(
    target: HFTarget,
    drafter: Drafter,
    answers: Mapping[str, Sequence[StoredAnswer]],
    options: GrowthOptions,
    costs: dict[int, float],
) -> Tried:
    growth = options.build()
    verify = profile.interpolated(costs, 1 + growth.budget)
    cost = _draft_cost(target, drafter, growth)
    lengths: dict[str, float] = {}
    draft: dict[str, float] = {}
    speedup: dict[str, float] = {}
    for name, own in answers.items():
        found = metrics.count(replay(Single(drafter, growth), target.spec, own, device=target.device)).acceptance_length
        if math.isnan(found):
            continue
        lengths[name] = found
        draft[name] = cost.ms(growth, drafter, target, own[:COUNTED])
        speedup[name] = found * profile.interpolated(costs, 1) / (draft[name] + verify)
    return Tried(options, lengths, draft, verify, speedup)


@dataclass(frozen=True)
class _DraftCost:
    """Milliseconds of drafting a round: `full` as it is, `observe` of it whatever the tree, `expand` a pass."""

    full: float
    observe: float
    expand: float

    def ms(self, growth: Growth, drafter: Drafter, target: HFTarget, answers: Sequence[StoredAnswer]) -> float:
        if not isinstance(growth, DynamicGrowth) or not growth.least_mass:
            return self.full
        counting = _Counting(drafter)
        generations = replay(Single(counting, growth), target.spec, answers, batch=1, device=target.device)
        rounds = sum(len(generation.rounds) for generation in generations)
        return self.observe + self.expand * counting.passes / max(1, rounds)


def _draft_cost(target: HFTarget, drafter: Drafter, growth: Growth) -> _DraftCost:
    if not isinstance(growth, DynamicGrowth) or not growth.least_mass or growth.depth == 1:
        return _DraftCost(profile.draft_cost(target, Single(drafter, growth)), 0.0, 0.0)
    flat = profile.draft_cost(target, Single(drafter, replace(growth, depth=1, least_mass=0.0)))
    deep = profile.draft_cost(target, Single(drafter, replace(growth, least_mass=0.0)))
    return _DraftCost(deep, flat, max(0.0, deep - flat) / (growth.depth - 1))


class _Counting:
    """A drafter whose draft passes are counted."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.passes = 0

    @property
    def wants(self) -> FeatureSpec:
        return self.inner.wants

    @property
    def vocab(self) -> VocabMap:
        return self.inner.vocab

    def start(self, batch: int, capacity: int) -> Any:
        return self.inner.start(batch, capacity)

    def observe(self, state: Any, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        return self.inner.observe(state, tokens, features, lengths)

    def expand(self, state: Any, frontier: Frontier) -> Proposal:
        self.passes += 1
        return self.inner.expand(state, frontier)


def _geometric(values: Any) -> float:
    found = list(values)
    return math.exp(sum(map(math.log, found)) / len(found)) if found else 0.0
