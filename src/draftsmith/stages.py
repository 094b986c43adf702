"""What each stage of a run does, in terms of the library's functions; `pipeline.py` says in which order."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.data import features as feature_store
from draftsmith.data import regenerate as regeneration
from draftsmith.data.benchmarks import posed
from draftsmith.data.conversations import Conversation, from_row, read_conversations, to_row
from draftsmith.data.features import FeatureStore
from draftsmith.data.online import OnlineSource
from draftsmith.data.prompts import make_prompts, templates_digest
from draftsmith.data.rows import SUFFIXES
from draftsmith.data.samples import Sample, samples_of
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.head import Head
from draftsmith.drafters.standalone import Standalone
from draftsmith.drafters.truncation import made
from draftsmith.evaluation import bench as benching
from draftsmith.evaluation import tuning
from draftsmith.evaluation.replayed import stored_answer
from draftsmith.foundation import artefacts, console, ranks, seeding
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.foundation.options import validate
from draftsmith.numerics.distributions import TokenStatistics
from draftsmith.recipe import Recipe
from draftsmith.selection.files import write_scores
from draftsmith.selection.samples import ScoredSample, Selection
from draftsmith.selection.samples import select as choose
from draftsmith.selection.scores import SCORES, Evidence, token_scores
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.replay import StoredAnswer
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

Identity = dict[str, object]
SPLITS = ("train", "dev", "test")


def prompts(run: Run, out: Path, identity: Identity) -> None:
    """Make or read prompts and part them into train, dev and test (kind "prompts")."""
    o = run.recipe.data
    with artefacts.writing(out, "prompts", identity) as scratch:
        parts: dict[str, list[Conversation]] = {split: [] for split in SPLITS}
        if o.path is None:
            for name, counts in o.counts().items():
                for split, count in zip(SPLITS, counts, strict=True):
                    parts[split] += make_prompts(name, split, count, o.seed)
        else:
            found, quarantine = read_conversations(o.path)
            if quarantine.rows:
                quarantine.write(scratch / "quarantine.jsonl")
                console.warn(f"{quarantine}; they are listed in {out / 'quarantine.jsonl'}")
            problems = posed(found, o.posed_as) if o.posed_as else found
            parts = _parted(problems, o.counts()[o.path], o.seed, o.path)
        for split, rows in parts.items():
            artefacts.write_jsonl(scratch / f"{split}.jsonl", (to_row(c) for c in rows))
        console.say(", ".join(f"{len(parts[split])} {split}" for split in SPLITS) + " prompts")


def _parted(
    found: list[Conversation], counts: tuple[int, int, int], seed: int, name: str
) -> dict[str, list[Conversation]]:
    if len(found) < 3:
        raise UserError(
            f"{name}: {len(found)} usable conversations are too few; train, dev and test need at least one each"
        )
    train, dev, test = counts
    # Few conversations: dev and test take at most a fifth each.
    dev, test = min(dev, max(1, len(found) // 5)), min(test, max(1, len(found) // 5))
    order = [found[i] for i in seeding.shuffled(len(found), "split", seed)]
    label = Path(name).stem
    order = [replace(c, source=label) for c in order]
    return {"dev": order[:dev], "test": order[dev : dev + test], "train": order[dev + test : dev + test + train]}


def source(recipe: Recipe) -> str | None:
    """Fingerprint of what the prompts are made from: draftsmith's templates, or the user's files.

    None where it can't be told: a hub data set, files that are gone.
    """
    if recipe.data.path is None:
        return templates_digest()
    path = Path(recipe.data.path)
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def read_prompts(run: Run, split: str) -> list[Conversation]:
    """A split of the run's prompts."""
    return [from_row(row) for row in artefacts.read_jsonl(run.path("prompts") / f"{split}.jsonl")]


