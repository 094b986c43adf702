"""Merging: all members draft, and one pass verifies what all of them drafted.

`concat` is TAPS' merge (2603.27027): the trees side by side under the root, nothing cut and nothing shared, so it
verifies as many nodes as all members together. `trie` shares what members agree on and keeps the likeliest nodes up to
a budget, so it can be compared with one drafter of that budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from draftsmith.decoding.composition import Composition, Hidden, names_of, offsets_of, wants_of
from draftsmith.decoding.costs import affordable
from draftsmith.decoding.growth import Limits
from draftsmith.decoding.tree import DraftTree, merged, take
from draftsmith.target.protocol import FeatureSpec


@dataclass(frozen=True)
class Merge:
    """Members that all draft in every round.

    Attributes:
        parts: the members, in the order of their owners.
        way: `concat` or `trie`.
        nodes: a trie's nodes at most; default: as many as the largest member may draft.
        round_ms: milliseconds of a round of 0 … K nodes: a trie is then cut to as many nodes as pay.
    """

    parts: tuple[Composition, ...]
    way: Literal["concat", "trie"] = "trie"
    nodes: int | None = None
    round_ms: tuple[float, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return names_of(self.parts)

    @property
    def wants(self) -> FeatureSpec:
        return wants_of(self.parts)

    @property
    def budget(self) -> int:
        if self.way == "concat":
            return sum(part.budget for part in self.parts)
        most = max(part.budget for part in self.parts) if self.nodes is None else self.nodes
        return most if self.round_ms is None else min(most, len(self.round_ms) - 1)

    def start(self, batch: int, capacity: int) -> list[Any]:
        return [part.start(batch, capacity) for part in self.parts]

    def observe(self, state: list[Any], tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        for part, own in zip(self.parts, state, strict=True):
            part.observe(own, tokens, hidden, lengths)

    def propose(self, state: list[Any], limits: Limits) -> DraftTree:
        trees = [
            owned(part.propose(own, limits), first)
            for part, own, first in zip(self.parts, state, offsets_of(self.parts), strict=True)
        ]
        if self.way == "concat":
            return concatenated(trees)
        trie = merged(trees, self.budget, limits.room)
        return trie if self.round_ms is None else affordable(trie, self.round_ms)


def owned(tree: DraftTree, first: int) -> DraftTree:
    """The tree with its owners numbered from `first`."""
    return replace(tree, owner=tree.owner + first) if first else tree


def concatenated(trees: Sequence[DraftTree]) -> DraftTree:
    """The trees `[B, N_i]` side by side under the root, as they are: equal nodes of two trees are two nodes."""
    offsets = [sum(tree.size for tree in trees[:i]) for i in range(len(trees))]
    parents = [torch.where(tree.parents >= 0, tree.parents + o, -1) for tree, o in zip(trees, offsets, strict=True)]
    everything = DraftTree(
        torch.cat([tree.tokens for tree in trees], 1),
        torch.cat(parents, 1),
        torch.cat([tree.depths for tree in trees], 1),
        torch.cat([tree.log_q for tree in trees], 1),
        torch.cat([tree.owner for tree in trees], 1),
        torch.stack([tree.counts for tree in trees]).sum(0),
    )
    # A tree's padding stands before the next tree's nodes: a stable sort puts it behind all.
    real = torch.cat([tree.real for tree in trees], 1)
    order = real.byte().sort(dim=1, descending=True, stable=True).indices
    width = int(everything.counts.max()) if everything.size else 0
    return take(everything, order[:, :width], everything.counts)
