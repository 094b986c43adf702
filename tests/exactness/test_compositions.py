"""Every composition writes what plain decoding writes, and a stored answer is replayed in the same rounds."""

from __future__ import annotations

import itertools

import pytest
import torch

from draftsmith.decoding.building import build
from draftsmith.decoding.composition import Composition
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.decoding.trace import Generation
from draftsmith.target.replay import ReplayTarget, StoredAnswer
from draftsmith.target.sampling import Sampling
from tests.exactness.members import COMPOSITIONS, NEW, composed, composed_equals_plain, letters, oracles
from tests.exactness.test_enumeration import SAMPLINGS, V, forced_probabilities, target_probabilities
from tests.tiny import END, prompts, tiny_target


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_equals_plain_decoding(name: str, batch: int, temperature: float) -> None:
    """Over a few seeds, nothing accepted, paths of each length to 3, and tokens of several members did occur."""
    accepted: set[int] = set()
    owners: set[int] = set()
    for seed in range(4 if batch == 1 else 2):
        found = composed_equals_plain(name, Sampling(temperature=temperature, seed=seed), batch)
        accepted |= {r.accepted for g in found for r in g.rounds}
        owners |= {owner for g in found for r in g.rounds for owner in r.owners}
    assert {0, 1, 2, 3} <= accepted
    # one prompt a batch and one member a prompt: four prompts may all fall to one
    assert len(owners) >= (1 if name in ("entropy", "keyword") else 2)


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma3"])
def test_other_families(kind: str) -> None:
    for name in ("hedge", "trie"):
        found = composed_equals_plain(name, Sampling(temperature=0.7, seed=1), 3, kind)
        assert {1, 2} <= {r.accepted for g in found for r in g.rounds}


def counted(generations: list[Generation]) -> list[list[tuple[object, ...]]]:
    return [[(r.nodes, r.reached, r.accepted, r.owners) for r in g.rounds] for g in generations]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_batch_equals_each_alone_and_replay_equals_both(name: str, temperature: float) -> None:
    """What decides is each sequence's own past, so rounds do not depend on who else is in the batch."""
    target = tiny_target("qwen3")
    asked = prompts(4, seed=9)
    sampling = Sampling(temperature=temperature, seed=5, suppress_tokens=(END,))
    texts = [[*p, *g.token_ids] for p, g in zip(asked, Engine(target).generate(asked, sampling, NEW), strict=True)]
    together = Engine(target, composed(name, texts)).generate(asked, sampling, NEW)
    # The oracle's draws are keyed by its row, so each text is asked alone in its row among others that are empty.
    uneven = Engine(target, composed(name, texts)).generate(asked, sampling, [NEW, 1, 1, NEW])
    assert counted([uneven[0], uneven[3]]) == counted([together[0], together[3]])
    alone = Engine(target, composed(name, texts[:1])).generate(asked[:1], sampling, NEW)
    assert counted(alone) == counted(together[:1])
    stored = [StoredAnswer(t, len(p), {}, False) for t, p in zip(texts, asked, strict=True)]
    replayed = Engine(ReplayTarget(target.spec, stored), composed(name, texts)).generate(asked, None, NEW)
    assert counted(replayed) == counted(together)
    assert [g.token_ids for g in replayed] == [g.token_ids for g in together]
    assert sum(r.accepted for g in together for r in g.rounds) > 10


@pytest.mark.parametrize("name", ["confidence", "hedge", "concat", "trie", "nested"])
@pytest.mark.parametrize("sampling", ["temperature", "penalty-top-k"])
def test_the_law_is_the_targets(monkeypatch: pytest.MonkeyPatch, name: str, sampling: str) -> None:
    """Every text of three tokens of a tiny vocabulary, in float64: its probability is the target's own."""
    tails = [list(tail) for tail in itertools.product(range(V), repeat=3)]

    def composition(texts: list[list[int]]) -> Composition:
        return build(COMPOSITIONS[name], oracles(texts, 0, V), DynamicGrowth(6, 2, 3), letters)

    found, accepted = forced_probabilities(monkeypatch, composition, SAMPLINGS[sampling], tails)
    expected = target_probabilities(SAMPLINGS[sampling], 3)
    assert found.keys() == expected.keys()
    assert max(abs(found[tail] - expected[tail]) for tail in expected) < 1e-10
    assert {0, 1, 2} == set(accepted)


def test_weights_are_carried_over_requests_and_replay_follows() -> None:
    """Requests one after another: the second begins with what the first taught, in the engine as in a replay."""
    target = tiny_target("llama")
    asked = prompts(3, seed=21)
    sampling = Sampling(suppress_tokens=(END,))
    texts = [[*p, *g.token_ids] for p, g in zip(asked, Engine(target).generate(asked, sampling, NEW), strict=True)]
    for options in ("", ",carry=0"):
        spec = f"route:hedge(poor,sure{options})"
        runs: list[list[list[tuple[object, ...]]]] = []
        brought: list[list[float]] = []
        for replayed in (False, True):
            composition = None
            rounds = []
            for prompt, text in zip(asked, texts, strict=True):
                members = oracles([text])
                if composition is None:
                    composition = build(spec, members, DynamicGrowth(8, 3, 3))
                else:
                    # the same rule, over oracles that know the next text
                    fresh = build(spec, members, DynamicGrowth(8, 3, 3))
                    composition = type(fresh)(fresh.parts, composition.rule)
                source = ReplayTarget(target.spec, [StoredAnswer(text, len(prompt), {}, False)]) if replayed else target
                rounds.append(counted(Engine(source, composition).generate([prompt], sampling, NEW))[0])
                brought.append(composition.rule._last.brought)
            runs.append(rounds)
        assert runs[0] == runs[1]
        assert brought[:3] == brought[3:]
        assert brought[0] == [0, 0]
        if options:
            assert brought[1] == brought[2] == [0, 0]
        else:
            assert brought[2][1] > brought[2][0], "the better member's regret does not grow"
    assert torch.isfinite(torch.tensor(brought)).all()
