"""Drafting depth by depth: what the growth policies whose trees are pruned afterwards have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.decoding.drawn import Draws
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafters.base import Drafter, Frontier, Proposal


@dataclass(frozen=True)
class Limits:
    """What bounds a round's trees before anything is drafted.

    Attributes:
        room: `[B]` int64, the deepest a node may stand in each row (tokens left to write, positions left); 0: no nodes.
        ends: `[E]` int64, end tokens: nothing is drafted after one.
        draws: what random draws are keyed by, and where the first drafted token would stand.
    """

    room: Tensor
    ends: Tensor
    draws: Draws | None = None


Worth = Callable[[Tensor, Tensor, int], Tensor]
"""From the path log probabilities of the nodes to expand `[B, W]` and of all nodes so far `[B, N]`, and the depth of
the former: whether to draft below them, `[B]` bool."""


def dynamic(
    drafter: Drafter,
    state: Any,
    proposal: Proposal,
    depth: int,
    width: int,
    limits: Limits,
    worth: Worth | None = None,
) -> DraftTree:
    """Everything drafted where of each depth the `width` likeliest nodes are expanded, see `drafted`."""

    def frontier(level: Tensor, pool: Tensor) -> int:
        return min(width, level.shape[1])

    return drafted(drafter, state, proposal, depth, width, limits, frontier, worth)


def drafted(
    drafter: Drafter,
    state: Any,
    proposal: Proposal,
    depth: int,
    width: int,
    limits: Limits,
    frontier: Callable[[Tensor, Tensor], int],
    worth: Worth | None = None,
) -> DraftTree:
    """Everything drafted, depth by depth, `width` children of each node of the frontier.

    Args:
        frontier: how many of the last depth's likeliest nodes are expanded, from the path log probabilities of that
            depth `[B, M]` and of all nodes so far `[B, N]`; 0 ends the drafting.
        worth: whether a sequence is drafted deeper; None: always.
    """
    log_q = proposal.log_q[:, 0]
    batch, vocab = log_q.shape
    children = min(width, vocab)
    deepest = min(depth, int(limits.room.max()) if batch else 0)
    device = log_q.device
    values, ids = log_q.topk(children, dim=-1)
    tokens = [drafter.vocab.to_target(ids)]
    parents = [torch.full_like(ids, -1)]
    scores = [values]
    pool, expanded = 0, 0
    for level in range(1, deepest):
        wide = frontier(scores[-1], torch.cat(scores, 1))
        if wide == 0:
            break
        if level == 1:
            best_scores = values[:, :wide]
            order = torch.arange(wide, device=device).expand(batch, -1)
            parent_slots = torch.full_like(order, -1)
        else:
            best_scores, order = scores[-1].topk(wide, dim=-1)
            parent_slots = expanded + order // children
            expanded = tokens[-1].shape[1] // children + expanded
        frontier_tokens = tokens[-1].gather(1, order)
        ended = torch.isin(frontier_tokens, limits.ends)
        if worth:
            going = worth(best_scores.masked_fill(ended, -torch.inf), torch.cat(scores, 1), level)
            best_scores = best_scores.masked_fill(~going[:, None], -torch.inf)
            # A pass is spared where no sequence goes deeper, at the price of asking the device.
            if not bool((best_scores > -torch.inf).any()):
                break
        chosen = pool + order  # the frontier's places in the pool of all nodes
        child_q = drafter.expand(state, Frontier(frontier_tokens, parent_slots, level)).log_q
        best, best_ids = child_q.masked_fill(ended[:, :, None], -torch.inf).topk(children, dim=-1)
        pool += tokens[-1].shape[1]
        tokens.append(drafter.vocab.to_target(best_ids).reshape(batch, -1))
        parents.append(chosen[:, :, None].expand(-1, -1, children).reshape(batch, -1))
        scores.append((best_scores[:, :, None] + best).reshape(batch, -1))
    return tree_of(tokens, parents, scores)


def tree_of(tokens: Sequence[Tensor], parents: Sequence[Tensor], scores: Sequence[Tensor]) -> DraftTree:
    """The trees of nodes given depth by depth, each `[B, M]`."""
    batch = tokens[0].shape[0]
    device = tokens[0].device
    widths = [t.shape[1] for t in tokens]
    depths = torch.repeat_interleave(torch.arange(1, len(widths) + 1), torch.tensor(widths)).to(device)
    return DraftTree(
        torch.cat(list(tokens), 1),
        torch.cat(list(parents), 1),
        depths.expand(batch, -1),
        torch.cat(list(scores), 1).float(),
        torch.zeros((batch, sum(widths)), dtype=torch.int64, device=device),
        torch.full((batch,), sum(widths), dtype=torch.int64, device=device),
    )
