"""Compositions in a study: a specification at a node budget, what is fitted for it on dev, and its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from draftsmith.data.conversations import Conversation
from draftsmith.decoding.building import Available, Text, build
from draftsmith.decoding.composition import Composition
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.decoding.hedging import carries
from draftsmith.decoding.specification import Combined, ConfidenceOptions, LearnedOptions, Member, TrieOptions
from draftsmith.decoding.trace import Generation
from draftsmith.evaluation import fitting, metrics
from draftsmith.evaluation.bench import BenchOptions, bench, results
from draftsmith.evaluation.replayed import replay
from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.studies.corpus import AnswerSet
from draftsmith.studies.rows import Row, counted_row
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import TargetSpec
from draftsmith.target.replay import StoredAnswer

Spec = Member | Combined
INTERLEAVED = "interleaved"
WALL_CLOCK = "wall-clock"


def at_budget(spec: Spec, growth: GrowthOptions) -> Spec:
    """The specification with a growth for every member that has none, so that a round verifies no more nodes than
    `growth` has.

    Members of `merge:concat` divide the nodes (the first have one more where they don't divide evenly); members of a
    trie draft as many nodes each as the trie then keeps; members of a route have all.

    Raises:
        UserError: fewer nodes than members to divide them.
    """
    if isinstance(spec, Member):
        return spec if spec.growth else replace(spec, growth=growth, text=spec.name)
    if spec.kind == "average":
        return spec
    nodes = [growth.node_budget] * len(spec.members)
    if spec.kind == "merge:concat":
        share, more = divmod(growth.node_budget, len(spec.members))
        if not share:
            raise UserError(f"{spec}: {growth.node_budget} nodes can't be divided among its members")
        nodes = [share + (i < more) for i in range(len(spec.members))]
    members = tuple(
        at_budget(member, growth.model_copy(update={"node_budget": n}))
        for member, n in zip(spec.members, nodes, strict=True)
    )
    options = spec.options
    if isinstance(options, TrieOptions) and options.budget is None:
        options = options.model_copy(update={"budget": growth.node_budget})
    return replace(spec, members=members, options=options)


def composed(spec: Spec, growth: GrowthOptions, members: Mapping[str, Available], text: Text | None) -> Composition:
    """The composition at `growth`'s node budget.

    Raises:
        UserError: it would verify more nodes than that, so that it could not be compared.
    """
    made = build(at_budget(spec, growth), members, growth, text)
    if made.budget > growth.node_budget:
        raise UserError(
            f"{spec} verifies {made.budget} nodes a round, the study compares at {growth.node_budget}: leave out its "
            "members' own growths and budgets, or lower them"
        )
    return made


def options_in(spec: Spec) -> list[object]:
    """The options of a specification and of those inside it."""
    if isinstance(spec, Member):
        return []
    return [spec.options, *(o for member in spec.members for o in options_in(member))]


def calibrates(spec: Spec) -> bool:
    """Whether a specification asks for temperatures."""
    return any(isinstance(o, ConfidenceOptions) and bool(o.calibrated) for o in options_in(spec))


def learns(spec: Spec) -> bool:
    """Whether a specification asks for a fitted router."""
    return any(isinstance(o, LearnedOptions) for o in options_in(spec))


def with_router(spec: Spec, file: Path) -> Spec:
    """The specification with another router's file."""
    if isinstance(spec, Member):
        return spec
    options = spec.options
    if isinstance(options, LearnedOptions):
        options = options.model_copy(update={"router": file})
    return replace(spec, members=tuple(with_router(m, file) for m in spec.members), options=options)


def calibrated(
    members: Mapping[str, Available],
    growth: GrowthOptions,
    spec: TargetSpec,
    dev: Sequence[StoredAnswer],
    device: torch.device,
) -> dict[str, Available]:
    """The members with the temperatures that their own rounds over the dev answers ask for."""
    found = {}
    for name, member in members.items():
        fitted = fitting.temperatures(member.drafter, growth.build(), spec, dev, growth.depth, device)
        found[name] = replace(member, temperatures=tuple(f.temperature for f in fitted) or (1.0,))
    return found


def composed_rows(
    compose: Callable[[GrowthOptions], Composition],
    device: torch.device,
    growths: Sequence[GrowthOptions],
    tests: Iterable[AnswerSet],
    spec: TargetSpec,
    common: Mapping[str, object],
    extra: Mapping[str, str | int | float],
    sweep: Sequence[GrowthOptions] = (),
    seed: int = 0,
) -> list[Row]:
    """Acceptance on stored answers: a row for each tree and test set, and one for all test sets interleaved.

    What learns from one request for the next begins anew with each set, and decodes the interleaved ones in their
    order; for anything else these are the same rounds, counted together.

    Args:
        compose: the composition for a tree, fresh at each call.
        common: the fields that all of the cell's rows share.
        extra: what goes into `Row.extra` beside the tree's shape and each drafter's share.
        sweep: more trees; their rows have `sweep` in `extra`.
        seed: of the order in which answers are interleaved.
    """
    by_temperature: dict[float, list[AnswerSet]] = {}
    for test in tests:
        by_temperature.setdefault(test.temperature, []).append(test)
    rows = []
    for temperature, sets in by_temperature.items():
        mixed = [(f"{t.benchmark}:{i}", a) for t in sets for i, a in zip(t.ids, t.answers, strict=True)]
        order = seeding.shuffled(len(mixed), INTERLEAVED, seed)
        for growth in (*growths, *sweep):
            made = compose(growth)
            pooled: list[Generation] = []

            def row(
                domain: str,
                benchmark: str,
                ids: Sequence[str],
                found: Sequence[Generation],
                growth: GrowthOptions = growth,
                made: Composition = made,
                temperature: float = temperature,
            ) -> Row:
                more = {**extra, "depth": growth.depth, "width": growth.width, **shares(made.names, found)}
                if growth in sweep:
                    more["sweep"] = 1
                place = (domain, benchmark, temperature, ids, growth.kind, growth.node_budget)
                return counted_row({**common, "extra": more}, *place, found)

            for test in sets:
                found = replay(compose(growth), spec, test.answers, device=device)
                pooled += found
                rows.append(row(test.domain, test.benchmark, test.ids, found))
            if carries(made):
                all_found = replay(made, spec, [mixed[i][1] for i in order], device=device)
            else:
                all_found = [pooled[i] for i in order]
            rows.append(row(INTERLEAVED, INTERLEAVED, [mixed[i][0] for i in order], all_found))
    return rows


def shares(names: Sequence[str], generations: Sequence[Generation]) -> dict[str, float]:
    """`nodes`: verified a round, duplicates shared; and of several drafters, by name: `rounds:` in which it had a node
    (of those that drafted), `accepted:` of the accepted tokens."""
    counts = metrics.count(generations)
    found = {"nodes": round(counts.drafted / max(counts.rounds, 1), 3)}
    if len(names) > 1:
        accepted = [sum(own) for own in metrics.by_owner(generations, len(names))]
        rounds = metrics.routing_shares(generations, len(names))
        for name, share, own in zip(names, rounds, accepted, strict=True):
            found[f"rounds:{name}"] = round(share, 4) if share == share else 0.0
            found[f"accepted:{name}"] = round(own / max(sum(accepted), 1), 4)
    return found


def wall_clock_rows(
    target: HFTarget,
    compositions: Mapping[str, Composition],
    sets: Mapping[str, Sequence[Conversation]],
    options: BenchOptions,
    out: Path,
    commons: Mapping[str, Mapping[str, object]],
) -> list[Row]:
    """Plain decoding and all the compositions by the wall clock, prompt by prompt in turn: a row for each composition,
    benchmark and temperature, and one for all benchmarks together.

    Args:
        sets: test prompts by benchmark.
        out: where finished prompts are kept, so that a killed measurement goes on.
        commons: of each composition, the fields that its rows share, `growth` among them; to `extra` is added what was
            measured.
    """
    measured = bench(target, compositions, sets, options, out)
    everything = [{**row, "set": INTERLEAVED, "id": f"{row['set']}:{row['id']}"} for row in measured]
    rows = []
    for result in [*results(measured), *results(everything)]:
        own = [
            row
            for row in (everything if result.set == INTERLEAVED else measured)
            if (row["set"], row["temperature"], row["drafters"]) == (result.set, result.temperature, result.drafters)
        ]
        common = commons[result.drafters]
        generations = [Generation.from_row(row["generation"]) for row in own]
        taken = {
            "tokens_per_second": result.tokens_per_second,
            "plain_tokens_per_second": result.plain_tokens_per_second,
            "round_cost": result.round_cost,
            "draft_ms": result.draft_ms or 0.0,
            "verify_ms": result.verify_ms or 0.0,
            "rest_ms": result.rest_ms or 0.0,
        }
        for end, value in (("low", result.speedup.low), ("high", result.speedup.high)):
            if value is not None:
                taken[f"speedup_{end}"] = value
        known = common["extra"]
        assert isinstance(known, Mapping)
        nodes = compositions[result.drafters].budget
        fields = {**common, "accounting": WALL_CLOCK, "extra": {**known, **taken}}
        ids = [f"{row['id']}#{row['repeat']}" if row["repeat"] else row["id"] for row in own]
        place = ("", result.set, result.temperature, ids, str(common["growth"]), nodes)
        row = counted_row(fields, *place, generations)
        rows.append(row.model_copy(update={"speedup": result.speedup.estimate}))
    return rows
