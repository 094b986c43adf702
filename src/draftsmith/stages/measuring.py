"""Which tree pays on this machine, and what the drafter is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.data.conversations import Conversation
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.evaluation import bench as benching
from draftsmith.evaluation import tuning
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError
from draftsmith.foundation.options import validate
from draftsmith.stages.reading import dev_by_set, training_source
from draftsmith.stages.texts import Identity, read_prompts, set_of

if TYPE_CHECKING:
    from draftsmith.pipeline import Run


def tune(run: Run, out: Path, identity: Identity) -> None:
    """Choose the tree (kind "growth"): measure what verifying and drafting cost here, replay dev, take the fastest.

    The speed-up expected of a tree is the geometric mean over the sets: a tree that is good for one only is not taken.
    """
    head = load_drafter(run.path("train"), run.target)
    tried = tuning.tuned(run.target, head, dev_by_set(run, training_source(run)), run.recipe.tune.growths)
    tuning.show(tried)
    with artefacts.writing(out, "growth", identity) as scratch:
        artefacts.write_json(scratch / "growth.json", tried.best.growth.model_dump(mode="json"))
        artefacts.write_json(scratch / "profile.json", tried.to_json())


def chosen_growth(run_folder: Path) -> GrowthOptions:
    """The growth that `tune` chose."""
    path = run_folder / "growth" / "growth.json"
    return validate(GrowthOptions, artefacts.read_json(path), str(path))


def bench(run: Run, out: Path, identity: Identity) -> None:
    """Plain and speculative decoding of the test prompts in the same engine (kind "bench")."""
    head = load_drafter(run.path("train"), run.target)
    growth = chosen_growth(run.folder)
    sets: dict[str, list[Conversation]] = {}
    for conversation in read_prompts(run, "test"):
        sets.setdefault(set_of(conversation), []).append(conversation)
    conditions = {"drafter": artefacts.checksum(run.path("train")), "growth": growth.model_dump(mode="json")}
    named: dict[str, Composition] = {run.recipe.drafter.kind: Single(head, growth.build())}
    with artefacts.writing(out, "bench", identity, resume=True) as scratch:
        try:
            rows = benching.bench(run.target, named, sets, run.recipe.bench, scratch / "bench.jsonl", conditions)
        except StaleError:
            (scratch / "bench.jsonl").unlink()
            rows = benching.bench(run.target, named, sets, run.recipe.bench, scratch / "bench.jsonl", conditions)
        found = benching.results(rows)
        artefacts.write_json(scratch / "results.json", [r.model_dump(mode="json") for r in found])
