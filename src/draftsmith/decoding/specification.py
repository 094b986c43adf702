"""One way to name any composition: a line such as `merge:trie(math,chat,ngram,budget=15)`, or the same as YAML.

    drafter              math                    a drafter by the name that it was given
    with a growth        math@chain:4            kind:depth for chains, kind:nodes/depth/width for trees
    average(…)           average(math,chat,weights=0.7/0.3)
    route:…(…)           confidence, entropy, keyword, learned, hedge
    merge:…(…)           concat, trie

Members may be put together themselves: `merge:trie(route:hedge(math,chat),ngram,budget=15)`. As YAML, a composition is
a mapping of `kind`, `members` and its options, a member a name, a line, or a mapping (`drafter`, `growth`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from draftsmith.decoding.growth import GrowthOptions
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options, validate

CHAINS, TREES = ("chain", "adaedl"), ("dynamic", "best-first")


class AverageOptions(Options):
    """Averaging weights."""

    weights: tuple[float, ...] | None = Field(default=None, description="λ of each member; default: equal parts")

    @field_validator("weights", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return value.split("/") if isinstance(value, str) else value


class ConcatOptions(Options):
    """TAPS' merge has nothing to set."""


class ConfidenceOptions(Options):
    """Routing by mean path probability, and what else compares probabilities."""

    calibrated: bool | Path = Field(
        default=False, description="temperatures stored beside the drafters (true), or in a file of calibrate's"
    )


class TrieOptions(ConfidenceOptions):
    """A trie at a node budget."""

    budget: int | None = Field(default=None, ge=1, description="nodes at most; default: the largest member's")
    profile: Path | None = Field(
        default=None, description="costs stored by tune: profile.json; then only as many nodes as pay"
    )
    draft_ms: float | None = Field(default=None, ge=0, description="milliseconds of drafting a round, with a profile")
    sequences: int = Field(default=1, ge=1, description="sequences decoded together, with a profile")
    recent: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="members count by what their claims came to lately, of which each round keeps this much; 0: alike",
    )


class EntropyOptions(ConfidenceOptions):
    """Routing per prompt by draft entropy."""

    rounds: int = Field(default=1, ge=1, description="rounds over which the entropies are averaged before the choice")


class KeywordOptions(Options):
    """Routing per prompt by words."""

    words: dict[str, tuple[str, ...]] = Field(default={}, description="of each member, the words that call it")
    default: str | None = Field(
        default=None, description="the member for other prompts; default: the one without words"
    )

    @field_validator("words", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: words.split("|") if isinstance(words, str) else words for name, words in value.items()}


class LearnedOptions(Options):
    """Routing by a fitted router."""

    router: Path = Field(description="the file that `calibrate --router` wrote")
    every: int = Field(default=1, ge=1, description="rounds between two decisions")


class HedgeOptions(Options):
    """Full-information routing."""

    scheme: Literal["normal", "hedge"] = Field(default="normal", description="NormalHedge, or Hedge with a rate")
    feedback: Literal["first", "path"] = Field(
        default="first",
        description="first: depth 1, free where all members read; path: each member's own unroll along "
        "the committed path",
    )
    pick: Literal["draw", "best"] = Field(default="draw", description="draw a member by weight, or take the heaviest")
    rate: float = Field(default=1.0, gt=0, description="Hedge's rate")
    every: int = Field(default=1, ge=1, description="rounds between two lessons; others read only then")
    carry: float = Field(default=1.0, ge=0, le=1, description="how much of the regrets the next request starts with")
    seed: int = Field(default=0, description="of the draws")


KINDS: dict[str, type[Options]] = {
    "average": AverageOptions,
    "route:confidence": ConfidenceOptions,
    "route:entropy": EntropyOptions,
    "route:keyword": KeywordOptions,
    "route:learned": LearnedOptions,
    "route:hedge": HedgeOptions,
    "merge:concat": ConcatOptions,
    "merge:trie": TrieOptions,
}


@dataclass(frozen=True)
class Member:
    """A drafter by name, and how it grows trees where that was said."""

    name: str
    growth: GrowthOptions | None = None
    text: str = ""

    def __str__(self) -> str:
        return self.text or self.name


