"""What the objectives of heads share: the drafts that count at an unrolled step, what each is taught, and the facts
that token weights look at."""

from __future__ import annotations

import torch
from torch import Tensor

from draftsmith.drafters.head import Head
from draftsmith.drafters.unrolled import StepOut
from draftsmith.numerics.distributions import flatness_from_log_norm
from draftsmith.numerics.losses import Loss, chunked_head_loss, smooth_l1, total_variation
from draftsmith.selection.tokens import RowFacts
from draftsmith.training.batches import REFERENCE, TrainBatch


class Taught:
    """The N drafts that count at an unrolled step. A draft from p is taught the target at position p + 1 + step.

    Attributes:
        where: `[N, 2]` int64, their (row, start) indices.
    """

    def __init__(
        self, head: Head, teacher_weight: Tensor, batch: TrainBatch, out: StepOut, block_rows: int | None = None
    ) -> None:
        """`teacher_weight [Vd, H]`: the target's output rows; `block_rows`: see `chunked_head_loss`."""
        self.head, self.batch, self.step = head, batch, out.step
        self.teacher_weight, self.block_rows = teacher_weight, block_rows
        self.where = batch.counted[out.step].nonzero()
        self._row, self._start = self.where.unbind(1)
        self._place = batch.unroll.starts[self._row, self._start] + 1 + out.step
        self.states = out.states[self._row, self._start]
        self.final = batch.final[self._row, self._place]

    def tokens(self, loss: Loss) -> Tensor:
        """A loss of the drafted distributions against the target's, `[N]` float32."""
        log_z = self.batch.log_z[self._row, self._place]
        states, output = self.head.judged(self.states), self.head.output
        return chunked_head_loss(states, output, self.final, self.teacher_weight, log_z, loss, self.block_rows)

    def feature(self) -> Tensor:
        """SmoothL1 between drafted and true final states, `[N]` float32."""
        return smooth_l1(self.states.float(), self.final.float())

    @torch.no_grad()
    def acceptance(self) -> Tensor:
        """Σ min(p, q), the mass outside the draft vocabulary lost, `[N]`: another pass through the head."""
        return 1.0 - self.tokens(total_variation)

    def facts(self, survival: Tensor | None = None, judged: Tensor | None = None) -> RowFacts:
        """What token weights may look at. `survival [R, Q]`: the chance that a draft's earlier tokens are accepted;
        `judged [N]`: the loss that is compared with a reference's, for all terms of a step."""
        log_norm = self.batch.statistics.get("log_norm")
        reference = self.batch.statistics.get(f"{REFERENCE}{self.step}")
        flatness = None
        if log_norm is not None:
            flatness = flatness_from_log_norm(log_norm[self._row, self._place], self.head.options.vocab_size)
        return RowFacts(
            samples=self.batch.samples[self._row, self._start],
            flatness=flatness,
            reference_losses=None if reference is None else reference[self._row, self._place],
            survival=None if survival is None else survival[self._row, self._start],
            judged=None if judged is None else judged.detach(),
            places=self.batch.unroll.positions[self._row, self._place],
        )

    def survived(self, survival: Tensor) -> None:
        """Multiply this step's acceptance into `survival [R, Q]`."""
        survival[self._row, self._start] *= self.acceptance()
