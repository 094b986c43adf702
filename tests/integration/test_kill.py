"""Every stage, killed with SIGKILL at any moment and run again, ends in the artefact of an undisturbed run."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith.evaluation.summary import read_summary
from draftsmith.foundation import artefacts
from draftsmith.pipeline import STAGES
from tests.integration.forked import Commands
from tests.integration.tiny_folder import write_recipe, write_target

KILLED = -9
# Small batches, so that there is something between them.
SMALL = {"regenerate": {"batch": 2, "max_new_tokens": 6}, "features": {"batch_positions": 512}}


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    server = Commands()
    yield server
    server.close()


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, commands: Commands) -> Path:
    """A target, a recipe and an undisturbed run; features are stored of what is kept, so that no stage is empty."""
    store = getattr(request, "param", "kept")
    folder = tmp_path_factory.mktemp(store)
    parts = {name: dict(values) for name, values in SMALL.items()}
    parts["features"]["store"] = store
    write_recipe(folder / "recipe.yaml", write_target(folder / "target"), **parts)
    ended = commands("quickstart", "--run", folder / "run", "--recipe", folder / "recipe.yaml")
    assert ended["code"] == 0, ended["said"]
    return folder


def until(root: Path, place: Path, stage: str) -> Path:
    """A copy of the run as it was before a stage."""
    run = place / "run"
    run.mkdir(parents=True)
    shutil.copy(root / "run" / "recipe.yaml", run)
    for name in list(STAGES)[: list(STAGES).index(stage)]:
        folder = STAGES[name].folder
        # artefacts are never changed in place, so links will do
        shutil.copytree(root / "run" / folder, run / folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return run


def result(run: Path, stage: str) -> Any:
    """What a stage's artefact holds, but for times that were measured."""
    folder = run / STAGES[stage].folder
    artefacts.opened(folder, STAGES[stage].kind)
    if stage == "tune":
        return [row["acceptance_length"] for row in artefacts.read_json(folder / "profile.json")["growths"]]
    if stage == "bench":
        rows = list(artefacts.read_jsonl(folder / "bench.jsonl"))
        assert len({(row["mode"], row["id"]) for row in rows}) == len(rows), "an answer is there twice"
        return sorted((row["mode"], row["id"], row["generation"]["token_ids"]) for row in rows)
    return artefacts.checksum(folder)


def leftovers(run: Path) -> list[str]:
    wanted = {".partial", ".old", ".tmp"}
    return [path.name for path in run.rglob("*") if path.suffix in wanted or path.name == artefacts.WORK]


def moments(stage: str, events: int, seconds: float, count: int) -> list[dict[str, float]]:
    """Seeded moments: the last changes of the file system (where it gets its name), some others, some by the clock."""
    draw = random.Random(stage)
    earlier = range(max(0, events - 6))
    chosen = {events - 2, events - 3, events - 4, *draw.sample(earlier, min(count, len(earlier)))}
    return [
        *({"event": n} for n in sorted(chosen) if n >= 0),
        *({"seconds": draw.uniform(0, seconds)} for _ in range(count)),
    ]


def kill_and_run_again(
    commands: Commands, root: Path, place: Path, stage: str, kills: list[dict[str, float]], redo: bool = False
) -> int:
    """Kill a stage at each moment in a fresh copy, and again while it goes on; returns how many kills struck."""
    struck = 0
    expected = result(root / "run", stage)
    more = ["--redo"] if redo else []
    for number, kill in enumerate(kills):
        run = until(root, place / str(number), stage)
        folder = run / STAGES[stage].folder
        if redo:
            shutil.copytree(root / "run" / folder.name, folder)
        for moment in (kill, {"event": 1 + kill.get("event", 8) // 2}):
            ended = commands(stage, "--run", run, *more, kill=moment)
            assert ended["code"] in (KILLED, 0), ended["said"]
            struck += ended["code"] == KILLED
            if folder.exists():
                artefacts.opened(folder, STAGES[stage].kind)
        ended = commands(stage, "--run", run, *more)
        assert ended["code"] == 0, ended["said"]
        assert result(run, stage) == expected, f"{stage} killed at {kill}"
        assert leftovers(run) == []
        shutil.rmtree(place / str(number))
    return struck


def undisturbed(commands: Commands, root: Path, place: Path, stage: str) -> dict[str, Any]:
    """How a stage ends that nobody kills: its seconds and changes of the file system."""
    run = until(root, place / "undisturbed", stage)
    ended = commands(stage, "--run", run)
    assert ended["code"] == 0, ended["said"]
    assert result(run, stage) == result(root / "run", stage)
    return ended


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_in_the_same_artefact(commands: Commands, root: Path, tmp_path: Path, stage: str) -> None:
    ended = undisturbed(commands, root, tmp_path, stage)
    kills = moments(stage, ended["events"], ended["seconds"], 1)
    assert kill_and_run_again(commands, root, tmp_path, stage, kills) >= len(kills)


@pytest.mark.parametrize("stage", ["regenerate", "train"])
def test_killed_while_it_is_made_again_the_old_or_the_new_one_is_there(
    commands: Commands, root: Path, tmp_path: Path, stage: str
) -> None:
    events = undisturbed(commands, root, tmp_path, stage)["events"]
    kills = [{"event": events - n} for n in (1, 3)]
    assert kill_and_run_again(commands, root, tmp_path, stage, kills, redo=True) >= len(kills)


def test_killed_while_the_report_is_written(commands: Commands, root: Path, tmp_path: Path) -> None:
    names = ("summary.json", "report.html", "finished.json", "export")
    command = ["quickstart", "--run", tmp_path / "run", "--recipe", root / "recipe.yaml"]
    shutil.copytree(root / "run", tmp_path / "run", ignore=shutil.ignore_patterns(*names))
    ended = commands(*command)
    assert ended["code"] == 0, ended["said"]
    draw = random.Random("report")
    # the last three changes: the mark that all of it is there gets its name, no torn one is left, the folder is flushed
    for event in (*draw.sample(range(ended["events"] - 3), 2), ended["events"] - 3):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(root / "run", tmp_path / "run", ignore=shutil.ignore_patterns(*names))
        assert commands(*command, kill={"event": event})["code"] == KILLED
        for page in (tmp_path / "run").glob("report.html"):
            assert page.read_text().rstrip().endswith("</html>")
        again = commands(*command)
        assert again["code"] == 0, again["said"]
        assert "report and export: done before" not in again["said"]
        read_summary(tmp_path / "run" / "summary.json")
        assert [p.name for p in (tmp_path / "run" / "export").iterdir()] == ["vllm"]
        artefacts.opened(tmp_path / "run" / "export" / "vllm", "export")
        assert leftovers(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("root", ["all", "kept"], indirect=True)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_many_moments(commands: Commands, root: Path, tmp_path: Path, stage: str) -> None:
    """As above at up to 24 changes of the file system and 6 times; made again, at the last 8 changes."""
    ended = undisturbed(commands, root, tmp_path, stage)
    draw = random.Random(f"many {stage}")
    chosen = draw.sample(range(ended["events"]), min(24, ended["events"]))
    kills: list[dict[str, float]] = [{"event": n} for n in chosen]
    kills += [{"seconds": draw.uniform(0, ended["seconds"])} for _ in range(6)]
    assert kill_and_run_again(commands, root, tmp_path, stage, kills) >= len(chosen)
    kills = [{"event": ended["events"] - n} for n in range(8)]
    assert kill_and_run_again(commands, root, tmp_path / "again", stage, kills, redo=True) >= len(kills)
