"""Answers of the kinds that models write, graded by hand."""

from __future__ import annotations

import os
from decimal import Decimal

import pytest

from draftsmith.data.benchmarks import load_benchmark
from draftsmith.evaluation.grading import boxed, final_number, grader, normal, same_formula, same_number


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("She sells 16 - 3 - 4 = 9 eggs, so she makes 9 * 2 = $18.", "18"),
        ("First 3 apples.\n#### 1,450,000\nThat was 12 steps.", "1450000"),
        ("The answer is \\boxed{70}. I checked it 2 times.", "70"),
        ("It costs $1,234.50.", "1234.50"),
        ("Temperature: -5", "-5"),
        ("Temperature: −5.", "-5"),
        ("10-3 is 7", "7"),
        ("about .5", "0.5"),
        ("\\boxed{\\text{none}} of the 4", "4"),
        ("I don't know", None),
        ("", None),
    ],
)
def test_final_number(answer: str, number: str | None) -> None:
    assert final_number(answer) == (None if number is None else Decimal(number))


def test_same_number() -> None:
    assert same_number("So it is 2125.00 dollars", "2,125")
    assert same_number("#### 18", "18")
    assert not same_number("#### 18", "19")
    assert not same_number("no number", "0")
    assert not same_number("3", "three")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{3}", "3"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\fbox{x} is open: \boxed{3", "x"),
        (r"\boxed {4}", "4"),
        ("nothing", None),
    ],
)
def test_boxed(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac1{20}", r"\frac{1}{20}"),
        (r"\frac{1}2", "1/2"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90°"),
        ("58,500", "58500"),
        (r"11,\! 111,\! 111,\! 100", "11111111100"),
        ("326.50", "326.5"),
        ("x=5", "5"),
        ("f(x) = 2x", "2x"),
        (r"\$5.40", "5.4"),
        (r"5.4 \text{ cents}", "5.4cents"),
        (r"2\sqrt3", r"2\sqrt{3}"),
        (r"10\%", "10"),
        (r"\frac{-3}{4}", r"-\frac{3}{4}"),
        ("-2 + 7i", "-2+7i"),
        ("007", "7"),
    ],
)
def test_formulas_that_look_otherwise(one: str, other: str) -> None:
    assert normal(one) == normal(other)
    assert same_formula(f"So \\boxed{{{one}}}.", other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("(1,-16,-4,43)", "(1,16,4,43)"), ("1,2", "12"), ("3", "-3"), (r"\frac{1}{2}", r"\frac{2}{1}"), ("40_9", "409")],
)
def test_formulas_that_differ(one: str, other: str) -> None:
    assert normal(one) != normal(other)
    assert not same_formula(f"\\boxed{{{one}}}", other)


def test_an_answer_without_a_box_is_wrong() -> None:
    assert not same_formula("it is 3", "3")


def test_who_is_graded() -> None:
    assert grader("gsm8k") is grader("svamp") is same_number
    assert grader("math-500") is same_formula
    assert grader("mt-bench") is None
    assert grader("humaneval") is None


@pytest.mark.skipif("DRAFTSMITH_DATA" not in os.environ, reason="DRAFTSMITH_DATA is not set")
def test_gold_answers_grade_as_right_and_shifted_ones_as_wrong() -> None:
    for name, form in (("gsm8k", "#### {}"), ("svamp", "It is {}."), ("math-500", "So \\boxed{{{}}}.")):
        grade = grader(name)
        assert grade is not None
        gold = [c.reference for c in load_benchmark(name) if c.reference is not None]
        assert len(gold) >= 300
        assert all(grade(form.format(one), one) for one in gold)
        shifted = [(a, b) for a, b in zip(gold, [*gold[1:], gold[0]], strict=True) if normal(a) != normal(b)]
        assert len(shifted) > 250
        assert not any(grade(form.format(one), other) for one, other in shifted)
