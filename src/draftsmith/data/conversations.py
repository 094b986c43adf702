"""Conversations: their form, the files they come from, and the bad rows among them, which are set aside with a reason.

Every source becomes the same rows: `{"id", "source", "messages": [{"role", "content"}, …]}`, with `reference` (a gold answer)
and `answer` (the exact tokens that a target read and wrote) where there are some.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.foundation import artefacts, seeding
from draftsmith.foundation.errors import UserError

MAX_CHARS = 32_768  # about 8,000 tokens of English
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
SCHEMAS = "messages, conversations (ShareGPT), prompt/response, or instruction/input/output (Alpaca)"

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
    """One turn: `role` is system, user or assistant. An assistant's empty `content` is a placeholder to be generated."""

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
        return self.messages[-1].role != "assistant" or any(not m.content for m in self.messages if m.role == "assistant")


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


class BadRowError(Exception):
    """A row that can't be used; `kind` is what it is counted under, the text says what is wrong with it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


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


def from_row(row: Mapping[str, Any], name: str, *, source: str = "", max_chars: int = MAX_CHARS) -> Conversation:
    """The conversation in a row of any known schema.

    Args:
        row: a JSON object with `messages`, `conversations` (ShareGPT: `from`, `value`), `prompt` and `response`, or
            `instruction`, `input` and `output` (Alpaca). Other fields are ignored.
        name: the id, where the row has none.
        source: where it is from, where the row does not say.
        max_chars: more characters than this in all messages is over-long.

    Raises:
        BadRowError: the row is of no known schema, or the conversation can't be used.
    """
    messages = _messages(row)
    _check(messages, max_chars)
    own = row.get("id")
    reference = row.get("reference")
    return Conversation(
        id=str(own) if isinstance(own, str | int) and own != "" else name,
        messages=tuple(messages),
        source=row["source"] if isinstance(row.get("source"), str) else source,
        answer=_answer(row["answer"]) if row.get("answer") is not None and "messages" in row else None,
        reference=reference if isinstance(reference, str) else None,
    )


def read_conversations(
    source: str | Path, *, split: str = "train", config: str | None = None, max_chars: int = MAX_CHARS
) -> tuple[list[Conversation], Quarantine]:
    """All usable conversations of a file, a folder of files, or a hub data set, in order, and the rows set aside.

    Args:
        source: a path (`.jsonl`, `.json`, `.parquet`, or a folder of such files), or the name of a data set on the
            Hugging Face hub, which `datasets` fetches.
        split, config: of a hub data set.
        max_chars: as in `from_row`.

    Returns:
        The conversations, their ids made unique, and the quarantine.

    Raises:
        UserError: there is nothing there, it is empty, or no row of it can be used.
    """
    found: list[Conversation] = []
    quarantine = Quarantine()
    ids: Counter[str] = Counter()
    for file, line, row in _rows(source, split, config):
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
            conversation = _renamed(conversation, f"{conversation.id}#{ids[conversation.id]}")
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


def subset(conversations: Sequence[Conversation], limit: int | None, seed: int, *purpose: str) -> list[Conversation]:
    """`limit` of the conversations, chosen by a keyed shuffle, in their old order; all of them if there are fewer.

    A smaller limit at the same seed chooses a part of what a larger one chooses.
    """
    if limit is None or limit >= len(conversations):
        return list(conversations)
    chosen = seeding.shuffled(len(conversations), "subset", seed, *purpose)[:limit]
    return [conversations[index] for index in sorted(chosen)]


Row = Mapping[str, Any] | BadRowError


def _rows(source: str | Path, split: str, config: str | None) -> Iterator[tuple[str, int, Row]]:
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no file with conversations ({', '.join(SUFFIXES)})")
        for file in files:
            yield from _file_rows(file)
    elif path.is_file():
        yield from _file_rows(path)
    elif path.suffix in SUFFIXES or path.is_absolute() or str(source).startswith((".", "~")):
        raise UserError(f"{source} does not exist: give a file, a folder of files, or the name of a hub data set")
    else:
        yield from ((str(source), line, row) for line, row in enumerate(hub_rows(str(source), split, config), start=1))


def hub_rows(name: str, split: str, config: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set on the Hugging Face hub.

    Raises:
        UserError: it can't be fetched; the text holds the reason that `datasets` gives.
    """
    import datasets

    try:
        yield from datasets.load_dataset(name, config, split=split)
    except Exception as problem:  # datasets raises errors of its own, of the hub's, of fsspec and of the network
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"{name} is neither a file here nor a data set that could be fetched from the Hugging Face hub "
            f"(split {split!r}): {reason}"
        ) from problem


def _file_rows(path: Path) -> Iterator[tuple[str, int, Row]]:
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {".parquet": _parquet_rows, ".json": _json_rows}
    for line, row in readers.get(path.suffix, _jsonl_rows)(path):
        yield str(path), line, row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _parsed(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return BadRowError("not UTF-8", "not UTF-8 text")
    except (json.JSONDecodeError, RecursionError) as problem:
        return BadRowError("not JSON", f"not valid JSON: {problem}")
    return row if isinstance(row, dict) else BadRowError("not JSON", f"not a JSON object but {type(row).__name__}")


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        data = json.loads(content) if content.strip() else []
    except json.JSONDecodeError as problem:
        if problem.msg == "Extra data":  # JSON lines under the name .json
            yield from _jsonl_rows(path)
            return
        raise UserError(f"{path}:{problem.lineno}: not valid JSON ({problem.msg}, column {problem.colno})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    for number, row in enumerate(data if isinstance(data, list) else [data], start=1):
        yield number, row if isinstance(row, dict) else BadRowError("not JSON", "not a JSON object")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as problem:
        raise UserError(f"{path} is not a whole parquet file: {problem}") from None


def _renamed(conversation: Conversation, name: str) -> Conversation:
    return Conversation(
        name, conversation.messages, conversation.source, conversation.answer, conversation.reference
    )


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
        asked = _text(instruction, "instruction")
        return [Message("user", f"{asked}\n\n{given}" if given else asked), *_reply(row.get("output"), "output")]
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


def _check(messages: Sequence[Message], max_chars: int) -> None:
    turns = messages[1:] if messages[0].role == "system" else messages
    if not turns:
        raise BadRowError("empty content", "a system message and nothing else")
    if turns[0].role == "assistant":
        raise BadRowError("starts with the assistant", "the assistant speaks first, so nothing was asked")
    for index, message in enumerate(turns):
        number = index + 1 + len(messages) - len(turns)
        if message.role != ("user", "assistant")[index % 2]:
            before = turns[index - 1].role if index else "the start"
            raise BadRowError("roles out of order", f"message {number} is the {message.role}'s, after {before}")
        placeholder = message.role == "assistant" and index + 1 < len(turns) and not message.content
        if not message.content.strip() and not placeholder:
            raise BadRowError("empty content", f"message {number} ({message.role}) is empty")
    length = sum(len(message.content) for message in messages)
    if length > max_chars:
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
        raise BadRowError("broken answer", f"answer: {problem!r}; wanted the tokens that draftsmith regenerate writes") from None
