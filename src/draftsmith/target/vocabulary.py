"""Which of the target's tokens a drafter may propose: the map between a reduced draft vocabulary and the target's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from draftsmith.foundation.errors import UserError


@dataclass(frozen=True, eq=False)
class VocabMap:
    """A draft vocabulary: the target's ids that it holds, in increasing order.

    Draft id i stands for target id `target_ids[i]`; both directions and both stored forms (`d2t`, `t2d`) follow.

    Attributes:
        target_ids: `[Vd]` int64 on the CPU, strictly increasing, each in `0 … V-1`.
        vocab_size: V, the width of the target's logits (a padded embedding included).
        filled: how many of the ids were never counted and only fill the map up to its size.
    """

    target_ids: Tensor
    vocab_size: int
    filled: int = 0
    _tables: dict[tuple[str, torch.device], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        ids = self.target_ids
        if ids.dtype != torch.int64 or ids.dim() != 1 or ids.numel() == 0:
            raise ValueError(f"target_ids must be a non-empty 1-D int64 tensor, not {list(ids.shape)} {ids.dtype}")
        if int(ids[0]) < 0 or int(ids[-1]) >= self.vocab_size or bool((ids.diff() <= 0).any()):
            raise ValueError(f"target_ids must increase strictly within 0 … {self.vocab_size - 1}")

    @classmethod
    def identity(cls, vocab_size: int) -> VocabMap:
        """The whole target vocabulary."""
        return cls(torch.arange(vocab_size), vocab_size)

    @classmethod
    def from_counts(cls, counts: Tensor, size: int, always: Iterable[int], vocab_size: int) -> VocabMap:
        """The ids in `always`, then the most frequent ones, then, if too few were counted, the lowest ids left.

        Args:
            counts: `[V]`, how often each target id occurred in what the drafter is to write. Of equally frequent
                ids the lower one is taken.
            size: Vd; cut to V where it is larger.
            always: ids that are in whatever their count: end and special tokens.
            vocab_size: V.

        Raises:
            UserError: `always` alone needs more than `size` ids.
        """
        if counts.shape != (vocab_size,):
            raise ValueError(f"counts must be [{vocab_size}], not {list(counts.shape)}")
        size = min(size, vocab_size)
        kept = torch.zeros(vocab_size, dtype=torch.bool)
        kept[torch.tensor(sorted(set(always)), dtype=torch.int64)] = True
        if int(kept.sum()) > size:
            raise UserError(
                f"a draft vocabulary of {size} has no room for the {int(kept.sum())} end and special tokens "
                "that it must hold: make it larger"
            )
        counts = counts.cpu()
        by_count = torch.argsort(counts, descending=True, stable=True)
        candidates = by_count[(counts[by_count] > 0) & ~kept[by_count]]
        kept[candidates[: size - int(kept.sum())]] = True
        filled = size - int(kept.sum())
        kept[(~kept).nonzero().squeeze(1)[:filled]] = True
        return cls(kept.nonzero().squeeze(1), vocab_size, filled)

    @classmethod
    def from_d2t(cls, d2t: Tensor, vocab_size: int) -> VocabMap:
        """The map that a checkpoint stores as offsets: target id = draft id + `d2t[draft id]`.

        Raises:
            UserError: the offsets lead outside the target's vocabulary or to ids out of order.
        """
        if d2t.dim() != 1 or not d2t.numel():
            raise UserError(f"d2t must be a list of offsets, one for each draft token; its shape is {list(d2t.shape)}")
        ids = torch.arange(d2t.numel()) + d2t.detach().cpu().to(torch.int64)
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise UserError(
                f"d2t leads to target ids {int(ids.min())} … {int(ids.max())}, outside the target's vocabulary of "
                f"{vocab_size}: it belongs to another target, or holds target ids where offsets "
                "(target id - draft id) are expected"
            )
        if bool((ids.diff() <= 0).any()):
            raise UserError(
                "d2t does not lead to strictly increasing target ids: draft ids must be in the target's order"
            )
        return cls(ids, vocab_size)

    @property
    def size(self) -> int:
        """Vd, the number of draft ids."""
        return self.target_ids.numel()

    @property
    def is_identity(self) -> bool:
        """Whether draft and target ids are the same, so that nothing needs translating."""
        return self.size == self.vocab_size

    @property
    def d2t(self) -> Tensor:
        """`[Vd]` int64 offsets as checkpoints store them: target id - draft id."""
        return self.target_ids - torch.arange(self.size)

    @property
    def t2d(self) -> Tensor:
        """`[V]` bool as checkpoints store it: whether the target id is in the draft vocabulary."""
        present = torch.zeros(self.vocab_size, dtype=torch.bool)
        present[self.target_ids] = True
        return present

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that name this map in fingerprints."""
        content = self.target_ids.numpy().astype("<i8").tobytes()
        return hashlib.sha256(f"{self.vocab_size}:".encode() + content).hexdigest()[:16]

    def to_target(self, ids: Tensor) -> Tensor:
        """Draft ids `[…]` → target ids `[…]` int64, on the ids' device."""
        return self._table("target", ids.device)[ids]

    def to_draft(self, ids: Tensor) -> Tensor:
        """Target ids `[…]` → draft ids `[…]` int64, -1 where the target's token is not in the draft vocabulary."""
        return self._table("draft", ids.device)[ids]

    def coverage(self, counts: Tensor) -> float:
        """Share of counted tokens that the drafter can propose at all; `counts [V]`, of text unseen by `from_counts`.

        Raises:
            ValueError: nothing was counted.
        """
        counts = counts.cpu().to(torch.float64)
        total = float(counts.sum())
        if total <= 0:
            raise ValueError("coverage of no tokens: the counts are all zero")
        return float(counts[self.target_ids].sum()) / total

    def _table(self, direction: str, device: torch.device) -> Tensor:
        if (direction, device) not in self._tables:
            table = self.target_ids
            if direction == "draft":
                table = torch.full((self.vocab_size,), -1, dtype=torch.int64)
                table[self.target_ids] = torch.arange(self.size)
            self._tables[direction, device] = table.to(device)
        return self._tables[direction, device]
