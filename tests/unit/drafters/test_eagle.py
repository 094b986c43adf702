"""The EAGLE head against the paper's equations in float64, and its three ways of drafting against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from draftsmith.drafters import checkpoint
from draftsmith.drafters.base import Frontier
from draftsmith.drafters.checkpoint import load_drafter
from draftsmith.drafters.eagle import Eagle, eagle_options
from draftsmith.foundation import artefacts
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import KINDS, VOCAB, tiny_eagle, tiny_target
from tests.unit.drafters.drafting import TREE, close, grown, observed, packed, text, unrolling_equals_decoding

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "one-key-head": {"num_key_value_heads": 1},
    "fc-bias": {"fc_bias": True},
    "bias": {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
}
REDUCED = VocabMap(torch.arange(0, VOCAB, 2), VOCAB)
TOLERANCE = 1e-4  # there is no norm before the output, so random heads' logits reach some tens


def head_of(variant: str, vocab: VocabMap | None = None) -> Eagle:
    """A head whose norms are not all ones and whose biases are not zero, so that each counts."""
    head = tiny_eagle(vocab=vocab, **VARIANTS[variant])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(float("norm" in name) + 0.3 * torch.randn(parameter.shape, generator=generator))
    return head


def by_hand(head: Eagle, ids: Tensor, features: Tensor, start: int, steps: int) -> list[Tensor]:
    """log q of drafting from position `start`, one row after another, in float64, from the equations.

    x = W_fc [e ; f] (+ b), f the target's state or the head's own of the step before; s = x + Attention(x);
    f' = s + MLP(norm(s)); softmax(W f').
    """
    w = {name: p.detach().double() for name, p in head.named_parameters()}
    o = head.options
    output = tiny_target().model.get_output_embeddings().weight.double()[head.vocab.target_ids]

    def linear(x: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", torch.zeros(()))

    def turned(x: Tensor, position: int) -> Tensor:
        angles = position * o.rope_theta ** -(torch.arange(0, o.head_dim, 2, dtype=torch.float64) / o.head_dim)
        pairs = torch.complex(x[..., : o.head_dim // 2], x[..., o.head_dim // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    keys: list[Tensor] = []
    values: list[Tensor] = []
    out: list[Tensor] = []
    state = torch.zeros(())
    for row in range(start + steps):
        f = features[row].double() if row <= start else state
        x = linear(torch.cat([head.embedding.double()[ids[row + 1]], f]), "fc")
        q, k, v = (linear(x, f"layers.0.self_attn.{p}_proj").unflatten(0, (-1, o.head_dim)) for p in "qkv")
        keys.append(turned(k, row))
        values.append(v)
        mixed = []
        for i, query in enumerate(turned(q, row)):
            shared = i // (o.num_attention_heads // o.num_key_value_heads)
            scores = torch.stack([query @ key[shared] for key in keys]) / o.head_dim**0.5
            mixed.append(scores.softmax(0) @ torch.stack([value[shared] for value in values]))
        s = x + linear(torch.cat(mixed), "layers.0.self_attn.o_proj")
        y = s / (s.square().mean() + o.rms_norm_eps).sqrt() * w["layers.0.post_attention_layernorm.weight"]
        gate = linear(y, "layers.0.mlp.gate_proj")
        gate = F.silu(gate) if o.hidden_act == "silu" else F.gelu(gate, approximate="tanh")
        state = s + linear(gate * linear(y, "layers.0.mlp.up_proj"), "layers.0.mlp.down_proj")
        if row >= start:
            out.append((output @ state).log_softmax(0))
    return out


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("vocab", [REDUCED, None], ids=["part", "whole"])
def test_drafting_equals_the_equations(variant: str, vocab: VocabMap | None) -> None:
    head = head_of(variant, vocab)
    ids, features = text(14, 1, head)
    expected = by_hand(head, ids, features, 8, 4)
    state, log_q = observed(head, ids[:10], features[:10])
    close(log_q, expected[0], TOLERANCE)
    for step in range(1, 4):
        parent = torch.tensor([[step - 2]])
        log_q = head.expand(state, Frontier(ids[None, 9 + step : 10 + step], parent, step)).log_q[0, 0]
        close(log_q, expected[step], TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unrolling_equals_observing_and_expanding(variant: str) -> None:
    head, steps = head_of(variant, REDUCED), 4
    batch, texts = packed(head, [[9, 6], [7, 5, 6]], steps)
    unrolling_equals_decoding(head, batch, texts, steps, TOLERANCE)


def test_a_tree_equals_its_chains() -> None:
    head = head_of("published")
    ids, features = text(9, 4, head)
    state, _ = observed(head, ids, features)
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, VOCAB, (1, len(level)), generator=generator) for level in TREE]
    found = grown(head, state, tokens, TREE)
    for a, b, c in [(0, 0, 1), (0, 1, 0), (0, 1, 2), (2, 2, 3)]:
        alone, _ = observed(head, ids, features)
        chain = [tokens[0][:, a : a + 1], tokens[1][:, b : b + 1], tokens[2][:, c : c + 1]]
        for level, expected in enumerate(grown(head, alone, chain, [(-1,), (0,), (0,)])):
            close(found[level][0, (a, b, c)[level]], expected[0, 0], TOLERANCE)


def test_it_holds_no_copy_of_its_targets_weights() -> None:
    target = tiny_target("llama")
    head = tiny_eagle("llama")
    assert head.wants == FeatureSpec((), final=True)
    assert head.output.data_ptr() == target.model.get_output_embeddings().weight.data_ptr()
    layer = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    names = {f"layers.0.{name}.weight" for name in (*layer, "post_attention_layernorm")}
    assert dict(head.named_parameters()).keys() == {"fc.weight", *names}, "as published (formats.md 2a)"


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_has_its_targets_shape(kind: str) -> None:
    target = tiny_target(kind)
    o = eagle_options(target.model.config, target.spec)
    assert (o.hidden_size, o.intermediate_size, o.vocab_size, o.draft_vocab_size) == (32, 48, VOCAB, VOCAB)
    assert (o.num_attention_heads, o.num_key_value_heads, o.head_dim, o.fc_bias) == (4, 2, 8, False)


@pytest.mark.parametrize("vocab", [REDUCED, VocabMap.identity(VOCAB)], ids=["part", "whole"])
def test_what_is_saved_drafts_the_same(vocab: VocabMap, tmp_path: Path) -> None:
    target, head = tiny_target(), head_of("fc-bias", vocab)
    with artefacts.writing(tmp_path / "drafter", "drafter", checkpoint.identity(head, target.spec.fingerprint)) as out:
        checkpoint.write(head, out)
    found = load_drafter(tmp_path / "drafter", target)
    assert isinstance(found, Eagle)
    assert found.vocab.digest == vocab.digest
    ids, features = text(9, 4, head)
    assert torch.equal(observed(found, ids, features)[1], observed(head, ids, features)[1])


def test_a_fresh_head_passes_the_targets_state_through() -> None:
    head = tiny_eagle(initializer_range=1e-4)
    head.begin()
    ids, features = text(6, 4, head)
    _, log_q = observed(head, ids, features)
    close(log_q, F.log_softmax(features[-2] @ head.output.T, dim=-1), 0.01)
