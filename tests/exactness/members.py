"""Oracle members for compositions: several that know a text with dials of their own, and what puts them together.

The oracles' mistakes are keyed by their seeds, so members are right at different places.
"""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.decoding.building import Available, build
from draftsmith.decoding.composition import Composition
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.decoding.trace import Generation
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import VOCAB, OracleDrafter, prompts, tiny_target

NEW = 24
DIALS = {"sure": 0.8, "half": 0.5, "poor": 0.2}
COMPOSITIONS = {
    "confidence": "route:confidence(half,sure,poor)",
    "entropy": "route:entropy(half,sure,rounds=2)",
    "keyword": "route:keyword(half=a|b,sure=c,poor)",
    "hedge": "route:hedge(poor,sure,half)",
    "hedge-path": "route:hedge(poor,sure,half,feedback=path,carry=0.5)",
    "hedge-seldom": "route:hedge(poor,sure,every=3,scheme=hedge,rate=2)",
    "hedge-best": "route:hedge(half@chain:3,sure@dynamic:7/3/3,poor,pick=best)",
    "concat": "merge:concat(half,sure)",
    "trie": "merge:trie(half,poor,budget=8)",
    "trie-recent": "merge:trie(half,poor,budget=8,recent=0.8)",
    "trie-ngram": "merge:trie(half,ngram,budget=9)",
    "nested": "merge:trie(route:hedge(poor,sure),ngram@chain:3,budget=11)",
}


def oracles(texts: Sequence[Sequence[int]], seed: int = 0, size: int = VOCAB) -> dict[str, Available]:
    """The members by name: oracles of DIALS, and n-grams."""
    vocab = VocabMap.identity(size)
    members = {
        name: Available(OracleDrafter(texts, dial, vocab, seed=100 * seed + i))
        for i, (name, dial) in enumerate(DIALS.items())
    }
    return {**members, "ngram": Available(NgramDrafter(NgramOptions(), vocab))}


def letters(ids: Sequence[int]) -> str:
    """Tokens as words, for routing by keyword."""
    return " ".join("abcdefgh"[i % 8] for i in ids)


def composed(name: str, texts: Sequence[Sequence[int]], seed: int = 0, size: int = VOCAB) -> Composition:
    """One of COMPOSITIONS over oracles of these texts."""
    return build(COMPOSITIONS[name], oracles(texts, seed, size), DynamicGrowth(10, 4, 3), letters)


def composed_equals_plain(name: str, sampling: Sampling, batch: int, kind: str = "llama") -> list[Generation]:
    """Decode plainly, then with a composition of oracles of that text: the same tokens, in rounds that add up."""
    target = tiny_target(kind)
    asked = prompts(batch, seed=1000 * batch + sampling.seed)
    plain = Engine(target).generate(asked, sampling, NEW)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, plain, strict=True)]
    composition = composed(name, texts, sampling.seed)
    found = Engine(target, composition).generate(asked, sampling, NEW)
    assert [g.token_ids for g in found] == [g.token_ids for g in plain]
    assert [g.finish for g in found] == [g.finish for g in plain]
    for prompt, g in zip(asked, found, strict=True):
        written = len(prompt) + 1
        for r in g.rounds:
            assert r.context == written
            assert r.nodes <= composition.budget
            assert all(0 <= owner < len(composition.names) for owner in r.owners)
            written += r.kept
        assert written == len(prompt) + len(g.token_ids)
    return found
