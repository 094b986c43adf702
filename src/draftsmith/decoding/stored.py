"""Drafters by name out of folders: of a run (with the tree that was tuned for it) or of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from draftsmith.decoding.building import Available
from draftsmith.decoding.costs import refuse_other_target
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.drafters.base import Drafter
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.foundation.options import validate
from draftsmith.target.model import HFTarget
from draftsmith.target.vocabulary import VocabMap

GROWTH_FILES = ("growth/growth.json", "growth.json")
NGRAM = "ngram"  # the one drafter that needs no folder


def members(named: Mapping[str, str | Path | Drafter], target: HFTarget) -> dict[str, Available]:
    """The drafters that a specification may name: those given, and `ngram`, which is always there.

    Raises:
        UserError: a folder is not there, is damaged, or was made for another target.
    """
    found = {NGRAM: Available(NgramDrafter(NgramOptions(), VocabMap.identity(target.spec.vocab_size)))}
    for name, given in named.items():
        if isinstance(given, str | Path):
            if (name, str(given)) != (NGRAM, NGRAM):
                found[name] = available(Path(given), target)
        else:
            found[name] = Available(given)
    return found


def available(folder: Path, target: HFTarget) -> Available:
    """The drafter of a run or of its own folder, with its run's growth and its temperatures, where there are any."""
    place, run = drafter_folder(folder)
    growth = run_growth(run) if run else None
    if growth and growth.profile:
        refuse_other_target(growth.profile, target.spec.fingerprint)
    return Available(load_drafter(place, target), growth.build() if growth else None, stored_temperatures(place))


def drafter_folder(folder: Path) -> tuple[Path, Path | None]:
    """Where the drafter lies, and the run that it belongs to if `folder` is one.

    Raises:
        UserError: there is nothing.
    """
    run = folder if not (folder / artefacts.MANIFEST).is_file() and (folder / "drafter").exists() else None
    if run is None and not folder.exists():
        raise UserError(f"{folder} does not exist: give the folder of a drafter or of a run")
    return (run / "drafter" if run else folder), run


def run_growth(run: Path) -> GrowthOptions:
    """The growth that was chosen for a run's drafter, or the default one where none was."""
    path = next((run / name for name in GROWTH_FILES if (run / name).is_file()), None)
    return GrowthOptions() if path is None else validate(GrowthOptions, artefacts.read_json(path), str(path))


def calibration_file(drafter: Path) -> Path:
    """Where a drafter's temperatures lie: beside its folder, which is sealed by checksums."""
    return drafter.with_name(f"{drafter.name}-calibration.json")


def stored_temperatures(drafter: Path) -> tuple[float, ...] | None:
    """The temperatures that `calibrate` found for a drafter, by depth; None where it was not calibrated.

    Raises:
        StaleError: they were found for other weights.
    """
    path = calibration_file(drafter)
    if not path.is_file():
        return None
    stored = artefacts.read_json(path)
    if stored.get("drafter") != artefacts.checksum(drafter):
        raise StaleError(f"{path} was made for other weights than {drafter} has now: calibrate again, or remove it")
    return tuple(float(t) for t in stored["temperatures"])


def pairs(given: Sequence[str]) -> dict[str, str]:
    """`name=path` (or a path alone, named after its folder; `ngram` alone) as a mapping.

    Raises:
        UserError: no name, no path, or a name twice.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        name, path = (name, path) if equals else (Path(one).name, one)
        if not name or not path:
            raise UserError(f"{one!r} is no drafter: write name=path, or a path")
        if name in found:
            raise UserError(f"{one}: there is another drafter called {name}; give it a name: other={path}")
        found[name] = path
    return found
