"""How a run trains its drafter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.data.features import FeatureStore
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.head import Head
from draftsmith.drafters.standalone import Standalone
from draftsmith.drafters.truncation import made
from draftsmith.evaluation.replayed import stored_answer
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import UserError
from draftsmith.stages.reading import kept_samples, read_selection, training_source
from draftsmith.stages.texts import Identity, read_samples
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training import algorithms
from draftsmith.training.account import Account, Before
from draftsmith.training.dev import Dev
from draftsmith.training.objectives.base import Objective, SampleSource
from draftsmith.training.on_policy import OnPolicySource
from draftsmith.training.options import TrainOptions
from draftsmith.training.reference import trained as trained_reference
from draftsmith.training.trackers import tracking
from draftsmith.training.trainer import train as training

if TYPE_CHECKING:
    from draftsmith.pipeline import Run
    from draftsmith.recipe import Recipe


def _dev(run: Run, source: SampleSource, growth: GrowthOptions) -> Dev:
    dev = {s.id for s in read_samples(run, "dev")}
    answers = [stored_answer(sample) for sample in source.fetch([i for i in source.ids if i in dev], 0)]
    return Dev(run.target.spec, answers, growth.build())


def vocabulary(run: Run) -> VocabMap:
    """The draft vocabulary: the tokens that the target is expected to write most, end and special tokens always.

    Counted over all training samples: what is left out of training may still be drafted. A head that is trained on
    keeps its own.
    """
    if start := run.recipe.drafter.start:
        return _started(run, start).vocab
    spec = run.target.spec
    expected = FeatureStore(run.path("score"), checksums=False).expected()
    always = {*spec.eos_ids, *getattr(run.target.tokenizer, "all_special_ids", [])}
    size = run.recipe.drafter.draft_vocab_size
    # In millionths, because a map is made from counts.
    counts = (expected * 1e6).round().long()
    return VocabMap.from_counts(counts, size, [i for i in always if i < spec.vocab_size], spec.vocab_size)


@dataclass(frozen=True)
class Training:
    """What the trainer is given, but for where it writes."""

    head: algorithms.Trained
    objective: Objective
    source: SampleSource
    kept: list[str]
    dev: Dev
    reference: Objective | None
    account: Account
    before: Before | None = None


def training_of(run: Run, vocab: VocabMap, reference: bool = True) -> Training:
    """A run's drafter and what it is trained on, untrained; `reference=False`: train none for it first."""
    o = run.recipe
    source: SampleSource = training_source(run)
    kept = kept_samples(run)
    dev = _dev(run, source, o.deploy.growth if o.deploy else o.growth)
    head = _fresh(run, vocab, source, kept)
    account, before, judge = Account(), None, None
    if o.train.reference == "trained" and reference:
        source, before = trained_reference(
            # a draft's layers are not chosen twice
            fresh=lambda: copy.deepcopy(head) if isinstance(head, Standalone) else _fresh(run, vocab, source, kept),
            load=lambda folder: _teaching(run, folder, head),
            objective_of=lambda drafter, options: _objective(run, drafter, options),
            source=source,
            kept=kept,
            dev=dev,
            options=o.train,
            folder=run.folder,
            meta=_reference_identity(run),
        )
    if o.train.on_policy.share:
        if not isinstance(head, Standalone):
            raise UserError("train.on_policy.share: only a standalone draft writes texts (drafter.kind=standalone)")
        if before is not None:
            # what the draft writes was not judged before
            judge = _objective(run, _teaching(run, run.folder / "reference", head))
        source = OnPolicySource(source, head, run.target, o.train.on_policy, o.features, o.train.seed, account)
    if isinstance(o.train.reference, Path):
        judge = _objective(run, _teaching(run, o.train.reference, head))
    return Training(head, _objective(run, head), source, kept, dev, judge, account, before)


def _reference_identity(run: Run) -> Identity:
    """What decides a run's reference beside how it is trained: inputs, shape, what its checkpoint is chosen by."""
    values = run.recipe.model_dump(mode="json", include={"drafter", "eagle", "hass", "growth", "deploy"})
    return {
        "inputs": {name: artefacts.checksum(run.path(name)) for name in ("features", "select")},
        "recipe": values,
    }


