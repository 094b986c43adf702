"""What the target is read for: statistics of all samples, states of those that are kept; and the choice between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from draftsmith.data import features as feature_store
from draftsmith.data import regenerate as regeneration
from draftsmith.data.conversations import to_row
from draftsmith.data.features import FeatureStore
from draftsmith.data.online import OnlineSource
from draftsmith.data.samples import Sample, samples_of
from draftsmith.evaluation.replayed import stored_answer
from draftsmith.foundation import artefacts, console, ranks
from draftsmith.foundation.errors import UserError
from draftsmith.numerics.distributions import TokenStatistics
from draftsmith.selection.files import write_scores
from draftsmith.selection.samples import ScoredSample, Selection, best_first, joined
from draftsmith.selection.samples import select as choose
from draftsmith.selection.scores import DRAFT_AWARE, SCORES, Evidence, token_scores
from draftsmith.stages.texts import Identity, asked_in, made_by, read_answers, read_prompts, read_samples, set_of
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.replay import StoredAnswer
from draftsmith.training import algorithms
from draftsmith.training.objectives.base import SampleSource
from draftsmith.training.overlaps import overlaps_of

if TYPE_CHECKING:
    from draftsmith.pipeline import Run


def _reads(run: Run) -> FeatureSpec:
    o = run.recipe.drafter
    try:
        return algorithms.reads(o.kind, o.layers, run.target.spec)
    except ValueError as problem:
        raise UserError(f"drafter.layers: {problem}") from None


def score(run: Run, out: Path, identity: Identity) -> None:
    """Statistics of every token (kind "features"); with `features.store: all` the hidden states too, in one pass.

    Statistics alone need no pass where they were taken while the target wrote (`regenerate.statistics`).
    """
    both = run.recipe.features.store == "all"
    read = _reads(run)  # checked here even where they are not read yet
    want = read if both else FeatureSpec()
    samples = read_samples(run)
    total = (
        sum(len(samples_of(c, run.target.tokenizer)) for c in read_answers(run)) if run.recipe.data.keep_answers else 0
    )
    if total > len(samples):
        console.warn(f"{total - len(samples)} of {total} answers are longer than the target's positions and left out")
    if not both and (seen := regeneration.read_statistics(run.path("regenerate"))):
        console.say("scored as the target wrote: there is nothing to read")
        if ranks.rank() == 0:
            feature_store.store_watched(run.target.spec, samples, seen, out, identity)
        return
    _say_size(run, samples, want)
    train = {s.id for s in read_samples(run, "train")}
    feature_store.store(run.target, samples, want, run.recipe.features, out, identity, train.__contains__)


def _say_size(run: Run, samples: Sequence[Sample], want: FeatureSpec) -> None:
    positions = sum(len(s.ids) for s in samples)
    size = feature_store.estimated_bytes(positions, want, run.target.spec.hidden_size)
    console.say(f"{console.count(positions)} positions, about {console.size(size)} on disk")


def _scored(
    run: Run, store: FeatureStore, ids: Sequence[str], overlaps: Sequence[Mapping[str, Tensor] | None]
) -> list[ScoredSample]:
    """Samples with the method's scores; `overlaps` with the current and the reference drafter, by id."""
    name = run.recipe.select.method
    texts: dict[str, str] = {}
    for c in read_answers(run, "train"):
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
            known = [None if found is None else found[i][rows] for found in overlaps]
            evidence = Evidence(TokenStatistics(**columns, vocab_size=int(store.meta["vocab_size"])), *known)
            scores = {name: token_scores(name, evidence)}
        scored.append(
            ScoredSample(i, int(rows.sum()), len(sample.ids), scores, text=texts.get(i, ""), complete=sample.complete)
        )
    return scored


def select(run: Run, out: Path, identity: Identity) -> None:
    """Choose the training samples (kind "selection"); what was kept is written as jsonl that any trainer takes."""
    store = FeatureStore(run.path("score"), checksums=False)
    sets = {c.id: set_of(c) if run.recipe.select.within_sets else "" for c in read_prompts(run, "train")}
    asked = {i: prompt for i in store.ids if (prompt := asked_in(i, sets)) is not None}
    ids = list(asked)
    groups: dict[str, list[str]] = {}
    for i, prompt in asked.items():
        groups.setdefault(sets[prompt], []).append(i)
    if not groups:
        raise UserError("there is no training sample to choose from: take more or other training prompts (data.train)")
    o = run.recipe.select
    drafters = [folder if o.method in DRAFT_AWARE else None for folder in (o.drafter, o.reference)]
    overlaps = [None if folder is None else overlaps_of(folder, run.target, store, ids) for folder in drafters]
    chosen = joined([choose(_scored(run, store, group, overlaps), o) for group in groups.values()], ids)
    if known := [artefacts.checksum(algorithms.drafter_in(folder)) for folder in drafters if folder is not None]:
        identity = {**identity, "drafters": known}
    # a conversation that gave several samples is kept with the first of them
    kept = {*chosen.kept, *(asked[i] for i in chosen.kept)}
    with artefacts.writing(out, "selection", identity) as scratch:
        artefacts.write_jsonl(scratch / "selection.jsonl", chosen.to_rows())
        write_scores(scratch / "scores.parquet", map(store.__getitem__, ids), chosen, int(store.meta["vocab_size"]))
        conversations = (c for c in read_answers(run, "train") if c.id in kept)
        artefacts.write_jsonl(scratch / "kept.jsonl", (to_row(c) for c in conversations))
    share = 1 - chosen.positions_kept / max(1, chosen.positions_total)
    console.say(
        f"kept {len(chosen.kept)} of {len(ids)} samples, {console.count(chosen.tokens_kept)} of "
        f"{console.count(chosen.tokens_total)} answer tokens: an epoch of training takes {share:.0%} less time"
    )


def read_selection(run: Run) -> Selection:
    """The run's selection."""
    return Selection.from_rows(artefacts.read_jsonl(run.path("select") / "selection.jsonl"))


def kept_samples(run: Run) -> list[str]:
    """The samples to train on; best first where training leaves some out as it goes on (`train.rounds`)."""
    chosen = read_selection(run)
    if not run.recipe.train.rounds:
        return list(chosen.kept)
    sets = {c.id: set_of(c) if run.recipe.select.within_sets else "" for c in read_prompts(run, "train")}
    return best_first(chosen, {i: sets[prompt] for i in chosen.kept if (prompt := asked_in(i, sets)) is not None})


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
    return FeatureStore(folder, made_by(run), checksums=False)


def _to_train_on(run: Run) -> list[Sample]:
    """The kept training samples and the dev samples."""
    kept = set(read_selection(run).kept)
    dev = {s.id for s in read_samples(run, "dev")}
    return [s for s in read_samples(run) if s.id in kept or s.id in dev]


def dev_by_set(run: Run, source: SampleSource) -> dict[str, list[StoredAnswer]]:
    """The dev answers of each set, to be replayed."""
    sets = {c.id: set_of(c) for c in read_prompts(run, "dev")}
    asked = {i: prompt for i in source.ids if (prompt := asked_in(i, sets)) is not None}
    answers: dict[str, list[StoredAnswer]] = {}
    for sample in source.fetch(list(asked), 0):
        answers.setdefault(sets[asked[sample.id]], []).append(stored_answer(sample))
    return answers


def dev_answers(run: Run) -> list[StoredAnswer]:
    """The run's dev answers with their states, to replay."""
    return [answer for own in dev_by_set(run, training_source(run)).values() for answer in own]
