"""Two processes of `torchrun` make what one makes: the same answers and features, the same training up to rounding."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.foundation import artefacts
from draftsmith.pipeline import STAGES
from tests.integration.tiny_folder import write_recipe, write_target

ROOT = Path(__file__).parents[2]
PARTS: dict[str, Any] = {
    "regenerate": {"batch": 2, "max_new_tokens": 10},
    "features": {"store": "kept", "batch_positions": 256},
    # three rows a step, the last of an epoch fewer: ranks have unequal shares, and sometimes none
    "train": {"steps": 20, "batch_positions": 192, "evaluations": 4, "ema": 0.5, "learning_rate": 1e-4},
}


def command(*arguments: object, processes: int) -> str:
    """Run draftsmith in so many processes; what it said."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "140"}
    line = [sys.executable, *launcher, "-m", "draftsmith", *map(str, arguments)]
    ended = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


# a reference of its own, its stored losses, and rows chosen in each sample: none of it depends on who has which rows
ADASPEC: dict[str, Any] = {
    **PARTS,
    "regenerate": {**PARTS["regenerate"], "statistics": False},  # so that scores are a pass of their own
    "drafter": {"kind": "standalone", "standalone": {"keep_layers": 2}},
    "train": {
        **PARTS["train"],
        "weights": {"name": "delta-loss", "fraction": 0.5, "scope": "sample"},
        "reference": "trained",
    },
}


@pytest.fixture(scope="module", params=["eagle3", "adaspec"])
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, Path, str]:
    """A whole run by one process and one by two, and what the two said."""
    folder = tmp_path_factory.mktemp("ranks")
    parts = ADASPEC if request.param == "adaspec" else PARTS
    recipe = write_recipe(folder / "recipe.yaml", write_target(folder / "target"), **parts)
    command("quickstart", "-C", folder / "one", "--recipe", recipe, processes=1)
    said = command("quickstart", "-C", folder / "two", "--recipe", recipe, processes=2)
    return folder / "one", folder / "two", said


@pytest.mark.parametrize("stage", ["prompts", "regenerate", "score", "select", "features"])
def test_two_ranks_make_the_same_artefact(runs: tuple[Path, Path, str], stage: str) -> None:
    one, two = (artefacts.checksum(run / STAGES[stage].folder) for run in runs[:2])
    assert one == two


def test_training_on_two_ranks_follows_one_process(runs: tuple[Path, Path, str]) -> None:
    one, two = ([row for row in artefacts.read_jsonl(run / "training.jsonl") if "loss" in row] for run in runs[:2])
    assert len(one) == len(two) == 20
    for here, there in zip(one, two, strict=True):
        assert there["loss_by_step"] == pytest.approx(here["loss_by_step"], rel=1e-5)
        assert there["lr"] == here["lr"]
    assert one[0]["loss"] != one[-1]["loss"], "it does learn"
    first, second = (
        {
            f"{file.parent.name}/{name}": value
            for file in sorted((run / "drafter").rglob("*.safetensors"))
            for name, value in artefacts.load_tensors(file).items()
        }
        for run in runs[:2]
    )
    assert sum(value.is_floating_point() for value in first.values()) > 5
    for name, value in first.items():
        if value.is_floating_point():
            assert (value - second[name]).norm() <= 1e-4 * value.norm(), name
        else:
            assert torch.equal(value, second[name])
    summaries = [artefacts.read_json(run / "drafter" / "training.json") for run in runs[:2]]
    for cost in ("cost", "cost.before.reference"):
        both = [reduce(lambda at, name: at.get(name, {}), cost.split("."), summary) for summary in summaries]
        passes = [found["draft"]["trained"].pop("passes") for found in both if found]
        assert passes[1:] == [2 * count for count in passes[:-1]], "each rank makes a pass of its part"
    assert summaries[0] == summaries[1]


def test_rows_are_compared_over_all_ranks(runs: tuple[Path, Path, str], tmp_path: Path) -> None:
    """AdaSPEC's share of rows is one of all ranks' rows; the last step of an epoch leaves a rank without any."""
    # not the average of the weights: equal losses in the first step would be chosen from by their order alone
    weights = ["train.weights.name=delta-loss", "train.weights.scope=running"]
    options = ["train.steps=8", f"train.reference={runs[0] / 'drafter'}", *weights]
    for processes in (1, 2):
        copy = tmp_path / str(processes)
        shutil.copytree(runs[0], copy, ignore=shutil.ignore_patterns("drafter", "training.jsonl"))
        command("train", "-C", copy, *options, processes=processes)
    one, two = (artefacts.load_tensors(tmp_path / n / "drafter" / "model.safetensors") for n in "12")
    for name, value in one.items():
        if value.is_floating_point():
            assert (value - two[name]).norm() <= 1e-4 * value.norm(), name
    logs = [list(artefacts.read_jsonl(tmp_path / n / "training.jsonl")) for n in "12"]
    for here, there in zip(*logs, strict=True):
        if "loss" in here:
            assert there["loss_by_step"] == pytest.approx(here["loss_by_step"], rel=1e-4)


def test_only_the_first_rank_speaks(runs: tuple[Path, Path, str]) -> None:
    said = runs[2].splitlines()
    for line in ("train: the EAGLE-3 head", "report and export"):
        assert sum(text.startswith(line) for text in said) <= 1
    assert sum(text.startswith("best checkpoint:") for text in said) == 1


def test_finished_shards_of_a_killed_run_are_kept(runs: tuple[Path, Path, str], tmp_path: Path) -> None:
    """One shard of three is there: two ranks read the others, and the artefact is the same."""
    one = runs[0]
    run = tmp_path / "run"
    for name in ("prompts", "answers", "scores", "selection"):
        (run / name).mkdir(parents=True)
        for file in (one / name).iterdir():
            (run / name / file.name).hardlink_to(file)
    (run / "recipe.yaml").write_bytes((one / "recipe.yaml").read_bytes())
    scratch = artefacts.partial(run / "features")
    shards = sorted((one / "features").glob("shard-*"))
    assert len(shards) > 2
    meta = artefacts.opened(one / "features", "features")
    artefacts.write_json(scratch / artefacts.WORK / "plan.json", {"kind": "features", "meta": meta})
    kept = scratch / shards[1].name
    kept.hardlink_to(shards[1])
    command("features", "-C", run, processes=2)
    assert artefacts.checksum(run / "features") == artefacts.checksum(one / "features")
    assert (run / "features" / kept.name).stat().st_ino == shards[1].stat().st_ino, "it was not read again"
