"""Heads for the cells of a study: a seed's own start, steps that follow from epochs, and what training cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftsmith.data import features as feature_store
from draftsmith.drafters.checkpoint import Saved, load_drafter
from draftsmith.drafters.eagle3 import Eagle3, auxiliary_layers, eagle3_options
from draftsmith.foundation import artefacts, seeding
from draftsmith.foundation.errors import UserError
from draftsmith.numerics import losses
from draftsmith.numerics.distributions import statistics
from draftsmith.recipe import DrafterOptions
from draftsmith.studies.corpus import Corpus
from draftsmith.studies.rows import TrainingCost
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.batches import epoch_plan
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.base import Objective, SampleSource
from draftsmith.training.objectives.eagle3 import Eagle3Objective
from draftsmith.training.options import TrainOptions
from draftsmith.training.trainer import train

LOG = "training.jsonl"
TIMED = 4  # batches of each kind


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


def steps_of(corpus: Corpus, kept: Sequence[str], o: TrainOptions) -> int:
    """Optimiser steps of a training on the kept samples."""
    return o.steps or sum(len(plan) for plan in islice(_plans(corpus, kept, o), o.epochs))


def positions_of(corpus: Corpus, kept: Sequence[str], o: TrainOptions) -> int:
    """Positions that a training on the kept samples reads, over all its steps."""
    batches = chain.from_iterable(_plans(corpus, kept, o))
    return sum(islice(batches, steps_of(corpus, kept, o)))


def _plans(corpus: Corpus, kept: Sequence[str], o: TrainOptions) -> Iterator[list[int]]:
    """Positions of each step's batch, epoch after epoch: as the trainer plans them."""
    known = dict(zip(corpus.training.ids, corpus.training.lengths, strict=True))
    lengths = [known[i] for i in kept]
    for epoch in count():
        plan = epoch_plan(lengths[: o.seen(len(lengths), epoch)], o.row_length, o.batch_positions, o.seed, epoch)
        yield [sum(lengths[i] for row in rows for i in row) for rows in plan]


def trained_head(
    corpus: Corpus,
    vocab: VocabMap,
    kept: Sequence[str],
    o: TrainOptions,
    dev: Dev,
    folder: Path,
    meta: dict[str, object],
    source: SampleSource | None = None,
    objective: Callable[[Eagle3], Objective] | None = None,
) -> tuple[Eagle3, TrainingCost]:
    """Train a head on the kept samples, or go on with it; `o.seed` is that of its start too.

    Args:
        source, objective: instead of the corpus's training answers and EAGLE-3's loss.

    Returns:
        the drafter in the target's number format, and what its training cost.
    """

    def begin() -> tuple[Eagle3, Objective]:
        head = fresh_head(corpus, vocab, o.seed)
        return head, objective(head) if objective else objective_of(corpus, head, o)

    found, cost = trained(corpus, begin, kept, o, dev, folder, meta, source, o.unroll_steps)
    assert isinstance(found, Eagle3)
    return found, cost.model_copy(update={"pass_ratio": pass_ratio(corpus, vocab, o)})


def trained(
    corpus: Corpus,
    begin: Callable[[], tuple[nn.Module, Objective]],
    kept: Sequence[str],
    o: TrainOptions,
    dev: Dev,
    folder: Path,
    meta: dict[str, object],
    source: SampleSource | None = None,
    unrolled: int = 1,
) -> tuple[Saved, TrainingCost]:
    """Train a drafter of any kind on the kept samples, or go on with it.

    Args:
        begin: the untrained drafter and what trains it.
        unrolled: steps that the objective unrolls, for the cost.

    Returns:
        the drafter in the target's number format, and what its training cost.
    """
    place, log = folder / "drafter", folder / LOG
    if not (place / artefacts.MANIFEST).is_file():
        drafter, loss = begin()
        train(drafter, loss, source or corpus.training, kept, dev, o, place, log, meta)
    positions = positions_of(corpus, kept, o)
    cost = TrainingCost(
        training_seconds=round(sum(float(row["seconds"]) for row in artefacts.read_jsonl(log) if "loss" in row), 3),
        training_steps=steps_of(corpus, kept, o),
        training_positions=positions,
        training_cost=positions * unrolled,
    )
    return load_drafter(place, corpus.target, checksums=False), cost


def pass_ratio(corpus: Corpus, vocab: VocabMap, o: TrainOptions) -> float:
    """Seconds in which the target reads and scores a position ÷ seconds of training on one; measured once a study.

    On a CPU the seconds are the process's own, which a busy machine changes least. Both are the least of a few batches.
    """
    path = corpus.folder / "pass.json"
    if not path.is_file():
        store, target = corpus.training, corpus.target
        lengths = dict(zip(store.ids, store.lengths, strict=True))
        ids = corpus.train_ids
        plan = epoch_plan([lengths[i] for i in ids], o.row_length, o.batch_positions, 0, 0)
        head = fresh_head(corpus, vocab, 0)
        objective = objective_of(corpus, head, o)
        optimiser = torch.optim.AdamW(head.parameters(), lr=0.0, foreach=True)

        def step(rows: Sequence[Sequence[int]]) -> int:
            batch = objective.collate([[store[ids[i]] for i in row] for row in rows], head.device)
            with torch.autocast(head.device.type, torch.bfloat16, enabled=o.precision == "bfloat16"):
                loss = sum(term.weight * term.values.mean() for term in objective.losses(batch, (0, 0)))
            loss.backward()  # type: ignore[union-attr]
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return batch.positions

        def read(group: Sequence[int]) -> int:
            texts = [store[i].ids for i in group]
            padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
            final = target.read(padded, [len(t) for t in texts], FeatureSpec((), True))["final"]
            statistics(final.flatten(0, 1), target.project, padded.roll(-1, 1).flatten().to(final.device))
            return sum(map(len, texts))

        groups = feature_store.plan(store.lengths, corpus.options.features.batch_positions)
        middle = len(groups) // 2
        reading = _least(read, groups[middle : middle + TIMED], target.device)
        training = _least(step, plan[: 2 * TIMED], target.device)
        artefacts.write_json(path, {"read_ms": 1e3 * reading, "train_ms": 1e3 * training})
    known = artefacts.read_json(path)
    return round(float(known["read_ms"]) / float(known["train_ms"]), 4)


def _least(work: Callable[[Any], int], batches: Sequence[Any], device: torch.device) -> float:
    """Least seconds of a position over some batches, each worked on after a first one that warms up."""
    gpu = device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    found = []
    for batch in [batches[0], *batches]:
        started = clock()
        positions = work(batch)
        if gpu:
            torch.cuda.synchronize()
        found.append((clock() - started) / positions)
    return min(found[1:])


def objective_of(corpus: Corpus, head: Eagle3, o: TrainOptions) -> Eagle3Objective:
    """EAGLE-3's loss for a head."""
    teacher = corpus.target.output_rows(head.vocab.target_ids)
    loss = losses.by_name(o.loss)
    survival = "survival" in o.weights.build().needs
    return Eagle3Objective(
        head, teacher, loss, o.unroll_steps, o.step_decay, o.detach_steps, o.checkpoint_steps, survival
    )
