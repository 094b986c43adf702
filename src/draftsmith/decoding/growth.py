"""Growth policies: how one drafter's proposals become a draft tree.

All policies here are deterministic given the drafter's proposals, and what decides a tree's shape looks only at what is
committed or drafted: that is what lets the verifier draw the target's token first and look whether it is in the tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from draftsmith.decoding.tree import DraftTree, pruned
from draftsmith.drafters.base import Drafter, Frontier, Proposal
from draftsmith.foundation.options import Options


@dataclass(frozen=True)
class Limits:
    """What bounds a round's trees before anything is drafted.

    Attributes:
        room: `[B]` int64, the deepest a node may stand in each row (tokens left to write, positions left); 0: no nodes.
        ends: `[E]` int64, end tokens: nothing is drafted after one.
    """

    room: Tensor
    ends: Tensor


class Growth(Protocol):
    """Grows the batch's trees from a drafter whose state has just observed the committed tokens."""

    @property
    def budget(self) -> int:
        """Nodes of a tree at most (the root is none)."""
        ...

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        """Trees from what `observe` gave (`log_q [B, 1, Vd]`) and what `expand` adds."""
        ...


class GrowthOptions(Options):
    """Which growth, and how large."""

    kind: Literal["dynamic", "chain"] = Field(
        default="dynamic", description="dynamic: EAGLE-2's tree; chain: one token after another"
    )
    node_budget: int = Field(default=15, ge=1, description="drafted nodes verified in a round, root not counted")
    depth: int = Field(default=4, ge=1, description="deepest node; a chain has as many nodes")
    width: int = Field(default=4, ge=1, description="nodes expanded at each depth and children taken of each (dynamic)")

    def build(self) -> Growth:
        if self.kind == "chain":
            return ChainGrowth(self.depth)
        return DynamicGrowth(self.node_budget, self.depth, self.width)


@dataclass(frozen=True)
class ChainGrowth:
    """The likeliest token, then the likeliest after it, and so on: what servers without trees do."""

    depth: int

    @property
    def budget(self) -> int:
        return self.depth

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        return _expand(drafter, state, proposal, self.depth, 1, self.depth, limits)


@dataclass(frozen=True)
class DynamicGrowth:
    """EAGLE-2 (2406.16858, §4): expand the `width` nodes of largest path probability of each depth, `width` children
    each, then keep the `budget` nodes of largest path probability V = Π q along the path; of equals the shallower."""

    budget: int
    depth: int
    width: int

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        return _expand(drafter, state, proposal, self.depth, self.width, self.budget, limits)


def _expand(
    drafter: Drafter, state: Any, proposal: Proposal, depth: int, width: int, budget: int, limits: Limits
) -> DraftTree:
    log_q = proposal.log_q[:, 0]
    batch, vocab = log_q.shape
    children = min(width, vocab)
    deepest = min(depth, int(limits.room.max()) if batch else 0)
    device = log_q.device
    values, ids = log_q.topk(children, dim=-1)
    tokens = [drafter.vocab.to_target(ids)]
    parents = [torch.full_like(ids, -1)]
    scores = [values]
    depths = [torch.ones_like(ids)]
    # `chosen`: the frontier's places in the pool of all nodes; `parent_slots`: its parents' places among the expanded.
    chosen = torch.arange(children, device=device).expand(batch, -1)
    parent_slots = torch.full_like(ids, -1)
    frontier_tokens, frontier_scores = tokens[0], values
    pool = children
    expanded = 0
    for level in range(1, deepest):
        child_q = drafter.expand(state, Frontier(frontier_tokens, parent_slots, level)).log_q
        ended = torch.isin(frontier_tokens, limits.ends)
        best, best_ids = child_q.masked_fill(ended[:, :, None], -torch.inf).topk(children, dim=-1)
        path = (frontier_scores[:, :, None] + best).reshape(batch, -1)
        child_tokens = drafter.vocab.to_target(best_ids).reshape(batch, -1)
        tokens.append(child_tokens)
        parents.append(chosen[:, :, None].expand(-1, -1, children).reshape(batch, -1))
        scores.append(path)
        depths.append(torch.full_like(child_tokens, level + 1))
        if level + 1 < deepest:
            frontier_scores, order = path.topk(min(width, path.shape[1]), dim=-1)
            frontier_tokens = child_tokens.gather(1, order)
            chosen = pool + order
            parent_slots = expanded + order // children
        expanded += child_q.shape[1]
        pool += child_tokens.shape[1]
    size = sum(t.shape[1] for t in tokens)
    everything = DraftTree(
        torch.cat(tokens, 1),
        torch.cat(parents, 1),
        torch.cat(depths, 1),
        torch.cat(scores, 1).float(),
        torch.zeros((batch, size), dtype=torch.int64, device=device),
        torch.full((batch,), size, dtype=torch.int64, device=device),
    )
    return pruned(everything, budget, limits.room)
