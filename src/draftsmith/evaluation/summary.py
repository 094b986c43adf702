"""`summary.json`: what a run measured, in a documented and versioned schema (docs/summary.md)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draftsmith.decoding.trace import Generation
from draftsmith.evaluation import metrics
from draftsmith.evaluation.statistics import ratio_interval, speedup_interval
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError

SCHEMA = 1
CONTEXTS = (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # tokens before a round


class _Model(BaseModel):
    # other tools may add fields of their own: they are kept when a summary is read and written again
    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Speedup(_Model):
    """Tokens per second ÷ plain decoding's, with its 95 % interval over prompts (null for a single prompt)."""

    estimate: float = Field(gt=0)
    low: float | None
    high: float | None


class Lossless(_Model):
    """How many answers were compared with plain decoding's, and what came out."""

    checked: int = Field(ge=0)
    equal: int = Field(ge=0)
    near_ties: int = Field(ge=0)

    @property
    def different(self) -> int:
        """Answers that differ without a near tie to explain it: anything but 0 is a bug, or a lossy mode."""
        return self.checked - self.equal - self.near_ties


class ContextBucket(_Model):
    """The rounds that began with so many tokens before them, prompt included."""

    at_least: int = Field(ge=0)
    below: int | None = None
    rounds: int = Field(ge=1)
    acceptance_length: float = Field(ge=1)
    milliseconds_per_round: float


class Result(_Model):
    """One set of prompts, at one temperature, with one composition of drafters."""

    set: str
    temperature: float = Field(ge=0)
    drafters: str
    acceptance_length: float = Field(ge=1)
    acceptance_by_depth: list[float]
    round_cost: float = Field(gt=0)
    speedup: Speedup
    plain_tokens_per_second: float
    tokens_per_second: float
    lossless: Lossless
    prompts: int | None = None
    rounds: int | None = None
    node_budget: int | None = None
    acceptance_length_after_cut: float | None = None
    acceptance_length_without_loops: float | None = None
    looping_answers: int | None = None
    draft_ms: float | None = None
    verify_ms: float | None = None
    rest_ms: float | None = None
    plain_token_ms: float | None = None
    acceptance_length_low: float | None = None
    acceptance_length_high: float | None = None
    by_context: list[ContextBucket] | None = None
    first_token_ms: float | None = None
    plain_first_token_ms: float | None = None
    graded: int | None = None
    accuracy: float | None = None
    plain_accuracy: float | None = None
    engine: str | None = None
    compared_with: str | None = None


class StageTime(_Model):
    """Wall-clock seconds of one stage."""

    name: str
    seconds: float = Field(ge=0)


class Summary(_Model):
    """The whole file."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    results: list[Result]
    stages: list[StageTime] = []


def summarise(
    set: str,  # noqa: A002 - the schema's word
    temperature: float,
    drafters: str,
    plain: Sequence[Generation],
    speculative: Sequence[Generation],
    lossless: Lossless,
    *,
    prompts: Sequence[Hashable] | None = None,
    node_budget: int | None = None,
    seed: int = 0,
) -> Result:
    """One row of the summary, from the traces of plain and speculative decoding of the same prompts.

    Args:
        set: the name of the set of prompts.
        temperature: both decoded at.
        drafters: what drafted, as one name.
        plain, speculative: answers to the same prompts in the same order.
        lossless: outcome of the equality checks.
        prompts: each answer's prompt, where prompts were repeated for better timing: a prompt's repeats count together.
        node_budget: drafted nodes verified in a round, if one number says it.
        seed: of the interval's resampling.

    Raises:
        ValueError: the two sides have different numbers of answers.
        UserError: no speculative round took place, or nothing was timed, so there is nothing to measure.
    """
    names = range(len(plain)) if prompts is None else prompts
    if not len(plain) == len(speculative) == len(names):
        raise ValueError(
            f"answers have to come in pairs: {len(plain)} plain, {len(speculative)} speculative, {len(names)} prompts"
        )
    counts, plain_counts = metrics.count(speculative), metrics.count(plain)
    if not counts.rounds or not counts.decode_ms > 0 or not plain_counts.decode_ms > 0:
        raise UserError(
            f"the set {set!r} has no speculative round to measure ({counts.answers} answers, {counts.tokens} tokens): "
            "use more prompts or more new tokens"
        )
    columns = list(_totals(names, speculative, plain).values())
    interval = speedup_interval(*zip(*columns, strict=True), seed=seed)
    low, high = _acceptance_interval(names, speculative, seed)
    looping = len(speculative) - len(metrics.without_loops(speculative))
    draft_ms, verify_ms, rest_ms = counts.split_per_round
    return Result(
        set=set,
        temperature=temperature,
        drafters=drafters,
        acceptance_length=counts.acceptance_length,
        acceptance_by_depth=counts.acceptance_by_depth,
        round_cost=metrics.round_cost(counts, plain_counts),
        speedup=Speedup(estimate=interval.estimate, low=interval.low, high=interval.high),
        plain_tokens_per_second=plain_counts.tokens_per_second,
        tokens_per_second=counts.tokens_per_second,
        lossless=lossless,
        prompts=len(columns),
        rounds=counts.rounds,
        node_budget=node_budget,
        acceptance_length_after_cut=counts.acceptance_length_after_cut,
        acceptance_length_without_loops=_known(metrics.count(metrics.without_loops(speculative)).acceptance_length),
        looping_answers=looping,
        draft_ms=draft_ms,
        verify_ms=verify_ms,
        rest_ms=rest_ms,
        plain_token_ms=plain_counts.milliseconds_per_token,
        acceptance_length_low=low,
        acceptance_length_high=high,
        by_context=[
            ContextBucket(
                at_least=start,
                below=end,
                rounds=inside.rounds,
                acceptance_length=inside.acceptance_length,
                milliseconds_per_round=inside.milliseconds_per_round,
            )
            for (start, end), inside in metrics.by_context(speculative, CONTEXTS).items()
        ],
    )


def result_table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for `foundation.console.table`."""
    columns = [
        "set",
        "T",
        "drafters",
        "τ",
        "α by depth",
        "round cost",
        "speed-up",
        "95 %",
        "tokens/s",
        "plain",
        "equal",
    ]
    rows = [
        [
            r.set,
            f"{r.temperature:g}",
            r.drafters,
            f"{r.acceptance_length:.2f}",
            " ".join(f"{a:.2f}" for a in r.acceptance_by_depth),
            f"{r.round_cost:.2f}",
            f"{r.speedup.estimate:.2f}×",
            interval_text(r.speedup),
            f"{r.tokens_per_second:.1f}",
            f"{r.plain_tokens_per_second:.1f}",
            lossless_text(r.lossless),
        ]
        for r in results
    ]
    return columns, rows


