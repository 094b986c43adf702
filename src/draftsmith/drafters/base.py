"""What decoding and training ask of a drafter.

A drafter reads committed truth (`observe`) and proposes the next token; it can go on from its own proposals (`expand`),
a frontier of tree nodes at a time. What it computed for nodes is *provisional*: the next `observe` drops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap


@dataclass(frozen=True)
class Proposal:
    """`log_q [B, N, Vd]`: for each of N nodes the log probabilities of its child over the draft vocabulary."""

    log_q: Tensor


@dataclass(frozen=True)
class Frontier:
    """Nodes to go on from, all of one depth.

    Attributes:
        tokens: `[B, W]` int64, target ids.
        parents: `[B, W]` int64, where the parent stands among the nodes expanded so far in this round (in the order
            given to `expand`); −1 for children of the root.
        depth: their depth, 1 for children of the root.
    """

    tokens: Tensor
    parents: Tensor
    depth: int


class Drafter(Protocol):
    """A module that proposes tokens. One instance serves one batch at a time; its state is the caller's to keep."""

    @property
    def wants(self) -> FeatureSpec:
        """The target features it reads: nothing for standalone drafts and n-grams."""
        ...

    @property
    def vocab(self) -> VocabMap:
        """Its draft vocabulary."""
        ...

    def start(self, batch: int, capacity: int) -> Any:
        """A fresh state for `batch` sequences of up to `capacity` positions."""
        ...

    def observe(self, state: Any, tokens: Tensor, features: Tensor | None, lengths: Sequence[int]) -> Proposal:
        """Read newly committed tokens and propose what follows the last of them.

        Args:
            tokens: `[B, L]` int64; on the first call the whole prompt and the first token, later what a round
                committed.
            features: `[B, L, F]`: the target's states *that produced* each token, i.e. those of the position before it.
                The very first token of a sequence has none: its column is ignored.
            lengths: tokens that count in each row; 0 leaves a row as it is.

        Returns:
            Proposal with `log_q [B, 1, Vd]`.
        """
        ...

    def expand(self, state: Any, frontier: Frontier) -> Proposal:
        """Go on from drafted nodes: `log_q [B, W, Vd]` for their children."""
        ...


def with_children(ancestors: Tensor, parents: Tensor) -> Tensor:
    """Who sees whom among a round's nodes once a frontier has joined them: each sees its ancestors and itself.

    Args:
        ancestors: `[B, P, P]` bool, of the nodes expanded so far.
        parents: `[B, W]` int64, as in `Frontier`.

    Returns:
        `[B, P + W, P + W]` bool.
    """
    width, old = parents.shape[1], ancestors.shape[1]
    # a first row that sees nothing stands for the root
    known = F.pad(ancestors, (0, width, 1, 0))
    inherited = known.gather(1, (parents + 1)[:, :, None].expand(-1, -1, old + width))
    own = F.pad(torch.eye(width, dtype=torch.bool, device=ancestors.device), (old, 0))
    return torch.cat([known[:, 1:], inherited | own], dim=1)
