"""Prompts made on the spot: word problems and everyday requests, from templates, by a seed.

The templates are in `word_problems.yaml` and `chat_prompts.yaml` beside this file, apart by split: train, dev and test
share no template and no wording, word problems no formula either.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from importlib import resources
from operator import add, eq, ge, gt, le, lt, mod, mul, ne, sub, truediv
from typing import Any

import yaml

from draftsmith.data.conversations import Conversation, Message
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.seeding import key, shuffled

SETS = {"word-problems": "word_problems.yaml", "chat": "chat_prompts.yaml"}
SPLITS = ("train", "dev", "test")
# What every word problem ends with; the templates themselves do not hold it.
STEP_BY_STEP = "Solve this step by step."

PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her")}
CASES = ("he", "his", "him")
# An article follows the sound, not the letter.
VOWEL_SOUND = re.compile(r"hour|honest|hono|heir|(?!uni[^n]|use|usu|uku|eu|one\b|once\b)[aeiou]", re.IGNORECASE)

_FIELD = re.compile(r"\{(?:(a|A) )?([A-Za-z_]+?)(\d?)\}")
_TRIES = 400


@dataclass(frozen=True)
class Template:
    """A template: its text with `{slots}`, and of word problems the numbers' ranges, a condition and the solution."""

    text: str
    numbers: Mapping[str, tuple[int, ...]]
    where: str | None = None
    answer: str | None = None


@dataclass(frozen=True)
class PromptSet:
    """The templates of a set by split, and the words that fill their slots."""

    slots: Mapping[str, tuple[str, ...]]
    splits: Mapping[str, tuple[Template, ...]]


def make_prompts(name: str, split: str, n: int, seed: int) -> list[Conversation]:
    """`n` distinct prompts of a set, one user message each, with ids such as `word-problems/train/0007`.

    The same arguments give the same prompts on every machine, and fewer prompts are the beginning of more. The split's
    templates are used about equally often. Word problems carry their solution as `reference`.

    Args:
        name: `word-problems` or `chat`.
        split: `train`, `dev` or `test`.

    Raises:
        UserError: there is no such set or split, or it has fewer than `n` distinct prompts.
    """
    if name not in SETS:
        raise UserError(f"there is no prompt set {name!r}: choose {' or '.join(SETS)}, or give a file with --data")
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}: choose {', '.join(SPLITS)}")
    prompts = load(name)
    templates = prompts.splits[split]
    found: list[Conversation] = []
    seen: set[str] = set()
    left = set(range(len(templates)))
    turn = 0
    while left:
        for index in shuffled(len(templates), "prompts", name, split, seed, turn):
            if len(found) == n:
                return found
            if index not in left:
                continue
            made = _unseen(templates[index], prompts.slots, seen, ("prompts", name, split, seed, turn, index))
            if made is None:
                left.remove(index)
                continue
            text, answer = made
            seen.add(text)
            asked = f"{text} {STEP_BY_STEP}" if name == "word-problems" else text
            number = f"{name}/{split}/{len(found):04d}"
            found.append(Conversation(number, (Message("user", asked),), source=name, reference=answer))
        turn += 1
    raise UserError(f"the prompt set {name} has no more than {len(found)} distinct prompts in {split}, not {n}")


@cache
def load(name: str) -> PromptSet:
    """The templates and words of a set, from its YAML file."""
    data = yaml.safe_load(resources.files("draftsmith.data").joinpath(SETS[name]).read_text(encoding="utf-8"))
    return PromptSet(
        slots={slot: tuple(map(str, words)) for slot, words in data["slots"].items()},
        splits={split: tuple(_template(row) for row in data[split]) for split in SPLITS},
    )


def templates_digest() -> str:
    """Fingerprint of all templates, sha256[:16]: other templates make other prompts."""
    digest = hashlib.sha256()
    for file in SETS.values():
        digest.update(resources.files("draftsmith.data").joinpath(file).read_bytes())
    return digest.hexdigest()[:16]


