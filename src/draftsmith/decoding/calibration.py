"""Temperatures that make drafters' probabilities comparable: what a merged trie is ranked by.

A drafter's probability for a node is *calibrated* if of all nodes that it gives 0.3, the target writes three in ten.
One temperature for each depth is fitted on replayed dev answers, by the likelihood of which drafted nodes were accepted
(as DSpark's sequential scaling, 2607.05147, depth by depth; likelihood instead of ECE).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.decoding.composition import Hidden, Single, SingleState, children_of
from draftsmith.decoding.growth import Growth, Limits
from draftsmith.decoding.hindsight import Counted, Step, unrolled
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafters.base import Drafter, Frontier, Proposal
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap

GRID = tuple(round(0.4 * 1.06**i, 4) for i in range(41))  # 0.4 … 4.1, with a step of 6 percent; 1 is put in
BINS = 10
ENOUGH = 50  # roots that tell a depth's temperature; deeper ones take the last


@dataclass(frozen=True)
class Tempered:
    """A drafter whose distributions are made flatter (T > 1) or sharper: q ∝ q^(1/T), T by depth, the last for deeper
    ones. What is likeliest below a node stays so; what is expanded and kept may change."""

    drafter: Drafter
    temperatures: tuple[float, ...]

    @property
    def wants(self) -> FeatureSpec:
        return self.drafter.wants

    @property
    def vocab(self) -> VocabMap:
        return self.drafter.vocab

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def observe(self, state: Any, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        return self._tempered(self.drafter.observe(state, tokens, features, lengths), 1)

    def expand(self, state: Any, frontier: Frontier) -> Proposal:
        return self._tempered(self.drafter.expand(state, frontier), frontier.depth + 1)

    def _tempered(self, proposal: Proposal, depth: int) -> Proposal:
        temperature = self.temperatures[min(depth, len(self.temperatures)) - 1]
        return proposal if temperature == 1 else Proposal((proposal.log_q / temperature).log_softmax(-1))


@dataclass
class Tally:
    """What the drafted children of tested nodes came to, by depth and temperature (`GRID`, and 1 at its end).

    All `[depths, temperatures]` or `[depths, temperatures, BINS]`, float64: negative log-likelihood; nodes, their
    probabilities and how many were accepted, by probability.
    """

    depths: int
    children: int
    roots: list[int] = field(default_factory=list)
    nll: Tensor = field(init=False)
    nodes: Tensor = field(init=False)
    probability: Tensor = field(init=False)
    accepted: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.roots = [0] * self.depths
        shape = (self.depths, len(GRID) + 1)
        self.nll = torch.zeros(shape, dtype=torch.float64)
        self.nodes, self.probability, self.accepted = (
            torch.zeros((*shape, BINS), dtype=torch.float64) for _ in range(3)
        )

    def add(self, step: Step, vocab: VocabMap) -> None:
        """Count the children that a drafter would have drafted at one depth of the committed path."""
        rows = step.tested.nonzero()[:, 0]
        if not len(rows):
            return
        log_q = step.log_q[rows].double()
        best = log_q.topk(min(self.children, log_q.shape[1]), dim=-1)
        hit = vocab.to_target(best.indices) == step.tokens[rows, None]
        at = step.depth - 1
        self.roots[at] += len(rows)
        for i, temperature in enumerate((*GRID, 1.0)):
            p = (best.values / temperature - (log_q / temperature).logsumexp(-1, keepdim=True)).exp()
            safe = p.clamp(1e-6, 1 - 1e-6)
            self.nll[at, i] -= float(torch.where(hit, safe, 1 - safe).log().sum())
            place = (p * BINS).long().clamp(max=BINS - 1).flatten().cpu()
            for total, weight in ((self.nodes, None), (self.probability, p), (self.accepted, hit.double())):
                values = None if weight is None else weight.flatten().cpu()
                total[at, i] += torch.bincount(place, values, minlength=BINS)

    def error(self, at: int, i: int) -> float:
        """Expected calibration error at a depth's temperature: mean |accepted − probability| over bins of nodes."""
        nodes = float(self.nodes[at, i].sum())
        return float((self.accepted[at, i] - self.probability[at, i]).abs().sum()) / nodes if nodes else float("nan")


@dataclass(frozen=True)
class Fitted:
    """One depth's temperature and what it changes: nats per drafted node, and calibration error."""

    depth: int
    temperature: float
    roots: int
    nll: tuple[float, float]  # before, after
    error: tuple[float, float]


def fitted(tally: Tally) -> list[Fitted]:
    """The temperature of greatest likelihood for each depth that was met; few roots take the depth's before."""
    found: list[Fitted] = []
    one = len(GRID)
    for at, roots in enumerate(tally.roots):
        if not roots:
            break
        best = int(tally.nll[at].argmin())
        if roots < ENOUGH:
            best = one if not found else _place(found[-1].temperature)
        nodes = float(tally.nodes[at, one].sum())
        found.append(
            Fitted(
                at + 1,
                1.0 if best == one else GRID[best],
                roots,
                (float(tally.nll[at, one]) / nodes, float(tally.nll[at, best]) / nodes),
                (tally.error(at, one), tally.error(at, best)),
            )
        )
    return found


def _place(temperature: float) -> int:
    return GRID.index(temperature) if temperature in GRID else len(GRID)


class Surveyed:
    """A drafter that drafts as ever and counts, after each round, what it would have drafted along the path."""

    def __init__(self, drafter: Drafter, growth: Growth, depth: int) -> None:
        self._counted = Counted(drafter)
        self._single = Single(self._counted, growth)
        self.tally = Tally(depth, children_of(self._single))

    @property
    def names(self) -> tuple[str, ...]:
        return self._single.names

    @property
    def wants(self) -> FeatureSpec:
        return self._single.wants

    @property
    def budget(self) -> int:
        return self._single.budget

    def start(self, batch: int, capacity: int) -> SingleState:
        return self._single.start(batch, capacity)

    def observe(self, state: SingleState, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        if state.proposal is not None:
            committed = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True)]
            tally = self.tally
            path = unrolled(self._counted, state.inner, state.proposal, committed, tally.depths, tally.children)
            for step in path:
                tally.add(step, self._counted.vocab)
        self._single.observe(state, tokens, hidden, lengths)

    def propose(self, state: SingleState, limits: Limits) -> DraftTree:
        return self._single.propose(state, limits)
