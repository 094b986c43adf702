"""Sampled candidates: drawn from the drafter's distribution in a shape that is fixed before, and the keyed draws of all
rules for them.

Every draw is keyed by (seed, request, position) and a purpose that names what is drawn *and the depth at which*: a
position that one round drafted and did not commit is drafted anew by the next, with other numbers. Block verification
needs that, for what it commits depends on all that it drafted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from draftsmith.decoding.tree import DraftTree, Sampled
from draftsmith.drafters.base import Drafter, Frontier, Proposal
from draftsmith.foundation import seeding
from draftsmith.target.sampling import Sampling, processors

if TYPE_CHECKING:
    from draftsmith.decoding.growth import Limits

Purpose = Literal["proposal", "acceptance", "remainder"]


@dataclass(frozen=True)
class Draws:
    """What a round's draws are keyed by.

    Attributes:
        sampling: the target's; its seed, and how candidates are drawn (`proposed`).
        requests: what names each of the B sequences.
        positions: `[B]` int64, where the first drafted token would stand.
    """

    sampling: Sampling
    requests: Sequence[int | str]
    positions: Tensor

    def keys(self, purpose: Purpose, depth: int) -> Tensor:
        """`[B]` int64: keys of the draws for the token at `depth`."""
        places = (self.positions + (depth - 1))[:, None]
        return seeding.position_keys(self.sampling.seed, self.requests, places, f"{purpose} at depth {depth}")[:, 0]


def proposed(log_q: Tensor, sampling: Sampling) -> Tensor:
    """What candidates are drawn from: a drafter's log probabilities `[..., Vd]` → float64, normalised, −inf where 0.

    The target's temperature, top-k, top-p and min-p apply, as they do to the target itself: that keeps q near p. What
    reads the tokens before (penalties) or names tokens (suppressed, forced) does not: those cost acceptance, never
    exactness. At temperature 0 the likeliest token has probability 1.
    """
    scores = log_q.float()
    if sampling.temperature == 0.0:
        best = scores.argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf, dtype=torch.float64).scatter_(-1, best, 0.0)
    flat = scores.flatten(0, -2)
    unused = torch.empty((flat.shape[0], 0), dtype=torch.int64, device=flat.device)
    for warp in processors(sampling, device=flat.device)[1]:
        flat = warp(unused, flat)
    return flat.double().log_softmax(dim=-1).view(scores.shape)


def candidates(log_q: Tensor, count: int, replacement: bool, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Draw `count` candidates below each of W nodes of one depth.

    With the noise g of a key: independent ones are argmax(log q + g_j), each with its own g_j; those without
    replacement are the `count` largest of log q + g in order (Gumbel top-k: each is drawn from what the earlier left).
    All W nodes of a sequence use the same noise: only one of them can be on the committed path.

    Args:
        log_q: `[B, W, Vd]` float64.
        keys: `[B]` int64.

    Returns:
        Draft ids `[B, W, count]`, and their log q, −inf for what was not drawn because nothing was left.
    """
    vocab = log_q.shape[-1]
    if replacement:
        noise = _gumbel(keys, count * vocab).view(-1, 1, count, vocab)
        ids = (log_q[:, :, None] + noise).argmax(dim=-1)
    else:
        values, ids = (log_q + _gumbel(keys, vocab)[:, None]).topk(min(count, vocab), dim=-1)
        ids = torch.nn.functional.pad(ids, (0, count - ids.shape[-1]))
        values = torch.nn.functional.pad(values, (0, count - values.shape[-1]), value=-torch.inf)
        return ids, log_q.gather(-1, ids).masked_fill(values == -torch.inf, -torch.inf)
    return ids, log_q.gather(-1, ids)


def flip(chances: Tensor, keys: Tensor) -> Tensor:
    """Independent coins `[B, K]` bool that fall True with probability `chances [B, K]`, by keys `[B]`."""
    return seeding.uniform(keys, chances.shape[1]) < chances


def pick(weights: Tensor, keys: Tensor) -> Tensor:
    """One index `[B]` in proportion to `weights [B, V]` (float64, some above 0), by keys `[B]`."""
    return (weights.log() + _gumbel(keys, weights.shape[1])).argmax(dim=-1)


def _gumbel(keys: Tensor, n: int) -> Tensor:
    return -torch.log(-torch.log(seeding.uniform(keys, n)))


@dataclass(frozen=True)
class SampledGrowth:
    """Candidates drawn from the drafter's distribution in a fixed shape: `branches[d]` below every node of depth d.

    Ones alone make a chain. Nothing is cut by what was drawn; below an end token nothing is drafted, which changes
    nothing, for an accepted end ends the answer. Room is known before anything is drawn.
    """

    branches: tuple[int, ...]
    replacement: bool = False

    @property
    def depth(self) -> int:
        return len(self.branches)

    @property
    def budget(self) -> int:
        return sum(accumulate(self.branches, mul))

    def grow(self, drafter: Drafter, state: Any, proposal: Proposal, limits: Limits) -> DraftTree:
        """Trees with `sampled` set. ValueError: `limits` has no draws."""
        if limits.draws is None:
            raise ValueError("sampled candidates need the round's draws in their limits")
        draws = limits.draws
        batch, device = limits.room.shape[0], proposal.log_q.device
        deepest = min(self.depth, int(limits.room.max()) if batch else 0)
        laws: list[Tensor] = []
        tokens: list[Tensor] = []
        scores: list[Tensor] = []
        parents: list[Tensor] = []
        log_q, above, first = proposal.log_q, torch.zeros((batch, 1), device=device), -1
        for depth, count in enumerate(self.branches[:deepest], start=1):
            law = proposed(log_q, draws.sampling)
            ids, values = candidates(law, count, self.replacement, draws.keys("proposal", depth).to(device))
            wide = law.shape[1]
            laws.append(law)
            tokens.append(drafter.vocab.to_target(ids).flatten(1))
            scores.append((above[:, :, None] + values).flatten(1).float())
            parents.append(torch.arange(first, first + wide, device=device).repeat_interleave(count).expand(batch, -1))
            first += wide
            if depth < deepest:
                above = scores[-1].masked_fill(torch.isin(tokens[-1], limits.ends), -torch.inf)
                # every node is expanded, so the expanded nodes are the nodes
                log_q = drafter.expand(state, Frontier(tokens[-1], parents[-1], depth)).log_q
        widths = [math.prod(self.branches[:d]) for d in range(1, deepest + 1)]
        depths = torch.repeat_interleave(torch.arange(1, deepest + 1), torch.tensor(widths, dtype=torch.int64))
        depths = depths.to(device).expand(batch, -1)
        none = torch.zeros((batch, 0), dtype=torch.int64, device=device)
        rows = laws or [proposal.log_q[:, :0].double()]
        return DraftTree(
            torch.cat([none, *tokens], 1),
            torch.cat([none, *parents], 1),
            depths,
            torch.cat([none.float(), *scores], 1),
            torch.zeros_like(depths),
            (depths <= limits.room[:, None]).sum(1),
            Sampled(torch.cat(rows, 1), self.branches[:deepest], self.replacement, drafter.vocab.target_ids.to(device)),
        )
