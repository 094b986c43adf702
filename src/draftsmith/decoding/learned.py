"""A route that learned from replayed dev answers which member pays: a small linear model of a member's root.

Fitting is `fitted`: each member alone is replayed over the same answers, and its accepted depth is regressed on what
could be seen at the root. Reading all members' roots costs a pass of each; `every` spreads it over several rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from draftsmith.decoding.composition import Seat
from draftsmith.decoding.routing import Committed, entropy, first_hits, proposed


@dataclass
class Recent:
    """How well a member's likeliest first tokens have fared lately, `[members][B]`: a running mean of hits.

    A hit: the first token that a round committed was among the member's `children` likeliest.
    """

    rate: list[list[float]]
    weight: float = 0.2

    def update(self, seats: Sequence[Seat], children: Sequence[int], committed: Committed) -> None:
        """Take in what a round committed, the seats still standing before it; all have caught up."""
        for rates, seat, wide in zip(self.rate, seats, children, strict=True):
            for b, hit in enumerate(first_hits(seat, wide, committed)):
                if hit is not None:
                    rates[b] += self.weight * (hit - rates[b])


FEATURES = ("one", "log_top_1", "entropy", "top_4_mass", "recent_hits")


def root_features(log_q: Tensor, recent: Sequence[float]) -> Tensor:
    """What the learned router sees of a member at a root: `[B, Vd]` and its recent hits → `[B, 5]` float64."""
    best = log_q.double().topk(min(4, log_q.shape[-1]), dim=-1).values
    rows = [
        torch.ones(len(recent), dtype=torch.float64),
        best[:, 0].clamp(min=-30).cpu(),
        entropy(log_q).cpu(),
        best.exp().sum(-1).cpu(),
        torch.tensor(list(recent), dtype=torch.float64),
    ]
    return torch.stack(rows, 1)


@dataclass
class _Learned:
    recent: Recent
    rounds: int = 0


@dataclass(frozen=True)
class LearnedRule:
    """The member of most expected tokens per millisecond drafts: (1 + w_m · f) / cost_m, f its features at the root.

    Attributes:
        weights: of each member, what its features say of the depth it will be accepted to (`routers.fitted`).
        round_ms: of each member, milliseconds of a round.
        children: of each member, how many of its likeliest first tokens count as a hit.
        every: rounds between two decisions; meanwhile only the chosen member reads.
    """

    weights: tuple[tuple[float, ...], ...]
    round_ms: tuple[float, ...]
    children: tuple[int, ...]
    every: int = 1

    def start(self, batch: int, members: int) -> _Learned:
        return _Learned(Recent([[0.5] * batch for _ in range(members)]))

    def learn(self, memory: _Learned, seats: Sequence[Seat], chosen: Sequence[int], committed: Committed) -> None:
        # In other rounds some may have caught up, for another sequence of the batch: that must not matter.
        if memory.rounds and (memory.rounds - 1) % self.every == 0:
            memory.recent.update(seats, self.children, committed)

    def choose(self, memory: _Learned, seats: Sequence[Seat], chosen: Sequence[int], live: Sequence[int]) -> list[int]:
        memory.rounds += 1
        if (memory.rounds - 1) % self.every:
            return list(chosen)
        worth = []
        for seat, weights, cost, recent in zip(seats, self.weights, self.round_ms, memory.recent.rate, strict=True):
            seat.read()
            depth = root_features(proposed(seat)[:, 0], recent) @ torch.tensor(weights, dtype=torch.float64)
            worth.append((1 + depth.clamp(min=0)) / cost)
        found: list[int] = torch.stack(worth).argmax(0).tolist()
        return found


@dataclass
class Survey:
    """What a member's own rounds looked like: features at each root, and the depth it was then accepted to."""

    seen: list[list[float]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SurveyRule:
    """Routes to its only member, and writes down what a router is fitted on."""

    children: tuple[int, ...]
    survey: Survey

    def start(self, batch: int, members: int) -> tuple[Recent, list[list[float]]]:
        return Recent([[0.5] * batch]), []

    def learn(self, memory: Any, seats: Sequence[Seat], chosen: Sequence[int], committed: Committed) -> None:
        recent, features = memory
        for row, seen in zip(committed, features, strict=False):
            if row:
                self.survey.seen.append(seen)
                self.survey.accepted.append(len(row) - 1)
        if features:
            recent.update(seats, self.children, committed)

    def choose(self, memory: Any, seats: Sequence[Seat], chosen: Sequence[int], live: Sequence[int]) -> list[int]:
        recent, features = memory
        seats[0].read()
        features[:] = root_features(proposed(seats[0])[:, 0], recent.rate[0]).tolist()
        return [0] * len(chosen)


def fitted(survey: Survey, ridge: float = 1.0) -> list[float]:
    """Weights w of least (accepted − w · f)² + ridge · |w without the constant|², float64, one for each feature.

    Raises:
        ValueError: nothing was seen.
    """
    if not survey.seen:
        raise ValueError("there was no round to learn from")
    x = torch.tensor(survey.seen, dtype=torch.float64)
    y = torch.tensor(survey.accepted, dtype=torch.float64)
    penalty = ridge * torch.eye(x.shape[1], dtype=torch.float64)
    penalty[0, 0] = 0
    found: list[float] = torch.linalg.solve(x.T @ x + penalty + 1e-9 * torch.eye(x.shape[1]), x.T @ y).tolist()
    return found
