"""What decoding asks of a target: the rows it verifies, the features it hands out, and the four calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Layer = int | Literal["final"]


@dataclass(frozen=True)
class TargetSpec:
    """What identifies a target and bounds its use."""

    name: str
    fingerprint: str
    vocab_size: int
    hidden_size: int
    layers: int
    max_positions: int
    eos_ids: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class FeatureSpec:
    """Which hidden states somebody wants: boundary ids `k` (transformers' `hidden_states[k]`, the input of layer k) and
    the final state (after the last norm)."""

    layers: tuple[int, ...] = ()
    final: bool = False

    def __or__(self, other: FeatureSpec) -> FeatureSpec:
        return FeatureSpec(tuple(sorted({*self.layers, *other.layers})), self.final or other.final)

    def __bool__(self) -> bool:
        return bool(self.layers) or self.final

    @property
    def names(self) -> tuple[Layer, ...]:
        """The states in the order in which `gather` joins them: auxiliary layers ascending, then the final one."""
        return (*self.layers, "final") if self.final else self.layers

    def gather(self, hidden: Mapping[Layer, Tensor]) -> Tensor | None:
        """Join the wanted states: `[B, R, H]` each → `[B, R, len(names)·H]`; None where nothing is wanted."""
        if not self:
            return None
        parts = [hidden[name] for name in self.names]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Rows:
    """The rows of one verification pass; row 0 is the root, the last committed token, which is not in the cache yet.

    Attributes:
        tokens: `[B, R]` int64.
        depths: `[B, R]` int64, 0 for the root; a row's position is the committed length + its depth.
        visible: `[B, R, R]` bool, `visible[b, i, j]`: row i attends to row j (its ancestors and itself).
    """

    tokens: Tensor
    depths: Tensor
    visible: Tensor

    @classmethod
    def roots(cls, tokens: Tensor) -> Rows:
        """Plain decoding's rows: the roots `[B]` alone."""
        batch = tokens.shape[0]
        return cls(
            tokens[:, None],
            torch.zeros((batch, 1), dtype=torch.int64, device=tokens.device),
            torch.ones((batch, 1, 1), dtype=torch.bool, device=tokens.device),
        )


@dataclass(frozen=True)
class TargetOut:
    """What a pass gives: `logits [B, R, V]` (`[B, V]` from `prefill`) or, from a stored answer, `choices [B, R]`, the
    token that the target writes after each row (−1 where the answer does not say); hidden states `[B, R, H]` by layer.
    """

    logits: Tensor | None
    hidden: Mapping[Layer, Tensor]
    choices: Tensor | None = None


class Target(Protocol):
    """A frozen model that decodes a batch. Everything has a batch axis and per-row lengths; `prefill` starts afresh."""

    @property
    def spec(self) -> TargetSpec: ...

    @property
    def device(self) -> torch.device: ...

    def prefill(self, ids: Tensor, lengths: Sequence[int], want: FeatureSpec, capacity: int) -> TargetOut:
        """Read prompts `ids [B, T]` (right-padded), `lengths[b]` tokens each, with room for `capacity` rows; gives the
        last row's logits `[B, V]` and all rows' features `[B, T, H]`."""
        ...

    def verify(self, rows: Rows, want: FeatureSpec) -> TargetOut:
        """One pass over `rows`; its cache rows stay provisional until `commit`."""
        ...

    def commit(self, rows: Tensor, counts: Sequence[int]) -> None:
        """Keep rows `rows[b, : counts[b]]` of the last pass, drop the others."""
        ...

    def select(self, sequences: Sequence[int]) -> None:
        """Let the other sequences leave the batch."""
        ...
