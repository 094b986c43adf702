"""Who drafts: one drafter, or several put together. The engine only sees trees.

A composition owns its members' states, hands them what was committed, and grows the round's trees. Several drafters are
put together by routing (`routing.py`: one of them drafts) or by merging (`merging.py`: all of them do).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any, Protocol

import torch
from torch import Tensor

from draftsmith.decoding.growth import Growth, Limits
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafters.base import Drafter, Proposal
from draftsmith.target.protocol import FeatureSpec, Layer

Hidden = Mapping[Layer, Tensor]


class Composition(Protocol):
    """What the engine asks of whoever drafts."""

    @property
    def names(self) -> tuple[str, ...]:
        """The drafters by number: owner i of a node is called `names[i]`."""
        ...

    @property
    def wants(self) -> FeatureSpec: ...

    @property
    def budget(self) -> int:
        """Nodes of a round's tree at most."""
        ...

    def start(self, batch: int, capacity: int) -> Any: ...

    def observe(self, state: Any, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        """Committed tokens `[B, L]` and the target's states that produced them, by layer (see `Drafter.observe`)."""
        ...

    def propose(self, state: Any, limits: Limits) -> DraftTree: ...


@dataclass
class SingleState:
    inner: Any
    proposal: Proposal | None = None


@dataclass(frozen=True)
class Single:
    """One drafter and its growth."""

    drafter: Drafter
    growth: Growth
    name: str = "drafter"

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def wants(self) -> FeatureSpec:
        return self.drafter.wants

    @property
    def budget(self) -> int:
        return self.growth.budget

    def start(self, batch: int, capacity: int) -> SingleState:
        return SingleState(self.drafter.start(batch, capacity))

    def observe(self, state: SingleState, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        state.proposal = self.drafter.observe(state.inner, tokens, self.wants.gather(hidden), lengths)

    def propose(self, state: SingleState, limits: Limits) -> DraftTree:
        assert state.proposal is not None
        return self.growth.grow(self.drafter, state.inner, state.proposal, limits)


@dataclass
class Seat:
    """A member's place in one batch. What was committed waits until the member is needed, and is then read in one pass.

    Attributes:
        waiting: tokens `[B, L]`, states by layer and lengths of the rounds not read yet.
    """

    part: Composition
    state: Any
    waiting: list[tuple[Tensor, Hidden, Sequence[int]]] = field(default_factory=list)

    def hear(self, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        """Keep what a round committed for later."""
        self.waiting.append((tokens, {name: hidden[name] for name in self.part.wants.names}, lengths))

    def read(self) -> None:
        """Catch up: observe all that waits, in one pass."""
        if self.waiting:
            tokens, hidden, lengths = joined(self.waiting)
            self.waiting.clear()
            self.part.observe(self.state, tokens, hidden, lengths)

    @property
    def proposal(self) -> Proposal | None:
        """What the member proposes after the last committed token; None where it has not caught up or is itself put
        together."""
        return self.state.proposal if isinstance(self.part, Single) and not self.waiting else None


def seated(parts: Sequence[Composition], batch: int, capacity: int) -> list[Seat]:
    """Fresh seats for a batch."""
    return [Seat(part, part.start(batch, capacity)) for part in parts]


def joined(pieces: Sequence[tuple[Tensor, Hidden, Sequence[int]]]) -> tuple[Tensor, Hidden, list[int]]:
    """What several rounds committed as if one had: each row's real tokens and states one after another, padded behind.

    Args:
        pieces: tokens `[B, L_i]`, states by layer `[B, L_i, H]` and lengths of each round.
    """
    if len(pieces) == 1:
        tokens, hidden, lengths = pieces[0]
        return tokens, hidden, list(lengths)
    together = [sum(column) for column in zip(*(lengths for _, _, lengths in pieces), strict=True)]
    tokens = torch.cat([piece for piece, _, _ in pieces], 1)
    real = torch.cat(
        [
            torch.arange(piece.shape[1]) < torch.tensor(list(lengths), dtype=torch.int64)[:, None]
            for piece, _, lengths in pieces
        ],
        1,
    )
    # A stable sort leaves the real columns of each row in order and puts the padding behind them.
    order = real.byte().sort(dim=1, descending=True, stable=True).indices[:, : max(1, max(together))].to(tokens.device)
    states = {
        name: torch.cat([hidden[name] for _, hidden, _ in pieces], 1).gather(
            1, order[:, :, None].expand(-1, -1, states.shape[2])
        )
        for name, states in pieces[0][1].items()
    }
    return tokens.gather(1, order), states, together


def wants_of(parts: Sequence[Composition]) -> FeatureSpec:
    """The target's states that any of the members reads."""
    return reduce(or_, (part.wants for part in parts), FeatureSpec())


def names_of(parts: Sequence[Composition]) -> tuple[str, ...]:
    """The members' drafters, numbered through."""
    return tuple(name for part in parts for name in part.names)


def offsets_of(parts: Sequence[Composition]) -> list[int]:
    """The number of each member's first drafter among all."""
    return [sum(len(part.names) for part in parts[:i]) for i in range(len(parts))]


def children_of(part: Composition) -> int:
    """How many of the likeliest tokens a member drafts below one node."""
    growth = getattr(part, "growth", None)
    paths = getattr(growth, "paths", None)
    return max(path[-1] for path in paths) + 1 if paths else int(getattr(growth, "width", 1))
