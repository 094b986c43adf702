"""What must not be chosen however flat it is: near-duplicates, and text that is flat because it means nothing."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

from pydantic import Field

from draftsmith.foundation.options import Options

SHINGLE_WORDS = 5
REPEAT_WORDS = 4
FEWEST_LETTERS = 40
FEWEST_REPEATABLE = 20

# first words of Unicode names: scripts that one text mixes by nature
EAST_ASIAN = frozenset(
    ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "HALFWIDTH", "FULLWIDTH")
)
# and letters of formulas, units and phonetics, in any script's text
SCRIPTLESS = frozenset(
    ("MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "MODIFIER", "MICRO", "OHM", "KELVIN")
)

# a word, one character of a script without spaces, or one sign
WORD = re.compile(r"[\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff]|\w+|[^\w\s]")


class Guard(Options):
    """When an answer counts as garbage. Noise is flat, so a score that prizes flatness would prize it."""

    cut_answers: bool = Field(True, description="Drop answers that were cut at the length limit.")
    max_scripts: int = Field(2, ge=1, description="Scripts (Latin, Cyrillic, …) that one answer may use.")
    script_share: float = Field(
        0.05, gt=0.0, le=1.0, description="The share of an answer's letters from which on a script counts as used."
    )
    max_repeats: float = Field(
        0.75, gt=0.0, le=1.0, description="The share of an answer's word 4-grams that may have occurred in it before."
    )
    max_undecodable: float = Field(
        0.01, ge=0.0, le=1.0, description="The share of an answer's characters that may be U+FFFD, broken UTF-8."
    )


def garbage(text: str, complete: bool, guard: Guard) -> str | None:
    """Why an answer is garbage, or None. The reasons: "cut answer", "undecodable", "mixed scripts", "repeated n-grams".

    Args:
        text: the answer.
        complete: False where the answer was cut at the length limit.
        guard: the limits.
    """
    if guard.cut_answers and not complete:
        return "cut answer"
    if text.count("\ufffd") > guard.max_undecodable * len(text):
        return "undecodable"
    scripts = used_scripts(text, guard.script_share)
    if len(scripts) > guard.max_scripts:
        return f"mixed scripts ({', '.join(sorted(scripts))})"
    repeats = repeated_share(text)
    if repeats > guard.max_repeats:
        return f"repeated n-grams ({repeats:.0%})"
    return None


def used_scripts(text: str, share: float) -> set[str]:
    """The scripts that at least `share` of the letters of `text` are in; none for texts of fewer than 40 letters."""
    counts = Counter(script for char in text if char.isalpha() and (script := _script(char)))
    letters = counts.total()
    return {script for script, n in counts.items() if n >= share * letters} if letters >= FEWEST_LETTERS else set()


def repeated_share(text: str) -> float:
    """The share of the word 4-grams of `text` that occurred before in it; 0 for texts with fewer than 20 of them."""
    words = WORD.findall(text)
    grams = len(words) - REPEAT_WORDS + 1
    if grams < FEWEST_REPEATABLE:
        return 0.0
    different = len({tuple(words[i : i + REPEAT_WORDS]) for i in range(grams)})
    return 1.0 - different / grams


def near_duplicates(texts: Mapping[str, str], threshold: float) -> dict[str, str]:
    """Which texts nearly repeat an earlier one, in the order of their ids.

    Two texts are near-duplicates if the Jaccard index of their sets of 5-word shingles, case and spacing aside, is at
    least `threshold`. MinHash finds the candidates; the exact index decides.

    Args:
        texts: id to text; an empty text duplicates nothing.
        threshold: between 0 and 1.

    Returns:
        The id of each duplicate to the id of the text that is kept in its stead.
    """
    from datasketch import MinHash, MinHashLSH  # a second to import

    # a missed duplicate costs, a wrong candidate only a comparison
    index = MinHashLSH(threshold=threshold, num_perm=128, weights=(0.1, 0.9))
    found: dict[str, str] = {}
    for name in sorted(texts):
        mine = shingles(texts[name])
        if not mine:
            continue
        sketch = MinHash(num_perm=128, seed=1)
        sketch.update_batch([" ".join(shingle).encode() for shingle in mine])
        for candidate in sorted(index.query(sketch)):
            other = shingles(texts[candidate])
            if len(mine & other) >= threshold * len(mine | other):
                found[name] = candidate
                break
        else:
            index.insert(name, sketch)
    return found


def shingles(text: str) -> set[tuple[str, ...]]:
    """The runs of 5 words of a text, in lower case; of a shorter text the one run of all its words."""
    words = WORD.findall(text.lower())
    if not words:
        return set()
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}


@functools.lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """The script of a letter by its Unicode name, "" where it belongs to none."""
    first = unicodedata.name(char, "").split(" ", 1)[0]
    if first in EAST_ASIAN:
        return "EAST ASIAN"
    return "" if first in SCRIPTLESS else first
