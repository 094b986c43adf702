"""Plain and speculative decoding of the same prompts, side by side: a row for each answer, and the numbers from them.

Both run in the same engine on the same target, prompt by prompt in alternating order, so that a slow minute of the
machine meets both. A prompt decoded in every mode is one unit: its rows are written together, an interrupted run goes
on with the next unit, and a unit that fails is listed apart and leaves the others alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from draftsmith.data.conversations import Conversation, subset
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.engine import Engine, Piece
from draftsmith.decoding.trace import Generation
from draftsmith.evaluation import equality, measured
from draftsmith.evaluation.measured import PLAIN, Row, pair
from draftsmith.evaluation.summary import Result, summarise
from draftsmith.foundation import console
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.target import chat
from draftsmith.target.detokenise import token_texts
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling


class BenchOptions(Options):
    """What is measured, and how often."""

    prompts: int = Field(default=8, ge=1, description="prompts of each set at most, chosen by the seed")
    max_new_tokens: int = Field(default=96, ge=2, description="tokens of an answer at most")
    temperatures: tuple[Annotated[float, Field(ge=0.0)], ...] = Field(
        default=(0.0,), min_length=1, description="each prompt is decoded at each of them"
    )
    repeats: int = Field(default=1, ge=1, description="times that everything is measured; a prompt's count together")
    warmup: int = Field(default=1, ge=0, description="times that the first prompt is decoded before anything counts")
    batch: int = Field(default=1, ge=1, description="prompts decoded together")
    seed: int = Field(default=0, description="of the draws and of the choice of prompts")


@dataclass(frozen=True)
class _Asked:
    set: str
    id: str
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class _Unit:
    """Prompts that are decoded together, in every mode."""

    asked: tuple[_Asked, ...]
    temperature: float
    repeat: int
    turn: int  # says which mode begins

    def keys(self, modes: Sequence[str]) -> set[measured.Key]:
        return {(a.set, a.id, self.temperature, self.repeat, mode) for a in self.asked for mode in modes}


@dataclass
class _Decoded:
    origins: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    generation: Generation | None = None


def bench(
    target: HFTarget,
    drafters: Composition | Mapping[str, Composition],
    sets: Mapping[str, Sequence[Conversation]],
    options: BenchOptions,
    out: Path,
    conditions: Mapping[str, object] | None = None,
) -> list[Row]:
    """Decode the sets' prompts plainly and with each composition; `results` makes the numbers.

    Args:
        drafters: compositions by name (a single one is named after its drafter).
        sets: conversations by set; the last user message and what stands before it is the prompt.
        out: the rows as JSON lines. Rows already there are kept, and their prompts not decoded again; what failed is
            listed in the file beside it whose name ends in `-failed.jsonl`, and tried again by the next call.
        conditions: what else identifies the measurement (the drafter's checksum); rows measured under other conditions
            are refused.

    Returns:
        The rows of all units that were measured, now or before, one for each answer: `set`, `id`, `prompt` (the last
        user message), `temperature`, `repeat`, `mode` (`plain`, `speculative`), `drafters` (None for plain rows),
        `node_budget`, `generation` (`Generation.to_row`, a plain one without rounds), `pieces` (a text for each token),
        `origins` (the drafter of each token, −1 for the target's own), `depths` (in the tree, 0 for the target's own),
        `conditions`; speculative rows also `equality` (`Equality.to_row` and, in half precision, `far_tokens`, see
        `equality.teacher_forced`).

    Raises:
        StaleError: `out` holds rows measured under other conditions.
        UserError: no prompt could be measured.
    """
    named = dict(drafters) if isinstance(drafters, Mapping) else {_name(drafters): drafters}
    if not named or PLAIN in named:
        raise UserError(
            f"drafters to measure need names, and none may be called {PLAIN!r}: {', '.join(named) or 'none'}"
        )
    modes = [PLAIN, *named]
    engines = {PLAIN: Engine(target), **{name: Engine(target, composition) for name, composition in named.items()}}
    failed: list[Row] = []
    units = _plan(target, sets, options, failed)
    under = _conditions(target, modes, options, conditions or {})
    rows = measured.resume(out, [unit.keys(modes) for unit in units], under)
    done = {measured.key(row) for row in rows}
    wanted = {key for unit in units for key in unit.keys(modes)}
    left = [unit for unit in units if not unit.keys(modes) <= done]
    total = sum(len(unit.asked) for unit in units)
    already = total - sum(len(unit.asked) for unit in left)
    for _ in range(options.warmup if left else 0):
        with suppress(Exception):  # what is wrong with it is said when it counts
            for mode in modes:
                _decode(engines[mode], left[0], options)
    with console.progress("measuring", total, "prompts", done=already) as bar:
        for unit in left:
            first = unit.turn % len(modes)
            try:
                decoded = {mode: _decode(engines[mode], unit, options) for mode in modes[first:] + modes[:first]}
                new = list(_rows(target, named, unit, decoded, options, under))
            except Exception as problem:
                failed += [_failure(a, problem, unit.temperature) for a in unit.asked]
                bar.advance(len(unit.asked))
                continue
            measured.append(out, new)
            rows += new
            bar.advance(len(unit.asked), **_speeds(new))
    measured.list_failures(out, failed)
    rows = [row for row in rows if measured.key(row) in wanted]
    if not rows:
        why = f": {failed[0]['id']}: {failed[0]['error']}" if failed else ", for there is none"
        raise UserError(f"no prompt could be measured{why}")
    return rows


def results(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Result]:
    """The numbers of `summary.json`: one result for each set, temperature and composition, in order of appearance.

    Intervals are paired over prompts, a prompt's repeats counting together. A group without a round (answers of one
    token) has no numbers and is left out with a warning.
    """
    plain = {pair(row): row for row in rows if row["mode"] == PLAIN}
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["mode"] != PLAIN and pair(row) in plain:
            groups.setdefault((row["set"], row["temperature"], row["drafters"]), []).append(row)
    found = []
    for (name, temperature, drafters), members in groups.items():
        compared = [_equality(row["equality"]) for row in members]
        try:
            result = summarise(
                name,
                temperature,
                drafters,
                [Generation.from_row(plain[pair(row)]["generation"]) for row in members],
                [Generation.from_row(row["generation"]) for row in members],
                equality.lossless(compared),
                prompts=[row["id"] for row in members],
                node_budget=members[0]["node_budget"],
                seed=seed,
            )
        except UserError as problem:
            console.warn(str(problem))
            continue
        found.append(result)
    return found


def _name(composition: Composition) -> str:
    return type(composition.drafter if isinstance(composition, Single) else composition).__name__.lower()


def _plan(
    target: HFTarget, sets: Mapping[str, Sequence[Conversation]], options: BenchOptions, failed: list[Row]
) -> list[_Unit]:
    """All units in order: sets by turns, so that a machine that slows down meets all of them."""
    groups: list[list[tuple[int, tuple[_Asked, ...]]]] = []
    for name, conversations in sets.items():
        asked = []
        for conversation in subset(conversations, options.prompts, options.seed, "bench", name):
            try:
                asked.append(_prompt(target, name, conversation))
            except UserError as problem:
                failed.append(_failure(_Asked(name, conversation.id, _question(conversation), ()), problem, None))
        starts = range(0, len(asked), options.batch)
        groups.append([(turn, tuple(asked[i : i + options.batch])) for turn, i in enumerate(starts)])
    mixed = [group for row in itertools.zip_longest(*groups) for group in row if group]
    return [
        _Unit(group, temperature, repeat, turn + step + repeat)
        for repeat in range(options.repeats)
        for turn, group in mixed
        for step, temperature in enumerate(options.temperatures)
    ]


def _prompt(target: HFTarget, name: str, conversation: Conversation) -> _Asked:
    messages = list(conversation.messages)
    while messages and messages[-1].role != "user":
        messages.pop()
    if not messages:
        raise UserError("the conversation asks nothing: it has no user message")
    if any(m.role == "assistant" and not m.content for m in messages):
        raise UserError(
            "an earlier answer is still to be generated: let the target write it first (draftsmith regenerate)"
        )
    ids = chat.prompt_ids(target.tokenizer, messages)
    if len(ids) + 2 > target.spec.max_positions:
        raise UserError(
            f"the prompt has {len(ids)} tokens; {target.spec.name} takes {target.spec.max_positions} in all"
        )
    return _Asked(name, conversation.id, messages[-1].content, tuple(ids))


def _question(conversation: Conversation) -> str:
    return next((m.content for m in reversed(conversation.messages) if m.role == "user"), "")


def _conditions(
    target: HFTarget, modes: Sequence[str], options: BenchOptions, more: Mapping[str, object]
) -> dict[str, object]:
    """What rows that are compared with each other must share."""
    own = {
        "target": target.spec.fingerprint,
        "dtype": target.spec.dtype,
        "device": target.device.type,
        "threads": torch.get_num_threads(),
        "modes": list(modes),
        "max_new_tokens": options.max_new_tokens,
        "batch": options.batch,
        "seed": options.seed,
    }
    plain: dict[str, object] = json.loads(json.dumps({**own, **more}))
    return plain


def _decode(engine: Engine, unit: _Unit, options: BenchOptions) -> list[_Decoded]:
    sampling = Sampling(temperature=unit.temperature, seed=options.seed)
    found = [_Decoded() for _ in unit.asked]
    prompts, names = [a.ids for a in unit.asked], [a.id for a in unit.asked]
    for event in engine.stream(prompts, sampling, options.max_new_tokens, names):
        if isinstance(event, Piece):
            found[event.request].origins += event.owners
            found[event.request].depths += event.depths
        else:
            found[event.request].generation = event
    return found


def _rows(
    target: HFTarget,
    named: Mapping[str, Composition],
    unit: _Unit,
    decoded: Mapping[str, Sequence[_Decoded]],
    options: BenchOptions,
    conditions: Mapping[str, object],
) -> Iterator[Row]:
    """The unit's rows, compared with plain decoding (outside the time that counts)."""
    sampling = Sampling(temperature=unit.temperature, seed=options.seed)
    for i, asked in enumerate(unit.asked):
        plain = decoded[PLAIN][i].generation
        assert plain is not None
        for mode in (PLAIN, *named):
            found = decoded[mode][i]
            generation = found.generation
            assert generation is not None
            row: Row = {
                "set": asked.set,
                "id": asked.id,
                "prompt": asked.text,
                "temperature": unit.temperature,
                "repeat": unit.repeat,
                "mode": PLAIN if mode == PLAIN else "speculative",
                "drafters": None if mode == PLAIN else mode,
                "node_budget": None if mode == PLAIN else named[mode].budget,
                "generation": (replace(generation, rounds=[]) if mode == PLAIN else generation).to_row(),
                "pieces": token_texts(target.tokenizer, generation.token_ids),
                "origins": found.origins,
                "depths": found.depths,
                "conditions": dict(conditions),
            }
            if mode != PLAIN:
                outcome = equality.check(
                    target, asked.ids, plain.token_ids, generation.token_ids, sampling, asked.id
                ).to_row()
                if target.dtype in equality.HALF:
                    ids = generation.token_ids
                    outcome["far_tokens"] = equality.teacher_forced(target, asked.ids, ids, sampling, asked.id)
                row["equality"] = outcome
            yield row


def _failure(asked: _Asked, problem: Exception, temperature: float | None) -> Row:
    said = str(problem) if isinstance(problem, UserError) else f"{type(problem).__name__}: {problem}"
    return {"set": asked.set, "id": asked.id, "prompt": asked.text, "temperature": temperature, "error": said}


def _speeds(rows: Sequence[Row]) -> dict[str, float | str]:
    """Tokens per second of each mode in the unit just measured."""
    speeds: dict[str, float | str] = {}
    for mode in dict.fromkeys(row["drafters"] or PLAIN for row in rows):
        own = [row["generation"] for row in rows if (row["drafters"] or PLAIN) == mode]
        seconds = sum(g["total_ms"] for g in own) / 1e3
        speeds[f"{mode} tokens/s"] = sum(len(g["token_ids"]) for g in own) / seconds if seconds else 0.0
    return speeds


def _equality(row: Mapping[str, Any]) -> equality.Equality:
    gap = row["gap"]
    return equality.Equality(row["equal"], row["first_difference"], row["near_tie"], torch.inf if gap is None else gap)
