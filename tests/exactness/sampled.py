"""Checks of the rules for sampled candidates: the law of what the engine commits, enumerated and counted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.decoding import drawn
from draftsmith.decoding.composition import Single
from draftsmith.decoding.drawn import Draws, SampledGrowth
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import Limits
from draftsmith.decoding.trace import Generation
from draftsmith.decoding.tree import DraftTree
from draftsmith.decoding.verification import Verification
from draftsmith.target import sampling as sampling_module
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.laws import law_by_hand
from tests.exactness.table import Ids, TableDrafter, TableTarget, logits

PROMPT = (1, 0, 1)


@dataclass(frozen=True)
class Case:
    """A rule, a shape to draw, and vocabularies (`draft`: the target's ids that the drafter knows; None: all)."""

    rule: Verification
    growth: SampledGrowth
    vocab: int
    draft: Ids | None = None

    def engine(self, ends: Ids = ()) -> Engine:
        known = torch.arange(self.vocab) if self.draft is None else torch.tensor(self.draft)
        drafter = TableDrafter(VocabMap(known, self.vocab))
        return Engine(TableTarget(self.vocab, ends), Single(drafter, self.growth), self.rule)


CASES = {
    "chain": Case("token", SampledGrowth((1, 1)), 4),
    "chain-reduced": Case("token", SampledGrowth((1, 1)), 4, (0, 1, 3)),
    "independent": Case("token", SampledGrowth((2, 1), True), 3),
    "without-replacement": Case("token", SampledGrowth((2, 1)), 3),
    "more-than-there-are": Case("token", SampledGrowth((3,)), 3, (0, 2)),
    "block": Case("block", SampledGrowth((1, 1, 1)), 3),
    "block-reduced": Case("block", SampledGrowth((1, 1)), 4, (0, 1, 3)),
}

# Enough tokens for what is left of p to have several, which is too many to enumerate three tokens deep.
WIDE = {
    "independent-wide": Case("token", SampledGrowth((2,), True), 5),
    "without-replacement-wide": Case("token", SampledGrowth((3,)), 5),
}


def target_law(sampling: Sampling, vocab: int, ends: Ids, prefix: Ids, count: int) -> dict[Ids, float]:
    """Probability of every text of `count` tokens after `prefix` (shorter where one ends), by hand from the table."""
    done: dict[Ids, float] = {}
    level: dict[Ids, float] = {(): 1.0}
    for _ in range(count):
        longer: dict[Ids, float] = {}
        for tail, mass in level.items():
            context = (*prefix, *tail)
            for token, p in enumerate(law_by_hand(logits("p", context, vocab).tolist(), list(context), sampling)):
                (done if token in ends else longer)[(*tail, token)] = mass * p
        level = longer
    return {**done, **level}


@dataclass
class Scripts:
    """Every random choice of a batch is taken from its row's script; behind its end a row takes the first outcome and
    lists the others as scripts yet to be run. So each row of each batch is another leaf of the tree of all outcomes."""

    rows: list[tuple[int, ...]]
    masses: list[float] = field(default_factory=list)
    taken: list[list[int]] = field(default_factory=list)
    others: list[tuple[int, ...]] = field(default_factory=list)
    # Where nothing can depend on a choice it is none: in rows that have finished, and deeper than there is room.
    finished: set[int] = field(default_factory=set)
    room: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.masses = [1.0] * len(self.rows)
        self.taken = [[] for _ in self.rows]

    def choose(self, b: int, outcomes: Sequence[float]) -> int:
        """Which outcome row b takes; those of probability 0 do not exist."""
        possible = [i for i, p in enumerate(outcomes) if p > 0]
        if b in self.finished:
            return possible[0]
        place = len(self.taken[b])
        if place < len(self.rows[b]):
            choice = self.rows[b][place]
        else:
            choice = possible[0]
            self.others += [(*self.taken[b], other) for other in possible[1:]]
        self.taken[b].append(choice)
        self.masses[b] *= outcomes[choice]
        return choice

    def candidates(self, log_q: Tensor, count: int, replacement: bool, keys: Tensor) -> tuple[Tensor, Tensor]:
        """One uniform number decides for all nodes of a depth, each by the quantiles of its own law of ordered draws:
        a coupling with as few outcomes as can be, and as lawful as any, for only one of the nodes can be committed."""
        batch, wide, _ = log_q.shape
        ids = torch.zeros((batch, wide, count), dtype=torch.int64)
        dead = torch.zeros((batch, wide, count), dtype=torch.bool)
        for b, depth in enumerate(keys.tolist()):
            if depth > self.room[b]:
                continue
            laws = [ordered_draws(row.exp().tolist(), count, replacement) for row in log_q[b]]
            borders = sorted({0.0, 1.0, *(x for law in laws for x in itertools.accumulate(law.values()) if x < 1)})
            choice = self.choose(b, [high - low for low, high in itertools.pairwise(borders)])
            middle = (borders[choice] + borders[choice + 1]) / 2
            for w, law in enumerate(laws):
                sums = list(itertools.accumulate(law.values()))
                draws = list(law)[next(i for i, x in enumerate(sums) if middle < x or i == len(sums) - 1)]
                for j, token in enumerate(draws):
                    ids[b, w, j], dead[b, w, j] = max(token, 0), token < 0
        return ids, log_q.gather(-1, ids).masked_fill(dead, -torch.inf)

    def flip(self, chances: Tensor, keys: Tensor) -> Tensor:
        made = torch.zeros_like(chances, dtype=torch.bool)
        for b, row in enumerate(chances.tolist()):
            for j, chance in enumerate(row):
                assert -1e-12 <= chance <= 1 + 1e-12
                made[b, j] = bool(self.choose(b, [1 - chance, chance])) if 0 < chance < 1 else chance >= 1
        return made

    def pick(self, weights: Tensor, keys: Tensor) -> Tensor:
        assert bool((weights.sum(1) > 0).all()), "there is nothing to draw from"
        shares = weights / weights.sum(1, keepdim=True)
        return torch.tensor([self.choose(b, row) for b, row in enumerate(shares.tolist())])

    def patched(self, patch: pytest.MonkeyPatch) -> None:
        """Take the place of all randomness; keys are the depths at which something is drawn."""
        grow = SampledGrowth.grow

        def noted(growth: SampledGrowth, drafter: Any, state: Any, proposal: Any, limits: Limits) -> DraftTree:
            self.room = limits.room.tolist()
            return grow(growth, drafter, state, proposal, limits)

        patch.setattr(SampledGrowth, "grow", noted)
        patch.setattr(Draws, "keys", lambda draws, purpose, depth: torch.full_like(draws.positions, depth))
        patch.setattr(sampling_module, "draw", lambda scores, keys, s: torch.ones(len(scores), dtype=torch.int64))
        for name in ("candidates", "flip", "pick"):
            patch.setattr(drawn, name, getattr(self, name))


def ordered_draws(q: list[float], count: int, replacement: bool) -> dict[Ids, float]:
    """The law of `count` draws in order; −1 where nothing was left to draw."""
    law: dict[Ids, float] = {(): 1.0}
    for _ in range(count):
        longer: dict[Ids, float] = {}
        for draws, mass in law.items():
            left = [0.0 if x in draws and not replacement else p for x, p in enumerate(q)]
            if not any(p > 0 for p in left):
                longer[(*draws, -1)] = mass
            for x, p in enumerate(left):
                if p > 0:
                    longer[(*draws, x)] = mass * p / math.fsum(left)
        law = longer
    return law


def enumerated(case: Case, sampling: Sampling, ends: Ids, count: int) -> tuple[dict[Ids, float], set[int]]:
    """The law of what the engine writes after `PROMPT` and a first token 1, and the accepted depths that occurred."""
    law: dict[Ids, float] = {}
    accepted: set[int] = set()
    waiting: list[tuple[int, ...]] = [()]
    while waiting:
        scripts = Scripts(waiting[:2000])
        waiting = waiting[2000:]
        with pytest.MonkeyPatch.context() as patch:
            scripts.patched(patch)
            for event in case.engine(ends).stream([list(PROMPT)] * len(scripts.rows), sampling, 1 + count):
                if isinstance(event, Generation):
                    b = event.request
                    scripts.finished.add(b)
                    assert len(scripts.taken[b]) >= len(scripts.rows[b]), "a script was not played to its end"
                    text = tuple(event.token_ids[1:])
                    law[text] = law.get(text, 0.0) + scripts.masses[b]
                    accepted.update(r.accepted for r in event.rounds)
        waiting += scripts.others
    return law, accepted


def law_is_the_targets(case: Case, sampling: Sampling, ends: Ids, count: int) -> set[int]:
    """Every outcome of every draw through the engine: texts have the target's probabilities to 1e-10."""
    found, accepted = enumerated(case, sampling, ends, count)
    expected = target_law(sampling, case.vocab, ends, (*PROMPT, 1), count)
    possible = {text for text, p in expected.items() if p > 0}
    assert found.keys() <= possible, f"impossible texts {sorted(found.keys() - possible)[:3]}"
    worst = max(possible, key=lambda text: abs(found.get(text, 0.0) - expected[text]))
    error = abs(found.get(worst, 0.0) - expected[worst])
    assert error < 1e-10, f"{worst}: {found.get(worst, 0.0)} instead of {expected[worst]}"
    return accepted


def frequencies_are_the_targets(case: Case, sampling: Sampling, count: int = 2, draws: int = 6000) -> None:
    """Keyed draws through the engine, as users get them: how often each text of `count` tokens is written."""
    expected = target_law(sampling, case.vocab, (), (*PROMPT, 1), count)
    found = dict.fromkeys(expected, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "draw", lambda scores, keys, s: torch.ones(len(scores), dtype=torch.int64))
        for g in case.engine().generate([list(PROMPT)] * draws, sampling, 1 + count):
            found[tuple(g.token_ids[1:])] += 1
    texts = sorted(expected)
    chi_squared_is_small([found[t] for t in texts], [expected[t] for t in texts])


def chi_squared_is_small(found: Sequence[int], law: Sequence[float], most: float = 5.0) -> None:
    """Pearson's χ² lies within `most` standard deviations of its mean (5: even a hundred such checks rarely err)."""
    total = sum(found)
    assert not any(n for n, p in zip(found, law, strict=True) if p == 0), "something of probability 0 was drawn"
    cells = [(n, p * total) for n, p in zip(found, law, strict=True) if p > 0]
    k = len(cells) - 1
    statistic = math.fsum((n - e) ** 2 / e for n, e in cells)
    assert statistic - k < most * math.sqrt(2 * k), f"chi-squared {statistic:.1f} with {k} degrees of freedom"
