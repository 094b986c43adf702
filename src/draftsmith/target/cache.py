"""The target's key/value cache: preallocated, per-row lengths, and able to keep any of the rows it was just given.

transformers' own caches either grow by concatenation (a copy a round) or can only be cropped, and the meaning of `crop`
changed between versions. A speculative round writes a whole draft tree and keeps one path of it, so this cache writes
*provisional* rows behind each sequence's committed ones and `keep` moves the accepted path to its final place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class KeyValueCache(Cache):
    """Keys and values of every layer, `[B, heads, capacity, head_dim]`, with `lengths[b]` committed rows in sequence b.

    Slots `lengths[b] … lengths[b] + R − 1` hold the provisional rows of the pass under way. The slot of a row says
    nothing about its position: rotary embeddings were applied to the keys before they came here.
    """

    def __init__(self, batch: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.batch = batch
        self.capacity = capacity
        self.lengths: list[int] = [0] * batch
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = 0
        self._held = 0
        self._index: tuple[Tensor, Tensor] | None = None

    @property
    def span(self) -> int:
        """Slots that a pass sees: the longest sequence's committed rows and the provisional ones."""
        return max(self.lengths) + self._held + self._rows

    def expect(self, rows: int, device: torch.device, held: int = 0) -> None:
        """Announce a pass of `rows` provisional rows a sequence, behind `held` ones of passes before it that stay
        provisional (a drafter's nodes); grows the buffers if they would not fit."""
        self._rows, self._held = rows, held
        if self.span > self.capacity:
            self._grow(max(self.span, 2 * self.capacity))
        if len(set(self.lengths)) == 1:
            self._index = None
        else:
            start = torch.tensor(self.lengths, device=device)
            self._index = (
                torch.arange(self.batch, device=device)[:, None],
                start[:, None] + held + torch.arange(rows, device=device),
            )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the pass's rows `[B, heads, R, head_dim]` of one layer; returns the layer's rows up to `span`."""
        while len(self._keys) <= layer_idx:
            shape = (self.batch, key_states.shape[1], self.capacity, key_states.shape[3])
            self._keys.append(key_states.new_zeros(shape))
            self._values.append(value_states.new_zeros((*shape[:3], value_states.shape[3])))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if self._index is None:
            start = self.lengths[0] + self._held
            keys[:, :, start : start + self._rows] = key_states
            values[:, :, start : start + self._rows] = value_states
        else:
            sequence, slot = self._index
            keys[sequence, :, slot] = key_states.transpose(1, 2)
            values[sequence, :, slot] = value_states.transpose(1, 2)
        return keys[:, :, : self.span], values[:, :, : self.span]

    def keep(self, rows: Tensor, counts: Sequence[int]) -> None:
        """Commit provisional rows `rows[b, : counts[b]]` of each sequence, in that order; the rest is dropped.

        Args:
            rows: `[B, L]` int64, indices among the provisional rows (0 is the first row of the pass), strictly
                increasing.
            counts: how many of them count in each sequence.
        """
        width = max(counts, default=0)
        if width and any(rows[b, : counts[b]].tolist() != list(range(counts[b])) for b in range(self.batch)):
            device = self._keys[0].device
            sequence = torch.arange(self.batch, device=device)[:, None]
            start = torch.tensor(self.lengths, device=device)[:, None]
            source = start + rows[:, :width].to(device)
            goal = start + torch.arange(width, device=device)
            for keys, values in zip(self._keys, self._values, strict=True):
                keys[sequence, :, goal] = keys[sequence, :, source]
                values[sequence, :, goal] = values[sequence, :, source]
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        self._rows = self._held = 0

    def select(self, sequences: Sequence[int]) -> None:
        """Keep only these sequences of the batch, in this order."""
        index = torch.tensor(list(sequences), dtype=torch.int64)
        self._keys = [k.index_select(0, index.to(k.device)) for k in self._keys]
        self._values = [v.index_select(0, index.to(v.device)) for v in self._values]
        self.lengths = [self.lengths[i] for i in sequences]
        self.batch = len(self.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows before the pass; transformers asks only where no position ids are given."""
        return max(self.lengths)

    def _grow(self, capacity: int) -> None:
        def wider(old: Tensor) -> Tensor:
            new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
            new[:, :, : old.shape[2]] = old
            return new

        self._keys = [wider(k) for k in self._keys]
        self._values = [wider(v) for v in self._values]
        self.capacity = capacity
