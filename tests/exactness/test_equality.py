"""Speculative decoding writes plain decoding's text, token for token, at the same seed: greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.drafters.head import Head
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.checks import (
    GROWTHS,
    NEW,
    a_sure_oracle_is_always_accepted,
    an_end_cuts_the_path,
    draft_state_is_rewound,
    features_are_of_the_position_before,
    speculative_equals_plain,
)
from tests.tiny import END, KINDS, VOCAB, OracleDrafter, prompts, tiny_eagle, tiny_head, tiny_target


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_family_writes_the_plain_text(kind: str, temperature: float, batch: int) -> None:
    generations = speculative_equals_plain(kind, GROWTHS["tree-15"], Sampling(temperature=temperature, seed=3), batch)
    assert any(r.accepted > 1 for g in generations for r in g.rounds)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_growth_writes_the_plain_text_at_every_depth(growth: str, temperature: float, batch: int) -> None:
    policy = GROWTHS[growth]
    texts: set[tuple[int, ...]] = set()
    accepted: set[int] = set()
    rejected: set[int] = set()
    seeds = range(8 if batch == 1 else 3)
    dial = 0.4 if policy.budget > 16 else 0.6  # a wide tree holds nearly everything that the oracle ranks at all
    for seed in seeds:
        for g in speculative_equals_plain("llama", policy, Sampling(temperature=temperature, seed=seed), batch, dial):
            texts.add(tuple(g.token_ids))
            accepted.update(r.accepted for r in g.rounds)
            rejected.update(r.reached for r in g.rounds if r.reached > r.accepted)
    assert len(texts) == len(seeds) * batch, "the seeds decode the same texts"
    assert accepted == set(range(policy.depth + 1)), "some depth, or full acceptance, never occurred"
    assert rejected == set(range(1, policy.depth + 1)), "no rejection at some depth"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reduced_draft_vocabulary_changes_nothing(temperature: float) -> None:
    """Ids the drafter cannot propose are committed as bonus tokens."""
    vocab = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 1], VOCAB)
    seen: set[int] = set()
    for seed in range(3):
        sampling = Sampling(temperature=temperature, seed=seed)
        generations = speculative_equals_plain("llama", GROWTHS["tree-15"], sampling, 2, dial=1.0, vocab=vocab)
        assert any(r.accepted >= 2 for g in generations for r in g.rounds)
        for g in generations:
            place = 1
            for r in g.rounds:
                seen.update(g.token_ids[place + r.accepted : place + r.kept])
                assert all(t % 3 != 1 for t in g.token_ids[place : place + r.accepted])
                place += r.kept
    assert any(token % 3 == 1 for token in seen)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.0, repetition_penalty=1.3),
        Sampling(temperature=0.8, repetition_penalty=1.2, top_p=0.9, seed=1),
        Sampling(temperature=1.0, no_repeat_ngram_size=2, top_k=20, seed=2),
        Sampling(temperature=1.3, min_p=0.05, suppress_tokens=(11, 12), seed=3),
        Sampling(temperature=0.9, forced_eos_token_id=33, suppress_tokens=(END,), typical_p=0.8, seed=4),
    ],
    ids=["penalty-greedy", "penalty-top-p", "no-repeat-top-k", "min-p-suppress", "forced-typical"],
)
@pytest.mark.parametrize("growth", ["chain-4", "tree-15"])
def test_processors_see_each_nodes_own_ancestors(sampling: Sampling, growth: str) -> None:
    generations = speculative_equals_plain("llama", GROWTHS[growth], sampling, 2)
    assert any(r.accepted >= 2 for g in generations for r in g.rounds)


@pytest.mark.parametrize("growth", ["chain-4", "tree-15"])
def test_features_are_those_of_the_position_before_a_token(growth: str) -> None:
    features_are_of_the_position_before(GROWTHS[growth])


def test_an_end_token_inside_the_path_drops_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target("llama")
    ends = (END, *range(40, 50))
    monkeypatch.setattr(target, "spec", replace(target.spec, eos_ids=ends))
    inside, met = an_end_cuts_the_path(ends)
    assert inside == {1, 2, 3, 4}, f"ends inside an accepted path stood at depths {inside} only"
    assert len(met) > 3


@pytest.mark.parametrize("growth", ["chain-4", "tree-15"])
def test_a_sure_oracle_is_always_accepted(growth: str) -> None:
    a_sure_oracle_is_always_accepted(GROWTHS[growth])


@pytest.mark.parametrize("made", [tiny_head, tiny_eagle])
def test_draft_states_are_rewound(made: Callable[[], Head]) -> None:
    draft_state_is_rewound(made())


@pytest.mark.parametrize("made", [tiny_head, tiny_eagle])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_random_heads_change_nothing(made: Callable[[str], Head], kind: str, temperature: float) -> None:
    """Nearly all that they propose is wrong, at other depths for each sequence; heads that are right are replayed in
    tests/integration/test_replay_equals_engine.py."""
    target, sampling, asked = tiny_target(kind), Sampling(temperature=temperature, seed=6), prompts(3, seed=12)
    plain = Engine(target).generate(asked, sampling, NEW)
    found = Engine(target, Single(made(kind), GROWTHS["tree-15"])).generate(asked, sampling, NEW)
    assert [g.token_ids for g in found] == [g.token_ids for g in plain]
    assert all(r.nodes > 0 for g in found for r in g.rounds[:-1])


@pytest.mark.parametrize("growth", [None, "tree-15"])
def test_a_batch_equals_each_alone(growth: str | None) -> None:
    target = tiny_target("qwen3")
    asked = prompts(4, seed=9)
    sampling = Sampling(temperature=0.9, seed=5)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, Engine(target).generate(asked, sampling, NEW), strict=True)]

    def engine(own: list[list[int]]) -> Engine:
        return Engine(target, Single(OracleDrafter(own, 1.0), GROWTHS[growth]) if growth else None)

    together = engine(texts).generate(asked, sampling, [NEW, 5, NEW, 11])
    for i, prompt in enumerate(asked):
        alone = engine([texts[i]]).generate([prompt], sampling, [NEW, 5, NEW, 11][i], requests=[i])[0]
        assert alone.token_ids == together[i].token_ids
        assert [r.accepted for r in alone.rounds] == [r.accepted for r in together[i].rounds]


@pytest.mark.parametrize("new", [0, 1, 2, 3, 7])
def test_limits_are_met_exactly(new: int) -> None:
    target = tiny_target("llama")
    asked = prompts(2, seed=4)
    plain = Engine(target).generate(asked, Sampling(), 40)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, plain, strict=True)]
    engine = Engine(target, Single(OracleDrafter(texts, 1.0), GROWTHS["tree-15"]))
    found = engine.generate(asked, Sampling(), new)
    assert [g.token_ids for g in found] == [g.token_ids[:new] for g in plain]
    assert all(g.finish == "length" for g in found)
    assert all(r.kept == r.committed for g in found for r in g.rounds)


def test_the_longest_position_ends_an_answer() -> None:
    target = tiny_target("llama")
    room = 6
    prompt = [[8 + i % 80 for i in range(target.spec.max_positions - room)]]
    sampling = Sampling(temperature=1.0, suppress_tokens=(END,))
    plain = Engine(target).generate(prompt, sampling, 50)[0]
    assert len(plain.token_ids) == room
    drafter = OracleDrafter([[*prompt[0], *plain.token_ids, 9, 9, 9]], 1.0)
    found = Engine(target, Single(drafter, GROWTHS["tree-15"])).generate(prompt, sampling, 50)[0]
    assert found.token_ids == plain.token_ids
    assert any(r.accepted >= 2 for r in found.rounds)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_decoding_equals_transformers_generate(kind: str) -> None:
    target = tiny_target(kind)
    prompt = prompts(1, seed=21)[0]
    ours = Engine(target).generate([prompt], Sampling(repetition_penalty=1.1), NEW)[0].token_ids
    ids = torch.tensor([prompt])
    theirs = target.model.generate(
        ids, do_sample=False, max_new_tokens=NEW, repetition_penalty=1.1, attention_mask=torch.ones_like(ids)
    )
    assert ours == theirs[0, len(prompt) :].tolist()
