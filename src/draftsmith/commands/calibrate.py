"""`draftsmith calibrate`: temperatures of drafters, and routers, fitted on a run's dev answers by replay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from draftsmith.decoding import profile
from draftsmith.decoding.building import Available
from draftsmith.decoding.composition import Single
from draftsmith.decoding.growth import Growth
from draftsmith.decoding.stored import NGRAM, calibration_file, drafter_folder, members, pairs, run_growth
from draftsmith.evaluation import fitting
from draftsmith.foundation import artefacts, console
from draftsmith.pipeline import Run
from draftsmith.stages import dev_answers
from draftsmith.target.replay import StoredAnswer


def calibrate(run: Run, drafters: Sequence[str], out: Path | None = None, router: Path | None = None) -> None:
    """Fit, write beside each drafter (and into `out`), and say what it changes; fit a router if one is wanted.

    Args:
        drafters: `name=path` of runs and drafters, or `ngram`; none: the run's own.

    Raises:
        UserError: a drafter or the run's dev answers are not there.
    """
    named = pairs(drafters) or {"drafter": str(run.folder)}
    target = run.target
    everyone = members(named, target)
    available = {name: everyone[name] for name in named}
    growth = run_growth(run.folder).build()
    answers = dev_answers(run)
    found: dict[str, Any] = {}
    rows: list[list[str]] = []
    with console.progress("calibrating on dev", len(available), "drafters") as bar:
        for name, member in available.items():
            fitted = fitting.temperatures(
                member.drafter, member.growth or growth, target.spec, answers, device=target.device
            )
            found[name] = {
                "format": 1,
                "target": target.spec.fingerprint,
                "temperatures": [f.temperature for f in fitted] or [1.0],
                "depths": [asdict(f) for f in fitted],
            }
            for f in fitted:
                numbers = [f"{f.temperature:.2f}", *(f"{v:.4f}" for v in (*f.nll, *f.error))]
                rows.append([name, str(f.depth), str(f.roots), *numbers])
            bar.advance(1)
    columns = ["drafter", "depth", "roots", "temperature", "nats before", "after", "calibration error before", "after"]
    console.table("Temperatures, by the likelihood of accepted nodes", columns, rows)
    _write(named, found, out)
    if len(available) > 1:
        _compare(run, available, growth, answers)
    if router is not None:
        _route(run, available, growth, answers, router)


def _write(named: Mapping[str, str], found: Mapping[str, dict[str, Any]], out: Path | None) -> None:
    for name, entry in found.items():
        if named[name] != NGRAM:
            place, _ = drafter_folder(Path(named[name]))
            artefacts.write_json(calibration_file(place), {"drafter": artefacts.checksum(place), **entry})
            console.say(f"{name}: {calibration_file(place)}")
    if out is not None:
        artefacts.write_json(out, {"format": 1, "drafters": found})
        console.say(f"all: {out}")


def _compare(run: Run, available: Mapping[str, Available], growth: Growth, answers: Sequence[StoredAnswer]) -> None:
    plain, warm = fitting.trie_lengths(available, growth, run.target.spec, answers, device=run.target.device)
    if not math.isnan(plain):
        console.say(
            f"merge:trie({','.join(available)}) on dev answers held out: acceptance length {plain:.3f} without, "
            f"{warm:.3f} with temperatures"
        )


def _route(
    run: Run, available: Mapping[str, Available], growth: Growth, answers: Sequence[StoredAnswer], path: Path
) -> None:
    target = run.target
    costs = profile.verify_cost(target)
    round_ms = {}
    for name, member in available.items():
        single = Single(member.drafter, member.growth or growth, name)
        round_ms[name] = profile.draft_cost(target, single) + profile.interpolated(costs, 1 + single.budget)
    made = fitting.router(available, growth, round_ms, target.spec, answers, target.device)
    artefacts.write_json(path, made)
    console.say(f"router over {', '.join(available)}: {path}")
