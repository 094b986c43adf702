"""How much of the target's distribution a head already has, token by token: Σ min(p, q), the chance of acceptance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.data.features import FeatureStore, StoredSample, plan
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.foundation.errors import UserError
from draftsmith.numerics import losses
from draftsmith.target.model import HFTarget
from draftsmith.training.algorithms import drafter_in
from draftsmith.training.objectives.base import SampleSource
from draftsmith.training.objectives.eagle3 import Eagle3Objective


def overlaps_of(folder: Path, target: HFTarget, store: FeatureStore, ids: Sequence[str]) -> dict[str, Tensor]:
    """What a trained EAGLE-3 head already has of some stored samples, `[T]` by id; rows that teach nothing count 1.

    Args:
        folder: the head's, or its run's.

    Raises:
        UserError: there is another drafter, or the store lacks the states that it reads.
    """
    head = load_drafter(drafter_in(folder), target, torch.float32)
    if not isinstance(head, Eagle3):
        raise UserError(f"{folder} is no EAGLE-3 head: what a drafter lacks can be told of those")
    lacking = {str(name) for name in (*head.wants.names, "final") if ids and name not in store[ids[0]].hidden}
    if lacking:
        raise UserError(
            f"{store.folder} holds no states of layers {', '.join(sorted(lacking))}, which {folder} reads: score with "
            "features.store=all, and with the head's drafter.layers"
        )
    teacher = target.output_rows(head.vocab.target_ids)
    objective = Eagle3Objective(head, teacher, losses.by_name("forward-kl"), 1, 1.0, False, False, False)
    return {sample.id: found.nan_to_num(1.0) for sample, found in overlaps(objective, store, ids)}


@torch.no_grad()
def overlaps(
    objective: Eagle3Objective, source: SampleSource, ids: Sequence[str], batch_positions: int = 4096
) -> Iterator[tuple[StoredSample, Tensor]]:
    """Each sample with `[T]` float32: at row t how the head's distribution over token t + 1 overlaps with the target's.

    The head drafts from true features (the first unrolled step), and what its draft vocabulary lacks is no overlap.
    Rows at which no draft counts (the prompt, an answer's first token, the last row) are NaN.
    """
    known = dict(zip(source.ids, source.lengths, strict=True))
    lengths = [known[i] for i in ids]
    for group in plan(lengths, batch_positions):
        samples = source.fetch([ids[i] for i in group], 0)
        batch = objective.collate([[sample] for sample in samples], objective.head.device)
        found = torch.full(batch.unroll.ids.shape, float("nan"), device=objective.head.device)
        out = next(objective.head.unroll(batch.unroll, 1))
        row, start = batch.counted[0].nonzero().unbind(1)
        found[row, batch.unroll.starts[row, start] + 1] = objective.taught(out, batch).acceptance().float()
        for sample, values in zip(samples, found.cpu(), strict=True):
            yield sample, values[: len(sample.ids)]
