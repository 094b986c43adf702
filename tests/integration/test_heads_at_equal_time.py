"""benchmarks/heads_at_equal_time.py on a tiny target: three heads on the same answers, for equal time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import heads_at_equal_time as script

from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.foundation import artefacts
from draftsmith.pipeline import Run
from draftsmith.recipe import load
from tests.integration.tiny_folder import write_recipe, write_target


def test_three_heads_for_the_time_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    for name in ("math_gsm8k", "chat_oasst_prompts"):
        rows = [{"id": f"{name}/{n}", "messages": [{"role": "user", "content": f"{name} {n}?"}]} for n in range(9)]
        (data / f"train_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("DRAFTSMITH_DATA", str(data))
    recipe = write_recipe(tmp_path / "recipe.yaml", write_target(tmp_path / "target"))
    script.prepare(folder, recipe, [])
    asked = [row["messages"][0]["content"] for row in artefacts.read_jsonl(folder / "prompts.jsonl")]
    assert len(asked) == 12
    assert sum("Solve the problem" in text for text in asked) == 6
    names = ["eagle", "hass", "eagle3-detached"]
    script.steps(folder, 0.1, names)
    plan = artefacts.read_json(folder / "steps.json")
    assert plan["seconds"] == 0.1
    for row in plan["heads"].values():
        assert row["steps"] == int(0.1 / row["step_seconds"])
    lengths = {kind: 2 + n for n, kind in enumerate(names)}
    plan["heads"] = {kind: {"steps": steps} for kind, steps in lengths.items()}
    artefacts.write_json(folder / "steps.json", plan)
    script.train(folder)
    target = Run(load(str(folder / "recipe.yaml")), folder).target
    for kind in names:
        assert artefacts.read_json(folder / kind / "training.json")["steps"] == lengths[kind]
        assert load_drafter(folder / kind, target).vocab.size == 64
    before = (folder / "eagle" / "manifest.json").stat().st_mtime_ns
    script.train(folder)
    assert (folder / "eagle" / "manifest.json").stat().st_mtime_ns == before
