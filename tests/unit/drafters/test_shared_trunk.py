"""Specialists side by side against each alone with its update multiplied out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from draftsmith.decoding.building import build
from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.decoding.merging import Merge
from draftsmith.decoding.routing import ConfidenceRoute
from draftsmith.decoding.stacked import Stacked
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.drafters.shared_trunk import adapted, alike, specialists, stacked, updates
from draftsmith.foundation.errors import UserError
from draftsmith.target.sampling import Sampling
from tests.tiny import prompts, tiny_head, tiny_target


def specialist(trunk: Eagle3, seed: int, rank: int = 4) -> Eagle3:
    """As after training: its updates are no longer zero."""
    made = adapted(trunk, rank, 8.0, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in updates(made).values():
        layer.up.data = torch.randn(layer.up.shape, generator=generator) * 0.15
    return made.eval()


def multiplied_out(head: Eagle3, trunk: Eagle3) -> Eagle3:
    """The plain head of weights W + scale · B A."""
    made = tiny_head()
    made.load_state_dict(trunk.state_dict())
    for name, layer in updates(head).items():
        linear = made.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = layer.base.weight + layer.scale * layer.up[0] @ layer.down[0]
    return made.eval()


def test_a_fresh_specialist_is_its_trunk_and_trains_alone() -> None:
    trunk = tiny_head(seed=4)
    made = adapted(trunk, rank=3)
    features, tokens = torch.randn(2, 9, trunk.fc.in_features), torch.randint(8, 90, (2, 9))
    states = trunk.start(2, 32), made.start(2, 32)
    lengths = [9, 6]
    ours = made.observe(states[1], tokens, features, lengths).log_q
    assert torch.equal(ours, trunk.observe(states[0], tokens, features, lengths).log_q)
    trained = {name for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}" for name in updates(made) for part in ("down", "up")}
    assert len(updates(made)) == 8
    weights = {name: p.data_ptr() for name, p in trunk.named_parameters()}
    assert all(layer.base.weight.data_ptr() == weights[f"{name}.weight"] for name, layer in updates(made).items())
    assert made.embedding is trunk.embedding
    assert all(p.requires_grad for p in trunk.parameters()), "the trunk itself was changed"


@pytest.mark.parametrize("way", ["trie", "concat", "confidence"])
@pytest.mark.parametrize("batch", [1, 3])
def test_side_by_side_drafts_what_each_alone_would(way: str, batch: int) -> None:
    trunk = tiny_head(seed=4)
    heads = {name: specialist(trunk, i) for i, name in enumerate(("math", "chat", "code"))}
    growth = DynamicGrowth(8, 3, 3)
    parts = tuple(Single(multiplied_out(head, trunk), growth, name) for name, head in heads.items())
    apart = ConfidenceRoute(parts) if way == "confidence" else Merge(parts, way, 10)  # type: ignore[arg-type]
    together = Stacked(stacked(heads), growth, tuple(heads), way, 10)  # type: ignore[arg-type]
    assert together.names == apart.names
    assert together.budget == apart.budget
    target = tiny_target("llama")
    asked = prompts(batch, seed=33)
    sampling = Sampling(temperature=0.8, seed=4, top_k=3)
    found = [
        [[(r.nodes, r.reached, r.owners, r.drafted) for r in g.rounds] for g in engine.generate(asked, sampling, 24)]
        for engine in (Engine(target, apart), Engine(target, together))
    ]
    assert found[0] == found[1]
    owners = {i for g in found[0] for r in g for i, nodes in enumerate(r[3]) if nodes}
    assert owners == {0, 1, 2}
    members = dict(heads)
    spec = {"trie": "merge:trie({},budget=10)", "concat": "merge:concat({})", "confidence": "route:confidence({})"}[way]
    built = build(spec.format("math,chat,code"), members, growth)
    assert isinstance(built, Stacked)
    assert (built.way, built.nodes, built.names) == (way, 10 if way == "trie" else None, together.names)
    plain = Engine(target).generate(asked, sampling, 24)
    assert [g.token_ids for g in Engine(target, together).generate(asked, sampling, 24)] == [g.token_ids for g in plain]


def test_only_specialists_of_one_trunk_are_stacked() -> None:
    trunk, other = tiny_head(seed=4), tiny_head(seed=5)
    a, b = specialist(trunk, 1), specialist(trunk, 2)
    assert specialists(stacked({"a": a, "b": b})) == 2
    assert alike([a, b])
    assert not alike([a])
    assert not alike([a, trunk])
    assert not alike([a, specialist(other, 2)])
    with pytest.raises(UserError, match="c stands on another trunk than a"):
        stacked({"a": a, "c": specialist(other, 2)})
    with pytest.raises(UserError, match="plain has no low-rank updates"):
        stacked({"a": a, "plain": trunk})
    with pytest.raises(UserError, match="wide has other layers, rank or scale than a"):
        stacked({"a": a, "wide": specialist(trunk, 2, rank=6)})
    with pytest.raises(UserError, match="already"):
        adapted(a)
