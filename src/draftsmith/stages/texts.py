"""What a run is made from: its prompts, and the answers that the target gives."""

from __future__ import annotations

import hashlib
from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.data import regenerate as regeneration
from draftsmith.data.benchmarks import posed
from draftsmith.data.conversations import Conversation, from_row, read_conversations, to_row
from draftsmith.data.prompts import make_prompts, templates_digest
from draftsmith.data.rows import SUFFIXES
from draftsmith.data.samples import Sample, samples_of
from draftsmith.foundation import artefacts, console, ranks, seeding
from draftsmith.foundation.errors import UserError
from draftsmith.recipe import Recipe

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
    train = {c.id for c in read_prompts(run, "train")}

    def counted(row: str) -> bool:
        return asked_in(row, train) is not None

    regeneration.regenerate(run.target, asked, run.recipe.regenerate, out, identity, counted=counted)


def read_answers(run: Run, split: str | None = None) -> list[Conversation]:
    """The answers; of one split, or of both."""
    wanted = {c.id for name in ("train", "dev") if split in (None, name) for c in read_prompts(run, name)}
    return [c for c in regeneration.read(run.path("regenerate")) if asked_in(c.id, wanted)]


def asked_in(name: str, prompts: Container[str]) -> str | None:
    """The prompt that a row or a sample belongs to: itself, or what stands before the `@` of a turn's number."""
    return next((known for known in (name, name.rpartition("@")[0]) if known in prompts), None)


def read_samples(run: Run, split: str | None = None) -> list[Sample]:
    """The answers as token samples, those that fit the target's positions."""
    if not run.recipe.data.keep_answers:
        artefacts.opened(run.path("regenerate"), regeneration.KIND, made_by(run), checksums=False)
    samples = [s for c in read_answers(run, split) for s in samples_of(c, run.target.tokenizer)]
    longest = run.target.spec.max_positions
    fitting = [s for s in samples if len(s.ids) <= longest]
    if not fitting:
        raise UserError(
            f"none of the {len(samples)} {split or ''} answers fits the {longest:,} positions of the target: take "
            "shorter conversations"
        )
    return fitting


def made_by(run: Run) -> dict[str, object]:
    """What the artefacts of this run's target say of it."""
    return {"target": run.target.spec.fingerprint}


def set_of(conversation: Conversation) -> str:
    return conversation.source or conversation.id.split("/")[0]