def regenerate(run: Run, out: Path, identity: Identity) -> None:
    """The target answers training and dev prompts (kind "conversations")."""
    asked = read_prompts(run, "train") + read_prompts(run, "dev")
    if run.recipe.data.keep_answers:
        if waiting := [c.id for c in asked if c.waits]:
            raise UserError(
                f"{len(waiting)} of {len(asked)} conversations of {run.recipe.data.path or 'the made prompts'} wait "
                f"for an answer ({waiting[0]} for one): take them out, or set data.keep_answers=false"
            )
        if ranks.rank() > 0:
            return
        with artefacts.writing(out, regeneration.KIND, identity) as scratch:
            artefacts.write_jsonl(scratch / regeneration.FILE, (to_row(c) for c in asked))
        return
    regeneration.regenerate(run.target, asked, run.recipe.regenerate, out, identity)


def _answers(run: Run, split: str | None = None) -> list[Conversation]:
    """The answers; of one split, or of both."""
    wanted = {c.id for name in ("train", "dev") if split in (None, name) for c in read_prompts(run, name)}
    return [c for c in regeneration.read(run.path("regenerate")) if _asked_in(c.id, wanted)]


def _asked_in(name: str, prompts: Container[str]) -> str | None:
    """The prompt that a row or a sample belongs to: itself, or what stands before the `@` of a turn's number."""
    return next((known for known in (name, name.rpartition("@")[0]) if known in prompts), None)


def _samples(run: Run, split: str | None = None) -> list[Sample]:
    """The answers as token samples, those that fit the target's positions."""
    if not run.recipe.data.keep_answers:
        artefacts.opened(run.path("regenerate"), regeneration.KIND, _made_by(run), checksums=False)
    samples = [s for c in _answers(run, split) for s in samples_of(c, run.target.tokenizer)]
    longest = run.target.spec.max_positions
    fitting = [s for s in samples if len(s.ids) <= longest]
    if not fitting:
        raise UserError(
            f"none of the {len(samples)} {split or ''} answers fits the {longest:,} positions of the target: take "
            "shorter conversations"
        )
    return fitting


def _made_by(run: Run) -> dict[str, object]:
    """What the artefacts of this run's target say of it."""
    return {"target": run.target.spec.fingerprint}


def _reads(run: Run) -> FeatureSpec:
    o = run.recipe.drafter
    try:
        return algorithms.reads(o.kind, o.layers, run.target.spec)
    except ValueError as problem:
        raise UserError(f"drafter.layers: {problem}") from None


def score(run: Run, out: Path, identity: Identity) -> None:
    """Statistics of every token (kind "features"); with `features.store: all` the hidden states too, in one pass."""
    both = run.recipe.features.store == "all"
    read = _reads(run)  # checked here even where they are not read yet
    want = read if both else FeatureSpec()
    samples = _samples(run)
    total = sum(len(samples_of(c, run.target.tokenizer)) for c in _answers(run)) if run.recipe.data.keep_answers else 0
    if total > len(samples):
        console.warn(f"{total - len(samples)} of {total} answers are longer than the target's positions and left out")
    _say_size(run, samples, want)
    train = {s.id for s in _samples(run, "train")}
    feature_store.store(run.target, samples, want, run.recipe.features, out, identity, train.__contains__)


def _say_size(run: Run, samples: Sequence[Sample], want: FeatureSpec) -> None:
    positions = sum(len(s.ids) for s in samples)
    size = feature_store.estimated_bytes(positions, want, run.target.spec.hidden_size)
    console.say(f"{console.count(positions)} positions, about {console.size(size)} on disk")


def _scored(run: Run, store: FeatureStore, ids: Sequence[str]) -> list[ScoredSample]:
    name = run.recipe.select.method
    texts: dict[str, str] = {}
    for c in _answers(run, "train"):
        answers = [m.content for m in c.messages if m.role == "assistant"]
        texts |= {f"{c.id}@{turn}": text for turn, text in enumerate(answers, start=1)}
        texts[c.id] = answers[-1]
    scored = []
    for i in ids:
        sample = store[i]
        rows = sample.answer_rows
        scores = {}
        if name in SCORES:
            columns = {column: values[rows] for column, values in sample.statistics.items()}
            evidence = Evidence(TokenStatistics(**columns, vocab_size=int(store.meta["vocab_size"])))
            scores = {name: token_scores(name, evidence)}
        scored.append(
            ScoredSample(i, int(rows.sum()), len(sample.ids), scores, text=texts.get(i, ""), complete=sample.complete)
        )
    return scored


