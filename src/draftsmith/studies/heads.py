"""Heads for the cells of a study: a seed's own start, steps that follow from epochs, and what training cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from draftsmith.drafters.checkpoint import Saved, load_drafter
from draftsmith.drafters.eagle3 import Eagle3, auxiliary_layers, eagle3_options
from draftsmith.foundation import artefacts, seeding
from draftsmith.foundation.errors import UserError
from draftsmith.recipe import DrafterOptions
from draftsmith.studies.corpus import Corpus
from draftsmith.studies.rows import TrainingCost
from draftsmith.target.model import HFTarget
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.batches import epoch_plan
from draftsmith.training.trainer import Dev, TrainOptions, train

LOG = "training.jsonl"
FASTEST = 0.1


def layers_of(target: HFTarget, o: DrafterOptions) -> tuple[int, ...]:
    """The auxiliary layers that heads read.

    Raises:
        UserError: they are none of the target's.
    """
    try:
        return auxiliary_layers(o.layers, target.spec.layers)
    except ValueError as problem:
        raise UserError(f"drafter.layers: {problem}") from None


def vocabulary(corpus: Corpus, size: int) -> VocabMap:
    """The draft vocabulary of all cells: what the target is expected to write most over *all* training answers."""
    spec, tokenizer = corpus.target.spec, corpus.target.tokenizer
    always = {*spec.eos_ids, *getattr(tokenizer, "all_special_ids", [])}
    counts = (corpus.training.expected() * 1e6).round().long()
    return VocabMap.from_counts(counts, size, [i for i in always if i < spec.vocab_size], spec.vocab_size)


def fresh_head(corpus: Corpus, vocab: VocabMap, seed: int) -> Eagle3:
    """An untrained head; the seed decides its weights."""
    target = corpus.target
    config = target.model.config.get_text_config()
    o = eagle3_options(config, target.spec, vocab.size, corpus.want.layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key("head", seed) % 2**31)
        head = Eagle3(o, vocab, target.embedding.float())
    head.begin_from(target.model.get_output_embeddings().weight, getattr(target.model.base_model, "norm", None))
    return head.to(target.device)


def batch_positions(corpus: Corpus, kept: Sequence[str], o: TrainOptions, epochs: int) -> list[list[int]]:
    """Positions of each step's batch, by epoch: as the trainer plans them."""
    known = dict(zip(corpus.training.ids, corpus.training.lengths, strict=True))
    lengths = [known[i] for i in kept]
    plans = [epoch_plan(lengths, o.row_length, o.batch_positions, o.seed, epoch) for epoch in range(epochs)]
    return [[sum(lengths[i] for row in rows for i in row) for rows in plan] for plan in plans]


def steps_of(corpus: Corpus, kept: Sequence[str], o: TrainOptions, epochs: int) -> int:
    """Optimiser steps of so many epochs over the kept samples."""
    return sum(map(len, batch_positions(corpus, kept, o, epochs)))


def trained_head(
    corpus: Corpus,
    vocab: VocabMap,
    kept: Sequence[str],
    o: TrainOptions,
    dev: Dev,
    folder: Path,
    meta: dict[str, object],
) -> tuple[Saved, TrainingCost]:
    """Train a head on the kept samples for `o.steps` steps, or go on with it; `o.seed` is that of its start too.

    Returns:
        the drafter in the target's number format, and what its training cost.
    """
    assert o.steps is not None
    head = fresh_head(corpus, vocab, o.seed)
    teacher = corpus.target.output_rows(vocab.target_ids)
    place, log = folder / "drafter", folder / LOG
    if not (place / artefacts.MANIFEST).is_file():
        train(head, teacher, corpus.training, kept, dev, o, place, log, meta)
    rows = [row for row in artefacts.read_jsonl(log) if "loss" in row]
    positions = 0
    left = o.steps
    epochs = 0
    while left > 0:
        epochs += 1
        plan = batch_positions(corpus, kept, o, epochs)[-1][:left]
        positions += sum(plan)
        left -= len(plan)
    # both paces are those of the machine left alone, as far as that can be told
    pace = float(np.quantile([1 / float(row["positions_per_second"]) for row in rows], FASTEST))
    cost = TrainingCost(
        training_seconds=round(sum(float(row["seconds"]) for row in rows), 3),
        training_steps=o.steps,
        training_positions=positions,
        training_cost=positions * o.unroll_steps,
        pass_ratio=round(corpus.scoring_seconds / pace, 4),
    )
    return load_drafter(place, corpus.target, checksums=False), cost
