"""What the report shows, worked out from a run: groups of answers, coloured tokens, worst prompts and tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from draftsmith.decoding.trace import Generation
from draftsmith.evaluation import metrics
from draftsmith.evaluation.metrics import Counts
from draftsmith.evaluation.report.inputs import Answer, Run, Scored
from draftsmith.evaluation.summary import Result

SHADES = 8  # steps of the flatness colours
DEEPEST = 5  # depths from here on share a shade


class Span(NamedTuple):
    """A token as shown: its text, its CSS classes and what hovering tells."""

    text: str
    style: str
    title: str


@dataclass(frozen=True)
class Pair:
    """A speculative answer and, where it was decoded too, the plain one."""

    answer: Answer
    plain: Answer | None

    @property
    def counts(self) -> Counts:
        return metrics.count([self.answer.generation])

    @property
    def speedup(self) -> float | None:
        if self.plain is None or not self.answer.generation.total_ms or not self.plain.generation.total_ms:
            return None
        return metrics.speedup(self.counts, metrics.count([self.plain.generation]))


@dataclass(frozen=True)
class Group:
    """Answers of one set at one temperature by one composition of drafters."""

    set: str
    temperature: float
    drafters: str
    pairs: list[Pair]
    several: bool

    @property
    def label(self) -> str:
        return label(self.set, self.temperature, self.drafters if self.several else None)

    @property
    def generations(self) -> list[Generation]:
        return [pair.answer.generation for pair in self.pairs]

    @property
    def owners(self) -> list[str]:
        """The drafters' names, by number."""
        highest = max((owner for g in self.generations for r in g.rounds for owner in r.owners), default=0)
        names = list(self.pairs[0].answer.members) or [name.strip() for name in self.drafters.split("+")]
        return names if len(names) > highest else [f"drafter {i + 1}" for i in range(highest + 1)]

    def typical(self) -> Pair:
        """The answer with the median acceptance length."""
        return sorted(self.pairs, key=_length)[len(self.pairs) // 2]

    def best(self) -> Pair:
        """The answer with the largest acceptance length."""
        return max(self.pairs, key=_length)


class Share(NamedTuple):
    """A drafter's part in a composition; what the traces do not tell is None.

    Attributes:
        rounds: of the rounds that drafted anything, the share with a node of its in the tree.
        nodes: of the verified nodes, its share.
        accepted: of the accepted tokens, its share.
        kept: of its own nodes, the share that was accepted.
    """

    drafter: str
    rounds: float | None
    nodes: float | None
    accepted: float | None
    kept: float | None


class Missed(NamedTuple):
    """A token that the target had to correct: how often, and how often it was written at all."""

    text: str
    missed: int
    written: int


def label(name: str, temperature: float, drafters: str | None = None) -> str:
    """`word-problems, T = 0`, with the drafters where they tell results apart."""
    return ", ".join([name, f"T = {temperature:g}", *([drafters] if drafters else [])])


def result_labels(results: Sequence[Result]) -> list[str]:
    """A label for each result, naming drafters only where several are compared."""
    several = len({r.drafters for r in results}) > 1
    return [label(r.set, r.temperature, r.drafters if several else None) for r in results]


def groups(run: Run) -> list[Group]:
    """The speculative answers of a run in the order of their first appearance, each with its plain counterpart."""
    everyone = {(a.set, a.id, a.temperature, a.drafters): a for a in run.answers}
    found: dict[tuple[str, float, str], list[Pair]] = defaultdict(list)
    for a in run.answers:
        if a.speculative:
            base = everyone.get((a.set, a.id, a.temperature, a.against))
            found[a.set, a.temperature, a.drafters].append(Pair(a, base))
    several = len({drafters for _, _, drafters in found}) > 1
    return [Group(*names, pairs, several) for names, pairs in found.items()]


def origin_spans(answer: Answer, owners: Sequence[str]) -> list[Span]:
    """An answer's tokens by who proposed them and how deep in the tree."""
    spans = []
    for piece, origin, depth in zip(answer.pieces, answer.origins, answer.depths, strict=True):
        if origin < 0:
            spans.append(Span(_visible(piece), "t", "written by the target"))
        else:
            name = owners[origin] if origin < len(owners) else f"drafter {origin + 1}"
            spans.append(Span(_visible(piece), f"d{origin % 4} k{min(depth, DEEPEST)}", f"{name}, depth {depth}"))
    return spans


def flatness_spans(sample: Scored, borders: Sequence[float]) -> list[Span]:
    """A sample's answer tokens shaded by flatness; `borders` from `shade_borders`."""
    pieces = sample.pieces or []
    return [
        Span(_visible(piece), f"f{bisect_right(borders, value)}", f"flatness {value:.4f}")
        for piece, value in zip(pieces, sample.flatness, strict=True)
    ]


def shade_borders(scores: Sequence[Scored]) -> list[float]:
    """Borders between the shades: the least flat half of all tokens stays unshaded, the rest is split evenly."""
    values = sorted(value for sample in scores for value in sample.flatness)
    if not values:
        return []
    return [values[min(len(values) - 1, int(len(values) * (0.5 + 0.5 * k / SHADES)))] for k in range(SHADES)]


def composition_shares(group: Group) -> list[Share]:
    """Each drafter's part in a group whose answers several drafted; empty where it was one."""
    names, generations = group.owners, group.generations
    if len(names) < 2:
        return []
    rounds = metrics.routing_shares(generations, len(names))
    nodes = metrics.nodes_by_owner(generations, len(names))
    accepted = [sum(depths) for depths in metrics.by_owner(generations, len(names))]

    def part(number: float, whole: float) -> float | None:
        return number / whole if whole else None

    return [
        Share(
            name,
            rounds[i] if any(nodes) else None,
            part(nodes[i], sum(nodes)),
            part(accepted[i], sum(accepted)),
            part(accepted[i], nodes[i]),
        )
        for i, name in enumerate(names)
    ]


def selection_examples(run: Run, each: int = 2) -> list[tuple[bool, float, Scored]]:
    """Kept and dropped samples to look at, from the middle of either side: (kept, score, sample with text)."""
    texts = {sample.id: sample for sample in run.scores if sample.pieces}
    chosen = []
    for kept in (True, False):
        side = sorted((s for s in run.samples if s.kept is kept and s.id in texts), key=lambda s: s.score)
        middle = side[max(0, (len(side) - each) // 2) :][:each]
        chosen += [(kept, s.score, texts[s.id]) for s in reversed(middle)]
    return chosen


def worst_prompts(found: Sequence[Group], number: int = 8) -> list[tuple[Group, Pair]]:
    """The answers with the smallest acceptance lengths."""
    pairs = [(group, pair) for group in found for pair in group.pairs if pair.answer.generation.rounds]
    return sorted(pairs, key=lambda item: _length(item[1]))[:number]


def missed_tokens(found: Sequence[Group], number: int = 12, least: int = 3) -> list[Missed]:
    """Tokens that the target most often put in place of a drafted one, among those written at least `least` times."""
    written: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    for pair in (pair for group in found for pair in group.pairs):
        pieces = pair.answer.pieces
        written.update(pieces)
        # what the prefill wrote is no round's
        place = len(pieces) - sum(r.kept for r in pair.answer.generation.rounds)
        for r in pair.answer.generation.rounds:
            place += r.kept
            if r.kept == r.committed and r.reached > r.accepted and place <= len(pieces):
                missed[pieces[place - 1]] += 1
    often = [Missed(_visible(t).strip("\n") or "␣", n, written[t]) for t, n in missed.items() if written[t] >= least]
    return sorted(often, key=lambda m: (-m.missed, -m.missed / m.written, m.text))[:number]


def context_edges(generations: Sequence[Generation], buckets: int = 5) -> list[int]:
    """Borders at multiples of 32 that split the rounds into about equal parts by the tokens before them."""
    contexts = sorted(r.context for g in generations for r in g.rounds)
    if not contexts:
        return []
    inner = {32 * round(contexts[len(contexts) * k // buckets] / 32) for k in range(1, buckets)}
    return [0, *sorted(edge for edge in inner if edge > 0)]


def _length(pair: Pair) -> float:
    return pair.counts.acceptance_length if pair.answer.generation.rounds else 0.0


def _visible(piece: str) -> str:
    return piece.replace("\n", "⏎\n")
