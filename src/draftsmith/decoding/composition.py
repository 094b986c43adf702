"""Who drafts: one drafter, or several put together. The engine only sees trees.

A composition owns its members' states, hands them what was committed, and grows the round's trees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from draftsmith.decoding.growth import Growth, Limits
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafters.base import Drafter, Proposal
from draftsmith.target.protocol import FeatureSpec, Layer


class Composition(Protocol):
    """What the engine asks of whoever drafts."""

    @property
    def wants(self) -> FeatureSpec: ...

    @property
    def budget(self) -> int:
        """Nodes of a round's tree at most."""
        ...

    def start(self, batch: int, capacity: int) -> Any: ...

    def observe(self, state: Any, tokens: Tensor, hidden: Mapping[Layer, Tensor], lengths: Sequence[int]) -> None:
        """Committed tokens `[B, L]` and the target's states that produced them, by layer (see `Drafter.observe`)."""
        ...

    def propose(self, state: Any, limits: Limits) -> DraftTree: ...


@dataclass
class _SingleState:
    inner: Any
    proposal: Proposal | None = None


@dataclass(frozen=True)
class Single:
    """One drafter and its growth."""

    drafter: Drafter
    growth: Growth

    @property
    def wants(self) -> FeatureSpec:
        return self.drafter.wants

    @property
    def budget(self) -> int:
        return self.growth.budget

    def start(self, batch: int, capacity: int) -> _SingleState:
        return _SingleState(self.drafter.start(batch, capacity))

    def observe(
        self, state: _SingleState, tokens: Tensor, hidden: Mapping[Layer, Tensor], lengths: Sequence[int]
    ) -> None:
        state.proposal = self.drafter.observe(state.inner, tokens, self.wants.gather(hidden), lengths)

    def propose(self, state: _SingleState, limits: Limits) -> DraftTree:
        assert state.proposal is not None
        return self.growth.grow(self.drafter, state.inner, state.proposal, limits)