def _fresh(run: Run, vocab: VocabMap, source: SampleSource, kept: Sequence[str]) -> algorithms.Trained:
    """The run's drafter before training."""
    o = run.recipe.drafter
    if o.start:
        return _started(run, o.start)
    if o.kind != "standalone":
        return algorithms.fresh_head(o.kind, run.target, vocab, o.layers, run.recipe.train.seed, o.norms or ())
    texts = [source.outline(name) for name in kept[:: max(1, len(kept) // o.standalone.texts)]]
    return made(run.target, vocab, o.standalone, [(text.ids, text.answer_rows) for text in texts])


def _teaching(run: Run, folder: Path, head: algorithms.Trained) -> algorithms.Trained:
    """A trained drafter of the kind that is trained, as its reference."""
    found = load_drafter(folder, run.target, torch.float32)
    if not isinstance(found, Head | Standalone) or found.KIND != head.KIND:
        raise UserError(f"train.reference: {folder} is no {head.LABEL}, which is what is trained")
    return found


def _started(run: Run, folder: Path) -> Head:
    """A trained head to go on from."""
    o = run.recipe.drafter
    return algorithms.started_head(folder, o.kind, run.target, o.draft_vocab_size, o.layers)


def train(run: Run, out: Path, identity: Identity) -> None:
    """Train the drafter on what was kept (kind "drafter"), and before it the reference that it is compared with."""
    with run.states_are_stored() if reads_stored(run.recipe) else nullcontext():
        _train(run, out, identity)


def reads_stored(o: Recipe) -> bool:
    """Whether training needs no pass of the target. (A standalone draft is made of its layers, and it may read texts
    that the draft writes.)"""
    return o.features.store != "online" and o.drafter.kind != "standalone"


def _train(run: Run, out: Path, identity: Identity) -> None:
    o = run.recipe
    vocab = vocabulary(run)
    t = training_of(run, vocab)
    written = torch.cat([torch.tensor(a.ids[a.prompt_length :]) for a in t.dev.answers])
    covered = vocab.coverage(torch.bincount(written, minlength=run.target.spec.vocab_size))
    filled = f"; {vocab.filled} of them are never written and fill it up" if vocab.filled else ""
    console.say(
        f"draft vocabulary of {console.count(vocab.size)} tokens covers {covered:.1%} of the dev answers{filled}"
    )
    meta: Identity = {**identity, "covered": round(covered, 4)}
    if isinstance(o.train.reference, Path):
        meta["reference"] = artefacts.checksum(o.train.reference)
    if o.drafter.start:
        meta["start"] = artefacts.checksum(algorithms.drafter_in(o.drafter.start))
    log = run.folder / "training.jsonl"
    with tracking(o.tracking, run.folder) as track:
        parts = (t.head, t.objective, t.source, t.kept, t.dev, o.train)
        more: dict[str, Any] = {"reference": t.reference, "account": t.account, "before": t.before}
        found = training(*parts, out, log, meta, track=track, judged_first=o.drafter.start is not None, **more)
    _say_saved(run, log)
    first = next((row for row in artefacts.read_jsonl(log) if row["step"] == 0), None)
    console.say(
        f"best checkpoint: step {found['best_step']} of {found['steps']}, dev acceptance length "
        f"{found['dev_acceptance_length']:.3f}" + (f", {first['dev_acceptance_length']:.3f} before" if first else "")
    )


def _objective(run: Run, head: algorithms.Trained, options: TrainOptions | None = None) -> Objective:
    o = run.recipe
    chain = (o.deploy.growth if o.deploy else o.growth).depth
    return algorithms.objective(o.drafter.kind, head, run.target, options or o.train, o.eagle, o.hass, chain)


def _say_saved(run: Run, log: Path) -> None:
    """What selection saved: the same epochs over all samples would have taken so much longer."""
    selection = read_selection(run)
    steps = [row for row in artefacts.read_jsonl(log) if "loss" in row]
    seconds = sum(float(row["seconds"]) for row in steps)
    left_out = selection.positions_total - selection.positions_kept
    if left_out and selection.positions_kept:
        saved = seconds * left_out / selection.positions_kept
        console.say(
            f"selection saved {console.duration(saved)}: as many epochs over all samples would have taken "
            f"{console.duration(seconds + saved)} instead of {console.duration(seconds)} of training"
        )
