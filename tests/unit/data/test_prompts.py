"""Prompts made on the spot: the same again, distinct, in good English, solvable, and nothing shared between splits."""

from __future__ import annotations

import ast
import re
import string
from collections import Counter
from fractions import Fraction
from itertools import combinations, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.data import prompts
from draftsmith.data.prompts import SETS, SPLITS, STEP_BY_STEP, Template, evaluate, fill, load, make_prompts
from draftsmith.foundation.errors import UserError

ENOUGH = {"train": 450, "dev": 200, "test": 200}


def texts(name: str, split: str, n: int | None = None, seed: int = 0) -> list[str]:
    return [c.messages[0].content for c in make_prompts(name, split, n or ENOUGH[split], seed)]


def skeleton(template: str) -> str:
    """A template's own words: slots are blanks, punctuation and case don't count."""
    blank = re.sub(r"\{[^}]*\}", "_", template)
    return " ".join("".join(c for c in blank.lower() if c not in string.punctuation or c == "_").split())


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = skeleton(text).split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


@pytest.mark.parametrize("name", SETS)
def test_as_many_templates_as_promised(name: str) -> None:
    templates = [t.text for split in SPLITS for t in load(name).splits[split]]
    assert len(templates) >= {"word-problems": 60, "chat": 120}[name]
    assert len(load(name).splits["train"]) >= {"word-problems": 40, "chat": 80}[name]
    assert len(set(map(skeleton, templates))) == len(templates)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize(("one", "other"), list(combinations(SPLITS, 2)))
def test_splits_share_no_template_and_hardly_a_phrase(name: str, one: str, other: str) -> None:
    first, second = (load(name).splits[split] for split in (one, other))
    assert not {skeleton(t.text) for t in first} & {skeleton(t.text) for t in second}
    for a in first:
        for b in second:
            mine, theirs = trigrams(a.text), trigrams(b.text)
            assert len(mine & theirs) / min(len(mine), len(theirs)) < 0.25, (a.text, b.text)


def behaviour(formula: str) -> frozenset[Fraction]:
    """What a formula computes, whatever its numbers are called: its values at all arrangements of five primes."""
    names = sorted({node.id for node in ast.walk(ast.parse(formula)) if isinstance(node, ast.Name)})
    primes = (101, 211, 307, 401, 503)[: len(names)]
    return frozenset(evaluate(formula, dict(zip(names, order, strict=True))) for order in permutations(primes))


def test_splits_share_no_formula() -> None:
    seen: dict[frozenset[Fraction], str] = {}
    for split in SPLITS:
        for template in load("word-problems").splits[split]:
            assert template.answer is not None
            found = seen.setdefault(behaviour(template.answer), split)
            assert found == split, template.text
    assert len(seen) >= 60


def test_what_is_quoted_in_full_is_not_shared_either() -> None:
    long = {split: {t for t in texts("chat", split) if len(t) > 150} for split in SPLITS}
    quoted = {split: {s for t in long[split] for s in re.split(r"[.:] |\n", t) if len(s) > 40} for split in SPLITS}
    assert all(quoted.values())
    for one, other in combinations(SPLITS, 2):
        assert not quoted[one] & quoted[other]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", SPLITS)
def test_enough_distinct_prompts_of_every_template(name: str, split: str) -> None:
    made = make_prompts(name, split, ENOUGH[split], 3)
    assert len({c.messages[0].content for c in made}) == len(made) == ENOUGH[split]
    assert [c.id for c in made[:2]] == [f"{name}/{split}/0000", f"{name}/{split}/0001"]
    assert len({c.id for c in made}) == len(made)
    assert {tuple(m.role for m in c.messages) for c in made} == {("user",)}
    templates = len(load(name).splits[split])
    used = Counter(_template_of(name, split, c.messages[0].content) for c in made[: 2 * templates])
    assert set(used.values()) == {2}
    assert len(used) == templates


def _template_of(name: str, split: str, text: str) -> str:
    """The template that a prompt was made from, found by matching its fixed words."""
    fits = []
    for template in load(name).splits[split]:
        parts = re.split(r"(\{[^}]*\})", template.text)
        pattern = "".join("(?s:.+)" if part.startswith("{") else re.escape(part) for part in parts)
        if re.fullmatch(pattern + (re.escape(f" {STEP_BY_STEP}") if name == "word-problems" else ""), text):
            fits.append(template.text)
    return max(fits, key=len)


@pytest.mark.parametrize("name", SETS)
def test_the_same_again_and_fewer_begin_more(name: str) -> None:
    assert make_prompts(name, "train", 60, 7) == make_prompts(name, "train", 60, 7)
    assert make_prompts(name, "train", 25, 7) == make_prompts(name, "train", 60, 7)[:25]
    other = set(texts(name, "train", 60, seed=8))
    assert len(other & set(texts(name, "train", 60, seed=7))) < 20


