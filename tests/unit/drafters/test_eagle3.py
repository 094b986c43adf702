"""The EAGLE-3 head against the paper's equations in float64, and its three ways of drafting against each other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from draftsmith.drafters.base import Frontier
from draftsmith.drafters.eagle3 import Eagle3, default_layers, eagle3_options
from draftsmith.drafters.head import rotary_parameters
from draftsmith.drafters.unrolled import UnrollBatch
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import KINDS, VOCAB, tiny_head, tiny_target
from tests.unit.drafters.drafting import TREE, close, grown, observed, packed, text, unrolling_equals_decoding, width_of

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "published": {},
    "all-heads": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "norm-output": {"norm_output": True},
    "fc-norm": {"fc_norm": True},
    "norm-before-fc": {"norm_before_fc": True},
    "norm-before-residual": {"norm_before_residual": True},
    "llama3-rope": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "bias": {"attention_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "everything": {"norm_output": True, "fc_norm": True, "norm_before_fc": True, "norm_before_residual": True},
}
REDUCED = VocabMap(torch.arange(0, VOCAB, 2), VOCAB)


def head_of(variant: str, vocab: VocabMap | None = None) -> Eagle3:
    """A head whose norms are not all ones, so that each counts."""
    head = tiny_head(vocab=vocab, **VARIANTS[variant])
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return head


def by_hand(head: Eagle3, ids: Tensor, features: Tensor, start: int, steps: int) -> list[Tensor]:
    """log q of drafting from position `start`, one row after another, in float64, from the equations.

    g_p = W_fc h_p, or the state of the step before; x = [norm(e), norm(g)]; s = g + Attention(x); a = s + MLP(norm(s)).
    """
    w = {name: p.detach().double() for name, p in head.named_parameters()}
    o = head.options
    embedding = head.embedding.double()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean() + o.rms_norm_eps).sqrt() * weight

    def linear(x: Tensor, name: str) -> Tensor:
        bias = w.get(f"{name}.bias")
        return w[f"{name}.weight"] @ x + (bias if bias is not None else 0)

    def frequencies() -> Tensor:
        inverse = o.rope_theta ** -(torch.arange(0, o.head_dim, 2, dtype=torch.float64) / o.head_dim)
        if o.rope_scaling is None:
            return inverse
        # Llama 3.1: slow rotations are slowed by `factor`, fast ones kept, those between interpolated.
        turns = o.rope_scaling["original_max_position_embeddings"] * inverse / (2 * torch.pi)
        low, high = o.rope_scaling["low_freq_factor"], o.rope_scaling["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return inverse * (smooth + (1 - smooth) / o.rope_scaling["factor"])

    def turned(x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(x[..., : o.head_dim // 2], x[..., o.head_dim // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(frequencies()), frequencies() * position)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def fused(h: Tensor) -> Tensor:
        if o.norm_before_fc:
            h = norm(h, w["input_norm.weight"])
        if o.fc_norm:
            size = o.target_hidden_size
            parts = [norm(h[i * size : (i + 1) * size], w[f"fc_norm.{i}.weight"]) for i in range(3)]
            h = torch.cat(parts)
        return linear(h, "fc")

    keys: list[Tensor] = []
    values: list[Tensor] = []
    out: list[Tensor] = []
    state = torch.zeros(())
    for row in range(start + steps):
        if row <= start:
            g = fused(features[row].double())
        else:
            g = norm(state, w["norm.weight"]) if o.norm_output else state
        normed = norm(g, w["midlayer.hidden_norm.weight"])
        embed = norm(embedding[ids[row + 1]], w["midlayer.input_layernorm.weight"])
        x = torch.cat([embed, normed])
        attention = "midlayer.self_attn"
        q, k, v = (linear(x, f"{attention}.{p}_proj").unflatten(0, (-1, o.head_dim)) for p in "qkv")
        keys.append(turned(k, row))
        values.append(v)
        mixed = []
        for i, query in enumerate(turned(q, row)):
            shared = i // (o.num_attention_heads // o.num_key_value_heads)
            scores = torch.stack([query @ key[shared] for key in keys]) / o.head_dim**0.5
            mixed.append(scores.softmax(0) @ torch.stack([value[shared] for value in values]))
        s = (normed if o.norm_before_residual else g) + linear(torch.cat(mixed), f"{attention}.o_proj")
        y = norm(s, w["midlayer.post_attention_layernorm.weight"])
        gate = linear(y, "midlayer.mlp.gate_proj")
        gate = F.silu(gate) if o.hidden_act == "silu" else F.gelu(gate, approximate="tanh")
        state = s + linear(gate * linear(y, "midlayer.mlp.up_proj"), "midlayer.mlp.down_proj")
        if row >= start:
            out.append(linear(norm(state, w["norm.weight"]), "lm_head").log_softmax(0))
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_drafting_equals_the_equations(variant: str) -> None:
    head = head_of(variant, REDUCED)
    ids, features = text(14, 1, head)
    expected = by_hand(head, ids, features, 8, 4)
    state, log_q = observed(head, ids[:10], features[:10])
    close(log_q, expected[0], 1e-4)
    for step in range(1, 4):
        parent = torch.tensor([[step - 2]])
        log_q = head.expand(state, Frontier(ids[None, 9 + step : 10 + step], parent, step)).log_q[0, 0]
        close(log_q, expected[step], 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unrolling_equals_observing_and_expanding(variant: str) -> None:
    """Packed rows, several texts in each, at every start and step: what is trained is what decodes."""
    head, steps = head_of(variant, REDUCED), 4
    batch, texts = packed(head, [[9, 6], [7, 5, 6]], steps)
    unrolling_equals_decoding(head, batch, texts, steps)


@pytest.mark.parametrize("variant", ["published", "everything"])
def test_a_tree_equals_each_of_its_chains(variant: str) -> None:
    head = head_of(variant)
    ids, features = text(9, 4, head)
    state, _ = observed(head, ids, features)
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(0, VOCAB, (1, len(level)), generator=generator) for level in TREE]
    found = grown(head, state, tokens, TREE)
    for a, b, c in itertools.product(range(3), range(3), range(4)):
        if TREE[1][b] != a or TREE[2][c] != b:
            continue
        alone, _ = observed(head, ids, features)
        chain = [tokens[0][:, a : a + 1], tokens[1][:, b : b + 1], tokens[2][:, c : c + 1]]
        expected = grown(head, alone, chain, [(-1,), (0,), (0,)])
        for level, node in enumerate((a, b, c)):
            close(found[level][0, node], expected[level][0, 0])


def test_a_batch_of_uneven_lengths_equals_each_alone() -> None:
    """Three rounds of observations of different lengths (none, too), trees between them; the buffers grow twice."""
    head = head_of("published", REDUCED)
    counts = [[5, 2, 9], [3, 1, 0], [1, 4, 2]]
    texts = [text(14, 20 + b, head) for b in range(3)]
    generator = torch.Generator().manual_seed(2)
    trees = [[torch.randint(0, VOCAB, (3, len(level)), generator=generator) for level in TREE] for _ in counts]

    def run(rows: list[int]) -> list[Tensor]:
        state, done, out = head.start(len(rows), 6), [0] * len(rows), []
        for lengths, tree in zip(counts, trees, strict=True):
            own = [lengths[b] for b in rows]
            ids = torch.zeros((len(rows), max(own) + 1), dtype=torch.int64)
            features = torch.randn(len(rows), max(own) + 1, width_of(head))
            for i, (b, n) in enumerate(zip(rows, own, strict=True)):
                ids[i, :n] = texts[b][0][done[i] : done[i] + n]
                for j in range(n):
                    if done[i] + j:
                        features[i, j] = texts[b][1][done[i] + j - 1]
                done[i] += n
            out.append(head.observe(state, ids, features, own).log_q)
            out += grown(head, state, [level[rows] for level in tree], TREE)
        return out

    together = run([0, 1, 2])
    for b in range(3):
        for found, expected in zip(together, run([b]), strict=True):
            close(found[b], expected[0])


def test_gradient_reaches_every_parameter_and_prompts_are_not_drafted_from() -> None:
    head, steps = head_of("everything", REDUCED), 3
    batch, _ = packed(head, [[9, 8]], steps)
    # drafts start in the second half of the second text only
    starts = torch.tensor([[9 + 4, 9 + 3]])
    features = batch.features.clone().requires_grad_(True)
    batch = UnrollBatch(
        batch.ids, features, batch.segments, batch.positions, starts, torch.ones(1, 2, dtype=torch.bool)
    )
    queries: list[int] = []
    head.midlayer.self_attn.q_proj.register_forward_hook(lambda module, args, out: queries.append(out.shape[1]))
    states = [out.states for out in head.unroll(batch, steps)]
    assert queries == [2] * steps
    assert [s.shape for s in states] == [(1, 2, head.options.hidden_size)] * steps
    sum(head.log_q(s)[..., 0].sum() for s in states).backward()  # type: ignore[union-attr]
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
    assert features.grad is not None
    reached = features.grad[0].abs().sum(-1) > 0
    # the other text and what comes after the last start are not read
    assert reached.tolist() == [9 <= p <= 13 for p in range(len(reached))]


def test_steps_computed_again_give_the_same_gradient() -> None:
    head, steps = head_of("published", REDUCED), 3
    batch, texts = packed(head, [[9, 8]], steps)
    unrolling_equals_decoding(head, batch, texts, steps, checkpoint_steps=True)

    def gradients(again: bool) -> dict[str, Tensor]:
        head.zero_grad()
        sum(
            head.log_q(out.states)[..., 0].sum() for out in head.unroll(batch, steps, checkpoint_steps=again)
        ).backward()  # type: ignore[union-attr]
        return {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}

    once, again = gradients(False), gradients(True)
    assert once.keys() == again.keys() == dict(head.named_parameters()).keys()
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("detach", [False, True])
def test_detached_steps_pass_no_gradient_on(detach: bool) -> None:
    head = head_of("published")
    batch, _ = packed(head, [[9]], 3)
    first, _, last = (out.states for out in head.unroll(batch, 3, detach_steps=detach))
    (gradient,) = torch.autograd.grad(last.sum(), first, allow_unused=True)
    assert (gradient is None) == detach


def test_a_head_that_has_decoded_can_still_be_trained() -> None:
    """Tables and caches made under inference mode must not find their way into a training pass."""
    head = head_of("published")
    ids, features = text(9, 4, head)
    observed(head, ids, features)
    batch, _ = packed(head, [[9]], 2)
    for out in head.unroll(batch, 2):
        head.log_q(out.states).sum().backward(retain_graph=True)
    assert head.fc.weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_has_its_targets_shape(kind: str) -> None:
    target = tiny_target(kind)
    o = eagle3_options(target.model.config, target.spec, 40)
    assert o.auxiliary_layers == default_layers(8) == (2, 4, 5)
    assert (o.hidden_size, o.target_hidden_size, o.intermediate_size, o.draft_vocab_size) == (32, 32, 48, 40)
    assert (o.num_attention_heads, o.num_key_value_heads, o.head_dim) == (4, 2, 8)
    head = Eagle3(o, VocabMap(torch.arange(40), VOCAB), target.embedding)
    assert "embed_tokens.weight" not in head.state_dict()
    assert head.wants.names == (2, 4, 5)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_head_begins_with_its_targets_norm_and_output(kind: str) -> None:
    """The norm's own arithmetic is what counts: Gemma stores its weight less one."""
    target = tiny_target(kind)
    norm = target.model.base_model.norm
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32, generator=torch.Generator().manual_seed(3)))
    head = tiny_head(kind, REDUCED)
    head.begin_from(target.model.get_output_embeddings().weight, norm)
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    close(head.norm(states), norm(states))
    close(head.judged(states) @ head.output.T, (norm(states) @ target.output_rows(None).T)[:, REDUCED.target_ids], 1e-4)
    with torch.no_grad():
        norm.weight.fill_(0.0 if kind == "gemma3" else 1.0)


@pytest.mark.parametrize("layers", [(2, 2, 5), (2, 4, 8), (-1, 2, 4)])
def test_auxiliary_layers_that_collide_or_lie_outside_are_refused(layers: tuple[int, ...]) -> None:
    target = tiny_target("llama")
    with pytest.raises(ValueError, match="auxiliary layers"):
        eagle3_options(target.model.config, target.spec, 40, layers)


def test_rotary_parameters_of_several_kinds_of_configuration() -> None:
    class Config:
        rope_parameters: Any = None
        rope_theta: Any = None

    config = Config()
    assert rotary_parameters(config) == (10000.0, None)
    config.rope_theta = 5e5
    assert rotary_parameters(config) == (5e5, None)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
    assert rotary_parameters(config) == (1e6, None)
    config.rope_parameters = {**LLAMA3, "rope_theta": 1e6}
    assert rotary_parameters(config) == (1e6, LLAMA3)
    full = {"rope_type": "default", "rope_theta": 1e6}
    config.rope_parameters = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": full}
    assert rotary_parameters(config) == (1e6, None)
