"""Draft trees: what a round proposes, as flat tensors with a batch axis.

Nodes are in topological order (a parent stands before its children); the root, the last committed token, is no node.
Rows with fewer nodes than the widest are padded behind (`counts`). Everything works on whole tensors; the loops below
run over depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from draftsmith.foundation.errors import UserError
from draftsmith.target.protocol import Rows


@dataclass(frozen=True)
class Sampled:
    """How a tree's candidates were drawn, which the rules for sampled candidates need.

    The shape was fixed before any token was drawn: `branches[d]` candidates below the root (d = 0) and below every node
    of depth d. Nodes stand depth by depth, parents in order: internal node n is row n + 1 of `log_q`, the root row 0.
    A node with log_q −∞ in its tree was not drawn: nothing was left to draw, or it stands below an end token.

    Attributes:
        log_q: `[B, I, Vd]` float64, what the candidates below the root and each internal node were drawn from.
        branches: candidates drawn at each depth; fewer depths than asked for where there was no room.
        replacement: whether a node's candidates were drawn independently (else each from what the others left).
        target_ids: `[Vd]` int64, the target's ids of the draft vocabulary; outside it q is 0.
    """

    log_q: Tensor
    branches: tuple[int, ...]
    replacement: bool
    target_ids: Tensor


@dataclass(frozen=True)
class DraftTree:
    """Nodes `[B, N]` of a batch of draft trees.

    Attributes:
        tokens: `[B, N]` int64, target ids.
        parents: `[B, N]` int64, index of the parent node, −1 for the root's children.
        depths: `[B, N]` int64, 1 for the root's children.
        log_q: `[B, N]` float, log probability of the path from the root to the node, as its drafter sees it.
        owner: `[B, N]` int64, which drafter proposed the node.
        counts: `[B]` int64, nodes that are real in each row; the rest is padding.
        sampled: how the candidates were drawn; None for deterministic ones.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_q: Tensor
    owner: Tensor
    counts: Tensor
    sampled: Sampled | None = None

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def size(self) -> int:
        """Nodes of the widest row."""
        return self.tokens.shape[1]

    @property
    def real(self) -> Tensor:
        """`[B, N]` bool: which nodes are no padding."""
        return torch.arange(self.size, device=self.tokens.device) < self.counts[:, None]

    @property
    def live(self) -> Tensor:
        """`[B, N]` bool: which nodes hold a drafted token; of sampled candidates those that were drawn."""
        return self.real & (self.log_q > -torch.inf) if self.sampled else self.real

    def ancestors(self) -> Tensor:
        """`[B, N, N]` bool: `[b, i, j]` if node j is node i or stands above it."""
        return self.lineage

    @cached_property
    def lineage(self) -> Tensor:
        """What `ancestors` says, computed once."""
        batch, size = self.tokens.shape
        device = self.tokens.device
        # (1 + P)^n is where n steps up lead, P being each node's step to its parent: squared until no path is longer.
        steps = torch.zeros((batch, size, 1 + size), device=device).scatter_(2, self.parents[:, :, None] + 1, 1.0)
        reach = steps[:, :, 1:] + torch.eye(size, device=device)
        for _ in range(max(size - 1, 0).bit_length()):
            reach = (reach @ reach).sign_()
        return reach.bool()

    def rows(self, roots: Tensor) -> Rows:
        """The verification rows of these trees under roots `[B]`; padding rows see only the root and themselves."""
        batch, size = self.tokens.shape
        device = self.tokens.device
        visible = torch.zeros((batch, 1 + size, 1 + size), dtype=torch.bool, device=device)
        visible[:, :, 0] = True
        visible[:, 1:, 1:] = self.ancestors()
        return Rows(
            torch.cat([roots[:, None].to(device), self.tokens], dim=1),
            torch.cat([torch.zeros((batch, 1), dtype=torch.int64, device=device), self.depths], dim=1),
            visible,
        )


def empty(batch: int, device: torch.device) -> DraftTree:
    """Trees without nodes: verifying them is plain decoding."""
    none = torch.zeros((batch, 0), dtype=torch.int64, device=device)
    return DraftTree(none, none, none, none.float(), none, torch.zeros(batch, dtype=torch.int64, device=device))


