"""What a report is made from: the files of a run folder, each of them optional.

summary.json      results and stage times (docs/summary.md)
bench.jsonl       a row for each answer: {"set", "id", "prompt", "temperature", "mode": "plain" | "speculative",
                  "generation": Generation.to_row(), "pieces": [token text], "origins": [-1 target, else the drafter's
                  number], "depths": [depth in the tree, 0 for the target's]} and, with several compositions, "drafters"
                  (the composition's name), "members" (the drafters' names by number), "against" (whom it is compared
                  with; default: plain)
training.jsonl    {"step", "loss", "loss_by_step": [...], "lr", "seconds", "positions_per_second"} and
                  {"step", "dev_acceptance_length", ...}
selection.json    [{"id", "score", "kept", "tokens"?}, ...], or an object with these as "rows" or "samples"
scores.jsonl      {"id", "flatness": [of each counted token], "pieces"?: [token text]}; or scores.parquet
provenance.json   of foundation.provenance; its "facts" {label: value}, where present, say what was trained on what
recipe.yaml       shown as it is
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from draftsmith.decoding.trace import Generation
from draftsmith.evaluation.measured import PLAIN
from draftsmith.evaluation.summary import Summary, read_summary
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """One row of bench.jsonl."""

    set: str
    id: str
    prompt: str
    temperature: float
    drafters: str
    speculative: bool
    generation: Generation
    pieces: list[str]
    origins: list[int]
    depths: list[int]
    members: tuple[str, ...] = ()
    against: str = PLAIN


@dataclass(frozen=True)
class Sample:
    """One row of selection.json."""

    id: str
    score: float
    kept: bool
    tokens: int | None


@dataclass(frozen=True)
class Scored:
    """One row of the scores: the flatness of each counted token, and the tokens' text where it was kept."""

    id: str
    flatness: list[float]
    pieces: list[str] | None


@dataclass
class Run:
    """A run folder's content; what isn't there is empty, and its file is in `missing`."""

    folder: Path
    summary: Summary | None = None
    answers: list[Answer] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    recipe: str = ""
    missing: set[str] = field(default_factory=set)


def load(folder: Path) -> Run:
    """Reads a run folder. Raises UserError when it isn't there, holds nothing to report, or a file in it is broken."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run, for example runs/quickstart")
    run = Run(folder)
    run.summary = _optional(run, "summary.json", read_summary, None)
    run.answers = _optional(run, "bench.jsonl", lambda p: _rows(p, artefacts.read_jsonl(p), _answer), [])
    run.answers = _named(run)
    run.training = _optional(run, "training.jsonl", lambda p: list(artefacts.read_jsonl(p)), [])
    run.samples = _optional(run, "selection.json", lambda p: _rows(p, _selection(p), _sample), [])
    run.scores = _scores(run)
    run.provenance = _optional(run, "provenance.json", artefacts.read_json, {})
    run.recipe = _optional(run, "recipe.yaml", lambda p: p.read_text(encoding="utf-8"), "")
    if not (run.summary or run.answers or run.training or run.samples or run.scores):
        raise UserError(f"{folder} holds nothing to report: run `draftsmith bench` first, or give another run's folder")
    return run


def _named(run: Run) -> list[Answer]:
    """The answers, with the summary's name of who drafted where a row has none."""
    named = {(r.set, r.temperature): r.drafters for r in run.summary.results} if run.summary else {}
    found = []
    for a in run.answers:
        nameless = a.speculative and a.drafters == PLAIN
        found.append(replace(a, drafters=named.get((a.set, a.temperature), "drafter")) if nameless else a)
    return found


def _optional(run: Run, name: str, read: Callable[[Path], T], otherwise: T) -> T:
    path = run.folder / name
    if path.is_file():
        return read(path)
    run.missing.add(name)
    return otherwise


def _rows(path: Path, rows: Iterable[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], T]) -> list[T]:
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            found.append(read(row))
        except KeyError as error:
            raise UserError(f"{path}: row {number} lacks the field {error}; make the file again") from None
        except (TypeError, ValueError, AttributeError, UserError) as error:
            raise UserError(f"{path}: row {number} is not valid ({error}); make the file again") from None
    return found


def _answer(row: Mapping[str, Any]) -> Answer:
    generation = Generation.from_row(row["generation"])
    pieces, origins, depths = (list(row.get(name) or []) for name in ("pieces", "origins", "depths"))
    if len(origins) != len(depths) or (pieces and origins and len(pieces) != len(origins)):
        raise ValueError("pieces, origins and depths have different lengths")
    return Answer(
        set=str(row["set"]),
        id=str(row["id"]),
        prompt=_prompt(row.get("prompt")),
        temperature=float(row["temperature"]),
        drafters=str(row.get("drafters") or PLAIN),
        speculative=row["mode"] == "speculative",
        generation=generation,
        pieces=pieces,
        origins=origins,
        depths=depths,
        members=tuple(map(str, row.get("members") or ())),
        against=str(row.get("against") or PLAIN),
    )


def _prompt(prompt: object) -> str:
    if isinstance(prompt, list):  # chat messages: the last one is the question
        return str(prompt[-1].get("content", "")) if prompt else ""
    return str(prompt or "")


def _selection(path: Path) -> Iterator[Mapping[str, Any]]:
    data = artefacts.read_json(path)
    rows = data if isinstance(data, list) else data.get("rows", data.get("samples"))
    if not isinstance(rows, list):
        raise UserError(f'{path}: wanted a list of rows, or an object with "rows"; make the file again')
    yield from rows


def _sample(row: Mapping[str, Any]) -> Sample:
    score = row["score"] if "score" in row else row["flatness"]
    tokens = row.get("tokens")
    return Sample(str(row["id"]), float(score), bool(row["kept"]), None if tokens is None else int(tokens))


def _scores(run: Run) -> list[Scored]:
    jsonl, parquet = run.folder / "scores.jsonl", run.folder / "scores.parquet"
    if parquet.is_file():
        import pyarrow.parquet

        wanted = {"id", "flatness", "pieces"}
        names = [name for name in pyarrow.parquet.read_schema(parquet).names if name in wanted]
        return _rows(parquet, pyarrow.parquet.read_table(parquet, columns=names).to_pylist(), _scored)
    if jsonl.is_file():
        return _rows(jsonl, artefacts.read_jsonl(jsonl), _scored)
    run.missing.add("scores.jsonl")
    return []


def _scored(row: Mapping[str, Any]) -> Scored:
    flatness, pieces = [float(value) for value in row["flatness"]], row.get("pieces")
    if pieces is not None and len(pieces) != len(flatness):
        raise ValueError("pieces and flatness have different lengths")
    return Scored(str(row["id"]), flatness, None if pieces is None else [str(piece) for piece in pieces])