def test_what_a_seed_gives_never_changes() -> None:
    # the words of an early version: stored runs name their prompts by set, split, number and seed
    assert texts("word-problems", "dev", 1)[0].startswith("Grandmother fills 4 jars with 14 spoonfuls of jam")
    assert texts("chat", "test", 2)[1].startswith("Leftover sweet potatoes and stale bread")


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", SPLITS)
def test_no_slot_is_left_and_the_english_is_good(name: str, split: str) -> None:
    articles = 0
    for text in texts(name, split):
        assert not re.search(r"[{}_/]|  | [,.?;]|\bNone\b", text.replace("\n", "")), text
        assert text[0].isupper() or text[0].isdigit(), text
        assert not re.search(r"(?<![\d,])1(?![\d,])", text), text
        for article, word in re.findall(r"\b(an?) ([A-Za-z]+)", text, re.IGNORECASE):
            vowel = word[0].lower() in "aeiou"
            if word.lower() in ("ukulele", "used", "hour"):
                vowel = not vowel
            assert (article.lower() == "an") == vowel, text
            articles += 1
    assert articles > 50


def test_articles_follow_the_sound() -> None:
    slots = {
        "word": ["hour", "honest man", "university", "uninteresting film", "ukulele", "one-way street", "egg", "API"]
    }
    made = [fill(Template("{A word} and {a word}.", {}), slots, lambda _, n, i=i: i % n) for i in range(8)]
    assert [text for text, _ in filter(None, made)] == [
        "An hour and an hour.",
        "An honest man and an honest man.",
        "A university and a university.",
        "An uninteresting film and an uninteresting film.",
        "A ukulele and a ukulele.",
        "A one-way street and a one-way street.",
        "An egg and an egg.",
        "An API and an API.",
    ]


def test_articles_before_slots_are_never_written_out() -> None:
    for name in SETS:
        for split in SPLITS:
            for template in load(name).splits[split]:
                assert not re.search(r"\b[Aa]n? \{[a-z_]{2,}", template.text), template.text


def test_people_keep_their_pronouns_and_never_meet_themselves() -> None:
    template = Template("{name} met {name2}. {He} showed {his2} dog to {him}; {he2} {boxs}, {box}.", {})
    slots = {"name": ["Ann/she", "Bob/he"], "box": ["box/boxes"]}
    first, second = (fill(template, slots, lambda _, n, i=i: i % n) for i in range(2))
    assert first == ("Ann met Bob. She showed his dog to her; he boxes, box.", None)
    assert second == ("Bob met Ann. He showed her dog to him; she boxes, box.", None)


def test_every_number_is_told_and_every_solution_is_a_positive_whole_number() -> None:
    for split in SPLITS:
        for template in load("word-problems").splits[split]:
            told = set(re.findall(r"\{([a-z])\}", template.text))
            assert told == set(template.numbers), template.text
            assert min(min(choices) for choices in template.numbers.values()) >= 2
        for conversation in make_prompts("word-problems", split, ENOUGH[split], 0):
            assert conversation.reference is not None
            assert int(conversation.reference) > 0
            assert conversation.messages[0].content.endswith(STEP_BY_STEP)


def test_solutions_are_those_of_the_numbers_in_the_text() -> None:
    template = Template(
        "{a} {things} in {b} rows", {"a": (6, 7, 8), "b": (4, 3)}, "a % b == 0 and a > 2 * b - 1", "a / b"
    )
    slots = {"thing": ["egg/eggs"]}
    made = {
        (i, j): fill(template, slots, lambda what, n, i=i, j=j: {"a": i, "b": j}.get(what[-1], 0))
        for i in range(3)
        for j in range(2)
    }
    assert {place: found for place, found in made.items() if found} == {
        (0, 1): ("6 eggs in 3 rows", "2"),
        (2, 0): ("8 eggs in 4 rows", "2"),
    }


@given(st.data())
def test_expressions_are_evaluated_exactly(data: st.DataObject) -> None:
    formulas = [t.answer for split in SPLITS for t in load("word-problems").splits[split] if t.answer]
    formula = data.draw(st.sampled_from(formulas))
    values = {name: data.draw(st.integers(2, 500)) for name in "abcde"}
    assert float(evaluate(formula, values)) == pytest.approx(eval(formula, {}, values))


def test_large_numbers_have_commas() -> None:
    assert fill(Template("{a} m", {"a": (1200,)}), {}, lambda *_: 0) == ("1,200 m", None)


def test_expressions_hold_nothing_but_arithmetic() -> None:
    with pytest.raises(ValueError, match="not an arithmetic expression"):
        evaluate("__import__('os')", {})


def test_unknown_slots_are_found_when_prompts_are_made() -> None:
    with pytest.raises(ValueError, match="'colour'"):
        fill(Template("a {colour} box", {}), {"box": ("box/boxes",)}, lambda *_: 0)


def test_unknown_sets_splits_and_too_many() -> None:
    with pytest.raises(UserError, match="choose word-problems or chat"):
        make_prompts("maths", "train", 1, 0)
    with pytest.raises(UserError, match="choose train, dev, test"):
        make_prompts("chat", "validation", 1, 0)
    with pytest.raises(UserError, match=r"no more than \d+ distinct prompts in test, not 5000"):
        make_prompts("chat", "test", 5000, 0)


def test_a_small_set_says_how_much_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = prompts.PromptSet(
        {"x": ("a", "b", "c")}, dict.fromkeys(SPLITS, (Template("{x}!", {}), Template("{x} {x2}", {})))
    )
    monkeypatch.setattr(prompts, "load", lambda _: tiny)
    assert sorted(texts("chat", "train", 9)) == ["a b", "a c", "a!", "b a", "b c", "b!", "c a", "c b", "c!"]
    with pytest.raises(UserError, match="no more than 9 distinct"):
        make_prompts("chat", "train", 10, 0)
