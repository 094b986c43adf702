"""`draftsmith chat` on a tiny target: what is written, in which colours, and what the target reads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.color import Color, ColorSystem
from rich.control import strip_control_codes
from tests.talking import Memory, answers, conversation, talking_target
from tests.unit.test_api import write_drafter

from draftsmith import api
from draftsmith.api import Model
from draftsmith.commands import chat as command
from draftsmith.commands import terminal
from draftsmith.commands.chat import SHADES, chat, converse, style
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.foundation.errors import UserError
from draftsmith.target.chat import prompt_ids

NEW = 20
LINE = re.compile(r"\[(\d+) tokens? in .*?(, [\d.]+ tokens/s)?(, acceptance length ([\d.]+))?\]( \(stopped\))?\n")


@pytest.fixture(autouse=True)
def _no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def model() -> Model:
    target = talking_target()
    texts = answers(target, [conversation("a", "Hi"), conversation("b", "Ho")], NEW)
    return Model(target, Single(Memory(texts), DynamicGrowth(7, 3, 3)))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """The conversations put before the target, as (role, content)."""
    seen: list[list[tuple[str, str]]] = []

    def spy(tokenizer: Any, messages: Any) -> list[int]:
        seen.append([(m["role"], m["content"]) for m in messages])
        return prompt_ids(tokenizer, messages)

    monkeypatch.setattr(api.chat, "prompt_ids", spy)
    return seen


def lines(*typed: str | type[BaseException]) -> Callable[[], str]:
    script: Iterator[str | type[BaseException]] = iter(typed)

    def read() -> str:
        item = next(script, EOFError)
        if isinstance(item, str):
            return item
        raise item

    return read


def shown(text: str) -> str:
    """The text as it appears: control characters (a random target writes some) are not sent to a terminal."""
    return strip_control_codes(text)


def test_one_shot(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    expected = model.generate("Hi", max_new_tokens=NEW)
    converse(model, max_new_tokens=NEW, prompt="Hi")
    out = capsys.readouterr().out
    text = shown(expected.text)
    assert len(text) > 10
    assert out.startswith(f"{text}\n")
    line = LINE.fullmatch(out[len(text) + 1 :])
    assert line is not None
    assert int(line[1]) == len(expected.token_ids)
    assert line[4] == f"{expected.acceptance_length:.2f}"
    assert float(line[4]) > 2
    assert line[5] is None


def test_a_conversation_remembers(
    model: Model, asked: list[list[tuple[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    converse(model, max_new_tokens=NEW, read=lines("Hi", "  ", "And now?", "/new", KeyboardInterrupt, "Ho"))
    out = capsys.readouterr().out
    assert len(LINE.findall(out)) == 3
    assert "Ctrl-D leaves" in out
    first = model.generate("Hi", max_new_tokens=NEW).text
    assert asked[:3] == [
        [("user", "Hi")],
        [("user", "Hi"), ("assistant", first), ("user", "And now?")],
        [("user", "Ho")],
    ]


def test_temperature_and_seed_reach_the_target(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [model.generate("Hi", max_new_tokens=NEW, temperature=1.2, seed=seed).text for seed in (1, 2)]
    assert expected[0] != expected[1]
    for seed, text in zip((1, 2), expected, strict=True):
        converse(model, max_new_tokens=NEW, temperature=1.2, seed=seed, prompt="Hi")
        assert capsys.readouterr().out.startswith(shown(text))


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_stops_the_answer_and_keeps_what_was_written(
    model: Model,
    asked: list[list[tuple[str, str]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    after: int,
) -> None:
    pieces = list(model.generate("Hi", stream=True, max_new_tokens=NEW))
    assert len(pieces) > after
    step = api.Stream.__next__
    count = 0

    def interrupted(stream: api.Stream) -> api.TextPiece:
        nonlocal count
        count += 1
        if count == after + 1:
            raise KeyboardInterrupt
        return step(stream)

    monkeypatch.setattr(api.Stream, "__next__", interrupted)
    asked.clear()
    converse(model, max_new_tokens=NEW, read=lines("Hi", "Go on"))
    out = capsys.readouterr().out
    stopped = next(LINE.finditer(out))
    assert stopped[5] == " (stopped)"
    written = [token for piece in pieces[:after] for token in piece.token_ids]
    assert int(stopped[1]) == len(written)
    if after:
        assert stopped[4] == f"{(len(written) - 1) / (after - 1):.2f}"
        said = "".join(piece.text for piece in pieces[:after])
        assert asked[1] == [("user", "Hi"), ("assistant", said), ("user", "Go on")]
    else:
        assert asked[1] == [("user", "Go on")]


def test_too_long_a_conversation_is_an_error_that_can_be_left(
    model: Model, asked: list[list[tuple[str, str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    converse(model, max_new_tokens=NEW, read=lines("x" * 400, "Hi"))
    captured = capsys.readouterr()
    assert "/new starts a new conversation" in captured.err
    assert len(LINE.findall(captured.out)) == 1
    assert asked[1] == [("user", "Hi")]
    with pytest.raises(UserError, match="tokens"):
        converse(model, prompt="x" * 400)


def test_colours_say_who_wrote(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(terminal.console, "write", lambda text, style="": seen.append((text, style)))
    stream = model.generate("Hi", stream=True, max_new_tokens=NEW)
    expected = [(t, o, d) for p in stream for t, o, d in zip(p.texts, p.owners, p.depths, strict=True)]
    converse(model, max_new_tokens=NEW, prompt="Hi")
    assert "".join(text for text, _ in seen) == "".join(text for text, _, _ in expected)
    colours = [colour for text, colour in seen for _ in text]
    assert colours == [style(o, d) for text, o, d in expected for _ in text]
    assert {colours.count("") > 0, SHADES[0][0] in colours, SHADES[0][1] in colours} == {True}
    assert "Uncoloured" not in capsys.readouterr().out


def test_shades() -> None:
    assert style(-1, 0) == ""
    assert [style(0, d) for d in (1, 2, 5, 9)] == [SHADES[0][0], SHADES[0][1], SHADES[0][4], SHADES[0][4]]
    assert style(1, 1) == SHADES[1][0] != style(0, 1)
    assert style(4, 1) == style(0, 1)
    # told from uncoloured text (white, grey) on a terminal of 16 colours too, and one hue from another
    hues = [{Color.parse(s).downgrade(ColorSystem.STANDARD).number % 8 for s in shades} for shades in SHADES]
    assert all(hue.isdisjoint({0, 7}) for hue in hues)
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(hues, 2))


def test_the_legend_is_shown_once_where_colours_are(
    model: Model, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    converse(model, max_new_tokens=NEW, read=lines("Hi", "Ho"))
    out = capsys.readouterr().out
    assert out.count("Drafted and accepted, by depth") == 1
    assert out.count("\x1b[") > 10
    converse(Model(model.target), max_new_tokens=NEW, prompt="Hi")
    assert "Drafted" not in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.coloured()


def test_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    target = talking_target()
    place = tmp_path / "talking"
    target.model.save_pretrained(place)
    target.tokenizer.save_pretrained(place)
    run = tmp_path / "run"
    write_drafter(run / "drafter", target)
    (run / "recipe.yaml").write_text(yaml.safe_dump({"target": {"name": str(place), "dtype": "float32"}}), "utf-8")
    expected = Model(target).generate("Hi", max_new_tokens=NEW)
    loaded: list[bool] = []
    monkeypatch.setattr(command, "load", lambda *a, **k: loaded.append(a[1] is not None) or api.load(*a, **k))
    for plain in (False, True):
        chat(run, max_new_tokens=NEW, plain=plain, prompt="Hi")
        assert capsys.readouterr().out.startswith(shown(expected.text))
    chat(run, str(place), max_new_tokens=NEW, prompt="Hi")
    assert loaded == [True, False, True]
    with pytest.raises(UserError, match="there is no run at .*nowhere: make one"):
        chat(tmp_path / "nowhere", prompt="Hi")
