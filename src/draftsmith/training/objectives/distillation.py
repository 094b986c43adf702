"""DistillSpec's objective (2310.08461, eq. 1): a standalone draft's distribution against the target's, token by token.

    loss = (1 / N) Σ_t D( P(· | x_{≤ t}) ‖ Q(· | x_{≤ t}) )       over rows t whose next token is an answer token

D is any of `numerics.losses`; which texts (given ones, the target's, the draft's own) is the sample source's business.
With a reduced draft vocabulary P is exp(h·W_d − log Z), exact with the mass outside lost.

AdaSPEC (2510.19779) is this objective with token weights: rows are chosen by KL(P‖Q) − KL(P‖R), R a reference. The
divergence that chooses may be another one than the divergence that is trained (`judge`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from draftsmith.data.features import StoredSample
from draftsmith.drafters.standalone import Standalone
from draftsmith.numerics.distributions import flatness_from_log_norm
from draftsmith.numerics.losses import Loss, chunked_head_loss, rounded, total_variation
from draftsmith.selection.tokens import RowFacts, chain_survival
from draftsmith.target.protocol import FeatureSpec
from draftsmith.training.batches import REFERENCE
from draftsmith.training.objectives.base import StepLosses


@dataclass(frozen=True)
class DistillationBatch:
    """Packed texts `[R, L]`.

    Attributes:
        ids: int64; segments: which text a token belongs to, −1 for padding; places: its position within the text.
        taught: bool, rows that count.
        final: `[R, L, H]` the target's final hidden states; log_z: float32 of its distribution: the teacher.
        statistics: float32 by name: the target's `log_norm`, a reference's losses, where all texts hold them.
    """

    ids: Tensor
    segments: Tensor
    places: Tensor
    taught: Tensor
    final: Tensor
    log_z: Tensor
    statistics: Mapping[str, Tensor]

    @property
    def positions(self) -> int:
        """Tokens that are no padding."""
        return int((self.segments >= 0).sum())

    @property
    def counts(self) -> list[int]:
        """Rows that count."""
        return [int(self.taught.sum())]


@dataclass(frozen=True)
class DistillationObjective:
    """The loss of a standalone draft.

    Attributes:
        draft: what is trained.
        teacher_weight: `[Vd, H]` rows of the target's output embedding for the draft vocabulary.
        loss: D.
        judge: the divergence that token weights compare with a reference's; none: D.
        chain: drafted tokens of a round, for weights that ask how likely decoding reaches a row; 0: they don't.
        block_rows: rows of one block of logits; default: what 64 MiB hold.
    """

    draft: Standalone
    teacher_weight: Tensor
    loss: Loss
    judge: Loss | None = None
    chain: int = 0
    block_rows: int | None = None

    @property
    def reads(self) -> FeatureSpec:
        return FeatureSpec(final=True)

    def teaches(self, sample: StoredSample) -> bool:
        return bool(sample.answer_rows.any())

    def collate(self, rows: Sequence[Sequence[StoredSample]], device: torch.device) -> DistillationBatch:
        return collate(rows, device)

    def losses(self, batch: DistillationBatch, draw: Sequence[int | str]) -> Iterator[StepLosses]:
        row, place = batch.taught.nonzero().unbind(1)
        states = self.draft.states(batch.ids, batch.segments, batch.places)[row, place]
        weight = self.draft.output_rows()
        teacher = (batch.final[row, place], self.teacher_weight, batch.log_z[row, place])

        def against_teacher(loss: Loss) -> Tensor:
            return chunked_head_loss(states, weight, *teacher, loss, self.block_rows)

        values = against_teacher(self.loss)
        judged = survival = None
        with torch.no_grad():
            if self.judge is not None:
                judged = against_teacher(self.judge)
            if self.chain:
                acceptance = torch.zeros(batch.taught.shape, device=row.device)
                acceptance[row, place] = (1.0 - against_teacher(total_variation)).float()
                survival = chain_survival(acceptance, batch.taught, self.chain)[row, place]
        log_norm = batch.statistics.get("log_norm")
        reference = batch.statistics.get(f"{REFERENCE}0")
        size = self.draft.vocab.vocab_size
        facts = RowFacts(
            samples=batch.segments[row, place],
            flatness=None if log_norm is None else flatness_from_log_norm(log_norm[row, place], size),
            reference_losses=None if reference is None else reference[row, place],
            survival=survival,
            judged=judged,
            places=batch.places[row, place],
        )
        yield StepLosses("divergence", 0, 1.0, values, facts)


def collate(rows: Sequence[Sequence[StoredSample]], device: torch.device) -> DistillationBatch:
    """Pack samples into rows, padded to the longest and on to a multiple (`rounded`)."""
    numbers = iter(range(sum(map(len, rows))))
    held = set.intersection(*(set(s.statistics) for row in rows for s in row))
    names = {name for name in held if name == "log_norm" or name.startswith(REFERENCE)}

    def packed(column: Callable[[StoredSample], Tensor], fill: float = 0) -> Tensor:
        lines = [torch.cat([column(sample) for sample in row]) for row in rows]
        joined = pad_sequence(lines, batch_first=True, padding_value=fill)
        surplus = rounded(joined.shape[1]) - joined.shape[1]
        return pad(joined, (0, 0) * (joined.dim() - 2) + (0, surplus), value=fill).to(device)

    return DistillationBatch(
        ids=packed(lambda s: s.ids),
        segments=packed(lambda s: torch.full_like(s.ids, next(numbers)), -1),
        places=packed(lambda s: torch.arange(len(s.ids))),
        taught=packed(lambda s: s.answer_rows).bool(),
        final=packed(lambda s: s.hidden["final"]),
        log_z=packed(lambda s: s.statistics["log_z"]),
        statistics={name: packed(partial(_statistic, name)) for name in sorted(names)},
    )


def _statistic(name: str, sample: StoredSample) -> Tensor:
    return sample.statistics[name]