@dataclass(frozen=True)
class Combined:
    """Several members put together."""

    kind: str
    members: tuple[Member | Combined, ...]
    options: Options = field(default_factory=Options)

    def __str__(self) -> str:
        own = self.options.model_dump(mode="json", exclude_defaults=True)
        words = own.pop("words", {})
        members = [f"{m}={_shown(words[str(m)], '|')}" if str(m) in words else str(m) for m in self.members]
        return f"{self.kind}({','.join([*members, *(f'{name}={_shown(value)}' for name, value in own.items())])})"


def parse(spec: str | Mapping[str, object], where: str = "the composition") -> Member | Combined:
    """A composition's specification, checked as far as it can be without the drafters.

    Raises:
        UserError: what is wrong, and where in the line or under which key.
    """
    if isinstance(spec, str):
        return _Line(spec, where).whole()
    return _mapped(spec, where)


def names_in(spec: Member | Combined) -> list[str]:
    """The drafters that a specification names, each once."""
    if isinstance(spec, Member):
        return [spec.name]
    return list(dict.fromkeys(name for member in spec.members for name in names_in(member)))


class _Line:
    """A line being read; `at` is the next character."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where, self.at = text, where, 0

    def whole(self) -> Member | Combined:
        found = self.composition()
        self.blank()
        if self.at < len(self.text):
            raise self.problem("nothing more was expected")
        return found

    def composition(self) -> Member | Combined:
        begin = self.begin()
        name = self.word("the name of a drafter or a way to put drafters together")
        if self.next_is("("):
            if name not in KINDS:
                self.at = begin
                raise self.problem(f"there is no {name!r}{_near(name, list(KINDS))}")
            return self.combined(name)
        if name in KINDS or name.partition(":")[0] in ("route", "merge"):
            raise self.problem(f"{name} needs its members in parentheses")
        if ":" in name:
            self.at = begin + name.index(":")
            raise self.problem("a growth stands after @, as in math@chain:4")
        return self.member(name, begin)

    def member(self, name: str, begin: int) -> Member:
        if not self.next_is("@"):
            return Member(name)
        self.at += 1
        start = self.begin()
        growth = self.word("a growth such as chain:4 or dynamic:15/4/4")
        try:
            return Member(name, named_growth(growth), f"{name}@{growth}")
        except UserError as wrong:
            self.at = start
            raise self.problem(str(wrong)) from None

    def combined(self, kind: str) -> Combined:
        start = self.at
        self.at += 1
        members: list[Member | Combined] = []
        settings: dict[str, Any] = {}
        while True:
            begin = self.begin()
            setting = re.compile(r"([\w-]+)\s*=\s*").match(self.text, self.at)
            if setting:
                self.at = setting.end()
                self.set(kind, setting.group(1), self.value(), members, settings, begin)
            else:
                members.append(self.composition())
            self.blank()
            if self.next_is(","):
                self.at += 1
            elif self.next_is(")"):
                self.at += 1
                break
            else:
                raise self.problem("expected ',' or ')'")
        try:
            return _checked(kind, members, settings, f"{self.where}, {kind}")
        except UserError as wrong:
            self.at = start
            raise self.problem(str(wrong)) from None

    def set(
        self, kind: str, name: str, value: str, members: list[Member | Combined], settings: dict[str, Any], begin: int
    ) -> None:
        if kind == "route:keyword" and name not in KeywordOptions.model_fields:
            members.append(Member(name))
            settings.setdefault("words", {})[name] = value
        elif name in settings:
            self.at = begin
            raise self.problem(f"{name} is given twice")
        else:
            settings[name] = value

    def value(self) -> str:
        quoted = re.compile(r"\"([^\"]*)\"|'([^']*)'").match(self.text, self.at)
        if quoted:
            self.at = quoted.end()
            return quoted.group(1) if quoted.group(1) is not None else quoted.group(2)
        plain = re.compile(r"[^,()\"']+").match(self.text, self.at)
        if not plain or not plain.group().strip():
            raise self.problem("expected a value")
        self.at = plain.end()
        return plain.group().strip()

    def word(self, what: str) -> str:
        found = re.compile(r"[\w.:/+-]+").match(self.text, self.at)
        if not found:
            raise self.problem(f"expected {what}")
        self.at = found.end()
        return found.group()

    def blank(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def begin(self) -> int:
        self.blank()
        return self.at

    def next_is(self, mark: str) -> bool:
        self.blank()
        return self.text.startswith(mark, self.at)

    def problem(self, what: str) -> UserError:
        rest = self.text[self.at :]
        place = f"at {rest[:24]!r}" if rest else "at its end"
        return UserError(f"{self.where} {self.text!r}: {what}, {place} (character {self.at + 1})")


def named_growth(text: str) -> GrowthOptions:
    """`chain:4` (kind:depth), `dynamic:15/4/4` (kind:nodes/depth/width), or a kind alone.

    Raises:
        UserError: another kind, or numbers that do not fit it.
    """
    kind, _, numbers = text.partition(":")
    if kind not in (*CHAINS, *TREES, "static"):
        raise UserError(f"there is no growth {kind!r} that can be named so{_near(kind, [*CHAINS, *TREES, 'static'])}")
    fields = ["depth"] if kind in CHAINS else ["node_budget", "depth", "width"] if kind in TREES else []
    given = numbers.split("/") if numbers else []
    if given and len(given) != len(fields):
        wanted = {1: "a depth, as in chain:4", 3: "nodes/depth/width, as in dynamic:15/4/4"}
        raise UserError(f"growth {kind} takes {wanted.get(len(fields), 'no numbers')}")
    return validate(GrowthOptions, {"kind": kind, **dict(zip(fields, given, strict=False))}, f"growth {text}")


def _mapped(spec: Mapping[str, object], where: str) -> Member | Combined:
    data = dict(spec)
    if "drafter" in data:
        name, growth = data.pop("drafter"), data.pop("growth", None)
        if not isinstance(name, str) or data:
            odd = f"{next(iter(data))} is no part of a member" if data else "drafter must be a name"
            raise UserError(f"{where}: {odd}; a member has drafter and growth")
        if growth is None:
            return Member(name)
        if isinstance(growth, str):
            return Member(name, named_growth(growth), f"{name}@{growth}")
        if not isinstance(growth, Mapping):
            raise UserError(f"{where}.growth must be a group of options or a text such as chain:4, not {growth!r}")
        made = validate(GrowthOptions, growth, f"{where}.growth")
        return Member(name, made, f"{name}@{made.kind}")
    kind, members = data.pop("kind", None), data.pop("members", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{where}: kind must be one of {', '.join(KINDS)}, not {kind!r}{_near(str(kind), list(KINDS))}")
    if not isinstance(members, Sequence) or isinstance(members, str):
        raise UserError(f"{where}: members must be a list of drafters' names")
    found: list[Member | Combined] = []
    for place, member in enumerate(members):
        if not isinstance(member, str | Mapping):
            raise UserError(f"{where}.members[{place}] must be a name or a mapping, not {member!r}")
        found.append(parse(member, f"{where}.members[{place}]"))
    return _checked(kind, found, data, where)


def _checked(kind: str, members: Sequence[Member | Combined], settings: Mapping[str, Any], where: str) -> Combined:
    if not members:
        raise UserError(f"{where}: {kind} needs members")
    texts = [str(member) for member in members]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise UserError(f"{where}: {twice} is a member twice")
    options = validate(KINDS[kind], settings, where)
    if isinstance(options, AverageOptions) and options.weights and len(options.weights) != len(members):
        raise UserError(f"{where}: {len(options.weights)} weights for {len(members)} members")
    if isinstance(options, KeywordOptions):
        if odd := next((name for name in (*options.words, options.default) if name and name not in texts), None):
            raise UserError(f"{where}: {odd} is no member{_near(odd, texts)}")
        if options.default is None and len([text for text in texts if text not in options.words]) != 1:
            raise UserError(f"{where}: one member without words drafts for other prompts; name it with default=…")
    return Combined(kind, tuple(members), options)


def _near(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _shown(value: Any, between: str = "/") -> str:
    if isinstance(value, list):
        text = between.join(str(v) for v in value)
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
    return f'"{text}"' if re.search(r"[,()']", text) else text
