"""`draftsmith bench` on benchmarks: drafters by name, and others beside them, on prompts of known benchmarks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from draftsmith import api
from draftsmith.data.benchmarks import load_benchmark
from draftsmith.data.conversations import Conversation
from draftsmith.data.served import ServerOptions
from draftsmith.decoding.building import build
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.decoding.stored import members, pairs
from draftsmith.drafters import standalone
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.evaluation import bench as benching
from draftsmith.evaluation import measured, regressions
from draftsmith.evaluation.bench import BenchOptions
from draftsmith.evaluation.endpoint import EndpointMode
from draftsmith.evaluation.measured import PLAIN
from draftsmith.evaluation.modes import Mode
from draftsmith.evaluation.peers import TRANSFORMERS, TransformersMode
from draftsmith.evaluation.summary import Result, Summary, read_summary, result_markdown, result_table, write_summary
from draftsmith.foundation import artefacts, console, provenance
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import validate
from draftsmith.pipeline import Run
from draftsmith.target.model import HFTarget
from draftsmith.target.vocabulary import VocabMap

ROWS, SUMMARY, TABLE = "bench.jsonl", "summary.json", "table.md"
LOOKUP, THEIR_LOOKUP, ASSISTED = "prompt-lookup", "transformers-prompt-lookup", "assisted"
BASELINES = (LOOKUP, TRANSFORMERS, f"{THEIR_LOOKUP}[:TOKENS]", f"{ASSISTED}[:TOKENS]=FOLDER", "NAME=http://…")


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, beside the recipe's own options of bench.

    Attributes:
        benchmarks: names or files, each may hold several, by commas.
        drafters: `name=path` of a run or a drafter, or a path alone.
        compose: `name=specification` of compositions over those drafters, or a specification alone.
        baselines: of `BASELINES`, each may hold several, by commas.
        assistant_tokens: drafted by transformers' assistant in a round; None leaves it to transformers.
        options: those of `BenchOptions` that were given.
    """

    benchmarks: Sequence[str]
    drafters: Sequence[str] = ()
    compose: Sequence[str] = ()
    baselines: Sequence[str] = ()
    assistant_tokens: int | None = None
    options: Mapping[str, object] = field(default_factory=dict)


def bench(run: Run, asked: Asked, out: Path, redo: bool = False) -> list[Result]:
    """Measure, write `bench.jsonl`, `summary.json`, `table.md` and `provenance.json` into `out`, print the table.

    Raises:
        UserError: something that was asked for is not there; nothing could be measured.
    """
    given = {name: value for name, value in asked.options.items() if value is not None}
    options = validate(BenchOptions, {**run.recipe.bench.model_dump(), **given}, "the command line")
    names = _split(asked.benchmarks)
    sets = {_set_name(name): load_benchmark(name) for name in names}
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: --out wants a folder")
    target = run.target
    drafters = _drafters(run, asked.drafters)
    compositions = composed(target, drafters, asked.compose)
    modes = peers(target, asked.baselines, asked.assistant_tokens, compositions)
    if not compositions and not modes:
        raise UserError("nothing is measured beside plain decoding: give --drafters, --compose or --baselines")
    conditions = {
        "sets": {name: _digest(found) for name, found in sets.items()},
        "drafters": {name: _identity(Path(path)) for name, path in drafters.items()},
        "compose": list(asked.compose),
        "baselines": _split(asked.baselines),
        "assistant_tokens": asked.assistant_tokens,
    }
    if redo:
        for file in (out / ROWS, measured.failures(out / ROWS)):
            file.unlink(missing_ok=True)
    rows = benching.bench(target, compositions, sets, options, out / ROWS, conditions, modes)
    results = benching.results(rows, options.seed)
    write_summary(out / SUMMARY, Summary(schema=1, results=results))
    facts = {"Target": f"{run.recipe.target.name} ({target.spec.dtype})", "Prompts": ", ".join(sets)}
    about = {**provenance.collect(), "facts": facts, "bench": options.model_dump(mode="json")}
    artefacts.write_json(out / "provenance.json", about)
    artefacts.write_text(out / TABLE, document(results, about))
    columns, table = result_table(results)
    console.table("Same target and prompts, by turns", columns, table)
    for line in accuracy(results):
        console.say(line)
    console.say(f"numbers: {out / SUMMARY}; rows: {out / ROWS}; a page: draftsmith report {out}")
    return results


def against(results: Sequence[Result], before: Path) -> bool:
    """Compare with an earlier summary; say what has become worse. True where nothing has.

    Raises:
        UserError: it is no summary, or has no result in common.
    """
    found = regressions.compare(results, read_summary(before).results)
    for name in found.missing:
        console.warn(f"{before} has {name}, which was not measured now")
    for line in found.open:
        console.warn(line)
    for line in found.worse:
        console.error(line)
    if not found.worse:
        console.say(f"no regression against {before} ({found.compared} compared)")
    return not found.worse


def document(results: Sequence[Result], about: Mapping[str, object]) -> str:
    """The table for a document: the command that made it, on which machine, when, and the numbers."""
    where = f"{about['processor']}, {about['threads']} of {about['cores']} cores' threads"
    target = about["facts"]["Target"] if isinstance(about["facts"], dict) else ""
    made = f"{target}; {where}; {str(about['time'])[:10]}; draftsmith {str(about['git'] or '')[:12]}"
    return f"    {about['command']}\n\n{made.strip('; ')}.\n\n{result_markdown(results)}"


