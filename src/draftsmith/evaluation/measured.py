"""The file of a measurement: rows as they come, whole units only, and what failed in a file beside it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from draftsmith.foundation import artefacts, console
from draftsmith.foundation.errors import StaleError, UserError

PLAIN = "plain"
Row = dict[str, Any]
Key = tuple[str, str, float, int, str]


def key(row: Mapping[str, Any]) -> Key:
    """What names a row: set, prompt, temperature, repeat, and who drafted (`plain`: nobody)."""
    return (*pair(row), row.get("drafters") or PLAIN)


def pair(row: Mapping[str, Any]) -> tuple[str, str, float, int]:
    """What a speculative row and its plain counterpart share."""
    return row["set"], row["id"], row["temperature"], row["repeat"]


def resume(out: Path, units: Sequence[Set[Key]], conditions: Mapping[str, object]) -> list[Row]:
    """The rows of a file, without those of units that were cut short, which are dropped from the file too.

    Args:
        units: the rows that belong together.
        conditions: what the rows' own `conditions` must be.

    Raises:
        StaleError: a row was measured under other conditions; the text names the first that differs.
        UserError: the file is something else.
    """
    if not out.exists():
        return []
    _drop_torn_line(out)
    rows: list[Row] = []
    for number, row in enumerate(artefacts.read_jsonl(out), start=1):
        stored = row.get("conditions")
        if not isinstance(stored, dict) or not {"set", "id", "temperature", "repeat", "mode"} <= row.keys():
            raise UserError(f"{out}:{number}: this is no row of draftsmith bench; choose another place, or use --redo")
        for name in sorted({*stored, *conditions}):
            if stored.get(name) != conditions.get(name):
                raise StaleError(
                    f"{out}:{number}: this row was measured under other conditions: {name} was {stored.get(name)!r} "
                    f"and is {conditions.get(name)!r} now; measure again with --redo, or change {name} back"
                )
        rows.append(row)
    there = {key(row) for row in rows}
    torn = {name for unit in units if not unit <= there for name in unit}
    kept = [row for row in rows if key(row) not in torn]
    if len(kept) < len(rows):
        artefacts.write_jsonl(out, kept)
    return kept


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add a unit's rows. A kill in the middle leaves a line without its end, or a part of the unit: `resume` drops it.

    Raises:
        UserError: the disk is full.
    """
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk is full: writing to {path} failed; free some space, then run the same command again"
        ) from problem


def failures(out: Path) -> Path:
    """Where what failed is listed: rows of `set`, `id`, `prompt`, `temperature` (None: before any), `error`."""
    return out.with_name(f"{out.stem}-failed.jsonl")


def list_failures(out: Path, failed: Sequence[Row]) -> None:
    """Write down what failed, and say so; nothing failed: no file."""
    path = failures(out)
    if not failed:
        path.unlink(missing_ok=True)
        return
    artefacts.write_jsonl(path, failed)
    some = "; ".join(f"{row['set']}/{row['id']}: {row['error']}" for row in failed[:3])
    more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
    console.warn(f"{len(failed)} measurements failed ({some}{more}): see {path}")


def _drop_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        data = file.read()
        if data and not data.endswith(b"\n"):
            file.truncate(data.rfind(b"\n") + 1)
