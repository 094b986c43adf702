"""A stored answer as a target: what it wrote is known, so a round needs no pass of the model.

For deterministic candidates a round over a stored answer has exactly the engine's law: the accepted path is the longest
drafted path that the answer follows, and its features were stored. Validation during training, studies and comparisons
of compositions use it; wall-clock never does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.target.protocol import FeatureSpec, Layer, Rows, TargetOut, TargetSpec


@dataclass(frozen=True)
class StoredAnswer:
    """What the target read and wrote, with its hidden states.

    Attributes:
        ids: prompt and answer.
        prompt_length: tokens of the prompt.
        hidden: hidden states by layer, `[len(ids), H]` each (only the layers that drafters want are needed).
        complete: whether the answer ends by itself; a cut answer ends where its limit was.
    """

    ids: Sequence[int]
    prompt_length: int
    hidden: Mapping[Layer, Tensor]
    complete: bool = True


class ReplayTarget:
    """A batch of stored answers as a `Target`; `verify` says what they write next instead of giving logits."""

    def __init__(self, spec: TargetSpec, answers: Sequence[StoredAnswer], device: torch.device | None = None) -> None:
        self.spec = spec
        self.device = device or torch.device("cpu")
        self._answers = list(answers)
        longest = max(len(a.ids) for a in answers)
        self._ids = torch.full((len(self._answers), longest + 1), -1, dtype=torch.int64)
        for b, answer in enumerate(self._answers):
            self._ids[b, : len(answer.ids)] = torch.tensor(list(answer.ids))
        self._ids = self._ids.to(self.device)
        layers: list[Layer] = list(self._answers[0].hidden)
        self._hidden: dict[Layer, Tensor] = {}
        for layer in layers:
            states = self._answers[0].hidden[layer]
            joined = torch.zeros((len(self._answers), longest + 1, states.shape[1]), dtype=states.dtype)
            for b, answer in enumerate(self._answers):
                joined[b, : len(answer.ids)] = answer.hidden[layer]
            self._hidden[layer] = joined.to(self.device)
        self._lengths = torch.zeros(len(self._answers), dtype=torch.int64, device=self.device)

    def prefill(self, ids: Tensor, lengths: Sequence[int], want: FeatureSpec, capacity: int) -> TargetOut:
        self._lengths = torch.tensor(list(lengths), device=self.device)
        first = self._ids.gather(1, self._lengths[:, None])
        width = ids.shape[1]
        return TargetOut(None, {name: self._hidden[name][:, :width] for name in want.names}, first)

    def verify(self, rows: Rows, want: FeatureSpec) -> TargetOut:
        last = self._ids.shape[1] - 1
        positions = (self._lengths[:, None] + rows.depths).clamp(max=last)
        # A row lies on the answer's path if it and all its ancestors are the answer's tokens.
        own = rows.tokens == self._ids.gather(1, positions)
        on_path = ~(rows.visible & ~own[:, None, :]).any(dim=2)
        follows = self._ids.gather(1, (positions + 1).clamp(max=last))
        hidden = {
            name: states.gather(1, positions[:, :, None].expand(-1, -1, states.shape[2]))
            for name, states in ((n, self._hidden[n]) for n in want.names)
        }
        return TargetOut(None, hidden, torch.where(on_path, follows, -1))

    def commit(self, rows: Tensor, counts: Sequence[int]) -> None:
        self._lengths = self._lengths + torch.tensor(list(counts), device=self.device)

    def select(self, sequences: Sequence[int]) -> None:
        index = torch.tensor(list(sequences), device=self.device)
        self._answers = [self._answers[i] for i in sequences]
        self._ids, self._lengths = self._ids[index], self._lengths[index]
        self._hidden = {name: states[index] for name, states in self._hidden.items()}
