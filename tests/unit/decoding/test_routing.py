"""Rules that decide per prompt, and the router that learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.decoding.building import Available, build
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth, DynamicGrowth, Limits
from draftsmith.decoding.hedging import carries
from draftsmith.decoding.learned import FEATURES, Survey, fitted, root_features
from draftsmith.decoding.trace import Generation
from draftsmith.evaluation import fitting
from draftsmith.evaluation.replayed import replay
from draftsmith.foundation.artefacts import write_json
from draftsmith.foundation.errors import UserError
from draftsmith.target.replay import ReplayTarget, StoredAnswer
from tests.exactness.members import letters, oracles
from tests.tiny import OracleDrafter, tiny_target

GROWTH = DynamicGrowth(8, 3, 3)
TEXTS = [[10 + (7 * i * i + 3 * b * i) % 80 for i in range(90)] for b in range(4)]
STORED = [StoredAnswer(t, 6, {}, False) for t in TEXTS]


def decoded(composition: Composition) -> list[Generation]:
    target = ReplayTarget(tiny_target("llama").spec, STORED)
    return Engine(target, composition).generate([t[:6] for t in TEXTS], None, 84)


def counts(generations: list[Generation]) -> list[list[object]]:
    return [[(r.nodes, r.reached, r.accepted, r.owners) for r in g.rounds] for g in generations]


@pytest.mark.parametrize(
    "kind", ["route:confidence", "route:entropy", "route:hedge", "merge:concat", "merge:trie", "route:keyword"]
)
def test_with_one_member_it_is_that_member(kind: str) -> None:
    alone = decoded(Single(OracleDrafter(TEXTS, 0.5, seed=1), GROWTH))
    assert counts(decoded(build(f"{kind}(half)", oracles(TEXTS), GROWTH, letters))) == counts(alone)


def test_confidence_verifies_the_surer_tree_of_each_round() -> None:
    """Against choosing by hand from both members' own trees, row by row."""
    route = build("route:confidence(half,sure)", oracles(TEXTS), GROWTH)
    found = decoded(route)
    singles = [Single(OracleDrafter(TEXTS, d, seed=i), GROWTH) for i, d in ((1, 0.5), (0, 0.8))]
    chosen = {0: 0, 1: 0}
    for b in range(4):
        for r in found[b].rounds[:6]:
            means = []
            for single in singles:
                state = single.start(4, 128)
                tokens = torch.zeros((4, r.context), dtype=torch.int64)
                for row in range(4):
                    tokens[row] = torch.tensor(TEXTS[row][: r.context])
                single.observe(state, tokens, {}, [r.context] * 4)
                tree = single.propose(state, Limits(torch.full((4,), 9), torch.tensor([7])))
                means.append(float(tree.log_q[b, : int(tree.counts[b])].exp().mean()))
            best = 0 if means[0] >= means[1] else 1
            assert r.drafted[best] == r.nodes
            chosen[best] += 1
    assert min(chosen.values()) > 0


def test_entropy_takes_the_sharper_member_for_the_whole_prompt() -> None:
    found = decoded(build("route:entropy(half,sure)", oracles(TEXTS), GROWTH))
    clear = []
    for b, generation in enumerate(found):
        entropies = []
        for name in ("half", "sure"):
            member = oracles(TEXTS)[name].drafter
            assert isinstance(member, OracleDrafter)
            row = member._row(b, 7, True)
            entropies.append(float(-(row.exp() * row).sum()))
        chosen = {r.drafted.index(r.nodes) for r in generation.rounds if r.nodes}
        assert len(chosen) == 1
        if abs(entropies[0] - entropies[1]) > 1e-4:  # oracles that are equally sure differ by rounding
            assert chosen == {entropies.index(min(entropies))}
            clear.append(b)
    assert clear


