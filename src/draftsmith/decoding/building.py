"""From a specification and drafters by name to the composition that the engine runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from draftsmith.decoding.averaging import averaged
from draftsmith.decoding.calibration import Tempered
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.costs import stored_round_costs
from draftsmith.decoding.drawn import SampledGrowth
from draftsmith.decoding.growth import AdaEDLGrowth, Growth, GrowthOptions
from draftsmith.decoding.hedging import hedged
from draftsmith.decoding.learned import FEATURES, LearnedRule
from draftsmith.decoding.merging import Merge
from draftsmith.decoding.routing import ConfidenceRoute, EntropyRule, KeywordRule, Route
from draftsmith.decoding.specification import (
    Combined,
    ConfidenceOptions,
    EntropyOptions,
    KeywordOptions,
    LearnedOptions,
    Member,
    TrieOptions,
    parse,
)
from draftsmith.decoding.stacked import Stacked
from draftsmith.drafters.base import Drafter
from draftsmith.drafters.head import Head
from draftsmith.drafters.shared_trunk import alike, stacked
from draftsmith.foundation.artefacts import read_json
from draftsmith.foundation.errors import UserError

Text = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Available:
    """A drafter that a specification may name.

    Attributes:
        growth: its own, where it has one (that of its run).
        temperatures: by depth, where it was calibrated.
    """

    drafter: Drafter
    growth: Growth | None = None
    temperatures: tuple[float, ...] | None = None


def build(
    spec: str | Mapping[str, object] | Member | Combined,
    members: Mapping[str, Available | Drafter],
    growth: Growth | GrowthOptions | None = None,
    text: Text | None = None,
) -> Composition:
    """The composition that a specification describes.

    Args:
        spec: a line, its YAML form, or what `parse` made of either.
        members: drafters by name.
        growth: of members that have none of their own (neither in the specification nor from their run).
        text: how token ids become text, for routing by keyword.

    Raises:
        UserError: the specification is wrong, names a drafter that is not there, or puts together what cannot be.
    """
    found = parse(spec) if isinstance(spec, str | Mapping) else spec
    available = {name: m if isinstance(m, Available) else Available(m) for name, m in members.items()}
    shared = growth or GrowthOptions()
    builder = _Builder(available, shared.build() if isinstance(shared, GrowthOptions) else shared, text)
    return builder.composition(found, None)


@dataclass(frozen=True)
class _Builder:
    members: Mapping[str, Available]
    growth: Growth
    text: Text | None

    def composition(self, spec: Member | Combined, calibrated: bool | Path | None) -> Composition:
        if isinstance(spec, Member):
            return self.single(spec, calibrated)
        if spec.kind == "average":
            return self.average(spec)
        options: Any = spec.options
        own = options.calibrated if isinstance(options, ConfidenceOptions) else calibrated
        parts = tuple(self.composition(member, own or calibrated) for member in spec.members)
        self.refuse(spec, parts)
        if (together := side_by_side(spec, parts)) is not None:
            return together
        match spec.kind:
            case "merge:concat":
                return Merge(parts, "concat")
            case "merge:trie":
                return Merge(parts, "trie", options.budget, self.costs(spec, parts, options), options.recent)
            case "route:confidence":
                return ConfidenceRoute(parts)
            case "route:keyword":
                return Route(parts, self.keywords(spec, options))
        singles = self.drafters(spec, parts)
        match options:
            case EntropyOptions():
                return Route(parts, EntropyRule(options.rounds))
            case LearnedOptions():
                return Route(parts, learned(options, singles))
        return hedged(singles, **options.model_dump())

    def available(self, name: str) -> Available:
        if name not in self.members:
            near = get_close_matches(name, self.members, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self.members) or 'none'}"
            raise UserError(f"no drafter is called {name!r}; {hint} (name one with --drafter {name}=FOLDER)")
        return self.members[name]

    def single(self, spec: Member, calibrated: bool | Path | None) -> Single:
        found = self.available(spec.name)
        growth = spec.growth.build() if spec.growth else found.growth or self.growth
        drafter = found.drafter
        if calibrated:
            drafter = Tempered(drafter, self.temperatures(spec.name, found, calibrated))
        return Single(drafter, growth, str(spec))

    def temperatures(self, name: str, found: Available, calibrated: bool | Path) -> tuple[float, ...]:
        if calibrated is True:
            if found.temperatures is None:
                raise UserError(f"{name} was not calibrated: run draftsmith calibrate, or name a file: calibrated=FILE")
            return found.temperatures
        stored = read_json(Path(str(calibrated)))
        drafters = stored.get("drafters") if isinstance(stored, Mapping) else None
        entry = drafters.get(name) if isinstance(drafters, Mapping) else None
        values = entry.get("temperatures") if isinstance(entry, Mapping) else None
        if not values or not all(isinstance(t, int | float) and t > 0 for t in values):
            raise UserError(f"{calibrated} holds no temperatures of {name}: calibrate it (draftsmith calibrate --out)")
        return tuple(float(t) for t in values)

    def average(self, spec: Combined) -> Single:
        options: Any = spec.options
        if odd := next((m for m in spec.members if not isinstance(m, Member) or m.growth), None):
            raise UserError(f"average takes drafters' names, not {odd}")
        names = [m.name for m in spec.members if isinstance(m, Member)]
        drafter = averaged({name: self.available(name).drafter for name in names}, options.weights)
        return Single(drafter, self.available(names[0]).growth or self.growth, str(spec))

    def refuse(self, spec: Combined, parts: Sequence[Composition]) -> None:
        for part in parts:
            if isinstance(part, Single) and isinstance(part.growth, AdaEDLGrowth) and len(parts) > 1:
                raise UserError(
                    f"{spec.kind}: {part.name} grows by adaedl, whose threshold follows what its own drafts come to: "
                    "it has to draft alone"
                )

            if isinstance(part, Single) and isinstance(part.growth, SampledGrowth) and len(parts) > 1:
                raise UserError(
                    f"{spec.kind}: {part.name} samples its candidates, whose tree can't be chosen or merged after they "
                    "are drawn: it has to draft alone"
                )

    def drafters(self, spec: Combined, parts: Sequence[Composition]) -> list[Single]:
        singles = [part for part in parts if isinstance(part, Single)]
        if len(singles) < len(parts):
            odd = next(m for m, part in zip(spec.members, parts, strict=True) if not isinstance(part, Single))
            raise UserError(f"{spec.kind} compares its members' own proposals; {odd} has none: name drafters")
        return singles

    def keywords(self, spec: Combined, options: KeywordOptions) -> KeywordRule:
        if self.text is None:
            raise UserError("route:keyword needs the target's tokenizer, to read prompts as text")
        names = [str(member) for member in spec.members]
        default = options.default or next(name for name in names if name not in options.words)
        return KeywordRule(tuple(options.words.get(n, ()) for n in names), names.index(default), self.text)

    def costs(self, spec: Combined, parts: Sequence[Composition], options: TrieOptions) -> tuple[float, ...] | None:
        if options.profile is None:
            return None
        budget = options.budget or max(part.budget for part in parts)
        draft = options.draft_ms
        if draft is None:
            shapes = [(getattr(p, "growth", None), p) for p in parts]
            if odd := next((p for g, p in shapes if not hasattr(g, "depth") or not hasattr(g, "width")), None):
                raise UserError(
                    f"merge:trie: the profile does not say what drafting with {odd.names[0]} costs: set draft_ms"
                )
            each: list[Any] = [g for g, _ in shapes]
            draft = sum(_drafting(options.profile, g.depth, g.width) for g in each)
        return stored_round_costs(options.profile, budget, 1, 1, draft, options.sequences)


def side_by_side(spec: Combined, parts: Sequence[Composition]) -> Stacked | None:
    """Specialists of one trunk with one growth, in one batched pass; None for other members or ways."""
    ways: dict[str, Literal["trie", "concat", "confidence"]]
    ways = {"merge:trie": "trie", "merge:concat": "concat", "route:confidence": "confidence"}
    singles = [part for part in parts if isinstance(part, Single)]
    if spec.kind not in ways or len(singles) < len(parts) or any(p.growth != singles[0].growth for p in singles):
        return None
    apart = any(getattr(spec.options, name, None) for name in ("profile", "recent"))
    if apart or not alike([p.drafter for p in singles]):
        return None
    heads = {p.name: p.drafter for p in singles if isinstance(p.drafter, Head)}
    nodes = getattr(spec.options, "budget", None)
    return Stacked(stacked(heads), singles[0].growth, tuple(heads), ways[spec.kind], nodes)


def _drafting(profile: Path, depth: int, width: int) -> float:
    """What the profile says a dynamic tree of this depth and width takes to draft."""
    free = stored_round_costs(profile, 0, depth, width, 0.0)[0]
    return stored_round_costs(profile, 0, depth, width)[0] - free


def learned(options: LearnedOptions, parts: Sequence[Single]) -> LearnedRule:
    """The rule of a stored router.

    Raises:
        UserError: the file is no router, or one of other members.
    """
    stored = read_json(options.router)
    members = stored.get("members") if isinstance(stored, Mapping) else None
    if not isinstance(members, Mapping) or tuple(stored.get("features", ())) != FEATURES:
        raise UserError(f"{options.router} is no router of this version: fit one with draftsmith calibrate --router")
    entries = []
    for part in parts:
        entry = members.get(part.name)
        if not isinstance(entry, Mapping) or not {"weights", "round_ms", "children"} <= entry.keys():
            raise UserError(f"{options.router} knows {', '.join(members)}, not {part.name}: fit it with these members")
        entries.append(entry)
    return LearnedRule(
        tuple(tuple(float(w) for w in e["weights"]) for e in entries),
        tuple(float(e["round_ms"]) for e in entries),
        tuple(int(e["children"]) for e in entries),
        options.every,
    )
