"""All printing: sentences, tables, progress with a rate and the time left. The only module of the package that prints.

Nothing is printed on ranks above 0 (environment variable `RANK`), except errors, which carry their rank's number.
Text is printed as it is: square brackets are never read as markup.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

PLAIN_WIDTH = 140  # columns assumed where the output is no terminal: tables must not be folded in a log
PLAIN_SECONDS = 10.0  # between two progress lines in a log
RATE_SECONDS = 60.0  # the rate shown is that of the last minute, so that it follows a change


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)


def _console(*, stderr: bool = False) -> Console:
    """A console on the present stdout or stderr, which a caller or a test may have redirected since the last call."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, emoji=False, quiet=_rank() > 0)


def say(text: str) -> None:
    """Print one line or paragraph, unwrapped."""
    _console().print(Text(text), soft_wrap=True)


def write(text: str, style: str = "") -> None:
    """Print a piece of a line at once (no newline), in a rich style such as `"green"`: for answers that stream in."""
    _console().print(Text(text, style=style), end="", soft_wrap=True)
    sys.stdout.flush()


def warn(text: str) -> None:
    """Print a warning to stderr."""
    _console(stderr=True).print(Text("warning: ", style="yellow").append(text, style="default"), soft_wrap=True)


def error(text: str) -> None:
    """Print an error to stderr, on every rank: the failing rank may be another one than the first."""
    console = _console(stderr=True)
    console.quiet = False
    prefix = f"error (rank {_rank()}): " if _rank() else "error: "
    console.print(Text(prefix, style="bold red").append(text, style="default not bold"), soft_wrap=True)


def heading(text: str) -> None:
    """Print a heading: an empty line, then the text in bold."""
    _console().print(Text(f"\n{text}", style="bold"), soft_wrap=True)


def table(
    title: str | None, columns: Sequence[str], rows: Sequence[Sequence[object]], *, align_right_from: int = 1
) -> None:
    """Print a table. Columns from index `align_right_from` on are right-aligned; `None` is shown as a dash.

    Raises:
        ValueError: a row has another number of cells than there are columns.
    """
    out = Table(title=None if title is None else Text(title), title_justify="left", title_style="bold")
    for index, name in enumerate(columns):
        out.add_column(Text(name), justify="right" if index >= align_right_from else "left")
    for row in rows:
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells in a table of {len(columns)} columns: {row!r}")
        out.add_row(*(Text(_cell(value)) for value in row))
    _console().print(out)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Seconds in words: `"0.35 s"`, `"4.2 s"`, `"48 s"`, `"2 min 05 s"`, `"1 h 02 min"`."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def size(n_bytes: int) -> str:
    """Bytes in binary units: `"512 B"`, `"1.2 GiB"`."""
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        # 1023.95 would be printed as 1024.0
        if value < 1023.95:
            return f"{n_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def count(n: int) -> str:
    """A whole number with thousands apart: `"12,345"`."""
    return f"{n:,}"


class Meter:
    """What a progress display shows, kept apart from how it is shown: units done, rate, time left, fields, a note."""

    def __init__(
        self,
        description: str,
        total: int,
        unit: str,
        done: int,
        clock: Callable[[], float],
        show: Callable[[Meter], None],
    ) -> None:
        self.description, self.total, self.unit, self.done = description, total, unit, done
        self._first, self._clock, self._show = done, clock, show
        self.started = clock()
        self._recent: deque[tuple[float, int]] = deque([(self.started, done)])
        self._fields: dict[str, float | str] = {}
        self._note = ""

    def advance(self, n: int = 1, **fields: float | str) -> None:
        """`n` more units are done; `fields` (for instance `loss=1.2`) are shown beside the rate until replaced."""
        self.done += n
        now = self._clock()
        self._recent.append((now, self.done))
        while len(self._recent) > 2 and now - self._recent[1][0] > RATE_SECONDS:
            self._recent.popleft()
        self._fields |= fields
        self._show(self)

    def note(self, text: str) -> None:
        """Show `text` at the end of the line until replaced."""
        self._note = text
        self._show(self)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.started

    def rate(self) -> float | None:
        """Units per second over the last minute, or None before the first measurement."""
        (then, before), (now, done) = self._recent[0], self._recent[-1]
        return (done - before) / (now - then) if now > then and done > before else None

    def seconds_left(self) -> float | None:
        """Estimated seconds until `total`, or None where there is no rate yet."""
        rate = self.rate()
        return None if rate is None else max(self.total - self.done, 0) / rate

    def status(self) -> str:
        """`"1,200/5,000 samples, 105 samples/s, 36 s left, loss 1.23"`."""
        parts = [f"{count(self.done)}/{count(self.total)} {self.unit}"]
        rate, left = self.rate(), self.seconds_left()
        if rate is not None and left is not None:
            parts.append(f"{_rate(rate)} {self.unit}/s")
            parts.append(f"{duration(left)} left")
        return ", ".join(parts + self._extras())

    def summary(self) -> str:
        """What is said at the end: units, seconds, and the mean rate of this run."""
        seconds = self.elapsed()
        parts = [f"{count(self.done)} {self.unit} in {duration(seconds)}"]
        if seconds > 0 and self.done > self._first:
            parts.append(f"{_rate((self.done - self._first) / seconds)} {self.unit}/s")
        return ", ".join(parts + self._extras())

    def _extras(self) -> list[str]:
        fields = [f"{name.replace('_', ' ')} {_cell(value)}" for name, value in self._fields.items()]
        return [*fields, self._note] if self._note else fields


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@contextmanager
def progress(description: str, total: int, unit: str, *, done: int = 0) -> Iterator[Meter]:
    """Show how far a loop is: a bar on a terminal, elsewhere a plain line about every ten seconds and one at the end.

    Args:
        description: what is being done.
        total: units in all.
        unit: the units' name, in the plural ("tokens").
        done: units that an earlier run did (a resumed stage): shown, but not counted in the rate.
    """
    console = _console()
    clock = time.monotonic
    if console.quiet or not console.is_terminal:
        shown_at = clock()

        def show_line(meter: Meter) -> None:
            nonlocal shown_at
            if clock() - shown_at >= PLAIN_SECONDS:
                shown_at = clock()
                say(f"{description}: {meter.status()}")

        meter = Meter(description, total, unit, done, clock, show_line)
        yield meter
        say(f"{description}: {meter.summary()}")
        return

    bars = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
    )
    task: TaskID = bars.add_task(description, total=max(total, 1), completed=done, status="")

    def show_bar(meter: Meter) -> None:
        bars.update(task, completed=meter.done, status=meter.status())

    with bars:
        meter = Meter(description, total, unit, done, clock, show_bar)
        yield meter
        bars.update(task, completed=max(meter.done, 1), total=max(total, 1), status=meter.summary())


@contextmanager
def timed(text: str) -> Iterator[None]:
    """Say what is being done and, when it is over, how long it took."""
    started = time.perf_counter()
    say(f"{text} …")
    yield
    say(f"{text}: {duration(time.perf_counter() - started)}")
