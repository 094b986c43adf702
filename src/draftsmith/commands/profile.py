"""`draftsmith profile`: what verifying and drafting cost on this machine, stored for the cost-aware growth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftsmith import api
from draftsmith.decoding import profile as measuring
from draftsmith.decoding.profile import Grid
from draftsmith.decoding.stored import members, pairs
from draftsmith.foundation import artefacts, console, provenance
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import Kernels, load_target


def profile(
    target: str | None,
    drafters: Sequence[str],
    out: Path,
    *,
    batches: str,
    contexts: str,
    repeats: int,
    dtype: str,
    device: str,
    kernels: Kernels = "plain",
) -> None:
    """Measure, print the costs of verifying, write them to `out`.

    Raises:
        UserError: a target or drafter that is not there, or numbers that are none.
    """
    paths = pairs(drafters)
    grid = Grid(whole(batches, "--batch"), whole(contexts, "--context"))
    name = target or api.target_of(paths.values())
    loaded = load_target(name, dtype, device, kernels=kernels)
    available = members(paths, loaded)
    own = {called: available[called].drafter for called in paths}
    with console.progress("measuring", grid.steps(len(own)), "costs") as bar:
        found = measuring.measured(loaded, own, grid, repeats, lambda: bar.advance(1))
    artefacts.write_json(out, {**found, "provenance": provenance.collect()})
    show(found)
    console.say(f"costs: {out}; use them: growth.kind=cost-aware growth.profile={out}")


def show(found: dict[str, Any]) -> None:
    """The costs of verifying and, at the widest shapes, of drafting."""
    rows = list(found["verify"][0]["ms"])
    console.table(
        f"Milliseconds of verifying rows of each sequence, {found['dtype']} on {found['device']}",
        ["sequences", "tokens each", *rows],
        [[e["batch"], e["context"], *(f"{e['ms'][r]:.1f}" for r in rows)] for e in found["verify"]],
        align_right_from=0,
    )
    if found["drafting"]:
        console.table(
            "Milliseconds of drafting",
            ["drafter", "sequences", "tokens each", "depth", "width", "ms"],
            [
                [e["drafter"], e["batch"], e["context"], e["depth"], e["width"], f"{e['ms']:.1f}"]
                for e in found["drafting"]
            ],
        )


def whole(text: str, option: str) -> tuple[int, ...]:
    """`"1,4"` → `(1, 4)`, ascending and each once. UserError: not numbers above 0."""
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] < 1:
        raise UserError(f"{option} {text}: write whole numbers above 0 with commas between, such as 1,4")
    return found
