"""A study that takes seconds: a random target in a folder, prompts of a few characters, two methods."""

from __future__ import annotations

import json
from pathlib import Path

from draftsmith.foundation import options
from draftsmith.studies.sfdd import Sfdd, SfddOptions
from tests.integration.tiny_folder import write_target


def data(folder: Path) -> Path:
    """Prompts for training and a benchmark of two turns, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[f"what is {a} plus {b}?"] for a in range(2, 9) for b in range(3)]
    tests = [["name a colour", "and another"], ["name a bird", "which other bird is there?"]]
    for name, asked in (("prompts", rows), ("tests", tests)):
        lines = [json.dumps({"id": f"{name}/{i}", "turns": turns}) for i, turns in enumerate(asked)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def settings(folder: Path, **changed: object) -> dict[str, object]:
    """A preset's content."""
    place = data(folder / "data")
    domain = {"train": [str(place / "prompts.jsonl")], "test": str(place / "tests.jsonl")}
    return {
        "study": "sfdd",
        "expected": "seconds",
        "target": {"name": str(write_target(folder / "target")), "dtype": "float32", "device": "cpu"},
        "corpus": {
            "domains": {"sums": domain},
            "train": 12,
            "dev": 2,
            "test": 4,
            "train_tokens": 12,
            "test_tokens": 16,
            "batch": 8,
        },
        "drafter": {"draft_vocab_size": 64},
        "train": {"epochs": 2, "row_length": 96, "batch_positions": 192, "unroll_steps": 2, "precision": "float32"},
        "growths": [{"node_budget": 5, "depth": 3, "width": 2}],
        "grid": [{"methods": ["random", "flatness"]}],
        **changed,
    }


def study(folder: Path, out: str = "out", **changed: object) -> Sfdd:
    """A tiny study."""
    return Sfdd(options.validate(SfddOptions, settings(folder, **changed), "the test"), folder / out)
