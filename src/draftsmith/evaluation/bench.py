"""Plain and speculative decoding of the same prompts, side by side: a row for each answer, and the numbers from them.

Both run in the same engine on the same target, prompt by prompt in alternating order, so that a slow minute of the
machine meets both. A prompt decoded in every mode is one unit: its rows are written together, an interrupted run goes
on with the next unit, and a unit that fails is listed apart and leaves the others alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from draftsmith.data.conversations import Conversation
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.trace import Generation
from draftsmith.evaluation import asking, equality, grading, measured
from draftsmith.evaluation.asking import Unit
from draftsmith.evaluation.measured import PLAIN, Row, pair
from draftsmith.evaluation.modes import Decoded, EngineMode, Mode
from draftsmith.evaluation.summary import Result, summarise
from draftsmith.foundation import console
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
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


def bench(
    target: HFTarget,
    drafters: Composition | Mapping[str, Composition],
    sets: Mapping[str, Sequence[Conversation]],
    options: BenchOptions,
    out: Path,
    conditions: Mapping[str, object] | None = None,
    peers: Sequence[Mode] = (),
) -> list[Row]:
    """Decode the sets' prompts plainly, with each composition and by each peer; `results` makes the numbers.

    Args:
        drafters: compositions by name (a single one is named after its drafter).
        sets: conversations by set; the last user message and what stands before it is the prompt. Where an earlier
            answer is empty it is written by plain decoding, and its turn is measured too (`<id>@1`, `<id>@2`, …).
        out: the rows as JSON lines. Rows already there are kept, and their prompts not decoded again; what failed is
            listed in the file beside it whose name ends in `-failed.jsonl`, and tried again by the next call.
        conditions: what else identifies the measurement (the drafter's checksum); rows measured under other conditions
            are refused.
        peers: others that answer the same prompts (`peers.py`, `endpoint.py`).

    Returns:
        The rows of all units that were measured, now or before, one for each answer: `set`, `id`, `prompt` (the last
        user message), `temperature`, `repeat`, `mode` (`plain`, `speculative`), `drafters` (None for plain rows),
        `members` (the drafters' names by number),
        `engine` (`draftsmith`, `transformers`, `server`), `against` (the mode that speed-ups are over), `node_budget`,
        `generation` (`Generation.to_row`, a plain one without rounds), `first_token_ms`, `pieces` (a text for each
        token), `origins` (the drafter of each token, −1 for the target's own), `depths` (in the tree, 0 for the
        target's own), `correct` (None where nothing grades), `conditions`; speculative rows also `equality`
        (`Equality.to_row` and, in half precision, `far_tokens`, see `equality.teacher_forced`; None for other engines
        at temperatures above 0, whose draws are others).

    Raises:
        StaleError: `out` holds rows measured under other conditions.
        UserError: no prompt could be measured.
    """
    named = dict(drafters) if isinstance(drafters, Mapping) else {_name(drafters): drafters}
    modes: list[Mode] = [
        EngineMode(PLAIN, target),
        *(EngineMode(name, target, composition) for name, composition in named.items()),
        *peers,
    ]
    names = [mode.name for mode in modes]
    if len(modes) < 2 or len(set(names)) < len(names):
        given = ", ".join(names[1:]) or "none"
        raise UserError(f"what is measured needs names of its own, and none may be called {PLAIN!r}: {given}")
    failed: list[Row] = []
    o = options
    units = asking.plan(target, sets, o.prompts, o.batch, o.temperatures, o.repeats, o.seed, failed)
    under = _conditions(target, names, options, conditions or {})
    rows = measured.resume(out, [unit.keys(names) for unit in units], under)
    plain = asking.plain_rows(rows)
    done = {measured.key(row) for row in rows}
    wanted = {key for unit in units for key in unit.keys(names)}
    left = [unit for unit in units if not unit.keys(names) <= done]
    total = sum(len(unit.asked) for unit in units)
    already = total - sum(len(unit.asked) for unit in left)
    for _ in range(options.warmup if left else 0):
        with suppress(Exception):  # what is wrong with it is said when it counts
            for mode in modes:
                _decode(mode, left[0], left[0].prompts(target, plain), options)
    with console.progress("measuring", total, "prompts", done=already) as bar:
        for unit in left:
            first = unit.begins % len(modes)
            try:
                prompts = unit.prompts(target, plain)
                decoded = {mode.name: _decode(mode, unit, prompts, options) for mode in modes[first:] + modes[:first]}
                new = list(_rows(target, modes, unit, prompts, decoded, options, under))
            except Exception as problem:
                failed += [asking.failure(a, problem, unit.temperature) for a in unit.asked]
                bar.advance(len(unit.asked))
                continue
            measured.append(out, new)
            rows += new
            plain |= asking.plain_rows(new)
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
    everyone = {(*pair(row), row["drafters"] or PLAIN): row for row in rows}
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["mode"] != PLAIN and (*pair(row), row.get("against", PLAIN)) in everyone:
            groups.setdefault((row["set"], row["temperature"], row["drafters"]), []).append(row)
    found = []
    for (name, temperature, drafters), members in groups.items():
        against = members[0].get("against", PLAIN)
        base = [everyone[(*pair(row), against)] for row in members]
        compared = [_equality(row["equality"]) for row in members if row["equality"] is not None]
        try:
            result = summarise(
                name,
                temperature,
                drafters,
                [Generation.from_row(row["generation"]) for row in base],
                [Generation.from_row(row["generation"]) for row in members],
                equality.lossless(compared),
                prompts=[row["id"] for row in members],
                node_budget=members[0]["node_budget"],
                seed=seed,
            )
        except UserError as problem:
            console.warn(str(problem))
            continue
        found.append(result.model_copy(update=_more(members, base, against)))
    return found


def _more(members: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], against: str) -> dict[str, object]:
    """A result's fields that are not in traces: whose engine, against what, first tokens, right answers."""
    more: dict[str, object] = {"engine": members[0].get("engine", "draftsmith"), "compared_with": against}
    for name, side in (("first_token_ms", members), ("plain_first_token_ms", base)):
        times = [row["first_token_ms"] for row in side if row.get("first_token_ms") is not None]
        more[name] = statistics.median(times) if times else None
    graded = [(a, b) for a, b in zip(members, base, strict=True) if a.get("correct") is not None]
    if graded:
        more["graded"] = len(graded)
        more["accuracy"] = sum(bool(a["correct"]) for a, _ in graded) / len(graded)
        more["plain_accuracy"] = sum(bool(b["correct"]) for _, b in graded) / len(graded)
    if members[0].get("engine", "draftsmith") != "draftsmith":
        # nobody told how a foreign round's time is spent
        more |= {"draft_ms": None, "verify_ms": None, "rest_ms": None}
        rounds = [r for row in members for r in Generation.from_row(row["generation"]).rounds]
        if not any(r.reached > r.accepted for r in rounds):
            more["acceptance_by_depth"] = []  # nor where drafts were refused
    return more


def _name(composition: Composition) -> str:
    return type(composition.drafter if isinstance(composition, Single) else composition).__name__.lower()


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
    if target.kernels != "plain":
        own["kernels"] = target.kernels
    plain: dict[str, object] = json.loads(json.dumps({**own, **more}))
    return plain


def _decode(mode: Mode, unit: Unit, prompts: Sequence[Sequence[int]], options: BenchOptions) -> list[Decoded]:
    sampling = Sampling(temperature=unit.temperature, seed=options.seed)
    return mode.decode(prompts, [a.id for a in unit.asked], sampling, options.max_new_tokens)


def _rows(
    target: HFTarget,
    modes: Sequence[Mode],
    unit: Unit,
    prompts: Sequence[Sequence[int]],
    decoded: Mapping[str, Sequence[Decoded]],
    options: BenchOptions,
    conditions: Mapping[str, object],
) -> Iterator[Row]:
    """The unit's rows, compared with plain decoding (outside the time that counts)."""
    sampling = Sampling(temperature=unit.temperature, seed=options.seed)
    for i, (asked, prompt) in enumerate(zip(unit.asked, prompts, strict=True)):
        plain = decoded[PLAIN][i].generation
        grade = grading.grader(asked.set)
        for mode in modes:
            found = decoded[mode.name][i]
            generation = found.generation
            ids = generation.token_ids
            correct = None
            if grade and asked.reference is not None:
                correct = grade(target.tokenizer.decode(ids, skip_special_tokens=True), asked.reference)
            row: Row = {
                "set": asked.set,
                "id": asked.id,
                "prompt": asked.text,
                "temperature": unit.temperature,
                "repeat": unit.repeat,
                "mode": PLAIN if mode.name == PLAIN else "speculative",
                "drafters": None if mode.name == PLAIN else mode.name,
                "members": list(getattr(mode, "members", ())),
                "engine": mode.engine,
                "against": mode.against,
                "node_budget": mode.node_budget,
                "generation": (replace(generation, rounds=[]) if mode.name == PLAIN else generation).to_row(),
                "first_token_ms": round(found.first_token_ms, 3),
                "pieces": token_texts(target.tokenizer, ids),
                "origins": found.origins,
                "depths": found.depths,
                "correct": correct,
                "conditions": dict(conditions),
            }
            if mode.name != PLAIN:
                row["equality"] = None
                if mode.engine == "draftsmith" or not unit.temperature:
                    same = equality.check(target, prompt, plain.token_ids, ids, sampling, asked.id).to_row()
                    if target.dtype in equality.HALF and mode.engine == "draftsmith":
                        same["far_tokens"] = equality.teacher_forced(target, prompt, ids, sampling, asked.id)
                    row["equality"] = same
            yield row


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
