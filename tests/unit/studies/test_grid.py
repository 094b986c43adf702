"""The grid: what is done stays done, a killed cell goes on to the same rows, a spent budget ends cleanly."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from draftsmith.foundation import artefacts, options
from draftsmith.foundation.errors import UserError
from draftsmith.studies import grid
from draftsmith.studies.figures import Drawing
from draftsmith.studies.grid import Progress, Setting, StudyOptions
from draftsmith.studies.rows import Row
from draftsmith.studies.tables import Table
from tests.unit.studies.rows import row


class Killed(BaseException):
    """What a kill looks like from within."""


@dataclass
class Counting:
    """A study of three cells, each of three steps that it notes in its folder, to be killed or rung off at will."""

    options: StudyOptions = field(default_factory=lambda: StudyOptions(study="counting"))
    kill_after: int = 10**6
    ring_after: int = 10**6
    steps: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)

    def settings(self) -> list[Setting]:
        return [Setting("random", seed=seed) for seed in range(3)]

    def prepare(self) -> None:
        pass

    def identity(self, setting: Setting) -> Mapping[str, object]:
        return {"tokens": self.options.corpus.train_tokens}

    def run(self, setting: Setting, folder: Path) -> list[Row]:
        self.runs.append(setting.name)
        folder.mkdir(parents=True, exist_ok=True)
        for step in range(3):
            if (folder / str(step)).exists():
                continue
            if len(self.steps) == self.kill_after:
                raise Killed
            if len(self.steps) == self.ring_after:
                signal.raise_signal(signal.SIGALRM)  # as if the time were up now
            self.steps.append(f"{setting.seed}.{step}")
            (folder / str(step)).touch()
        return [row(seed=setting.seed, committed=(10 + setting.seed, 7), rounds=(5, 4))]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        return [Table("seeds", ["seed"], [[str(r.seed)] for r in rows])]

    def figures(self, rows: Sequence[Row]) -> list[Drawing]:
        return []


def results(out: Path) -> bytes:
    return (out / "results" / grid.ROWS).read_bytes()


@pytest.mark.parametrize("kill_after", range(9))
def test_a_grid_that_was_killed_anywhere_ends_in_the_same_rows(tmp_path: Path, kill_after: int) -> None:
    whole = tmp_path / "whole"
    assert grid.run(Counting(), whole) == Progress(3, 3)
    broken = tmp_path / "broken"
    first = Counting(kill_after=kill_after)
    with pytest.raises(Killed):
        grid.run(first, broken)
    second = Counting()
    assert grid.run(second, broken) == Progress(3, 3)
    # nothing is done twice, and nothing left out
    assert first.steps + second.steps == [f"{seed}.{step}" for seed in range(3) for step in range(3)]
    assert results(broken) == results(whole)
    assert [r.seed for r in grid.read_rows(broken / "results" / grid.ROWS)] == [0, 1, 2]


def test_a_done_grid_runs_no_cell(tmp_path: Path) -> None:
    grid.run(Counting(), tmp_path)
    again = Counting()
    assert grid.run(again, tmp_path) == Progress(3, 3)
    assert again.runs == []


def test_two_commands_share_the_cells_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Both(Counting):
        """Starts the same command while it is in the middle of its first cell."""

        def run(self, setting: Setting, folder: Path) -> list[Row]:
            if setting.seed == 0:
                assert grid.run(other, tmp_path) == Progress(2, 3)
            return super().run(setting, folder)

    other, first = Counting(), Both()
    assert grid.run(first, tmp_path) == Progress(3, 3)
    assert [name[-1] for name in other.runs] == ["1", "2"]
    assert [name[-1] for name in first.runs] == ["0"], "what the other did is not done again"
    assert "1 of 3 cells are being made by other commands" in capsys.readouterr().out
    assert [r.seed for r in grid.read_rows(tmp_path / "results" / grid.ROWS)] == [0, 1, 2]


def test_what_is_shared_is_made_by_one_at_a_time(tmp_path: Path) -> None:
    inside: list[str] = []

    class Slow(Counting):
        def prepare(self) -> None:
            inside.append("in")
            time.sleep(0.1)
            inside.append("out")

    threads = [threading.Thread(target=grid.run, args=(Slow(), tmp_path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == ["in", "out"] * 3


def test_other_inputs_make_other_cells_and_leave_the_old_ones(tmp_path: Path) -> None:
    grid.run(Counting(), tmp_path)
    other = Counting(StudyOptions.model_validate({"study": "counting", "corpus": {"train_tokens": 9}}))
    grid.run(other, tmp_path)
    assert len(other.runs) == 3
    back = Counting()
    grid.run(back, tmp_path)
    assert back.runs == []


def test_a_spent_budget_ends_cleanly_and_the_next_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Counting(ring_after=4)
    before = signal.getsignal(signal.SIGALRM)
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    assert grid.run(first, tmp_path, seconds=600) == Progress(1, 3)
    assert "2 of 3 cells left" in capsys.readouterr().out
    # whose alarm it was before (pytest's, against tests that hang) has it back
    assert signal.getsignal(signal.SIGALRM) == before
    assert 0 <= signal.getitimer(signal.ITIMER_REAL)[0] <= left
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (left > 0)
    # what was done is in the results already
    assert len(grid.read_rows(tmp_path / "results" / grid.ROWS)) == 1
    rest = Counting()
    assert grid.run(rest, tmp_path, seconds=600) == Progress(3, 3)
    assert first.steps + rest.steps == [f"{seed}.{step}" for seed in range(3) for step in range(3)]


def test_time_is_up_even_where_exceptions_are_caught(tmp_path: Path) -> None:
    with pytest.raises(grid.TimeUp), grid.time_box(0.1):
        while True:
            try:
                time.sleep(1)
            except Exception:
                pytest.fail("caught as an error")


def test_no_budget_rings_no_alarm() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with grid.time_box(None):
        assert signal.getsignal(signal.SIGALRM) == before


def test_a_cell_that_stands_in_the_grid_twice_is_refused(tmp_path: Path) -> None:
    twice = Counting()
    twice.settings = lambda: [Setting("random"), Setting("random")]  # type: ignore[method-assign]
    with pytest.raises(UserError, match="random-100-equal-epochs-seed0 more than once"):
        grid.run(twice, tmp_path)


def test_rows_survive_the_file_and_bad_ones_are_named(tmp_path: Path) -> None:
    rows = [row(seed=1, temperature=0.5), row(alpha_by_depth=(0.5, None))]
    artefacts.write_jsonl(tmp_path / "rows.jsonl", (r.model_dump(mode="json") for r in rows))
    assert grid.read_rows(tmp_path / "rows.jsonl") == rows
    artefacts.write_jsonl(tmp_path / "rows.jsonl", [rows[0].model_dump(mode="json"), {"study": "sfdd"}])
    with pytest.raises(UserError, match=r"rows\.jsonl:2: .* is required"):
        grid.read_rows(tmp_path / "rows.jsonl")


def test_steps_are_no_option_of_a_study() -> None:
    with pytest.raises(UserError, match=r"give train\.epochs"):
        options.validate(StudyOptions, {"study": "x", "train": {"steps": 5}}, "the test")
    given = options.validate(StudyOptions, {"study": "x", "train": {"epochs": 3}}, "the test")
    assert (given.train.epochs, given.train.evaluations) == (3, 1)
