"""Merging: all members draft, and one pass verifies what all of them drafted.

`concat` is TAPS' merge (2603.27027): the trees side by side under the root, nothing cut and nothing shared, so it
verifies as many nodes as all members together. `trie` shares what members agree on and keeps the likeliest nodes up to
a budget, so it can be compared with one drafter of that budget.

A trie can weigh members by what their claims came to lately in this very text (`recent`): a specialist outside its
domain stays sure of itself and is refused. At depth 1 all that a member claims is seen, whoever drafted: r is the share
of its likeliest first tokens' probability that was then committed, and its node of depth d counts r^d times its path
probability. It costs nothing, for members of a merge read every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from draftsmith.decoding.composition import (
    Composition,
    Hidden,
    Single,
    children_of,
    names_of,
    offsets_of,
    wants_of,
)
from draftsmith.decoding.costs import affordable
from draftsmith.decoding.growth import Limits
from draftsmith.decoding.tree import DraftTree, merged, take
from draftsmith.drafters.base import Proposal
from draftsmith.target.protocol import FeatureSpec

CAUTION = 2.0  # claims that a member is believed to have kept before anything is known of it


@dataclass
class MergeState:
    """One batch: the members' states, and by member `[B]` float64 what their first tokens claimed lately and what of it
    was committed, both sums that fade."""

    inner: list[Any]
    claimed: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Merge:
    """Members that all draft in every round.

    Attributes:
        parts: the members, in the order of their owners.
        way: `concat` or `trie`.
        nodes: a trie's nodes at most; default: as many as the largest member may draft.
        round_ms: milliseconds of a round of 0 … K nodes: a trie is then cut to as many nodes as pay.
        recent: of a trie, how much of a member's earlier claims each round keeps; 0: members are believed.
    """

    parts: tuple[Composition, ...]
    way: Literal["concat", "trie"] = "trie"
    nodes: int | None = None
    round_ms: tuple[float, ...] | None = None
    recent: float = 0.0

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

    def start(self, batch: int, capacity: int) -> MergeState:
        nothing = [[torch.zeros(batch, dtype=torch.float64) for _ in self.parts] for _ in range(2)]
        return MergeState([part.start(batch, capacity) for part in self.parts], *nothing)

    def observe(self, state: MergeState, tokens: Tensor, hidden: Hidden, lengths: Sequence[int]) -> None:
        for i, (part, own) in enumerate(zip(self.parts, state.inner, strict=True)):
            if self.recent and isinstance(part, Single) and own.proposal is not None:
                claimed, kept = first_claims(part, own.proposal, tokens)
                grew = torch.tensor([n > 0 for n in lengths])
                for sums, new in ((state.claimed, claimed), (state.kept, kept)):
                    sums[i] = torch.where(grew, self.recent * sums[i] + new, sums[i])
            part.observe(own, tokens, hidden, lengths)

    def propose(self, state: MergeState, limits: Limits) -> DraftTree:
        trees = [
            owned(part.propose(own, limits), first)
            for part, own, first in zip(self.parts, state.inner, offsets_of(self.parts), strict=True)
        ]
        if self.recent:
            trees = [believed(tree, c, k) for tree, c, k in zip(trees, state.claimed, state.kept, strict=True)]
        if self.way == "concat":
            return concatenated(trees)
        trie = merged(trees, self.budget, limits.room)
        return trie if self.round_ms is None else affordable(trie, self.round_ms)


def first_claims(part: Single, proposal: Proposal, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Of each sequence, `[B]` float64 on the CPU: the probability that a drafter gave its likeliest first tokens, as
    many as it drafts below a node, and 1 where the first committed token `tokens[:, 0]` is among them.

    Args:
        proposal: what it proposed before these tokens were committed.
    """
    log_q = proposal.log_q[:, 0]
    best = log_q.topk(min(children_of(part), log_q.shape[1]), dim=-1)
    ids = part.drafter.vocab.to_target(best.indices)
    hit = ((ids == tokens[:, :1].to(ids.device)) & (best.values > -torch.inf)).any(1)
    return best.values.double().exp().sum(1).cpu(), hit.double().cpu()


def believed(tree: DraftTree, claimed: Tensor, kept: Tensor) -> DraftTree:
    """The tree with path probabilities times r^depth, r = (kept + 2) / (claimed + 2) of each sequence, at most 1."""
    share = ((kept + CAUTION) / (claimed + CAUTION)).clamp(max=1).log().float().to(tree.log_q.device)
    return replace(tree, log_q=tree.log_q + tree.depths * share[:, None])


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
