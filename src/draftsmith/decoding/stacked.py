"""Specialists of one trunk draft in one batched pass, then are merged or routed like any members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from draftsmith.decoding.composition import Hidden, SingleState
from draftsmith.decoding.growth import Growth, Limits
from draftsmith.decoding.merging import concatenated
from draftsmith.decoding.routing import confidence, rows_of
from draftsmith.decoding.tree import DraftTree, merged
from draftsmith.drafters.base import Drafter
from draftsmith.target.protocol import FeatureSpec


@dataclass(frozen=True)
class Stacked:
    """What `Merge` and `ConfidenceRoute` do, over specialists that one drafter runs side by side.

    Attributes:
        drafter: of `shared_trunk.stacked`; sequence b of specialist i is its sequence i·B + b.
        names: the specialists, in that order.
        way: as the members are put together.
        nodes: of a trie at most; default: the growth's.
    """

    drafter: Drafter
    growth: Growth
    names: tuple[str, ...]
    way: Literal["trie", "concat", "confidence"] = "trie"
    nodes: int | None = None

    @property
    def wants(self) -> FeatureSpec:
        return self.drafter.wants

    @property
    def budget(self) -> int:
        if self.way == "concat":
            return len(self.names) * self.growth.budget
        return self.growth.budget if self.way == "confidence" or self.nodes is None else self.nodes

    def start(self, batch: int, capacity: int) -> SingleState:
        return SingleState(self.drafter.start(len(self.names) * batch, capacity))

    def observe(self, state: SingleState, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        n = len(self.names)
        features = self.wants.gather(hidden)
        every = features.repeat(n, 1, 1) if features is not None else None
        state.proposal = self.drafter.observe(state.inner, tokens.repeat(n, 1), every, list(lengths) * n)

    def propose(self, state: SingleState, limits: Limits) -> DraftTree:
        assert state.proposal is not None
        n, batch = len(self.names), len(limits.room)
        tree = self.growth.grow(self.drafter, state.inner, state.proposal, replace(limits, room=limits.room.repeat(n)))
        trees = [_part(tree, i * batch, batch, i) for i in range(n)]
        if self.way == "concat":
            return concatenated(trees)
        if self.way == "confidence":
            return rows_of(trees, torch.stack([confidence(t) for t in trees]).argmax(0))
        return merged(trees, self.budget, limits.room)


def _part(tree: DraftTree, first: int, batch: int, owner: int) -> DraftTree:
    """Sequences first … first + batch − 1, as this owner's."""
    rows = slice(first, first + batch)
    return DraftTree(
        tree.tokens[rows],
        tree.parents[rows],
        tree.depths[rows],
        tree.log_q[rows],
        torch.full_like(tree.owner[rows], owner),
        tree.counts[rows],
    )
