"""What is printed, on a terminal, in a log, and on other ranks."""

from __future__ import annotations

import io
import itertools

import pytest

from draftsmith.foundation import console


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.00 s"),
        (0.352, "0.35 s"),
        (0.999, "1.0 s"),
        (4.25, "4.2 s"),
        (9.97, "10 s"),
        (59.7, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.9, "1 h 00 min"),
        (3720, "1 h 02 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (int(1.2 * 1024**3), "1.2 GiB"),
        (5 * 1024**4, "5.0 TiB"),
    ],
)
def test_size(n: int, text: str) -> None:
    assert console.size(n) == text


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    text = "logits [B, T, V] [bold]:smile:[/bold] " + "long " * 60
    console.say(text)
    console.warn("[x]")
    captured = capsys.readouterr()
    assert captured.out == text + "\n"
    assert captured.err == "warning: [x]\n"


def test_pieces_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.write("one ", "green")
    console.write("two [B]")
    assert capsys.readouterr().out == "one two [B]"


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    console.table("Results", ["set", "speed-up [x]", "n"], [["chat", 1.25, 8], ["word problems", None, "12"]])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "Results"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [["chat", "1.25", "8"], ["word problems", "–", "12"]]
    numbers = [line for line in lines if line.startswith("│")]
    assert numbers[0].rstrip("│").endswith(" 8 ")  # right-aligned
    assert numbers[0].startswith("│ chat  ")  # left-aligned
    with pytest.raises(ValueError, match="1 cells in a table of 2 columns"):
        console.table(None, ["a", "b"], [["x"]])


def test_wide_tables_are_not_folded_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    console.table(None, [f"column {i}" for i in range(10)], [["x" * 10] * 10])
    assert "x" * 10 in capsys.readouterr().out


def test_other_ranks_are_silent_but_for_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    console.say("a")
    console.warn("b")
    console.heading("c")
    console.table(None, ["d"], [["e"]])
    with console.progress("f", 2, "tokens") as bar:
        bar.advance(2)
    console.error("it broke")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error (rank 3): it broke\n"


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = itertools.count(0.0, 0.5)  # every look at the clock is half a second
    monkeypatch.setattr("time.monotonic", lambda: next(seconds))
    with console.progress("scoring", 1000, "tokens", done=100) as bar:
        for step in range(90):
            bar.advance(10, loss=1 / (step + 1))
        bar.note("almost there")
    lines = capsys.readouterr().out.splitlines()
    assert 4 <= len(lines) <= 20  # 90 steps of about 1.5 s in lines of 10 s, and the last
    assert lines[0].startswith("scoring: ")
    assert "/1,000 tokens, " in lines[0]
    assert " tokens/s, " in lines[0]
    assert " left, loss " in lines[0]
    assert lines[-1].startswith("scoring: 1,000 tokens in ")
    assert lines[-1].endswith("almost there")


def test_rate_and_time_left_leave_out_what_an_earlier_run_did() -> None:
    now = 0.0
    meter = console.Meter("x", 1000, "samples", 500, lambda: now, lambda meter: None)
    assert meter.rate() is None
    assert meter.status() == "500/1,000 samples"
    now = 10.0
    meter.advance(100, loss=1.23456)
    assert meter.rate() == 10.0
    assert meter.seconds_left() == 40.0
    assert meter.status() == "600/1,000 samples, 10 samples/s, 40 s left, loss 1.235"
    now = 100.0
    meter.advance(300)
    assert meter.summary() == "900 samples in 1 min 40 s, 4 samples/s, loss 1.235"


def test_the_rate_follows_the_last_minute() -> None:
    now = 0.0
    meter = console.Meter("x", 10_000, "tokens", 0, lambda: now, lambda meter: None)
    for _ in range(100):
        now += 10.0
        meter.advance(10)
    for _ in range(10):
        now += 10.0
        meter.advance(50)
    assert meter.rate() == 5.0


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with console.progress("training [k]", 50, "steps") as bar:
        bar.advance(20, loss=0.5)
        bar.advance(30, loss=0.25)
    shown = screen.getvalue()
    assert "training [k]" in shown
    assert "50 steps in " in shown
    assert "loss 0.25" in shown
    assert "━" in shown
    with console.progress("nothing", 0, "steps"):
        pass
    assert "0 steps in" in screen.getvalue()