def result_markdown(results: Sequence[Result]) -> str:
    """The results as a Markdown table; who drafted, and right answers, where there is something to say."""
    several = len({r.drafters for r in results}) > 1
    graded = any(r.graded for r in results)
    columns = ["set", "T", *(["drafters"] * several), "prompts", "τ", "τ, 95 %", "α by depth", "round cost", "speed-up"]
    columns += ["95 %", "tokens/s", "first token", *(["right answers"] * graded), "loops", "equal"]
    rows = [columns, ["---", *["--:"] * (len(columns) - 1)]]
    for r in results:
        low, high = r.acceptance_length_low, r.acceptance_length_high
        times = [r.plain_first_token_ms, r.first_token_ms]
        rates = [r.plain_accuracy, r.accuracy]
        right = [_between([f"{100 * x:.0f} %" for x in rates if x is not None])] if r.graded else ["–"]
        rows.append(
            [
                r.set,
                f"{r.temperature:g}",
                *([r.drafters] * several),
                "–" if r.prompts is None else str(r.prompts),
                f"{r.acceptance_length:.2f}",
                "–" if low is None or high is None else f"{low:.2f}–{high:.2f}",
                " ".join(f"{a:.2f}" for a in r.acceptance_by_depth),
                f"{r.round_cost:.2f}",
                f"{r.speedup.estimate:.2f}×",
                interval_text(r.speedup),
                f"{r.plain_tokens_per_second:.1f} → {r.tokens_per_second:.1f}",
                _between([f"{t:.0f} ms" for t in times if t is not None]),
                *(right * graded),
                "–" if r.looping_answers is None else str(r.looping_answers),
                lossless_text(r.lossless) if r.lossless.checked else "–",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _between(values: Sequence[str]) -> str:
    return " → ".join(values) if len(values) == 2 else "–"


def interval_text(speedup: Speedup) -> str:
    """`1.41–1.63`, or a dash where one prompt allows no interval."""
    return "–" if speedup.low is None or speedup.high is None else f"{speedup.low:.2f}–{speedup.high:.2f}"


def lossless_text(lossless: Lossless) -> str:
    """`23 of 24 (1 near tie)`."""
    text = f"{lossless.equal} of {lossless.checked}"
    if lossless.near_ties:
        text += f" ({lossless.near_ties} near tie{'s' if lossless.near_ties > 1 else ''})"
    return text


def write_summary(path: Path, summary: Summary) -> None:
    """Writes `summary.json`; optional fields that are not known are left out."""
    artefacts.write_json(path, summary.model_dump(by_alias=True, exclude_none=True) | _results(summary))


def read_summary(path: Path) -> Summary:
    """Reads `summary.json`. Raises UserError when it isn't one, naming the field."""
    data = artefacts.read_json(path)
    version = data.get("schema") if isinstance(data, dict) else None
    if version != SCHEMA:
        raise UserError(
            f"{path}: the field 'schema' is {version!r}, this draftsmith reads {SCHEMA}; make the summary again"
        )
    try:
        return Summary.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: the field '{where}' is not valid ({first['msg']}); make the summary again") from error


def _results(summary: Summary) -> dict[str, object]:
    # low and high are part of the schema, so null has to stay where no interval exists
    rows = []
    for result in summary.results:
        row = result.model_dump(exclude_none=True)
        rows.append({**row, "speedup": result.speedup.model_dump()})
    return {"results": rows}


def _totals(
    names: Sequence[Hashable], *sides: Sequence[Generation]
) -> dict[Hashable, tuple[float, float, float, float]]:
    """For each prompt, tokens and seconds of the first side, then of the second."""
    totals: dict[Hashable, tuple[float, float, float, float]] = {}
    for name, first, second in zip(names, *sides, strict=True):
        a, b, c, d = totals.get(name, (0.0, 0.0, 0.0, 0.0))
        a, b = a + len(first.token_ids), b + first.total_ms / 1e3
        totals[name] = (a, b, c + len(second.token_ids), d + second.total_ms / 1e3)
    return totals


def _acceptance_interval(
    names: Sequence[Hashable], speculative: Sequence[Generation], seed: int
) -> tuple[float | None, float | None]:
    """95 % of the acceptance length over prompts; None for a single prompt."""
    counts: dict[Hashable, metrics.Counts] = {}
    for name, generation in zip(names, speculative, strict=True):
        counts[name] = counts.get(name, metrics.Counts()) + metrics.count([generation])
    # an answer of one token has no round and says nothing of them
    tokens, rounds = zip(*((c.committed, c.rounds) for c in counts.values() if c.rounds), strict=True)
    found = ratio_interval(tokens, rounds, seed=seed)
    return found.low, found.high


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