def pruned(tree: DraftTree, budget: int, room: Tensor | None = None) -> DraftTree:
    """Keep the `budget` nodes of largest path probability, and with each node its ancestors.

    A path's probability never exceeds its parent's, so the largest `budget` nodes are connected; ties go to the node
    that comes first, which is never deeper than a later one of the same path.

    Args:
        budget: nodes to keep at most.
        room: `[B]` int64, the largest depth that still fits in each row (tokens left to write, positions left); deeper
            nodes go.

    Raises:
        UserError: the candidates were sampled.
    """
    value = tree.log_q.masked_fill(~tree.real, -torch.inf)  # nodes of probability 0 are padding too
    if room is not None:
        value = value.masked_fill(tree.depths > room.to(value.device)[:, None], -torch.inf)
    kept = min(budget, tree.size)
    order = value.sort(dim=1, descending=True, stable=True)
    chosen = order.indices[:, :kept]
    counts = (order.values[:, :kept] > -torch.inf).sum(dim=1)
    # Back to the order of creation, which is topological; what does not count goes behind.
    rank = torch.where(order.values[:, :kept] > -torch.inf, chosen, chosen + tree.size)
    chosen = rank.sort(dim=1).values % max(tree.size, 1)
    width = int(counts.max()) if kept else 0
    return take(tree, chosen[:, :width], counts)


def take(tree: DraftTree, chosen: Tensor, counts: Tensor) -> DraftTree:
    """The trees of nodes `chosen [B, M]` (ascending, ancestors included), `counts[b]` of them real.

    Raises:
        UserError: the candidates were sampled.
    """
    _deterministic(tree)
    batch = tree.batch
    device = tree.tokens.device
    place = torch.full((batch, tree.size + 1), -1, dtype=torch.int64, device=device)
    real = torch.arange(chosen.shape[1], device=device) < counts[:, None]
    slots = torch.where(real, chosen, tree.size)
    place.scatter_(1, slots, torch.arange(chosen.shape[1], device=device).expand(batch, -1))
    parents = tree.parents.gather(1, chosen)
    parents = torch.where(parents >= 0, place.gather(1, parents.clamp(min=0)), parents)

    def pad(values: Tensor, fill: float) -> Tensor:
        return values.gather(1, chosen).masked_fill(~real, fill)

    return DraftTree(
        pad(tree.tokens, 0),
        parents.masked_fill(~real, -1),
        pad(tree.depths, 1),
        pad(tree.log_q, -torch.inf),
        pad(tree.owner, 0),
        counts,
    )


def merged(trees: Sequence[DraftTree], budget: int, room: Tensor | None = None) -> DraftTree:
    """In each row one trie of several trees, cut to the `budget` likeliest nodes, which hold their ancestors.

    Nodes with equal tokens on the path from the root are one node. Its log_q is the largest that any tree gave it, its
    owner the one who gave that (of equals the earlier tree's). A parent's largest is never below its child's, so what
    is kept is connected.

    Args:
        trees: at least one, `[B, N_i]` each, of the same B; owners are theirs, nodes of probability 0 go.
        budget, room: as in `pruned`.

    Raises:
        ValueError: no trees, or batches of different sizes.
        UserError: the candidates of a tree were sampled.
    """
    if not trees or len({tree.batch for tree in trees}) > 1:
        raise ValueError("merged needs at least one tree, all of the same batch")
    for tree in trees:
        _deterministic(tree)
    offsets = [sum(tree.size for tree in trees[:i]) for i in range(len(trees))]
    real = torch.cat([tree.real for tree in trees], 1)
    tokens = torch.cat([tree.tokens for tree in trees], 1)
    depths = torch.cat([tree.depths for tree in trees], 1).masked_fill(~real, 0)
    log_q = torch.cat([tree.log_q for tree in trees], 1).masked_fill(~real, -torch.inf)
    parents = torch.cat(
        [torch.where(tree.parents >= 0, tree.parents + o, -1) for tree, o in zip(trees, offsets, strict=True)], 1
    )
    size = tokens.shape[1]
    if not size:
        return trees[0]
    alike = (tokens[:, :, None] == tokens[:, None, :]) & (depths[:, :, None] == depths[:, None, :])
    index = torch.arange(size, device=tokens.device).expand_as(tokens)
    first = index  # of each node, the first node of the same path; right to a depth more with each turn
    for _ in range(max(int(depths.max()), 1)):
        above = torch.where(parents >= 0, first.gather(1, parents.clamp(min=0)), -1)
        first = (alike & (above[:, :, None] == above[:, None, :])).byte().argmax(2)
    best = torch.full_like(log_q, -torch.inf).scatter_reduce(1, first, log_q, "amax")
    giver = torch.where(log_q == best.gather(1, first), index, size)
    giver = torch.full_like(index, size).scatter_reduce(1, first, giver, "amin").clamp(max=size - 1)
    trie = DraftTree(
        tokens,
        above,
        depths.clamp(min=1),
        best.masked_fill(first != index, -torch.inf),
        torch.cat([tree.owner for tree in trees], 1).gather(1, giver),
        torch.full_like(trees[0].counts, size),
    )
    return pruned(trie, budget, room)


def _deterministic(tree: DraftTree) -> None:
    if tree.sampled:
        raise UserError(
            "sampled candidates can't be pruned, re-ranked or merged: the shape of their tree is fixed before they are "
            "drawn, or verification would favour what was kept; let this drafter draft alone, or choose another growth"
        )