def fill(
    template: Template, slots: Mapping[str, Sequence[str]], draw: Callable[[str, int], int]
) -> tuple[str, str | None] | None:
    """A prompt and its solution; None if the numbers drawn don't fit.

    Args:
        draw: `draw(what, n)` gives a number below n, always the same for the same `what`.
    """
    values = {name: choices[draw(f"number {name}", len(choices))] for name, choices in template.numbers.items()}
    answer = None
    if template.answer is not None:
        solution = evaluate(template.answer, values)
        fits = template.where is None or evaluate(template.where, values)
        if not fits or solution.denominator != 1 or solution <= 0:
            return None
        answer = str(solution)
    words: dict[tuple[str, str], str] = {}

    def word(match: re.Match[str]) -> str:
        article, field, digit = match.groups()
        if field in values:
            return f"{values[field]:,}"
        name = field.lower()
        slot, form = _slot(name, slots)
        if (slot, digit) not in words:
            taken = {chosen for (other, _), chosen in words.items() if other == slot}
            left = [entry for entry in slots[slot] if entry not in taken]
            words[slot, digit] = left[draw(f"slot {slot}{digit}", len(left))]
        text = form(words[slot, digit])
        if article:
            text = f"{_article(text)} {text}"
        return text[0].upper() + text[1:] if (article == "A" or field[0].isupper()) else text

    return _FIELD.sub(word, template.text), answer


def evaluate(expression: str, values: Mapping[str, int]) -> Fraction:
    """The exact value of an arithmetic expression or comparison (true is 1) over named numbers."""
    return _value(ast.parse(expression, mode="eval").body, values)


_OPERATORS: Mapping[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: add,
    ast.Sub: sub,
    ast.Mult: mul,
    ast.Div: truediv,
    ast.Mod: mod,
    ast.Eq: eq,
    ast.NotEq: ne,
    ast.Lt: lt,
    ast.LtE: le,
    ast.Gt: gt,
    ast.GtE: ge,
}


def _value(node: ast.expr, values: Mapping[str, int]) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.Name):
        return Fraction(values[node.id])
    if isinstance(node, ast.BinOp):
        return Fraction(_OPERATORS[type(node.op)](_value(node.left, values), _value(node.right, values)))
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return Fraction(_OPERATORS[type(node.ops[0])](_value(node.left, values), _value(node.comparators[0], values)))
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        return Fraction(all(_value(part, values) for part in node.values))
    raise ValueError(f"not an arithmetic expression: {ast.unparse(node)}")


def _unseen(
    template: Template, slots: Mapping[str, Sequence[str]], seen: set[str], parts: Sequence[int | str]
) -> tuple[str, str | None] | None:
    """A prompt of the template that was not made before, or None after many tries."""
    for attempt in range(_TRIES):
        made = fill(template, slots, partial(_draw, (*parts, attempt)))
        if made is not None and made[0] not in seen:
            return made
    return None


def _draw(parts: Sequence[int | str], what: str, n: int) -> int:
    return key(*parts, what) % n


def _slot(name: str, slots: Mapping[str, Sequence[str]]) -> tuple[str, Callable[[str], str]]:
    """The list that a field draws from, and what it takes of a word: `singular/plural`, or a name's pronoun."""
    if name in CASES:
        return "name", lambda entry: PRONOUNS[entry.split("/")[1]][CASES.index(name)]
    if name in slots:
        return name, lambda entry: entry.split("/")[0]
    if name.removesuffix("s") in slots and name.endswith("s"):
        return name.removesuffix("s"), lambda entry: entry.split("/")[1]
    raise ValueError(f"no slot and no number is called {name!r}")


def _article(text: str) -> str:
    return "an" if VOWEL_SOUND.match(text) else "a"


def _template(row: Any) -> Template:
    if isinstance(row, str):
        return Template(row, {})
    numbers = {name: _choices(given) for name, given in row["numbers"].items()}
    return Template(row["text"], numbers, row.get("where"), row["answer"])


def _choices(given: Any) -> tuple[int, ...]:
    if isinstance(given, list):
        return tuple(given)
    bounds, _, step = str(given).partition("/")
    low, _, high = bounds.partition("-")
    return tuple(range(int(low), int(high) + 1, int(step or 1)))