def test_keywords_choose_by_the_prompt() -> None:
    texts = ["Solve 3x = 9.", "write PYTHON code", "resolve this", "hello"]
    spec = 'route:keyword(half=solve|equation,sure="python",poor)'

    def text(ids: object) -> str:
        row = next(b for b, t in enumerate(TEXTS) if t[:6] == list(ids))  # type: ignore[call-overload]
        return texts[row]

    found = decoded(build(spec, oracles(TEXTS), GROWTH, text))
    assert [{r.drafted.index(r.nodes) for r in g.rounds if r.nodes} for g in found] == [{0}, {1}, {2}, {2}]


def test_the_regression_is_the_least_squares_one() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.cat([torch.ones(400, 1), torch.randn(400, len(FEATURES) - 1, generator=generator)], 1).double()
    weights = torch.tensor([1.0, -0.5, 0.25, 2.0, 0.0], dtype=torch.float64)
    y = (x @ weights).tolist()
    found = fitted(Survey(x.tolist(), y), ridge=0.0)  # type: ignore[arg-type]
    assert found == pytest.approx(weights.tolist(), abs=1e-6)
    with pytest.raises(ValueError, match="no round"):
        fitted(Survey())


def test_features_of_a_root() -> None:
    log_q = torch.tensor([[0.5, 0.25, 0.125, 0.0625, 0.0625]]).log()
    one, top, nats, mass, recent = root_features(log_q, [0.7])[0].tolist()
    assert (one, recent) == (1, 0.7)
    assert top == pytest.approx(-0.693147, abs=1e-5)
    assert nats == pytest.approx(1.875 * 0.693147, abs=1e-5)
    assert mass == pytest.approx(0.9375)


def test_a_router_prefers_what_pays(tmp_path: Path) -> None:
    """Fitted on replay: the better member drafts; when it costs ten times as much, the other does."""
    path = tmp_path / "router.json"
    members = {n: m for n, m in oracles(TEXTS).items() if n in ("sure", "poor")}
    spec = tiny_target("llama").spec
    shares = []
    for cost in (1.0, 10.0):
        made = fitting.router(members, GROWTH, {"sure": cost, "poor": 1.0}, spec, STORED)
        write_json(path, made)
        for every in (1, 3):
            found = decoded(build(f"route:learned(poor,sure,router={path},every={every})", members, GROWTH))
            rounds = [r for g in found for r in g.rounds if r.nodes]
            shares.append(sum(r.drafted[1] > 0 for r in rounds) / len(rounds))
    assert min(shares[:2]) > 0.8
    assert max(shares[2:]) < 0.2
    entry = made["members"]["sure"]  # type: ignore[index]
    alone = decoded(Single(members["sure"].drafter, GROWTH))
    told = [r.accepted for g in alone for r in g.rounds[:-1]]
    assert entry["mean_accepted"] == pytest.approx(sum(told) / len(told), rel=0.15)
    with pytest.raises(UserError, match="knows sure, poor, not half"):
        build(f"route:learned(half,sure,router={path})", oracles(TEXTS), GROWTH)
    write_json(path, {"members": {}})
    with pytest.raises(UserError, match="no router of this version"):
        build(f"route:learned(poor,sure,router={path})", members, GROWTH)


def test_what_learns_over_requests_is_replayed_in_their_order() -> None:
    members = oracles(TEXTS)
    for line, learns in (
        ("route:hedge(poor,sure)", True),
        ("route:hedge(poor,sure,carry=0)", False),
        ("merge:trie(route:hedge(poor,sure),ngram)", True),
        ("merge:trie(sure,ngram)", False),
    ):
        assert carries(build(line, members, GROWTH)) == learns


def test_replay_in_order_goes_on_with_what_was_learned() -> None:
    """The second of two equal answers begins where the first ended, so its first choices are the better member's."""
    twice = [STORED[0], STORED[0]]
    growth = ChainGrowth(2)
    poor, sure = OracleDrafter(TEXTS[:1], 0.05, seed=5), OracleDrafter(TEXTS[:1], 1.0)
    members = {"poor": Available(poor), "sure": Available(sure)}
    spec = tiny_target("llama").spec
    first, second = replay(build("route:hedge(poor,sure,pick=best)", members, growth), spec, twice)
    assert first.rounds[0].drafted == (2, 0)
    assert second.rounds[0].drafted == (0, 2)
