"""Statistics of the target's distributions, taken while it writes: scoring its answers then needs no pass of its own.

They are of the logits as no processor has seen them, at temperature 1, so they equal those of a pass over the finished
text up to the rounding of another batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.foundation import artefacts
from draftsmith.numerics.distributions import COLUMNS, statistics


class Watch:
    """Statistics of a batch of answers while they are written; `watch` of `target.sampling.write`.

    Args:
        names: the answers' ids, by row.
        counted: over those answers the expected tokens are summed up, as by `data.features.store`.
    """

    def __init__(self, names: Sequence[str], counted: Callable[[str], bool]) -> None:
        self._weights = torch.tensor([float(counted(name)) for name in names])
        self._rows: list[Tensor] = []
        self._columns: list[dict[str, Tensor]] = []
        self._expected: Tensor | None = None

    def __call__(self, logits: Tensor, rows: Sequence[int], tokens: Tensor) -> None:
        if self._expected is None:
            self._expected = torch.zeros(logits.shape[1], device=logits.device)
        index = torch.tensor(list(rows))
        expected = self._weights[index].to(logits.device), self._expected
        found = statistics(logits, lambda block: block, tokens, block_rows=len(rows), expected=expected)
        self._rows.append(index)
        self._columns.append({name: column.cpu() for name, column in found.tensors().items()})

    def save(self, path: Path) -> None:
        """Write columns of all tokens, one answer after another, with the answers' lengths and the expected tokens."""
        assert self._expected is not None
        rows = torch.cat(self._rows)
        order = torch.argsort(rows, stable=True)
        tensors = {name: torch.cat([part[name] for part in self._columns])[order] for name in COLUMNS}
        tensors["lengths"] = torch.bincount(rows, minlength=len(self._weights))
        tensors["expected"] = self._expected.cpu()
        artefacts.save_tensors(path, tensors)


@dataclass(frozen=True)
class Watched:
    """What was seen of some answers.

    Attributes:
        columns: by answer, the columns of `TokenStatistics` `[T]`, a row for each token written.
        expected: `[V]` float32, how often the target was expected to write each token in the answers that counted.
    """

    columns: Mapping[str, Mapping[str, Tensor]]
    expected: Tensor

    def save(self, path: Path, names: Sequence[str]) -> None:
        """Write the answers of these ids, in this order."""
        parts = [self.columns[name] for name in names]
        tensors = {name: torch.cat([part[name] for part in parts]) for name in COLUMNS}
        tensors["lengths"] = torch.tensor([len(part["log_z"]) for part in parts])
        artefacts.save_tensors(path, {**tensors, "expected": self.expected})


def load(files: Sequence[tuple[Path, Sequence[str]]]) -> Watched:
    """What files hold, each with the ids of its answers in their order."""
    columns: dict[str, dict[str, Tensor]] = {}
    expected: Tensor | None = None
    for path, names in files:
        tensors = artefacts.load_tensors(path)
        ends = tensors["lengths"].cumsum(0).tolist()
        for name, start, end in zip(names, [0, *ends], ends, strict=False):
            columns[name] = {column: tensors[column][start:end] for column in COLUMNS}
        own = tensors["expected"]
        expected = own.clone() if expected is None else expected + own
    assert expected is not None
    return Watched(columns, expected)
