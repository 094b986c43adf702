"""`--plan` of training: parameters, tokens and steps are those of the training, memory that is not there is refused."""

from __future__ import annotations

import pytest

from draftsmith import plan
from draftsmith import recipe as recipes
from draftsmith.data.features import FeatureStore
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.pipeline import Run
from tests.integration.command_line import draftsmith
from tests.integration.tiny_folder import write_recipe, write_target


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run until its features are there, to be trained for two epochs."""
    folder = tmp_path_factory.mktemp("plan")
    recipe = write_recipe(folder / "recipe.yaml", write_target(folder / "target"), train={"steps": None, "epochs": 2})
    for stage in ("prompts", "regenerate", "score", "select", "features"):
        ended = draftsmith(stage, "-C", folder / "run", "--recipe", recipe)
        assert ended.code == 0, ended.err
    return Run(recipes.load(str(recipe)), folder / "run")


def test_what_is_planned_is_what_is_done(run: Run) -> None:
    planned = plan.training(run, probe=True)
    assert planned.step_seconds is not None
    assert planned.seconds is not None
    assert 0 < planned.step_seconds * (planned.steps or 0) < planned.seconds
    ended = draftsmith("train", "-C", run.folder, "--plan")
    assert ended.code == 0, ended.err
    assert (
        f"{planned.parameters:,} parameters, {planned.positions:,} tokens an epoch, {planned.steps} steps, "
        in ended.out
    )
    assert "each (timed); peak memory" in ended.out
    assert not run.made("train")
    assert draftsmith("train", "-C", run.folder).code == 0
    head = load_drafter(run.path("train"), run.target)
    assert planned.parameters == sum(p.numel() for p in head.parameters())  # type: ignore[attr-defined]
    assert planned.steps == artefacts.read_json(run.path("train") / "training.json")["steps"]
    store = FeatureStore(run.path("score"))
    kept = [row["id"] for row in artefacts.read_jsonl(run.path("select") / "selection.jsonl") if row.get("kept")]
    assert planned.positions == sum(len(store[i].ids) for i in kept)


def test_memory_that_is_not_there(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = plan.training(run).memory
    for share, refused, warned in ((1.2, False, False), (0.9, False, True), (0.7, True, False)):
        monkeypatch.setattr(plan, "memory_here", lambda share=share: int(share * needed))
        if refused:
            with pytest.raises(UserError, match=r"training would take .* of memory, and there are .*--force"):
                plan.check(run, anew=True)
        else:
            plan.check(run, anew=True)
        assert ("training would take" in capsys.readouterr().err) == warned
    plan.check(run, force=True, anew=True)
    assert "training would take" in capsys.readouterr().err
    ended = draftsmith("train", "-C", run.folder, "--redo")
    assert ended.code == 2
    assert "--force" in ended.err
    assert draftsmith("train", "-C", run.folder, "--redo", "--force").code == 0