def select(run: Run, out: Path, identity: Identity) -> None:
    """Choose the training samples (kind "selection"); what was kept is written as jsonl that any trainer takes."""
    store = FeatureStore(run.path("score"), checksums=False)
    sets = {c.id: _set_of(c) if run.recipe.select.within_sets else "" for c in read_prompts(run, "train")}
    asked = {i: prompt for i in store.ids if (prompt := _asked_in(i, sets)) is not None}
    ids = list(asked)
    groups: dict[str, list[str]] = {}
    for i, prompt in asked.items():
        groups.setdefault(sets[prompt], []).append(i)
    if not groups:
        raise UserError("there is no training sample to choose from: take more or other training prompts (data.train)")
    chosen = _joined([choose(_scored(run, store, group), run.recipe.select) for group in groups.values()], ids)
    # a conversation that gave several samples is kept with the first of them
    kept = {*chosen.kept, *(asked[i] for i in chosen.kept)}
    with artefacts.writing(out, "selection", identity) as scratch:
        artefacts.write_jsonl(scratch / "selection.jsonl", chosen.to_rows())
        write_scores(scratch / "scores.parquet", map(store.__getitem__, ids), chosen, int(store.meta["vocab_size"]))
        conversations = (c for c in _answers(run, "train") if c.id in kept)
        artefacts.write_jsonl(scratch / "kept.jsonl", (to_row(c) for c in conversations))
    share = 1 - chosen.positions_kept / max(1, chosen.positions_total)
    console.say(
        f"kept {len(chosen.kept)} of {len(ids)} samples, {console.count(chosen.tokens_kept)} of "
        f"{console.count(chosen.tokens_total)} answer tokens: an epoch of training takes {share:.0%} less time"
    )


def _joined(parts: Sequence[Selection], order: Sequence[str]) -> Selection:
    """Selections made within sets, as one."""
    kept = {i for part in parts for i in part.kept}

    def total(name: str) -> int:
        return sum(int(getattr(part, name)) for part in parts)

    return Selection(
        kept=tuple(i for i in order if i in kept),
        dropped={i: reason for part in parts for i, reason in part.dropped.items()},
        scores={i: value for part in parts for i, value in part.scores.items()},
        thresholds=tuple(t for part in parts for t in part.thresholds),
        tokens_kept=total("tokens_kept"),
        tokens_total=total("tokens_total"),
        positions_kept=total("positions_kept"),
        positions_total=total("positions_total"),
    )


def read_selection(run: Run) -> Selection:
    """The run's selection."""
    return Selection.from_rows(artefacts.read_jsonl(run.path("select") / "selection.jsonl"))


def features(run: Run, out: Path, identity: Identity) -> None:
    """Hidden states of kept training samples and dev samples; nothing to do where the score pass stored them."""
    store = run.recipe.features.store
    if store != "kept":
        # what reads this stage's artefact has to notice when what is read instead is another one
        read = run.path("score" if store == "all" else "regenerate")
        if ranks.rank() == 0:
            with artefacts.writing(out, feature_store.KIND, identity) as scratch:
                stored = {"stored_in": read.name, "checksum": artefacts.checksum(read)}
                artefacts.write_json(scratch / "stored.json", stored)
        told = {"all": "stored by the score pass", "online": "nothing to store: the target reads as training goes on"}
        console.say(told[store])
        return
    samples = _to_train_on(run)
    want = _reads(run)
    _say_size(run, samples, want)
    feature_store.store(run.target, samples, want, run.recipe.features, out, identity)


