"""Is decoding lossless with these drafters, on this target, here? The exactness suite on a user's own models.

Each prompt is decoded plainly, alone, and speculatively, in batches, at the same seed. In float32 the texts must be
equal token for token; where two differ, both tokens there must be a near tie, and every later token must be what the
target chooses after what stands before it. In half precision texts may part early, so the latter decides alone.
Beside the drafters goes an oracle, which knows the plain text: what is deep is committed even if they are poor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.drafters.oracle import Oracle
from draftsmith.evaluation import equality
from draftsmith.evaluation.equality import HALF, Equality
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling

ORACLE = "oracle"
ORACLE_GROWTH = DynamicGrowth(15, 5, 4)


@dataclass(frozen=True)
class Prompt:
    """A prompt's name, which is part of its draws, and its ids."""

    name: str
    ids: list[int]


@dataclass(frozen=True)
class Compared:
    """One answer of one composition beside plain decoding's.

    Attributes:
        tokens: of the speculative answer.
        far_tokens: of these, how many the target would not choose (beyond rounding); only judged where texts differ,
            and in half precision.
        plain_far_tokens: the same of the plain answer, in half precision: what the measure itself is worth here.
        rounds, accepted, deepest: rounds, drafted tokens accepted in all, and at most in a round.
    """

    drafters: str
    temperature: float
    prompt: str
    tokens: int
    equality: Equality
    far_tokens: int | None
    plain_far_tokens: int | None
    rounds: int
    accepted: int
    deepest: int

    @property
    def sound(self) -> bool:
        """Whether it shows no loss."""
        if self.far_tokens:
            return False
        judged = self.far_tokens is not None and (self.plain_far_tokens is not None or self.tie)
        return self.equality.equal or judged

    @property
    def tie(self) -> bool:
        """Whether the texts part at a near tie."""
        return self.equality.near_tie and not self.equality.equal

    def to_row(self) -> dict[str, object]:
        """The comparison as a JSON object."""
        return {**asdict(self), "equality": self.equality.to_row(), "sound": self.sound}


@dataclass(frozen=True)
class Group:
    """All answers of one composition at one temperature, as counts."""

    drafters: str
    temperature: float
    answers: int
    equal: int
    near_ties: int
    unsound: int
    tokens: int
    acceptance_length: float
    deepest: int


def compare(
    target: HFTarget,
    compositions: Mapping[str, Composition],
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    max_new_tokens: int,
    batch: int = 4,
    seed: int = 0,
) -> Iterator[Compared]:
    """Decode each prompt plainly, then with the oracle and with each composition, and compare.

    Args:
        compositions: by name; each is decoded with keyed verification.
        batch: prompts decoded together speculatively; plain decoding takes one at a time.
    """
    half = target.dtype in HALF
    for temperature in temperatures:
        sampling = Sampling(temperature=temperature, seed=seed)
        plain: list[list[int]] = []
        far: list[int | None] = []
        for prompt in prompts:
            text = Engine(target).generate([prompt.ids], sampling, max_new_tokens, [prompt.name])[0].token_ids
            plain.append(text)
            far.append(equality.teacher_forced(target, prompt.ids, text, sampling, prompt.name) if half else None)
        for name in (ORACLE, *compositions):
            for first in range(0, len(prompts), batch):
                own = range(first, min(first + batch, len(prompts)))
                known = [[*prompts[i].ids, *plain[i]] for i in own]
                oracle = Single(Oracle(known, target.spec.vocab_size, seed=first), ORACLE_GROWTH)
                engine = Engine(target, oracle if name == ORACLE else compositions[name])
                names = [prompts[i].name for i in own]
                found = engine.generate([prompts[i].ids for i in own], sampling, max_new_tokens, names)
                for i, generation in zip(own, found, strict=True):
                    prompt, text = prompts[i], generation.token_ids
                    same = equality.check(target, prompt.ids, plain[i], text, sampling, prompt.name)
                    judged = half or not same.equal
                    yield Compared(
                        name,
                        temperature,
                        prompt.name,
                        len(text),
                        same,
                        equality.teacher_forced(target, prompt.ids, text, sampling, prompt.name) if judged else None,
                        far[i],
                        len(generation.rounds),
                        sum(r.accepted for r in generation.rounds),
                        max((r.accepted for r in generation.rounds), default=0),
                    )


def grouped(found: Sequence[Compared]) -> list[Group]:
    """The counts of each composition and temperature, in the order in which they came."""
    groups: list[Group] = []
    for name, temperature in dict.fromkeys((c.drafters, c.temperature) for c in found):
        own = [c for c in found if (c.drafters, c.temperature) == (name, temperature)]
        rounds = sum(c.rounds for c in own)
        groups.append(
            Group(
                name,
                temperature,
                answers=len(own),
                equal=sum(c.equality.equal for c in own),
                near_ties=sum(c.tie for c in own),
                unsound=sum(not c.sound for c in own),
                tokens=sum(c.tokens for c in own),
                acceptance_length=(rounds + sum(c.accepted for c in own)) / rounds if rounds else float("nan"),
                deepest=max(c.deepest for c in own),
            )
        )
    return groups


def verdict(found: Sequence[Compared], dtype: str) -> tuple[bool, str]:
    """Whether nothing was lost, and that in a sentence with its numbers; nothing accepted proves nothing."""
    answers, equal = len(found), sum(c.equality.equal for c in found)
    ties, tokens = sum(c.tie for c in found), sum(c.tokens for c in found)
    accepted, deepest = sum(c.accepted for c in found), max((c.deepest for c in found), default=0)
    unsound = [c for c in found if not c.sound]
    if unsound:
        worst = unsound[0]
        place = worst.equality.first_difference
        where = f"first at token {place} of {worst.prompt!r} with {worst.drafters} at temperature {worst.temperature:g}"
        return False, f"NOT lossless: {len(unsound)} of {answers} answers are not what the target writes; {where}"
    if not accepted:
        return False, f"nothing proven: none of the drafted tokens was accepted in {answers} answers; ask for more"
    said = f"lossless: {equal} of {answers} answers ({tokens} tokens, {dtype}) equal plain decoding's token for token"
    if ties:
        said += f", {ties} part from it at a near tie"
    if other := answers - equal - ties:
        said += f", {other} part from it where rounding decides"
    return True, f"{said}; {accepted} drafted tokens were accepted, up to {deepest} in a round"
