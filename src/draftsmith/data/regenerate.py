"""The target answers the prompts in its own words: what a drafter trains on has to be what the target would write.

Batches are planned over all prompts before the first is decoded, longest prompts first, and finished at batch borders:
an interrupted run goes on with the next batch and writes the same file. Of a conversation with several user turns each
assistant turn is written in its place, with the target's own earlier turns before it, and becomes a row of its own.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import Field

from draftsmith.data import watched
from draftsmith.data.conversations import Answer, Conversation, Message, from_row, to_row
from draftsmith.data.replies import Asked, Tally
from draftsmith.data.served import ServerOptions
from draftsmith.data.served import answer as served
from draftsmith.foundation import artefacts, console, ranks
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.target import chat
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling, Written, write

KIND = "conversations"
FILE = "conversations.jsonl"
QUARANTINE = "quarantine.jsonl"
STATISTICS = "statistics.safetensors"


class RegenerateOptions(Options):
    """How the target writes its answers."""

    max_new_tokens: int = Field(
        default=128, ge=1, description="tokens of an answer at most; a cut answer is marked, and teaches no end"
    )
    batch: int = Field(default=64, ge=1, description="prompts decoded together")
    sampling: Sampling = Field(default=Sampling(), description="greedy by default")
    server: ServerOptions | None = Field(default=None, description="a server of the same target writes them instead")
    statistics: bool = Field(
        default=True,
        description="keep flatness and the other statistics of each token as it is written, so that scores need no "
        "pass of their own; a server gives none",
    )


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
        users = turns(conversation)
        if users > turn:
            suffix = f"@{turn + 1}" if users > 1 else ""
            jobs.append(Job(conversation.id + suffix, conversation, turn))
    return jobs


def turns(conversation: Conversation) -> int:
    """How many answers a conversation asks for."""
    return sum(m.role == "user" for m in conversation.messages)


def regenerate(
    target: HFTarget,
    conversations: Sequence[Conversation],
    options: RegenerateOptions,
    out: Path,
    meta: dict[str, object],
    on_tokens: Callable[[int], None] | None = None,
    counted: Callable[[str], bool] = lambda _: True,
) -> Path:
    """Write answers to all conversations' user turns into the artefact `out` (kind "conversations").

    A conversation of several turns gives a row for each, named `<id>@<turn>`. What the template refuses, or what leaves
    no room for an answer, is set aside with its reason in the artefact's `quarantine.jsonl`.

    Args:
        meta: what else identifies the result (the prompts' fingerprint); target, template and options are added.
        on_tokens: called with the number of tokens just written.
        counted: over these rows (by id) the tokens that the target was expected to write are summed up.

    Raises:
        UserError: the target has no chat template, two rows would have one id, or no conversation can be answered.
    """
    identity = {
        **meta,
        "target": target.spec.fingerprint,
        "template": chat.template_digest(target.tokenizer),
        "regenerate": options.model_dump(mode="json"),
    }
    order = [job.id for c in conversations for turn in range(turns(c)) for job in plan([c], turn)]
    if twice := [name for name, count in Counter(order).items() if count > 1]:
        raise UserError(f"two answers would be called {twice[0]!r}: give the conversations other ids")
    with artefacts.writing(out, KIND, identity, resume=True, together=True) as scratch:
        writer = _Writer(target, options, scratch / artefacts.WORK, on_tokens, counted)
        for turn in range(max(map(turns, conversations), default=0)):
            writer.write_turn(plan(conversations, turn), turn)
        if not writer.written:
            reason = f": {next(iter(writer.refused.values()))}" if writer.refused else ", for there is none"
            raise UserError(f"no conversation can be answered{reason}")
        writer.tally.report()
        if ranks.rank() == 0:
            _finish(writer, order, scratch, out)
    return out


def _finish(writer: _Writer, order: Sequence[str], scratch: Path, out: Path) -> None:
    names = [i for i in order if i in writer.written]
    artefacts.write_jsonl(scratch / FILE, (to_row(writer.written[i]) for i in names))
    if writer.watches:
        watched.load(writer.batches).save(scratch / STATISTICS, names)
    if writer.refused:
        rows = [{"id": name, "reason": reason} for name, reason in writer.refused.items()]
        artefacts.write_jsonl(scratch / QUARANTINE, rows)
        console.warn(
            f"{len(rows)} of {len(order)} answers can't be written, the first ({rows[0]['id']}) because "
            f"{rows[0]['reason']}; all are listed in {out / QUARANTINE}"
        )


def read(folder: Path, expect: Mapping[str, object] | None = None) -> list[Conversation]:
    """The conversations of an artefact that `regenerate` made."""
    artefacts.opened(folder, KIND, expect)
    return [from_row(row) for row in artefacts.read_jsonl(folder / FILE)]


def read_statistics(folder: Path) -> watched.Watched | None:
    """What was seen of each answer while the target wrote it; None where that was not kept."""
    path = folder / STATISTICS
    if not path.is_file():
        return None
    return watched.load([(path, [str(row["id"]) for row in artefacts.read_jsonl(folder / FILE)])])


class _Writer:
    """What a regeneration has written so far, by row id, and what it had to set aside."""

    def __init__(
        self,
        target: HFTarget,
        options: RegenerateOptions,
        folder: Path,
        on_tokens: Callable[[int], None] | None,
        counted: Callable[[str], bool],
    ) -> None:
        self.target, self.options, self.folder, self.on_tokens = target, options, folder, on_tokens
        self.counted = counted
        self.watches = options.statistics and options.server is None
        self.batches: list[tuple[Path, list[str]]] = []
        self.written: dict[str, Conversation] = {}
        self.refused: dict[str, str] = {}
        self.tally = Tally()
        self._ended: set[str] = set()

    def write_turn(self, jobs: Sequence[Job], turn: int) -> None:
        """Answer a turn of all conversations; batches that an earlier run finished are read."""
        prompts = {job.id: prompt for job in jobs if (prompt := self._prompt(job)) is not None}
        order = sorted((job for job in jobs if job.id in prompts), key=lambda job: (-len(prompts[job.id][1]), job.id))
        server = self.options.server
        size = 4 * server.concurrency if server else self.options.batch
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        files = [(batch, self.folder / f"{turn}-{number:05d}.jsonl") for number, batch in enumerate(batches)]
        own = ranks.share(files)
        # Counted in tokens, for a batch's answers end nearly together; what an answer did not need is done too.
        longest = self.options.max_new_tokens
        done = longest * sum(len(batch) for batch, path in own if path.is_file())
        title = f"writing answers, turn {turn + 1}" if turn else "writing answers"
        started, tokens, answers = time.perf_counter(), 0, 0
        with console.progress(title, longest * sum(len(batch) for batch, _ in own), "tokens", done=done) as bar:
            for batch, path in own:
                if path.is_file():
                    continue
                rows = []
                asked = [prompts[job.id][1] for job in batch]
                names = [job.id for job in batch]
                watch = watched.Watch(names, self.counted) if self.watches else None
                for event in self._events(asked, names, watch):
                    if isinstance(event, Written):
                        rows.append(self._answered(batch[event.row], *prompts[names[event.row]], event))
                        answers += 1
                        bar.advance(max(0, longest - len(event.token_ids)), answers=answers)
                    else:
                        tokens += event
                        bar.advance(event, written_per_second=round(tokens / (time.perf_counter() - started)))
                        if self.on_tokens:
                            self.on_tokens(event)
                rows.sort(key=lambda c: c.id)
                if watch is not None:  # before the answers, which say that the batch is done
                    watch.save(path.with_suffix(".safetensors"))
                artefacts.write_jsonl(path, (to_row(c) for c in rows))
        ranks.barrier()  # the next turn reads what all ranks wrote
        self.batches += [(path.with_suffix(".safetensors"), [job.id for job in batch]) for batch, path in files]
        for _, path in files:
            self.written.update({c.id: c for c in map(from_row, artefacts.read_jsonl(path))})

    def _events(
        self, asked: Sequence[list[int]], names: Sequence[str], watch: watched.Watch | None
    ) -> Iterator[Written | int]:
        """Finished answers and counts of tokens, from the target here or from a server."""
        o = self.options
        if o.server is None:
            yield from write(self.target, asked, names, o.sampling, o.max_new_tokens, watch)
            return
        spec = self.target.spec
        questions = [
            Asked(i, ids, name, room=min(o.max_new_tokens, spec.max_positions - len(ids)))
            for i, (ids, name) in enumerate(zip(asked, names, strict=True))
        ]
        tokenizer, ends = self.target.tokenizer, spec.eos_ids
        for answer in served(o.server, questions, o.sampling, o.max_new_tokens, tokenizer, ends, self.tally):
            yield Written(answer.index, answer.token_ids, answer.complete)
            yield len(answer.token_ids)

    def _prompt(self, job: Job) -> tuple[list[Message], list[int]] | None:
        """The messages before a turn and their token ids; None if it can't be answered."""
        if job.source.id in self._ended:
            self.refused[job.id] = "an earlier turn could not be answered"
            return None
        messages = self._before(job)
        try:
            ids = chat.prompt_ids(self.target.tokenizer, messages)
            longest = self.target.spec.max_positions
            if len(ids) >= longest:
                raise UserError(f"its prompt has {len(ids):,} tokens, and the target takes {longest:,} with the answer")
        except UserError as problem:
            self.refused[job.id] = str(problem)
            self._ended.add(job.source.id)
            return None
        return messages, ids

    def _before(self, job: Job) -> list[Message]:
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
                    messages.append(self.written[f"{job.source.id}@{turn}"].messages[-1])
            messages.append(message)
        return messages

    def _answered(self, job: Job, messages: list[Message], prompt: Sequence[int], event: Written) -> Conversation:
        text = self.target.tokenizer.decode(event.token_ids, skip_special_tokens=True)
        answer = Answer(
            prompt_ids=tuple(prompt),
            token_ids=tuple(event.token_ids),
            complete=event.complete,
            temperature=self.options.sampling.temperature,
            seed=self.options.sampling.seed,
        )
        return replace(job.source, id=job.id, messages=(*messages, Message("assistant", text)), answer=answer)
