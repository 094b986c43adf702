"""Numbers from traces: counts first, ratios last, so that counts can be added over prompts, processes and machines.

Definitions are DESIGN.md's ("Words"). `Counts` holds what happened; its properties are the ratios, and the functions
named after other projects give what those would print for the same trace. A ratio without a denominator is NaN.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from operator import mul

from draftsmith.decoding.trace import Generation, Round


@dataclass(frozen=True, slots=True)
class Counts:
    """What happened in some rounds and answers; `+` adds them up.

    The depth lists start at depth 1 (entry `d - 1` is depth `d`).

    Attributes:
        rounds: rounds.
        committed: tokens committed before the cut at the answer's end, bonus tokens included.
        kept: tokens of those after the cut.
        accepted_at_depth: rounds that accepted depth d.
        offered_at_depth: rounds that accepted depth d - 1 and held a node there.
        drafted: drafted nodes verified.
        draft_ms, verify_ms, rest_ms: milliseconds of the rounds.
        answers: answers; this and what follows is 0 for counts of single rounds.
        answers_with_rounds: answers of more than the prefill's token.
        tokens: answer tokens, each answer's first (the prefill's) included.
        prefill_ms: milliseconds of the prefills.
        total_ms: milliseconds from request to answer.
    """

    rounds: int = 0
    committed: int = 0
    kept: int = 0
    accepted_at_depth: tuple[int, ...] = ()
    offered_at_depth: tuple[int, ...] = ()
    drafted: int = 0
    draft_ms: float = 0.0
    verify_ms: float = 0.0
    rest_ms: float = 0.0
    answers: int = 0
    answers_with_rounds: int = 0
    tokens: int = 0
    prefill_ms: float = 0.0
    total_ms: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            rounds=self.rounds + other.rounds,
            committed=self.committed + other.committed,
            kept=self.kept + other.kept,
            accepted_at_depth=_add(self.accepted_at_depth, other.accepted_at_depth),
            offered_at_depth=_add(self.offered_at_depth, other.offered_at_depth),
            drafted=self.drafted + other.drafted,
            draft_ms=self.draft_ms + other.draft_ms,
            verify_ms=self.verify_ms + other.verify_ms,
            rest_ms=self.rest_ms + other.rest_ms,
            answers=self.answers + other.answers,
            answers_with_rounds=self.answers_with_rounds + other.answers_with_rounds,
            tokens=self.tokens + other.tokens,
            prefill_ms=self.prefill_ms + other.prefill_ms,
            total_ms=self.total_ms + other.total_ms,
        )

    @property
    def accepted(self) -> int:
        """Accepted drafted tokens, before the cut."""
        return self.committed - self.rounds

    @property
    def acceptance_length(self) -> float:
        """τ: committed tokens ÷ rounds, bonus included, micro average, before the cut at the answer's end (as vLLM)."""
        return _ratio(self.committed, self.rounds)

    @property
    def acceptance_length_after_cut(self) -> float:
        """τ counting only the tokens that stayed in the answer."""
        return _ratio(self.kept, self.rounds)

    @property
    def acceptance_by_depth(self) -> list[float]:
        """α_d for d = 1, 2, …: rounds that accepted depth d ÷ rounds that accepted d - 1 and held a node there."""
        return [_ratio(a, o) for a, o in zip(self.accepted_at_depth, self.offered_at_depth, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens ÷ seconds, prefill included on both sides."""
        return _ratio(self.tokens, self.total_ms / 1e3)

    @property
    def decode_ms(self) -> float:
        """Milliseconds after the prefill; for counts of single rounds, the rounds' own."""
        return self.total_ms - self.prefill_ms if self.answers else self.draft_ms + self.verify_ms + self.rest_ms

    @property
    def milliseconds_per_round(self) -> float:
        """Milliseconds of a round, all time after the prefill shared out."""
        return _ratio(self.decode_ms, self.rounds)

    @property
    def milliseconds_per_token(self) -> float:
        """Milliseconds of a token after the prefill's."""
        return _ratio(self.decode_ms, self.tokens - self.answers)

    @property
    def split_per_round(self) -> tuple[float, float, float]:
        """Milliseconds a round spends on (draft, verify, rest); rest is all else, so the three add up to a round."""
        rest = self.decode_ms - self.draft_ms - self.verify_ms
        return _ratio(self.draft_ms, self.rounds), _ratio(self.verify_ms, self.rounds), _ratio(rest, self.rounds)


def count_rounds(rounds: Iterable[Round]) -> Counts:
    """The counts of some rounds, wherever they come from; the answers' fields stay 0."""
    rounds = list(rounds)
    deepest = max((r.reached for r in rounds), default=0)
    return Counts(
        rounds=len(rounds),
        committed=sum(r.committed for r in rounds),
        kept=sum(r.kept for r in rounds),
        accepted_at_depth=tuple(sum(r.accepted >= d for r in rounds) for d in range(1, deepest + 1)),
        offered_at_depth=tuple(sum(r.reached >= d for r in rounds) for d in range(1, deepest + 1)),
        drafted=sum(r.nodes for r in rounds),
        draft_ms=sum(r.draft_ms for r in rounds),
        verify_ms=sum(r.verify_ms for r in rounds),
        rest_ms=sum(r.rest_ms for r in rounds),
    )


def count(generations: Iterable[Generation]) -> Counts:
    """The counts of whole answers."""
    generations = list(generations)
    answers = Counts(
        answers=len(generations),
        answers_with_rounds=sum(bool(g.rounds) for g in generations),
        tokens=sum(len(g.token_ids) for g in generations),
        prefill_ms=sum(g.prefill_ms for g in generations),
        total_ms=sum(g.total_ms for g in generations),
    )
    return count_rounds(r for g in generations for r in g.rounds) + answers


def round_cost(speculative: Counts, plain: Counts) -> float:
    """Seconds of a round ÷ seconds of a plain token, the prefills' left out: speed-up ≈ τ ÷ round cost."""
    return _ratio(speculative.milliseconds_per_round, plain.milliseconds_per_token)


def speedup(speculative: Counts, plain: Counts) -> float:
    """Tokens per second ÷ plain decoding's: a ratio of sums over the same prompts."""
    return _ratio(speculative.tokens_per_second, plain.tokens_per_second)


def loops(token_ids: Sequence[int], n: int = 8, times: int = 3) -> bool:
    """Whether some `n`-gram occurs `times` times (overlaps count): such an answer drafts too easily."""
    grams = Counter(tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1))
    return max(grams.values(), default=0) >= times


def without_loops(generations: Iterable[Generation]) -> list[Generation]:
    """The answers that don't loop."""
    return [g for g in generations if not loops(g.token_ids)]


def by_context(generations: Iterable[Generation], edges: Sequence[int]) -> dict[tuple[int, int | None], Counts]:
    """Counts of the rounds by the number of tokens before them.

    Args:
        generations: any answers.
        edges: increasing borders; `[0, 256, 1024]` makes the buckets [0, 256), [256, 1024) and [1024, ∞).

    Returns:
        `{(from, to): counts}` for the buckets that hold a round; `to` is None in the last.
    """
    if list(edges) != sorted(set(edges)):
        raise ValueError(f"edges have to increase, got {list(edges)}")
    rounds = [r for g in generations for r in g.rounds]
    spans = list(zip_longest(edges, edges[1:]))
    inside = {
        span: [r for r in rounds if r.context >= span[0] and (span[1] is None or r.context < span[1])] for span in spans
    }
    return {span: count_rounds(members) for span, members in inside.items() if members}


def by_owner(generations: Iterable[Generation], drafters: int) -> list[list[int]]:
    """Accepted tokens: `[drafters][depths]`, depth 1 first; column sums are `accepted_at_depth`."""
    rounds = [r for g in generations for r in g.rounds]
    tally = Counter((owner, depth) for r in rounds for depth, owner in enumerate(r.owners))
    deepest = max((r.reached for r in rounds), default=0)
    return [[tally[owner, depth] for depth in range(deepest)] for owner in range(drafters)]


def nodes_by_owner(generations: Iterable[Generation], drafters: int) -> list[int]:
    """Verified nodes of each drafter; rounds whose trace does not say count for none."""
    rounds = [r for g in generations for r in g.rounds]
    return [sum(r.drafted[owner] for r in rounds if owner < len(r.drafted)) for owner in range(drafters)]


def routing_shares(generations: Iterable[Generation], drafters: int) -> list[float]:
    """Of the rounds that drafted anything, the share in which each drafter had a node in the tree: for a route the
    shares add up to 1, for a merge each may be near 1."""
    rounds = [r for g in generations for r in g.rounds if r.drafted and r.nodes]
    return [
        _ratio(sum(owner < len(r.drafted) and r.drafted[owner] > 0 for r in rounds), len(rounds))
        for owner in range(drafters)
    ]


def vllm(counts: Counts) -> Mapping[str, float | list[float]]:
    """What vLLM prints (v1/spec_decode/metrics.py): length, accepted ÷ drafted, accepted ÷ rounds for each position.

    vLLM drafts chains; for a tree, `draft_acceptance_rate` falls with every node that could not be accepted with its
    siblings.
    """
    return {
        "mean_acceptance_length": 1 + _ratio(counts.accepted, counts.rounds),
        "draft_acceptance_rate": _ratio(counts.accepted, counts.drafted),
        "per_position_acceptance_rate": [_ratio(a, counts.rounds) for a in counts.accepted_at_depth],
    }


def sglang(counts: Counts) -> float:
    """SGLang's acceptance length: completion tokens (after the cut, the prefill's included) ÷ verify passes."""
    return _ratio(counts.tokens, counts.rounds)


def eagle(counts: Counts) -> float:
    """EAGLE's and TAPS' acceptance length: Σ new tokens ÷ Σ idx; idx counts rounds from 0, one too few an answer."""
    return _ratio(counts.committed, counts.rounds - counts.answers_with_rounds)


def sfdd(counts: Counts, by_idx: bool = False) -> float:
    """SFDD's ℓ: accepted drafted tokens of a round, τ - 1; `by_idx` as its `result.py` has it, which divides by EAGLE's
    idx and so comes out too large."""
    return (eagle(counts) if by_idx else counts.acceptance_length) - 1


def adaspec(counts: Counts) -> float:
    """AdaSPEC's α (Eq. 3): accepted ÷ (accepted + rejected); nothing after a round's first rejection counts."""
    return _ratio(sum(counts.accepted_at_depth), sum(counts.offered_at_depth))


def specforge(accuracies: Sequence[float]) -> float:
    """SpecForge's simulated acceptance length a0 + a0·a1 + …: a chain, greedy, no bonus token.

    Args:
        accuracies: per-step accuracies. SpecForge takes them teacher-forced over *all* positions, which overstates:
            real rounds start after tokens that were hard. `Counts.acceptance_by_depth` gives the value for real
            rounds.
    """
    return float(sum(accumulate(accuracies, mul)))


def hass(generations: Iterable[Generation]) -> float:
    """HASS' acceptance length: the mean over answers of their own τ (macro average): short ones weigh as long ones."""
    lengths = [count_rounds(g.rounds).acceptance_length for g in generations if g.rounds]
    return _ratio(sum(lengths), len(lengths))


def _add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip_longest(a, b, fillvalue=0))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else float("nan")
