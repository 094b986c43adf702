"""Watched nodes against the oracles' own rows and the trace."""

from __future__ import annotations

import math

import pytest
import torch
from tests.exactness.members import COMPOSITIONS, letters, oracles
from tests.tiny import OracleDrafter, prompts, tiny_target

from draftsmith.decoding.building import build
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.evaluation import metrics
from draftsmith.evaluation.diagnosis import NodeRow, Recorder, by_owner_and_depth
from draftsmith.target.sampling import Sampling


@pytest.mark.parametrize("name", ["confidence", "hedge", "hedge-path", "hedge-seldom", "concat", "trie", "nested"])
def test_nodes_are_told_as_they_were(name: str) -> None:
    target = tiny_target("llama")
    asked = prompts(3, seed=71)
    sampling = Sampling(temperature=0.8, seed=2)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, Engine(target).generate(asked, sampling, 30), strict=True)]

    def made() -> object:
        return build(COMPOSITIONS[name], oracles(texts), DynamicGrowth(10, 4, 3), letters)

    bare = Engine(target, made()).generate(asked, sampling, 30)  # type: ignore[arg-type]
    recorder = Recorder(made())  # type: ignore[arg-type]
    found = Engine(target, recorder).generate(asked, sampling, 30)

    def counts(generations: list[metrics.Generation]) -> list[list[object]]:
        return [[(r.nodes, r.reached, r.owners, r.drafted) for r in g.rounds] for g in generations]

    assert counts(bare) == counts(found), "being watched changes the rounds"
    rows = recorder.rows(found, asked)
    members = {i: oracles(texts)[n].drafter for i, n in enumerate(recorder.names) if n in ("half", "sure", "poor")}
    for generation in found:
        for number, told in enumerate(generation.rounds):
            own = [r for r in rows if (r.request, r.round) == (generation.request, number)]
            assert len(own) == told.nodes
            assert [sum(r.owner == i for r in own) for i in range(len(recorder.names))] == list(told.drafted)
            accepted = sorted((r.depth, r.owner) for r in own if r.outcome == "accepted")
            if name != "concat":
                assert accepted == [(d, o) for d, o in enumerate(told.owners, start=1)]
            else:
                assert {(d, o) for d, o in enumerate(told.owners, start=1)} <= set(accepted)
            # at the root and on the text, entropies are those of the oracle's own rows
            for row in own:
                member = members.get(row.owner)
                if isinstance(member, OracleDrafter) and row.outcome != "untested":
                    log_q = member._row(row.request, told.context + row.depth - 1, True)
                    assert math.isclose(row.entropy, float(-(log_q.exp() * log_q).sum()), rel_tol=1e-4)
                    if row.depth == 1:
                        assert any(math.isclose(row.confidence, p, rel_tol=1e-4) for p in log_q.exp().tolist())
    assert {r.outcome for r in rows} == {"accepted", "refused", "untested"}


def test_summaries_are_means_of_what_was_tested() -> None:
    rows = [
        NodeRow(0, 0, 0, 1, 0.9, 1.0, "accepted"),
        NodeRow(0, 0, 0, 1, 0.1, 1.0, "refused"),
        NodeRow(0, 1, 0, 1, 0.3, 3.0, "refused"),
        NodeRow(0, 1, 1, 2, 0.5, 2.0, "untested"),
    ]
    first, second = by_owner_and_depth(rows)
    assert (first.owner, first.depth, first.nodes) == (0, 1, (3, 3, 1))
    assert first.confidence == pytest.approx((0.9, 0.2))
    assert first.entropy == pytest.approx((1.0, 2.0))
    assert second.nodes == (1, 0, 0)
    assert all(map(math.isnan, (*second.confidence, *second.entropy)))


def test_shares_of_routes_and_nodes_by_owner() -> None:
    target = tiny_target("llama")
    asked = prompts(3, seed=72)
    texts = [[*p, *g.token_ids] for p, g in zip(asked, Engine(target).generate(asked, None, 30), strict=True)]
    growth = DynamicGrowth(6, 3, 3)
    routed = Engine(target, build("route:hedge(poor,sure)", oracles(texts), growth)).generate(asked, None, 30)
    shares = metrics.routing_shares(routed, 2)
    assert sum(shares) == pytest.approx(1)
    assert shares[1] > shares[0] > 0
    nodes = metrics.nodes_by_owner(routed, 2)
    assert sum(nodes) == metrics.count(routed).drafted
    merged = Engine(target, build("merge:concat(poor,sure)", oracles(texts), growth)).generate(asked, None, 30)
    assert metrics.routing_shares(merged, 2) == pytest.approx([1, 1])
    assert math.isnan(metrics.routing_shares(Engine(target).generate(asked, None, 5), 1)[0])
    assert torch.tensor(nodes).min() > 0
