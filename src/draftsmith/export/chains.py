"""How many speculative tokens a server that drafts chains should be given: what one more is accepted, and costs.

τ(k) = 1 + α₁ + α₁α₂ + … + α₁⋯α_k            tokens a round, the bonus included
c(k) = (verify(k + 1) + draft(k)) ÷ verify(1)  cost of a round in plain tokens
speed-up ≈ τ(k) ÷ c(k)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from draftsmith.decoding.profile import interpolated


@dataclass(frozen=True)
class Chain:
    """A chain of `tokens`.

    Attributes:
        tokens: k; 0 is plain decoding.
        acceptance: α_k, of rounds that accepted k − 1 those that accept k (1 for k = 0).
        acceptance_length: τ(k).
        round_cost: c(k).
    """

    tokens: int
    acceptance: float
    acceptance_length: float
    round_cost: float

    @property
    def speedup(self) -> float:
        """τ(k) ÷ c(k), expected."""
        return self.acceptance_length / self.round_cost


def chains(alphas: Sequence[float], verify_ms: Mapping[int, float], draft_ms: Sequence[float]) -> list[Chain]:
    """Chains of 0, 1, …, len(alphas) tokens.

    Args:
        alphas: α₁, α₂, … of *chains*: those of a tree are higher, for there a depth has several candidates.
        verify_ms: milliseconds of a pass over so many rows (`profile.verify_cost`).
        draft_ms: milliseconds of drafting 1, 2, … tokens.
    """
    plain = interpolated(dict(verify_ms), 1)
    out = [Chain(0, 1.0, 1.0, 1.0)]
    lengths = accumulate(accumulate(alphas, mul), initial=1.0)
    next(lengths)
    for k, (alpha, length, drafting) in enumerate(zip(alphas, lengths, draft_ms, strict=True), start=1):
        cost = (interpolated(dict(verify_ms), k + 1) + drafting) / plain
        out.append(Chain(k, alpha, length, cost))
    return out


def best(found: Sequence[Chain]) -> Chain:
    """The chain of the highest expected speed-up; of equals the shortest. 0 tokens: speculation does not pay."""
    return max(found, key=lambda chain: (chain.speedup, -chain.tokens))
