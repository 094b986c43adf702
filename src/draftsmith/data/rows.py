"""The rows of conversation files and hub data sets, whatever their format; which line is broken is not yet an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from draftsmith.foundation.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")


class BadRowError(UserError):
    """A row that can't be used; `kind` is what it is counted under, the text says what is wrong with it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


Row = Mapping[str, Any] | BadRowError


def rows_of(source: str | Path, split: str, config: str | None) -> Iterator[tuple[str, int, Row]]:
    """File, line and row of every row of a file, a folder of files, or a hub data set; a broken line's row is an error.

    Raises:
        UserError: there is nothing there, or it is broken as a whole.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise UserError(f"{path} holds no file with conversations ({', '.join(SUFFIXES)})")
        for file in files:
            yield from _file_rows(file)
    elif path.is_file():
        yield from _file_rows(path)
    elif path.suffix in SUFFIXES or path.is_absolute() or str(source).startswith((".", "~")):
        raise UserError(f"{source} does not exist: give a file, a folder of files, or the name of a hub data set")
    else:
        yield from ((str(source), line, row) for line, row in enumerate(hub_rows(str(source), split, config), start=1))


def hub_rows(name: str, split: str, config: str | None) -> Iterator[Mapping[str, Any]]:
    """The rows of a data set on the Hugging Face hub.

    Raises:
        UserError: it can't be fetched; the text holds the reason that `datasets` gives.
    """
    import datasets

    try:
        yield from datasets.load_dataset(name, config, split=split)
    except Exception as problem:  # datasets raises errors of its own, of the hub's, of fsspec and of the network
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise UserError(
            f"{name} is neither a file here nor a data set that could be fetched from the Hugging Face hub "
            f"(split {split!r}): {reason}"
        ) from problem


def _file_rows(path: Path) -> Iterator[tuple[str, int, Row]]:
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {".parquet": _parquet_rows, ".json": _json_rows}
    for line, row in readers.get(path.suffix, _jsonl_rows)(path):
        yield str(path), line, row


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _parsed(line: bytes) -> Row:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        return BadRowError("not UTF-8", "not UTF-8 text")
    except (json.JSONDecodeError, RecursionError) as problem:
        return BadRowError("not JSON", f"not valid JSON: {problem}")
    return row if isinstance(row, dict) else BadRowError("not JSON", f"not a JSON object but {type(row).__name__}")


def _json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        data = json.loads(content) if content.strip() else []
    except json.JSONDecodeError as problem:
        if problem.msg == "Extra data":  # JSON lines under the name .json
            yield from _jsonl_rows(path)
            return
        raise UserError(f"{path}:{problem.lineno}: not valid JSON ({problem.msg}, column {problem.colno})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    for number, row in enumerate(data if isinstance(data, list) else [data], start=1):
        yield number, row if isinstance(row, dict) else BadRowError("not JSON", "not a JSON object")


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except pyarrow.ArrowInvalid as problem:
        raise UserError(f"{path} is not a whole parquet file: {problem}") from None
