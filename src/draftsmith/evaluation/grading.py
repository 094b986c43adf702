"""Is an answer right? Exact answers only (GSM8K, SVAMP, MATH-500, made word problems): a check that nothing was lost.

Lossless decoding writes the target's own text, so accuracy can't change; where it does, something is wrong. It is no
measure of the target: prompts are few and answers are cut at the token limit.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

Grader = Callable[[str, str], bool]
"""Answer text, gold answer → whether they agree."""

# Commas are thousands' marks before groups of three digits only: lists and points keep theirs.
_NUMBER = re.compile(r"(?<![\d.])[-−]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
# What changes the look of a formula, not its value.
_LOOKS = (
    (r"\\(?:left|right|displaystyle|,|!|;|:| |quad|qquad)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-z])", r"\\frac"),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", ""),
    (r"\\?%|\\?\$", ""),
    (r"\\(?:text|mbox|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1"),
    (r"\s+", ""),
)


def grader(name: str) -> Grader | None:
    """What grades a set of prompts by its name (a benchmark's, or `word-problems`); None where nothing exact does."""
    return {
        "gsm8k": same_number,
        "svamp": same_number,
        "word-problems": same_number,
        "math-500": same_formula,
    }.get(name)


def same_number(answer: str, gold: str) -> bool:
    """Whether the answer's final number is the gold one."""
    found, wanted = final_number(answer), _decimal(gold)
    return found is not None and found == wanted


def same_formula(answer: str, gold: str) -> bool:
    """Whether the answer's last boxed expression is the gold one, but for its looks."""
    found = boxed(answer)
    return found is not None and normal(found) == normal(gold)


def final_number(text: str) -> Decimal | None:
    r"""The number an answer gives: in its last `\boxed{}`, else the first behind its last `####`, else its last one."""
    for part in (boxed(text) or "", text.rpartition("####")[2] if "####" in text else ""):
        if found := _NUMBER.findall(part):
            return _decimal(found[0])
    found = _NUMBER.findall(text)
    return _decimal(found[-1]) if found else None


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{…}` that is closed, braces inside it included; None where there is none."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for place in range(start, len(text)):
            escaped = text[place - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[place], 0)
            if not depth:
                return text[start:place]
    return None


def normal(formula: str) -> str:
    r"""A formula without what only changes its looks: spacing, `\left`, `\dfrac`, units' marks, `x=`, `.0`, `1,000`.

    Numbers become exact decimals; `1/2` and `\frac12` become `\frac{1}{2}`. Two formulas that are equal but written
    otherwise (`0.5` and `\frac{1}{2}`, other orders of a sum) stay different.
    """
    for pattern, replacement in _LOOKS:
        formula = re.sub(pattern, replacement, formula)
    formula = formula.rstrip(".").replace("−", "-")
    formula = re.sub(r"^[a-zA-Z](?:\([a-zA-Z]\))?=(?=.)", "", formula)
    formula = re.sub(r"\\frac([^{}\\])([^{}\\])", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"\\frac([^{}\\])\{", r"\\frac{\1}{", formula)
    formula = re.sub(r"\\frac(\{[^{}]*\})([^{}\\])", r"\\frac\1{\2}", formula)
    formula = re.sub(r"\\sqrt([^{}\[\\])", r"\\sqrt{\1}", formula)
    formula = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", formula)
    formula = re.sub(r"^\\frac\{-", r"-\\frac{", formula)
    number = _decimal(formula)
    return formula if number is None else format(number.normalize(), "f")


def _decimal(text: str) -> Decimal | None:
    text = text.strip()
    return Decimal(text.replace(",", "").replace("−", "-")) if _NUMBER.fullmatch(text) else None
