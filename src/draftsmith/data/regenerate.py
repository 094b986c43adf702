"""The target answers the prompts in its own words: what a drafter trains on has to be what the target would write.

Batches are planned over all prompts before the first is decoded, longest prompts first, and finished at batch borders: an
interrupted run goes on with the next batch and writes the same file. Of a conversation with several user turns each assistant turn
is written in its place, with the target's own earlier turns before it, and becomes a row of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field

from draftsmith.data.conversations import Answer, Conversation, Message, from_row, to_row
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.options import Options
from draftsmith.target import chat
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling, Written, write

KIND = "conversations"
FILE = "conversations.jsonl"


class RegenerateOptions(Options):
    """How the target writes its answers."""

    max_new_tokens: int = Field(
        default=128, ge=1, description="tokens of an answer at most; a cut answer is marked, and teaches no end"
    )
    batch: int = Field(default=64, ge=1, description="prompts decoded together")
    sampling: Sampling = Field(default=Sampling(), description="greedy by default")


@dataclass(frozen=True)
class Job:
    """One assistant turn to write: the conversation's row id, the messages before the turn."""

    id: str
    source: Conversation
    turn: int


def plan(conversations: Sequence[Conversation], turn: int) -> list[Job]:
    """The conversations that have a user turn number `turn` (from 0), in their order."""
    jobs = []
    for conversation in conversations:
        users = sum(m.role == "user" for m in conversation.messages)
        if users > turn:
            suffix = f"#{turn + 1}" if users > 1 else ""
            jobs.append(Job(conversation.id + suffix, conversation, turn))
    return jobs


def regenerate(
    target: HFTarget,
    conversations: Sequence[Conversation],
    options: RegenerateOptions,
    out: Path,
    meta: dict[str, object],
    on_tokens: Callable[[int], None] | None = None,
) -> Path:
    """Write answers to all conversations' user turns into the artefact `out` (kind "conversations").

    Args:
        meta: what else identifies the result (the prompts' fingerprint); target, template and options are added.
        on_tokens: called with the number of tokens just written.
    """
    identity = {
        **meta,
        "target": target.spec.fingerprint,
        "template": chat.template_digest(target.tokenizer),
        "regenerate": options.model_dump(mode="json"),
    }
    with artefacts.writing(out, KIND, identity, resume=True) as scratch:
        _same_plan(scratch, identity)
        written: dict[str, Conversation] = {}
        for turn in range(max((sum(m.role == "user" for m in c.messages) for c in conversations), default=0)):
            _write_turn(target, plan(conversations, turn), options, scratch / "batches", turn, written, on_tokens)
        order = [job.id for c in conversations for t in range(8) for job in plan([c], t)]
        artefacts.write_jsonl(scratch / FILE, (to_row(written[i]) for i in order))
        for path in (scratch / "batches").iterdir():
            path.unlink()
        (scratch / "batches").rmdir()
        (scratch / "plan.json").unlink()
    return out


def read(folder: Path, expect: dict[str, object] | None = None) -> list[Conversation]:
    """The conversations of an artefact that `regenerate` made."""
    artefacts.opened(folder, KIND, expect)
    return [from_row(row) for row in artefacts.read_jsonl(folder / FILE)]


def _same_plan(scratch: Path, identity: dict[str, object]) -> None:
    """Clear what an interrupted run with other options left."""
    plan_file = scratch / "plan.json"
    if plan_file.is_file() and artefacts.read_json(plan_file) != identity:
        for path in (scratch / "batches").glob("*"):
            path.unlink()
    artefacts.write_json(plan_file, identity)
    (scratch / "batches").mkdir(exist_ok=True)


def _write_turn(
    target: HFTarget,
    jobs: Sequence[Job],
    options: RegenerateOptions,
    folder: Path,
    turn: int,
    written: dict[str, Conversation],
    on_tokens: Callable[[int], None] | None,
) -> None:
    prompts = {job.id: (messages := _before(job, written), chat.prompt_ids(target.tokenizer, messages)) for job in jobs}
    order = sorted(jobs, key=lambda job: (-len(prompts[job.id][1]), job.id))
    batches = [order[i : i + options.batch] for i in range(0, len(order), options.batch)]
    started, tokens = time.perf_counter(), 0
    with console.progress(f"writing answers{f', turn {turn + 1}' if turn else ''}", len(jobs), "answers") as bar:
        for number, batch in enumerate(batches):
            path = folder / f"{turn}-{number:05d}.jsonl"
            if path.is_file():
                rows = [from_row(row) for row in artefacts.read_jsonl(path)]
                bar.advance(len(rows))
            else:
                rows = []
                asked = [prompts[job.id][1] for job in batch]
                for event in write(target, asked, [job.id for job in batch], options.sampling, options.max_new_tokens):
                    if isinstance(event, Written):
                        job = batch[event.row]
                        rows.append(_answered(job, prompts[job.id][0], asked[event.row], event, options, target))
                        bar.advance(1, **{"tokens/s": tokens / (time.perf_counter() - started)})
                    else:
                        tokens += event
                        if on_tokens:
                            on_tokens(event)
                rows.sort(key=lambda c: c.id)
                artefacts.write_jsonl(path, (to_row(c) for c in rows))
            written.update({c.id: c for c in rows})


def _before(job: Job, written: dict[str, Conversation]) -> list[Message]:
    """The messages up to the user turn to be answered, earlier assistant turns as the target wrote them."""
    messages: list[Message] = []
    turn = -1
    for message in job.source.messages:
        if message.role == "assistant":
            continue
        if message.role == "user":
            turn += 1
            if turn > job.turn:
                break
            if turn:
                messages.append(written[f"{job.source.id}#{turn}"].messages[-1])
        messages.append(message)
    return messages


def _answered(
    job: Job,
    messages: list[Message],
    prompt: Sequence[int],
    event: Written,
    options: RegenerateOptions,
    target: HFTarget,
) -> Conversation:
    text = target.tokenizer.decode(event.token_ids, skip_special_tokens=True)
    answer = Answer(
        prompt_ids=tuple(prompt),
        token_ids=tuple(event.token_ids),
        complete=event.complete,
        temperature=options.sampling.temperature,
        seed=options.sampling.seed,
    )
    return replace(job.source, id=job.id, messages=(*messages, Message("assistant", text)), answer=answer)