def stage_results(folder: Path) -> list[Result]:
    """What the run's own bench stage measured."""
    return [Result.model_validate(row) for row in artefacts.read_json(folder / "bench" / "results.json")]


def numbers(text: str | None) -> list[float] | None:
    """`"0,1"` → `[0.0, 1.0]`."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--temperatures {text}: write numbers with commas between, such as 0,1") from None


def refuse_without_benchmark(asked: Asked, out: Path | None) -> None:
    """Options that only `--benchmark` reads are refused where there is none: the stage has the recipe's."""
    given = [f"--{name.replace('_', '-')}" for name, value in asked.options.items() if value is not None]
    given += ["--drafters"] * bool(asked.drafters) + ["--compose"] * bool(asked.compose)
    given += ["--baselines"] * bool(asked.baselines) + ["--out"] * bool(out)
    if given:
        raise UserError(
            f"{given[0]} belongs to --benchmark; the run's own bench is set in the recipe, for instance "
            "bench.prompts=30, bench.temperatures=[0,1]"
        )


def composed(target: HFTarget, drafters: Mapping[str, str], compose: Sequence[str]) -> dict[str, Composition]:
    """Who drafts under each name: every drafter alone (a run's with its tree), and every composition of them."""
    available = members(drafters, target)
    made: dict[str, Composition] = {name: build(name, available) for name in drafters}
    for one in compose:
        label = re.match(r"([\w.+-]+)=", one)
        name, spec = (label.group(1), one[label.end() :]) if label else (one, one)
        if name in made:
            raise UserError(f"--compose {one}: something else is called {name}; write name=specification")
        made[name] = build(spec, available, text=target.tokenizer.decode)
    return made


def peers(
    target: HFTarget, baselines: Sequence[str], assistant_tokens: int | None, compositions: dict[str, Composition]
) -> list[Mode]:
    """The others to measure; draftsmith's own prompt lookup is a composition and joins those."""
    wanted = _split(baselines)
    servers = [one.partition("=")[0] for one in wanted if "://" in one]
    modes: list[Mode] = []
    theirs = any(re.match(rf"({THEIR_LOOKUP}|{ASSISTED})[:=]|{THEIR_LOOKUP}$", one) for one in wanted)
    if theirs and TRANSFORMERS not in wanted:
        wanted.insert(0, TRANSFORMERS)  # what they are compared with
    for one in wanted:
        name, equals, value = one.partition("=")
        kind, tokens = _setting(name)
        if one == LOOKUP:
            vocab = VocabMap.identity(target.spec.vocab_size)
            drafter = NgramDrafter(NgramOptions(guess=False), vocab)
            compositions[LOOKUP] = Single(drafter, GrowthOptions().build())
        elif one == TRANSFORMERS:
            modes.append(TransformersMode(TRANSFORMERS, target))
        elif kind == THEIR_LOOKUP and not equals:
            modes.append(TransformersMode(name, target, lookup=True, draft_tokens=tokens))
        elif kind == ASSISTED and equals and value:
            drafted = tokens or assistant_tokens
            modes.append(TransformersMode(name, target, assistant=_assistant(value), draft_tokens=drafted))
        elif "://" in one:
            label, url = (name, value) if equals and "://" not in name else ("server", one)
            # a server without speculation, called NAME-plain, is what NAME is compared with
            base = f"{label}-plain" if f"{label}-plain" in servers else PLAIN
            modes.append(EndpointMode(label, validate(ServerOptions, {"url": url}, one), target, base))
        elif one != PLAIN:
            raise UserError(f"there is no baseline {one!r}: choose {', '.join(BASELINES)}")
    return modes


def accuracy(results: Sequence[Result]) -> list[str]:
    """A sentence for each set whose answers were graded."""
    return [
        f"{regressions.label(r)}: {r.accuracy:.1%} of {r.graded} answers are right, {r.plain_accuracy:.1%} of "
        f"{r.compared_with}'s"
        for r in results
        if r.graded and r.accuracy is not None and r.plain_accuracy is not None
    ]


def _setting(name: str) -> tuple[str, int | None]:
    """`assisted:4` → (`assisted`, 4): tokens drafted in a round; None where that is left open."""
    kind, colon, tokens = name.partition(":")
    return (kind, int(tokens)) if colon and tokens.isdecimal() and int(tokens) else (name, None)


def _assistant(given: str) -> Path:
    """A standalone draft as a folder that transformers loads: given as such, as a drafter, or as its run."""
    path = Path(given)
    places = (path / "drafter" / standalone.FOLDER, path / standalone.FOLDER)
    return next((place for place in places if place.is_dir()), path)


def _drafters(run: Run, given: Sequence[str]) -> dict[str, str]:
    if given:
        return pairs(given)
    return {"drafter": str(run.folder)} if (run.folder / "drafter" / artefacts.MANIFEST).is_file() else {}


def _split(given: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(part.strip() for one in given for part in one.split(",") if part.strip()))


def _set_name(benchmark: str) -> str:
    path = Path(benchmark)
    return path.stem if path.exists() else benchmark


def _digest(conversations: Sequence[Conversation]) -> str:
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(repr((conversation.id, conversation.messages)).encode())
    return digest.hexdigest()[:16]


def _identity(path: Path) -> dict[str, object]:
    """What tells a drafter, and a run's tree, from others of the same path."""
    folder = path / "drafter" if (path / "drafter").is_dir() else path
    growth = api.run_growth(path).model_dump(mode="json") if folder != path else None
    return {"checksum": artefacts.checksum(folder), "growth": growth}
