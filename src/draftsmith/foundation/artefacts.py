"""Files and folders that are either whole or not there: JSON, JSON lines, safetensors, and folders with a manifest.

Every file is written beside its place, flushed to the disk and renamed; every folder likewise. A folder's
`manifest.json` holds what identifies its content (deterministic: no times, no paths), `provenance.json` where it came
from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from draftsmith.foundation import console, provenance, ranks
from draftsmith.foundation.errors import StaleError, UserError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
MEASURED = "measured.json"  # seconds and the like: they differ from run to run, so they are no content
WORK = "work"
_PLAN = "plan.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def read_json(path: Path) -> Any:
    """The content of a JSON file. UserError names the file, and the line where it is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except json.JSONDecodeError as problem:
        raise UserError(f"{path}:{problem.lineno}: not valid JSON ({problem.msg}, column {problem.colno})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None


def write_json(path: Path, obj: object) -> None:
    """Write a JSON file atomically: two spaces of indent, keys in the order given."""
    text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with _replacing(path) as file:
        file.write(text.encode())


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file, one object a line; empty lines are skipped. UserError names file and line."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as problem:
                raise UserError(f"{path}:{number}: not valid JSON ({problem.msg}, column {problem.colno})") from None
            except UnicodeDecodeError:
                raise UserError(f"{path}:{number}: not UTF-8 text") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
            yield row


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    with _replacing(path) as file:
        file.write(text.encode())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write a JSON-lines file atomically."""
    with _replacing(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically; equal content gives equal bytes."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory, and would write the whole storage's size check for views
        shared = storage.data_ptr() in stored or storage.nbytes() != tensor.numel() * tensor.element_size()
        plain[name] = tensor.clone() if shared else tensor
        stored.add(storage.data_ptr())
    needed = sum(tensor.numel() * tensor.element_size() for tensor in plain.values())
    with _disk_full_named(path.parent, lambda: f"{console.size(needed)} needed"):
        temporary = _beside(path)
        try:
            try:
                save_file(plain, temporary, metadata=None if metadata is None else dict(metadata))
            except SafetensorError as problem:
                if f"os error {errno.ENOSPC}" in str(problem):
                    raise OSError(errno.ENOSPC, str(problem)) from problem
                raise
            _sort_metadata(temporary)
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    _flush(path.parent)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. UserError names the file if it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except SafetensorError as problem:
        raise UserError(f"{path} is not a whole safetensors file ({problem}); make it again") from None


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. UserError names the file if it is missing or broken."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except SafetensorError as problem:
        raise UserError(f"{path} is not a whole safetensors file ({problem}); make it again") from None


def partial(folder: Path) -> Path:
    """Where a folder is assembled before it is renamed into place."""
    return folder.with_name(folder.name + ".partial")


@contextmanager
def writing(
    folder: Path,
    kind: str,
    meta: Mapping[str, object],
    *,
    keep: Path | None = None,
    resume: bool = False,
    together: bool = False,
) -> Iterator[Path]:
    """Assemble an artefact in a scratch folder beside `folder`; it appears under its name only when it is whole.

    On success the manifest and provenance are written and the scratch folder takes the name, replacing an older
    artefact. On an exception, or a kill at any moment, the scratch folder stays, for a resumed run. What only a resumed
    run needs (finished batches, a trainer's state) belongs into the scratch folder's subfolder `WORK`: it is no part of
    the artefact, and is deleted once that has its name, so that a kill in the last moment loses nothing either.

    Args:
        folder: the artefact's place.
        kind: what it is ("features", "drafter", …); `opened` checks it.
        meta: what identifies its content, JSON values: options, fingerprints. Read when the block ends, so that it may
            be filled in meanwhile.
        keep: where an older complete artefact is moved to; by default it is deleted.
        resume: keep the files of an unfinished earlier run of the same kind and meta; any others are cleared.
        together: all ranks run the block on one shared scratch folder, each writing files of its own names; rank 0
            begins and, once all are through, finishes.

    Raises:
        UserError: the disk is full, or `folder` is in the way and no artefact.
    """
    scratch, older = partial(folder), folder.with_name(folder.name + ".old")
    wait = ranks.barrier if together else _not_waiting
    if together and ranks.rank() > 0:
        wait()  # until the folder is there
        yield scratch
        wait()  # until all have written
        wait()  # until the artefact has its name
        return
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and was not made by draftsmith: it is left alone; choose another place")
    if older.exists():
        # killed between the two renames below (the older one is still good), or before it was deleted
        if folder.exists():
            shutil.rmtree(older)
        else:
            older.rename(folder)
    plan = json.loads(json.dumps({"kind": kind, "meta": dict(meta)}))
    if scratch.exists() and not (resume and _planned(scratch) == plan):
        shutil.rmtree(scratch)
    with _disk_full_named(folder.parent, lambda: f"{console.size(_bytes_in(scratch))} written so far"):
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / MANIFEST).unlink(missing_ok=True)
        if resume:
            write_json(scratch / WORK / _PLAN, plan)
        wait()
        yield scratch
        wait()
        for leftover in scratch.rglob(".*.tmp"):
            leftover.unlink()
        write_json(scratch / PROVENANCE, provenance.collect())
        files = {name: _file_entry(scratch / name) for name in _names(scratch)}
        write_json(scratch / MANIFEST, {"format": FORMAT, "kind": kind, "meta": dict(meta), "files": files})
        if folder.exists():
            folder.rename(older)
        scratch.rename(folder)
        _flush(folder.parent)
        if older.exists():
            if keep is None:
                shutil.rmtree(older)
            else:
                if keep.exists():
                    shutil.rmtree(keep)
                older.rename(keep)
        tidy(folder)
        wait()


def _not_waiting() -> None:
    pass


def tidy(folder: Path) -> None:
    """Delete what a run that was killed at the very end left beside or in a whole artefact."""
    if (folder / MANIFEST).is_file():
        for leftover in (folder / WORK, folder.with_name(folder.name + ".old")):
            shutil.rmtree(leftover, ignore_errors=True)


def opened(
    folder: Path, kind: str, expect: Mapping[str, object] | None = None, *, checksums: bool = True
) -> dict[str, Any]:
    """Check an artefact and return its meta.

    Args:
        folder: the artefact.
        kind: the kind it must be.
        expect: meta fields that must have these values (nested mappings are compared field by field).
        checksums: read every file and compare; otherwise only that each is there with its size.

    Raises:
        UserError: missing, unfinished, of another kind or format, or a file is missing or changed.
        StaleError: a field of `expect` differs; the text names it.
    """
    manifest = _manifest(folder)
    if manifest["kind"] != kind:
        raise UserError(f"{folder} holds {_an(str(manifest['kind']))}, not {_an(kind)}: give another folder")
    if expect is not None:
        difference = _difference(manifest["meta"], json.loads(json.dumps(expect)), "")
        if difference is not None:
            field, stored, wanted = difference[0], _short(difference[1]), _short(difference[2])
            raise StaleError(
                f"{folder} was made with other options or inputs: {field} is {stored} there and "
                f"{wanted} now; make it again with --redo, or change {field} back",
                field,
                stored,
                wanted,
            )
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: make {folder} again with --redo")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes where its manifest says {entry['bytes']}: "
                f"make {folder} again with --redo"
            )
        if checksums and _sha256(path) != entry["sha256"]:
            raise UserError(f"{path} was changed or damaged (wrong checksum): make {folder} again with --redo")
    meta: dict[str, Any] = manifest["meta"]
    return meta


def checksum(folder: Path) -> str:
    """One hash of the content of an artefact's files, from its manifest."""
    entries = {name: entry["sha256"] for name, entry in _manifest(folder)["files"].items()}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _planned(scratch: Path) -> object:
    """What an unfinished run was making; None if it can't be told."""
    try:
        return read_json(scratch / WORK / _PLAN)
    except UserError:
        return None


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        if partial(folder).exists():
            raise UserError(f"{folder} is not finished: run the command that makes it again, it goes on where it was")
        what = "is no artefact of draftsmith (it has no manifest.json)" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}: give another folder, or run the command that makes it")
    try:
        manifest = read_json(path)
    except UserError as problem:
        raise UserError(f"{problem}: make {folder} again with --redo") from None
    if not isinstance(manifest, dict) or not {"format", "kind", "meta", "files"} <= manifest.keys():
        raise UserError(f"{path} is no manifest of draftsmith: make {folder} again with --redo")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{path}: format {manifest['format']} was written by another version of draftsmith (this one reads "
            f"format {FORMAT}): make {folder} again"
        )
    return manifest


def _difference(stored: Any, wanted: Any, field: str) -> tuple[str, Any, Any] | None:
    if isinstance(stored, dict) and isinstance(wanted, dict):
        for name, value in wanted.items():
            found = _difference(stored.get(name), value, f"{field}.{name}" if field else name)
            if found is not None:
                return found
        # at the top `expect` names a choice of fields; below it a field's whole value
        extra = [name for name in stored if field and name not in wanted]
        return (f"{field}.{extra[0]}", stored[extra[0]], None) if extra else None
    return None if stored == wanted else (field, stored, wanted)


def _short(value: object) -> str:
    if value is None:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def _an(noun: str) -> str:
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun!r} artefact"


def _names(folder: Path) -> list[str]:
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(
        name for name in paths if name not in (MANIFEST, PROVENANCE, MEASURED) and not name.startswith(f"{WORK}/")
    )


def _file_entry(path: Path) -> dict[str, object]:
    _flush(path)  # files of other writers (safetensors, parquet) may not have reached the disk
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the name `path` when the block ends without an exception."""
    temporary = _beside(path)
    written = 0

    def needed() -> str:
        return f"more than {console.size(written)} needed for {path.name}"

    with _disk_full_named(path.parent, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                try:
                    yield file
                    file.flush()
                finally:
                    written = file.tell()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_full_named(folder: Path, needed: Callable[[], str]) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a UserError that tells the folder, `needed()` and what is free."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in _FULL:
            raise
        raise UserError(
            f"the disk is full: writing to {folder} failed ({needed()}, {_free(folder)} free); "
            "free some space or choose another folder, then run the same command again"
        ) from problem


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _free(folder: Path) -> str:
    return console.size(shutil.disk_usage(folder if folder.exists() else folder.parent).free)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order: the library writes it in an order that changes from run to run."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path}: the safetensors header grew from {length} to {len(text)} bytes when sorted")
        file.seek(8)
        file.write(text.ljust(length))
