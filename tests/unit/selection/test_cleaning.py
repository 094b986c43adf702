"""The guard against garbage, and near-duplicates against the exact Jaccard index of all pairs."""

from __future__ import annotations

import random

import pytest

from draftsmith.selection.cleaning import Guard, garbage, near_duplicates, repeated_share, shingles, used_scripts

PROSE = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "To find how many clips she sold in total we add the clips of April and May: 48 + 24 = 72."
)
CODE = "def area(radius):\n    if radius < 0:\n        raise ValueError('radius')\n    return 3.14 * radius ** 2\n" * 2
GREEK_FORMULAS = PROSE + " Let α, β, γ and Δ be such that α + β = γ, hence ∑ x = Ω and μ = 𝛼."
JAPANESE = "今日はとても良い天気ですから、カメラを持って公園へ散歩に行きましょう。写真をたくさん撮りましょう。"
TRANSLATION = PROSE + " По-русски: Наталья продала сорок восемь скрепок в апреле и ещё двадцать четыре в мае."
SOUP = "Natalia продала कितने クリップ and किताब στον Απρίλιο на рынке ακόμα 公園 نسيت ولكن الكتاب जाने والله"
LOOP = "The answer is 42. " * 20


@pytest.mark.parametrize("text", [PROSE, CODE, GREEK_FORMULAS, JAPANESE, TRANSLATION, "", "42", "Yes."])
def test_ordinary_answers_pass(text: str) -> None:
    assert garbage(text, True, Guard()) is None


@pytest.mark.parametrize(
    ("text", "complete", "reason"),
    [
        (PROSE, False, "cut answer"),
        (SOUP, True, "mixed scripts (ARABIC, CYRILLIC, DEVANAGARI, EAST ASIAN, GREEK, LATIN)"),
        (LOOP, True, "repeated n-grams (95%)"),
        (PROSE + "\ufffd" * 5, True, "undecodable"),
    ],
)
def test_garbage_is_named(text: str, complete: bool, reason: str) -> None:
    assert garbage(text, complete, Guard()) == reason


def test_the_guard_s_limits_are_options() -> None:
    assert garbage(PROSE, False, Guard(cut_answers=False)) is None
    assert garbage(TRANSLATION, True, Guard(max_scripts=1)) == "mixed scripts (CYRILLIC, LATIN)"
    assert garbage(SOUP, True, Guard(max_scripts=6)) is None
    assert garbage(SOUP, True, Guard(script_share=0.5)) is None
    assert garbage(LOOP, True, Guard(max_repeats=0.95)) is None


def test_scripts_are_counted_by_letters() -> None:
    assert used_scripts("a" * 60 + "я" * 40, 0.4) == {"LATIN", "CYRILLIC"}
    assert used_scripts("a" * 60 + "я" * 40, 0.41) == {"LATIN"}
    assert used_scripts("a" * 39 + "1" * 100, 0.1) == set()  # too few letters to judge


def test_repeats_are_the_share_of_n_grams_seen_before() -> None:
    words = [f"w{i}" for i in range(30)]
    assert repeated_share(" ".join(words)) == 0.0
    twice = words + words
    grams = [tuple(twice[i : i + 4]) for i in range(57)]
    seen_before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repeated_share(" ".join(twice)) == pytest.approx(seen_before / 57)
    assert repeated_share("la " * 22) == 0.0  # 19 n-grams: too few to judge
    assert repeated_share("la " * 23) == pytest.approx(19 / 20)


def test_shingles_ignore_case_and_spacing() -> None:
    assert shingles("The  quick brown\nfox JUMPS over") == {
        ("the", "quick", "brown", "fox", "jumps"),
        ("quick", "brown", "fox", "jumps", "over"),
    }
    assert shingles("Yes") == {("yes",)}
    assert shingles(" ") == set()


def test_near_duplicates_are_those_of_all_pairs_and_the_first_id_stays() -> None:
    rng = random.Random(0)
    texts: dict[str, str] = {}
    for group in range(40):
        words = [rng.choice("abcdefghijklmnop") * rng.randint(1, 4) + str(rng.randint(0, 30)) for _ in range(80)]
        for copy in range(4):
            changed = list(words)
            for place in rng.sample(range(80), (0, 1, 2, 12)[copy]):
                changed[place] = "changed"
            texts[f"{group:02}-{copy}"] = " ".join(changed)
    texts |= {"empty": "", "empty-2": "  "}

    def jaccard(a: str, b: str) -> float:
        mine, other = shingles(texts[a]), shingles(texts[b])
        return len(mine & other) / len(mine | other) if mine | other else 0.0

    want: dict[str, str] = {}
    for name in sorted(texts):
        for earlier in sorted(set(texts) - set(want)):
            if earlier < name and jaccard(earlier, name) >= 0.8:
                want[name] = earlier
                break
    ends = [name[-1] for name in want]
    assert ends.count("1") == 40  # one word changed
    assert 0 < ends.count("2") < 10  # two: mostly just below the threshold, where MinHash alone would err
    assert ends.count("3") == 0  # twelve
    assert near_duplicates(texts, 0.8) == want
    backwards = dict(sorted(texts.items(), reverse=True))
    assert near_duplicates(backwards, 0.8) == want
