"""What a drafter would have drafted along the path that was committed: its own unroll, after the round.

That path is evidence about every member, also about those that did not draft. A recurrent head's distribution at depth
2 and deeper comes from its own states, so telling it takes passes of its own; they are made here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftsmith.drafters.base import Drafter, Frontier, Proposal
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap


@dataclass
class CountedState:
    """A drafter's state and how many nodes it expanded since it last observed."""

    inner: Any
    expanded: int = 0


@dataclass(frozen=True)
class Counted:
    """A drafter that counts the nodes expanded in a round, so that more can be expanded below its root afterwards."""

    drafter: Drafter

    @property
    def wants(self) -> FeatureSpec:
        return self.drafter.wants

    @property
    def vocab(self) -> VocabMap:
        return self.drafter.vocab

    def start(self, batch: int, capacity: int) -> CountedState:
        return CountedState(self.drafter.start(batch, capacity))

    def observe(self, state: CountedState, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        state.expanded = 0
        return self.drafter.observe(state.inner, tokens, features, lengths)

    def expand(self, state: CountedState, frontier: Frontier) -> Proposal:
        state.expanded += frontier.tokens.shape[1]
        return self.drafter.expand(state.inner, frontier)


@dataclass(frozen=True)
class Step:
    """A depth of the path, seen by one drafter.

    Attributes:
        depth: 1 for the first committed token.
        log_q: `[B, Vd]` log probabilities after the path so far.
        tokens: `[B]` int64, what was committed there (target ids; anything where `tested` is false).
        tested: `[B]` bool: a token was committed there, and all before it were among the likeliest.
        hit: `[B]` bool: tested, and the token is among the `children` likeliest.
    """

    depth: int
    log_q: Tensor
    tokens: Tensor
    tested: Tensor
    hit: Tensor


def unrolled(
    drafter: Counted,
    state: CountedState,
    proposal: Proposal,
    committed: Sequence[Sequence[int]],
    depth: int,
    children: int,
) -> Iterator[Step]:
    """Walk the committed path with a drafter that still stands at the root, as deep as its likeliest tokens follow it.

    Each depth after the first is one pass of the drafter over one node a sequence, and is made only where a sequence's
    path goes on.

    Args:
        proposal: what `observe` gave at the root.
        committed: of each sequence, the tokens that the round committed.
        depth: of the deepest token looked at.
        children: how many of the likeliest tokens would have been drafted below a node.
    """
    device = proposal.log_q.device
    batch = len(committed)
    lengths = torch.tensor([len(row) for row in committed], device=device)
    width = max(int(lengths.max()), 1) if batch else 1
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in committed], device=device)
    log_q = proposal.log_q[:, 0]
    going = lengths > 0
    first = state.expanded
    for at in range(1, min(depth, width) + 1):
        token = tokens[:, at - 1]
        tested = going & (lengths >= at)
        best = log_q.topk(min(children, log_q.shape[1]), dim=-1)
        drafted = drafter.vocab.to_target(best.indices).masked_fill(best.values == -torch.inf, -1)
        going = tested & (drafted == token[:, None]).any(1)
        yield Step(at, log_q, token, tested, going)
        if at == min(depth, width) or not bool((going & (lengths > at)).any()):
            return
        parent = -1 if at == 1 else first + at - 2
        frontier = Frontier(token[:, None], torch.full_like(token, parent)[:, None], at)
        log_q = drafter.expand(state, frontier).log_q[:, 0]


def accepted_depths(steps: Iterator[Step], batch: int) -> list[int]:
    """To which depth each sequence's path would have been accepted."""
    found = torch.zeros(batch, dtype=torch.int64)
    for step in steps:
        found += step.hit.cpu().long()
    return found.tolist()
