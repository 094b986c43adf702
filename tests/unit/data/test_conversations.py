"""Reading conversations: every schema and format, every reason to set a row aside, and nothing that slips through."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.data import conversations
from draftsmith.data.conversations import Answer, Conversation, Message, from_row, read_conversations, subset, to_row
from draftsmith.data.rows import BadRowError
from draftsmith.foundation.errors import UserError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
TALK = (Message("user", "Hi"), Message("assistant", "Hello"))


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def chat(*turns: str) -> dict[str, Any]:
    """`chat("user", "a", "assistant", "b")` as a row."""
    return {"messages": [{"role": r, "content": c} for r, c in zip(turns[::2], turns[1::2], strict=True)]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (GOOD, TALK),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, TALK),
        ({"conversations": GOOD["messages"]}, TALK),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"}]},
            (Message("system", "S"), TALK[0]),
        ),
        ({"prompt": "Hi", "response": "Hello"}, TALK),
        ({"prompt": "Hi", "completion": "Hello"}, TALK),
        ({"prompt": GOOD["messages"][:1], "response": "Hello"}, TALK),
        ({"prompt": "Hi"}, TALK[:1]),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, TALK),
        ({"instruction": "Hi", "output": "Hello"}, TALK),
        (
            {"instruction": "Sum", "input": "1 2", "output": "3"},
            (Message("user", "Sum\n\n1 2"), Message("assistant", "3")),
        ),
        ({"instruction": "Hi"}, TALK[:1]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, TALK[:1]),
        ({"turns": ["Hi", "Ho"], "category": "x"}, (TALK[0], Message("assistant", ""), Message("user", "Ho"))),
        ({"messages": GOOD["messages"], "category": "x", "prompt": "other"}, TALK),
    ],
)
def test_schemas(row: dict[str, Any], expected: tuple[Message, ...]) -> None:
    assert from_row(row, "name").messages == expected


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        (chat("assistant", "a", "user", "b"), "starts with the assistant", "nothing was asked"),
        (chat("user", "a", "user", "b"), "roles out of order", "message 2 is the user's, after user"),
        (chat("system", "s", "user", "a", "assistant", "b", "assistant", "c"), "roles out of order", "message 4"),
        (chat("user", "a", "system", "s"), "roles out of order", "message 2 is the system's"),
        (chat("user", " \n"), "empty content", "message 1 (user) is empty"),
        (chat("user", "a", "assistant", ""), "empty content", "message 2 (assistant) is empty"),
        (chat("user", "a", "assistant", " ", "user", "b"), "empty content", "message 2"),
        (chat("system", "s"), "empty content", "nothing was asked"),
        ({"turns": []}, "empty content", "nothing was asked"),
        ({"messages": []}, "empty content", "empty list"),
        ({"prompt": "a", "response": ""}, "empty content", "message 2"),
        (chat("user", "a", "tool", "b"), "unknown role", "'tool'"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "unknown role", "tool calls"),
        ({"messages": [{"role": "user"}]}, "unknown schema", "message 1 of 1 has no role and content"),
        ({"messages": "Hi"}, "unknown schema", "messages is not a list but str"),
        ({"messages": ["Hi"]}, "unknown schema", "message 1 of 1 is not an object"),
        ({"text": "Hi", "n": 1}, "unknown schema", "its fields are text, n; wanted messages, conversations (ShareGPT)"),
        ({}, "unknown schema", "its fields are none"),
        ({"prompt": 7}, "not text", "prompt is not text but int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text", "message 1 of 1"),
        (chat("user", "a" * 60, "assistant", "b" * 60), "over-long", "120 characters, the limit is 100"),
        ({**GOOD, "answer": {"prompt_ids": [1]}}, "broken answer", "token_ids"),
    ],
)
def test_what_cannot_be_used_says_why(row: dict[str, Any], kind: str, reason: str) -> None:
    with pytest.raises(BadRowError) as caught:
        from_row(row, "name", max_chars=100)
    assert caught.value.kind == kind
    assert reason in str(caught.value)


def test_a_placeholder_between_user_turns_is_kept() -> None:
    conversation = from_row(chat("user", "a", "assistant", "", "user", "b"), "name")
    assert conversation.messages[1] == Message("assistant", "")
    assert conversation.waits


def test_waiting() -> None:
    assert Conversation("a", TALK[:1]).waits
    assert not Conversation("a", TALK).waits


def test_an_answer_of_nothing_but_its_end_can_be_read_back() -> None:
    answer = Answer((1, 2), (0,), complete=True, temperature=0.0, seed=0)
    conversation = Conversation("a", (TALK[0], Message("assistant", "")), answer=answer)
    assert from_row(to_row(conversation)) == conversation


texts = st.text(min_size=1).filter(str.strip)


@given(
    st.builds(
        Conversation,
        id=texts,
        messages=st.lists(texts, min_size=1, max_size=6).map(
            lambda contents: tuple(Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents))
        ),
        source=st.text(),
        answer=st.none()
        | st.builds(
            Answer,
            prompt_ids=st.lists(st.integers(0, 99)).map(tuple),
            token_ids=st.lists(st.integers(0, 99)).map(tuple),
            complete=st.booleans(),
            temperature=st.floats(0, 2),
            seed=st.integers(0, 2**62),
        ),
        reference=st.none() | st.text(),
    )
)
def test_rows_round_trip_through_json(conversation: Conversation) -> None:
    assert from_row(json.loads(json.dumps(to_row(conversation)))) == conversation


def test_jsonl_with_every_kind_of_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    lines(
        path,
        {**GOOD, "id": "x"},
        "",
        GOOD,
        GOOD,
        GOOD,
        GOOD,
        "{broken",
        "[1]",
        chat("assistant", "a"),
        {**GOOD, "id": "x"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'{"prompt": "\xff"}\n')
    found, quarantine = read_conversations(path)
    assert [c.id for c in found] == ["x", "talk/3", "talk/4", "talk/5", "talk/6", "x#2"]
    assert {c.source for c in found} == {"talk"}
    where = [(Path(row.file).name, row.line, row.kind) for row in quarantine.rows]
    assert where == [
        ("talk.jsonl", 7, "not JSON"),
        ("talk.jsonl", 8, "not JSON"),
        ("talk.jsonl", 9, "starts with the assistant"),
        ("talk.jsonl", 11, "not UTF-8"),
    ]
    assert "line 1 column 2" in quarantine.rows[0].reason
    assert str(quarantine) == "4 rows set aside: 2 not JSON, 1 starts with the assistant, 1 not UTF-8"
    assert quarantine.counts == {"not JSON": 2, "starts with the assistant": 1, "not UTF-8": 1}
    quarantine.write(tmp_path / "aside.jsonl")
    written = [json.loads(line) for line in (tmp_path / "aside.jsonl").read_text().splitlines()]
    assert written[2] == {
        "file": str(path),
        "line": 9,
        "kind": "starts with the assistant",
        "reason": "the assistant speaks first, so nothing was asked",
    }


def test_over_long_by_default_and_by_option(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", chat("user", "x" * (conversations.MAX_CHARS + 1)), GOOD)
    found, quarantine = read_conversations(path)
    assert (len(found), quarantine.counts) == (1, {"over-long": 1})
    assert len(read_conversations(path, max_chars=10**6)[0]) == 2


def test_json_parquet_and_folders(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.json").write_text(json.dumps([GOOD, 3, {"prompt": "Hi", "response": "Hello"}]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, chat("assistant", "x")]), tmp_path / "b.parquet")
    lines(tmp_path / "c.json", GOOD, GOOD)  # JSON lines under another name
    (tmp_path / "notes.txt").write_text("no data")
    found, quarantine = read_conversations(tmp_path)
    assert [c.id for c in found] == ["a/1", "a/3", "b/1", "c/1", "c/2"]
    assert {c.messages for c in found} == {TALK}
    assert [(Path(row.file).name, row.line, row.kind) for row in quarantine.rows] == [
        ("a.json", 2, "not JSON"),
        ("b.parquet", 2, "starts with the assistant"),
    ]


def test_a_single_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(GOOD, indent=2))
    assert len(read_conversations(tmp_path / "a.json")[0]) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.json", '[\n{"a": 1},\n{"a": }]', r"a\.json:3: not valid JSON"),
        ("a.jsonl", "{oops\n[]\n{}", r"none of its 3 rows.*2 not JSON, 1 unknown schema.*a\.jsonl:1: not valid JSON"),
        ("a.parquet", "PAR1", "not a whole parquet file"),
    ],
)
def test_nothing_to_read(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_conversations(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "{tmp}/missing"])
def test_missing_files_are_not_looked_up_on_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="does not exist"):
        read_conversations(name.format(tmp=tmp_path))


def test_a_folder_without_conversations(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file with conversations"):
        read_conversations(tmp_path)


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, Any]]:
        asked.append((args, options))
        return [GOOD, chat("user", "")]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found, quarantine = read_conversations("owner/talks", split="test", config="small")
    assert asked == [(("owner/talks", "small"), {"split": "test"})]
    assert [(c.id, c.source) for c in found] == [("owner/talks/1", "owner/talks")]
    assert [(row.file, row.line) for row in quarantine.rows] == [("owner/talks", 2)]


def test_a_hub_data_set_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UserError, match=r"owner/talks is neither a file here nor a data set.*: no route$"):
        read_conversations("owner/talks")


def test_subsets_are_chosen_by_seed_and_nested() -> None:
    talks = [Conversation(str(i), TALK) for i in range(50)]
    few, more = subset(talks, 5, 1), subset(talks, 20, 1)
    assert len(few) == 5
    assert few == subset(talks, 5, 1)
    assert set(few) < set(more)
    assert [int(c.id) for c in more] == sorted(int(c.id) for c in more)
    assert subset(talks, 5, 2) != few
    assert subset(talks, None, 1) == subset(talks, 50, 1) == talks
