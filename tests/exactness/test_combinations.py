"""Every growth with every kind of drafter, greedy and sampled, bare and with processors, alone and in a batch: the text
is plain decoding's at the same seed, token for token; where the rules for sampled candidates are greedy, theirs too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from draftsmith.decoding.composition import Single
from draftsmith.decoding.drawn import SampledGrowth
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import (
    AdaEDLGrowth,
    BestFirstGrowth,
    ChainGrowth,
    CostAwareGrowth,
    DynamicGrowth,
    Growth,
    StaticGrowth,
)
from draftsmith.decoding.stopping import EntropyStop
from draftsmith.decoding.trace import Generation
from draftsmith.decoding.verification import Verification
from draftsmith.drafters.base import Drafter
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import END, VOCAB, OracleDrafter, prompts, tiny_draft, tiny_eagle, tiny_head, tiny_target

NEW = 16
GROWTHS: dict[str, Growth] = {
    "chain": ChainGrowth(4),
    "dynamic": DynamicGrowth(15, 4, 4),
    "stopping": DynamicGrowth(9, 4, 3, 0.3),
    "static": StaticGrowth(),
    "best-first": BestFirstGrowth(9, 4, 3),
    "adaedl": AdaEDLGrowth(4, EntropyStop(start=0.1)),
    "cost-aware": CostAwareGrowth(tuple(10 + 0.5 * k for k in range(13)), 4, 4),
    "costs-by-length": CostAwareGrowth(
        tuple(10 + 0.5 * k for k in range(13)),
        4,
        4,
        (4, 24),
        (tuple(10 + 0.5 * k for k in range(13)), tuple(10 + 3.0 * k for k in range(13))),
    ),
    "sampled-chain": SampledGrowth((1, 1, 1)),
    "sampled-tree": SampledGrowth((3, 2, 1)),
    "independent": SampledGrowth((3, 1), True),
}
SAMPLINGS = {
    "greedy": Sampling(),
    "greedy-processed": Sampling(repetition_penalty=1.2, no_repeat_ngram_size=3, forced_eos_token_id=END, seed=1),
    "sampled": Sampling(temperature=0.8, top_k=4, seed=2),
    "sampled-processed": Sampling(temperature=1.1, repetition_penalty=1.1, top_p=0.9, suppress_tokens=(END, 9), seed=3),
}
REDUCED = VocabMap(VocabMap.identity(VOCAB).target_ids[::2].clone(), VOCAB)
DRAFTERS: dict[str, Callable[[list[list[int]]], Drafter]] = {
    "oracle": lambda texts: OracleDrafter(texts, 0.7),
    "oracle-reduced": lambda texts: OracleDrafter(texts, 0.7, REDUCED),
    "eagle3": lambda texts: tiny_head(),
    "eagle": lambda texts: tiny_eagle(),
    "standalone": lambda texts: tiny_draft("llama", 7),
    "ngram": lambda texts: NgramDrafter(NgramOptions(), VocabMap.identity(VOCAB)),
}


def decoded(
    growth: Growth, kind: str, sampling: Sampling, batch: int, rule: Verification = "keyed"
) -> list[Generation]:
    """Decode with a drafter; its texts and ends are those of plain decoding, its rounds add up."""
    target = tiny_target("llama")
    asked = prompts(batch, seed=70 + batch)
    new = [NEW, 5, NEW, 9][:batch]
    plain = Engine(target).generate(asked, sampling, new)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, plain, strict=True)]
    drafter = DRAFTERS[kind](texts)
    found = Engine(target, Single(drafter, growth), rule).generate(asked, sampling, new)
    assert [g.token_ids for g in found] == [g.token_ids for g in plain]
    assert [g.finish for g in found] == [g.finish for g in plain]
    assert all(r.nodes <= growth.budget for g in found for r in g.rounds)
    assert all(1 + sum(r.kept for r in g.rounds) == len(g.token_ids) for g in found)
    return found


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("growth", GROWTHS)
def test_every_combination_writes_the_plain_text(growth: str, kind: str) -> None:
    accepted: dict[bool, int] = {False: 0, True: 0}
    for sampling in SAMPLINGS.values():
        for batch in (1, 4):
            found = decoded(GROWTHS[growth], kind, sampling, batch)
            accepted[sampling.temperature > 0] += sum(r.accepted for g in found for r in g.rounds)
    if "oracle" in kind:
        assert min(accepted.values()) > 10, f"nearly nothing was accepted: {accepted}"
    if kind in ("standalone", "ngram"):
        assert sum(accepted.values()) > 0


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_greedy_rules_for_sampled_candidates_write_the_plain_text(rule: Verification, kind: str) -> None:
    shapes = [GROWTHS["sampled-chain"]] + ([GROWTHS["sampled-tree"], GROWTHS["independent"]] if rule == "token" else [])
    for growth in shapes:
        for name in ("greedy", "greedy-processed"):
            for batch in (1, 4):
                found = decoded(growth, kind, SAMPLINGS[name], batch, rule)
                if kind == "oracle" and name == "greedy":
                    assert any(r.accepted for g in found for r in g.rounds)
