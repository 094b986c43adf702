"""What the trainer asks of an algorithm: rows out of samples, and per-token losses that nobody has reduced yet.

    loss = Σ_terms weight · (1 / N) Σ_i w_i · l_i

An objective gives the terms (`StepLosses`); token weights give the w_i; the trainer divides by N, the number of a
step's rows over all ranks and parts of the batch.

What token weights look at stands where the loss is taught: `flatness` is the target's at the position whose
distribution is the teacher, a stored loss of a reference is `statistics["reference_loss.<unrolled step>"]` there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from draftsmith.data.features import StoredSample
from draftsmith.selection.tokens import RowFacts
from draftsmith.target.protocol import FeatureSpec


@dataclass(frozen=True)
class StepLosses:
    """One term of an objective at one unrolled step.

    Attributes:
        name: of the term ("kl", "feature", "top-k"), for logs; one name stands once at each step.
        step: unrolled step, from 0.
        weight: of the term in the sum (step decay times the term's own).
        values: `[N]` float32, a loss for each row that counts.
        facts: what token weights may look at, in the order of `values`.
    """

    name: str
    step: int
    weight: float
    values: Tensor
    facts: RowFacts


def compared(term: StepLosses) -> Tensor:
    """`[N]`: the loss of a term that token weights compare with another drafter's."""
    return term.values if term.facts.judged is None else term.facts.judged


class Batch(Protocol):
    """What an objective's `collate` makes; only the objective looks inside."""

    @property
    def positions(self) -> int:
        """Tokens in it that are no padding."""
        ...

    @property
    def counts(self) -> Sequence[int]:
        """Rows that count at each unrolled step, the same for all terms of a step: known before anything is computed,
        so that they can be summed over ranks and over the parts of a step."""
        ...


class Objective(Protocol):
    """One training algorithm for one drafter."""

    @property
    def reads(self) -> FeatureSpec:
        """The target's states that samples must hold, the teacher's `final` among them."""
        ...

    def teaches(self, sample: StoredSample) -> bool:
        """Whether anything in the sample counts."""
        ...

    def collate(self, rows: Sequence[Sequence[StoredSample]], device: torch.device) -> Any:
        """Pack samples into rows, padded to the longest; rows of one batch are independent."""
        ...

    def losses(self, batch: Any, draw: Sequence[int | str]) -> Iterator[StepLosses]:
        """The batch's terms. `draw` keys whatever is random (feature noise): the seed and the optimiser step."""
        ...


@runtime_checkable
class Changing(Protocol):
    """A source of samples that change as training goes on: it is saved with a checkpoint and goes on from it."""

    def state(self) -> dict[str, Tensor]: ...

    def resume(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a saved state; from the start where there is none."""
        ...


class SampleSource(Protocol):
    """Where training samples come from: a feature store, or the target itself, reading as training goes on."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def lengths(self) -> Sequence[int]:
        """Positions of each sample, in the order of `ids`: batches are planned from them."""
        ...

    def outline(self, name: str) -> StoredSample:
        """A sample's ids and mask; its hidden states and statistics may be missing."""
        ...

    def fetch(self, ids: Sequence[str], step: int) -> list[StoredSample]:
        """The samples of a step's batch; `step` is the optimiser's, for sources whose samples change."""
        ...