def training_source(run: Run) -> FeatureStore | OnlineSource:
    """What training reads: a store, or the target itself.

    Raises:
        StaleError: another target filled the store.
    """
    if run.recipe.features.store == "online":
        return OnlineSource(run.target, _to_train_on(run), _reads(run), run.recipe.features)
    folder = run.path("score" if run.recipe.features.store == "all" else "features")
    return FeatureStore(folder, _made_by(run), checksums=False)


def _to_train_on(run: Run) -> list[Sample]:
    """The kept training samples and the dev samples."""
    kept = set(read_selection(run).kept)
    dev = {s.id for s in _samples(run, "dev")}
    return [s for s in _samples(run) if s.id in kept or s.id in dev]


def _dev(run: Run, source: SampleSource, growth: GrowthOptions) -> Dev:
    dev = {s.id for s in _samples(run, "dev")}
    answers = [stored_answer(sample) for sample in source.fetch([i for i in source.ids if i in dev], 0)]
    return Dev(run.target.spec, answers, growth.build())


def dev_by_set(run: Run, source: SampleSource) -> dict[str, list[StoredAnswer]]:
    """The dev answers of each set, to be replayed."""
    sets = {c.id: _set_of(c) for c in read_prompts(run, "dev")}
    asked = {i: prompt for i in source.ids if (prompt := _asked_in(i, sets)) is not None}
    answers: dict[str, list[StoredAnswer]] = {}
    for sample in source.fetch(list(asked), 0):
        answers.setdefault(sets[asked[sample.id]], []).append(stored_answer(sample))
    return answers


def dev_answers(run: Run) -> list[StoredAnswer]:
    """The run's dev answers with their states, to replay."""
    return [answer for own in dev_by_set(run, training_source(run)).values() for answer in own]


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
    kept = list(read_selection(run).kept)
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
        return algorithms.fresh_head(o.kind, run.target, vocab, o.layers, run.recipe.train.seed)
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


def tune(run: Run, out: Path, identity: Identity) -> None:
    """Choose the tree (kind "growth"): measure what verifying and drafting cost here, replay dev, take the fastest.

    The speed-up expected of a tree is the geometric mean over the sets: a tree that is good for one only is not taken.
    """
    head = load_drafter(run.path("train"), run.target)
    tried = tuning.tuned(run.target, head, dev_by_set(run, training_source(run)), run.recipe.tune.growths)
    tuning.show(tried)
    with artefacts.writing(out, "growth", identity) as scratch:
        artefacts.write_json(scratch / "growth.json", tried.best.growth.model_dump(mode="json"))
        artefacts.write_json(scratch / "profile.json", tried.to_json())


def chosen_growth(run_folder: Path) -> GrowthOptions:
    """The growth that `tune` chose."""
    path = run_folder / "growth" / "growth.json"
    return validate(GrowthOptions, artefacts.read_json(path), str(path))


def bench(run: Run, out: Path, identity: Identity) -> None:
    """Plain and speculative decoding of the test prompts in the same engine (kind "bench")."""
    head = load_drafter(run.path("train"), run.target)
    growth = chosen_growth(run.folder)
    sets: dict[str, list[Conversation]] = {}
    for conversation in read_prompts(run, "test"):
        sets.setdefault(_set_of(conversation), []).append(conversation)
    conditions = {"drafter": artefacts.checksum(run.path("train")), "growth": growth.model_dump(mode="json")}
    named: dict[str, Composition] = {run.recipe.drafter.kind: Single(head, growth.build())}
    with artefacts.writing(out, "bench", identity, resume=True) as scratch:
        try:
            rows = benching.bench(run.target, named, sets, run.recipe.bench, scratch / "bench.jsonl", conditions)
        except StaleError:
            (scratch / "bench.jsonl").unlink()
            rows = benching.bench(run.target, named, sets, run.recipe.bench, scratch / "bench.jsonl", conditions)
        found = benching.results(rows)
        artefacts.write_json(scratch / "results.json", [r.model_dump(mode="json") for r in found])


def _set_of(conversation: Conversation) -> str:
    return conversation.source or conversation.id.split("/")[0]
