"""`draftsmith score --cost`: what scoring and choosing cost beside the target's pass and beside training."""

from __future__ import annotations

import statistics

from draftsmith import stages
from draftsmith.data import cost
from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import UserError
from draftsmith.pipeline import Run

BATCH = 2048  # positions: the shares are those of the recipe's larger batches, in a fraction of the time


def cost_of_scores(run: Run) -> None:
    """Time the parts of the score pass on the run's own answers, and set them beside its training if it has one.

    Raises:
        UserError: the run has no answers yet.
    """
    if not run.made("regenerate"):
        raise UserError(f"{run.path('regenerate')} is missing: run `draftsmith regenerate --run {run.folder}` first")
    samples = stages.read_samples(run)
    found = cost.measure(run.target, samples, min(BATCH, run.recipe.features.batch_positions))
    positions = sum(len(s.ids) for s in samples)
    parts = {
        "the target's body": found.body,
        "its output layer (lm_head)": found.head,
        "all scores of every token": found.scores,
        "expected tokens (draft vocabulary)": found.expected,
    }
    body = [
        [name, f"{1e3 * seconds:.4f}", f"{seconds / found.plain:.1%}", console.duration(seconds * positions)]
        for name, seconds in parts.items()
    ]
    columns = ["part", "ms a position", "of a pass that computes logits", f"{console.count(positions)} positions"]
    console.table("The score pass, part by part", columns, body)
    training = _full_training(run)
    if training is None:
        console.say("no training to compare with: train a drafter in this run first")
        return
    chosen = run.seconds().get("select", 0.0)
    written = (found.scores + found.expected) * sum(sum(s.mask) for s in samples)
    console.say(
        f"training on all samples takes {console.duration(training)}; scoring and choosing take "
        f"{(written + chosen) / training:.1%} of it where the target scores what it writes, "
        f"{(found.scores * positions + chosen) / training:.1%} where the pass is made for features anyway, "
        f"{((found.plain + found.scores) * positions + chosen) / training:.1%} as a pass of their own"
    )


def _full_training(run: Run) -> float | None:
    """Seconds that training on every sample, as often as this run saw the kept ones, takes; None without a training."""
    log = run.folder / "training.jsonl"
    try:
        rows = [row for row in artefacts.read_jsonl(log) if "loss" in row] if log.is_file() else []
        chosen = stages.read_selection(run)
    except UserError:
        return None
    if not rows or not chosen.positions_kept:
        return None
    # the median step: a busy minute does not count
    step = statistics.median(float(row["seconds"]) for row in rows)
    return step * len(rows) * chosen.positions_total / chosen.positions_kept
