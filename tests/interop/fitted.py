"""Heads that accept something without being trained: in closed form, for the very texts that the test decodes.

A head of random weights is never right, and then neither the commits of a server nor its counts are exercised. Ridge
regression from the features at p to the target's last state at p+1 makes a head that often is; its attention and MLP
stay random, at a size at which they change some of its proposals, so that RoPE, norms and masks count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.export.checkpoint import HeadCheckpoint, TargetCard, rope_parameters
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap

NOISE = 0.02  # standard deviation of the random weights
LAYERS = (3, 14, 26)  # not the default (2, 15, 27), so that a server that falls back to it is seen


def states(target: HFTarget, texts: Sequence[Sequence[int]], want: FeatureSpec) -> tuple[Tensor, Tensor]:
    """Pairs (features at p `[n, F]`, last state at p+1 `[n, H]`) of all texts, float64."""
    inputs, outputs = [], []
    for ids in texts:
        hidden = target.read(torch.tensor([list(ids)]), [len(ids)], want)
        features = want.gather(hidden)
        assert features is not None
        inputs.append(features[0, :-1])
        outputs.append(hidden["final"][0, 1:])
    return torch.cat(inputs).double(), torch.cat(outputs).double()


def ridge(x: Tensor, y: Tensor, strength: float = 1e-3) -> Tensor:
    """W `[H, F]` that minimises ‖xWᵀ − y‖² + λ‖W‖², λ relative to the mean square of x."""
    gram = x @ x.T
    level = strength * gram.diagonal().mean()
    return (torch.linalg.solve(gram + level * torch.eye(len(gram), dtype=gram.dtype), y).T @ x).float()


def card(target: HFTarget, folder: str) -> TargetCard:
    config = target.model.config.to_dict()
    return TargetCard.from_config(config, name=folder, fingerprint=target.spec.fingerprint, licence="apache-2.0")


def eagle3(
    target: HFTarget, folder: str, texts: Sequence[Sequence[int]], draft_vocab: int
) -> tuple[Eagle3, HeadCheckpoint]:
    """A fitted EAGLE-3 head, and the same as a checkpoint; `folder` is the target's."""
    counts = torch.bincount(torch.tensor([token for ids in texts for token in ids]), minlength=target.spec.vocab_size)
    vocab = VocabMap.from_counts(counts, draft_vocab, target.spec.eos_ids, target.spec.vocab_size)
    options = eagle3_options(target.model.config, target.spec, vocab.size, LAYERS)
    torch.manual_seed(0)
    head = Eagle3(options, vocab, target.embedding)
    with torch.no_grad():
        for parameter in head.midlayer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=NOISE)
        head.fc.weight.copy_(ridge(*states(target, texts, FeatureSpec(LAYERS))))
        head.lm_head.weight.copy_(target.model.get_output_embeddings().weight[vocab.target_ids])
    head = head.eval().requires_grad_(False)
    config = options.model_dump()
    return head, HeadCheckpoint("eagle3", config, head.state_dict(), vocab, card(target, folder))


def eagle(target: HFTarget, folder: str, texts: Sequence[Sequence[int]]) -> HeadCheckpoint:
    """A fitted EAGLE head: the last state at p gives that at p+1."""
    options = eagle3_options(target.model.config, target.spec, target.spec.vocab_size, LAYERS)
    width, inner = options.hidden_size, options.intermediate_size
    rows = {"q": options.num_attention_heads * options.head_dim, "k": options.num_key_value_heads * options.head_dim}
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * NOISE

    fc = torch.cat([noise(width, width), ridge(*states(target, texts, FeatureSpec((), True)))], dim=1)
    tensors = {
        "fc.weight": fc,
        "layers.0.self_attn.q_proj.weight": noise(rows["q"], width),
        "layers.0.self_attn.k_proj.weight": noise(rows["k"], width),
        "layers.0.self_attn.v_proj.weight": noise(rows["k"], width),
        "layers.0.self_attn.o_proj.weight": noise(width, rows["q"]),
        "layers.0.mlp.gate_proj.weight": noise(inner, width),
        "layers.0.mlp.up_proj.weight": noise(inner, width),
        "layers.0.mlp.down_proj.weight": noise(width, inner),
        "layers.0.post_attention_layernorm.weight": torch.ones(width),
    }
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "vocab_size", "hidden_act")
    config = {name: getattr(options, name) for name in names} | {"attention_bias": False, "fc_bias": False}
    assert rope_parameters(config) == dict(card(target, folder).rope)
    return HeadCheckpoint("eagle", config, tensors, VocabMap.identity(target.spec.vocab_size), card(target, folder))
