"""Conversations: their form, the files they come from, and the bad rows among them, which are set aside with a reason.

Every source becomes the same rows: `{"id", "source", "messages": [{"role", "content"}, …]}`, with `reference` (a gold
answer) and `answer` (the exact tokens that a target read and wrote) where there are some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from draftsmith.data.rows import SUFFIXES, BadRowError, rows_of
from draftsmith.foundation import artefacts, seeding
from draftsmith.foundation.errors import UserError

MAX_CHARS = 32_768  # about 8,000 tokens of English
SCHEMAS = "messages, conversations (ShareGPT), prompt/response, instruction/input/output (Alpaca), or turns (MT-Bench)"

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of the system, user or assistant. An assistant's empty `content` is a placeholder to be generated."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a target read and wrote for a conversation's last turn, in its own tokens.

    Attributes:
        prompt_ids: exactly what it read.
        token_ids: exactly what it wrote, the end token included if it wrote one.
        complete: it wrote an end token; otherwise the length limit cut the answer, which then teaches no end.
        temperature: 0 where it was greedy.
        seed: of the draws, where it was sampled.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    complete: bool
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation. `source` says where it is from, `reference` holds a gold answer for graders."""

    id: str
    messages: tuple[Message, ...]
    source: str = ""
    answer: Answer | None = None
    reference: str | None = None

    @property
    def waits(self) -> bool:
        """Whether some answer is still to be generated: a placeholder, or the user's message at the end."""
        return self.messages[-1].role != "assistant" or any(
            not m.content for m in self.messages if m.role == "assistant"
        )


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used: where it is (`line` counts from 1; in parquet and JSON lists it is the row) and why."""

    file: str
    line: int
    kind: str
    reason: str


@dataclass
class Quarantine:
    """The rows that were set aside."""

    rows: list[BadRow] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows by kind of reason, the most frequent first."""
        return dict(Counter(row.kind for row in self.rows).most_common())

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """`"3 rows set aside: 2 not JSON, 1 empty content"`."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return f"{len(self)} row{'s' * (len(self) != 1)} set aside: {kinds}" if self.rows else "no row set aside"

    def write(self, path: Path) -> None:
        """Write the rows as JSON lines: file, line, kind, reason."""
        artefacts.write_jsonl(
            path, ({"file": r.file, "line": r.line, "kind": r.kind, "reason": r.reason} for r in self.rows)
        )


def to_row(conversation: Conversation) -> dict[str, object]:
    """A conversation as a JSON row; `from_row` reads it back unchanged."""
    row: dict[str, object] = {
        "id": conversation.id,
        "source": conversation.source,
        "messages": [{"role": m.role, "content": m.content} for m in conversation.messages],
    }
    if conversation.reference is not None:
        row["reference"] = conversation.reference
    if (answer := conversation.answer) is not None:
        row["answer"] = {
            "prompt_ids": list(answer.prompt_ids),
            "token_ids": list(answer.token_ids),
            "complete": answer.complete,
            "temperature": answer.temperature,
            "seed": answer.seed,
        }
    return row


def from_row(row: Mapping[str, Any], name: str = "", *, source: str = "", max_chars: int | None = None) -> Conversation:
    """The conversation in a row of any known schema.

    Args:
        row: a JSON object with `messages`, `conversations` (ShareGPT: `from`, `value`), `prompt` and `response`,
            `instruction`, `input` and `output` (Alpaca), or `turns` (MT-Bench: the user's). Other fields are ignored.
        name: the id, where the row has none.
        source: where it is from, where the row does not say.
        max_chars: more characters than this in all messages is over-long; None for any length.

    Raises:
        BadRowError: the row is of no known schema, or the conversation can't be used.
    """
    messages = _messages(row)
    answer = _answer(row["answer"]) if row.get("answer") is not None and "messages" in row else None
    _check(messages, max_chars, answered=answer is not None)
    own = row.get("id")
    reference = row.get("reference")
    return Conversation(
        id=str(own) if isinstance(own, str | int) and own != "" else name,
        messages=tuple(messages),
        source=row["source"] if isinstance(row.get("source"), str) else source,
        answer=answer,
        reference=str(reference) if isinstance(reference, str | int | float) else None,
    )


def read_conversations(
    source: str | Path, *, split: str = "train", config: str | None = None, max_chars: int = MAX_CHARS
) -> tuple[list[Conversation], Quarantine]:
    """All usable conversations of a file, a folder of files, or a hub data set, in order, and the rows set aside.

    Args:
        source: a path (`.jsonl`, `.json`, `.parquet`, or a folder of such files), or the name of a data set on the
            Hugging Face hub, which `datasets` fetches.
        split, config: of a hub data set.
        max_chars: more characters than this in all messages is over-long.

    Returns:
        The conversations, their ids made unique, and the quarantine.

    Raises:
        UserError: there is nothing there, it is empty, or no row of it can be used.
    """
    found: list[Conversation] = []
    quarantine = Quarantine()
    ids: Counter[str] = Counter()
    for file, line, row in rows_of(source, split, config):
        stem = file.removesuffix(Path(file).suffix).rsplit("/", 1)[-1] if Path(file).suffix in SUFFIXES else file
        try:
            if isinstance(row, BadRowError):
                raise row
            conversation = from_row(row, f"{stem}/{line}", source=stem, max_chars=max_chars)
        except BadRowError as problem:
            quarantine.rows.append(BadRow(file, line, problem.kind, str(problem)))
            continue
        ids[conversation.id] += 1
        if ids[conversation.id] > 1:
            # every keyed draw depends on the id
            conversation = replace(conversation, id=f"{conversation.id}#{ids[conversation.id]}")
        found.append(conversation)
    if not found:
        if not quarantine.rows:
            raise UserError(f"{source} is empty: it holds no conversation")
        first = quarantine.rows[0]
        raise UserError(
            f"{source}: none of its {len(quarantine)} rows can be used ({quarantine}); the first is "
            f"{first.file}:{first.line}: {first.reason}"
        )
    return found, quarantine


def asked(turns: Sequence[str]) -> list[Message]:
    """The user's turns with placeholders between them, where the answers are to be generated."""
    messages = [Message("user", turn) for turn in turns]
    return [part for message in messages for part in (Message("assistant", ""), message)][1:]


def subset(conversations: Sequence[Conversation], limit: int | None, seed: int, *purpose: str) -> list[Conversation]:
    """`limit` of the conversations, chosen by a keyed shuffle, in their old order; all of them if there are fewer.

    A smaller limit at the same seed chooses a part of what a larger one chooses.
    """
    if limit is None or limit >= len(conversations):
        return list(conversations)
    chosen = seeding.shuffled(len(conversations), "subset", seed, *purpose)[:limit]
    return [conversations[index] for index in sorted(chosen)]


def _messages(row: Mapping[str, Any]) -> list[Message]:
    for name in ("messages", "conversations"):
        if row.get(name) is not None:
            return _listed(row[name], name)
    if (prompt := row.get("prompt")) is not None:
        messages = _listed(prompt, "prompt") if isinstance(prompt, list) else [Message("user", _text(prompt, "prompt"))]
        reply = next((row[name] for name in ("response", "completion") if row.get(name) is not None), None)
        return messages + _reply(reply, "response")
    if (instruction := row.get("instruction")) is not None:
        given = _text(row.get("input") or "", "input").strip()
        task = _text(instruction, "instruction")
        return [Message("user", f"{task}\n\n{given}" if given else task), *_reply(row.get("output"), "output")]
    if isinstance(turns := row.get("turns"), Sequence) and not isinstance(turns, str):
        return asked([_text(turn, "a turn") for turn in turns])
    fields = ", ".join(map(str, row)) or "none"
    raise BadRowError("unknown schema", f"no known schema: its fields are {fields}; wanted {SCHEMAS}")


def _listed(messages: Any, name: str) -> list[Message]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadRowError("unknown schema", f"{name} is not a list but {type(messages).__name__}")
    if not messages:
        raise BadRowError("empty content", f"{name} is an empty list")
    out = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of {len(messages)}"
        if not isinstance(message, Mapping):
            raise BadRowError("unknown schema", f"{where} is not an object")
        role = message.get("role", message.get("from"))
        if role is None or ("content" not in message and "value" not in message):
            raise BadRowError("unknown schema", f"{where} has no role and content (or from and value)")
        if role not in ROLES:
            raise BadRowError("unknown role", f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise BadRowError("unknown role", f"{where} holds tool calls, which are not supported")
        out.append(Message(ROLES[role], _text(message.get("content", message.get("value")), where)))
    return out


def _reply(reply: Any, name: str) -> list[Message]:
    return [] if reply is None else [Message("assistant", _text(reply, name))]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if isinstance(content, Sequence) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        return "".join(str(part.get("text", "")) for part in content)
    raise BadRowError("not text", f"{where} is not text but {type(content).__name__}")


def _check(messages: Sequence[Message], max_chars: int | None, answered: bool) -> None:
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        raise BadRowError("empty content", "nothing was asked")
    if turns[0].role == "assistant":
        raise BadRowError("starts with the assistant", "the assistant speaks first, so nothing was asked")
    for index, message in enumerate(turns):
        number = index + 1 + len(messages) - len(turns)
        if message.role != ("user", "assistant")[index % 2]:
            before = turns[index - 1].role if index else "the start"
            raise BadRowError("roles out of order", f"message {number} is the {message.role}'s, after {before}")
        # an answer of the target's own may be nothing but its end token
        placeholder = message.role == "assistant" and (answered or (index + 1 < len(turns) and not message.content))
        if not message.content.strip() and not placeholder:
            raise BadRowError("empty content", f"message {number} ({message.role}) is empty")
    length = sum(len(message.content) for message in messages)
    if max_chars is not None and length > max_chars:
        raise BadRowError("over-long", f"{length:,} characters, the limit is {max_chars:,}")


def _answer(row: Any) -> Answer:
    try:
        return Answer(
            prompt_ids=tuple(map(int, row["prompt_ids"])),
            token_ids=tuple(map(int, row["token_ids"])),
            complete=bool(row["complete"]),
            temperature=float(row["temperature"]),
            seed=int(row["seed"]),
        )
    except (KeyError, TypeError, ValueError) as problem:
        raise BadRowError(
            "broken answer", f"answer: {problem!r}; wanted the tokens that draftsmith regenerate writes"
        ) from None
