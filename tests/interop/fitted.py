"""Heads that accept something without being trained: in closed form, for the very texts that the test decodes.

A head of random weights is never right, and then neither the commits of a server nor its counts are exercised. Ridge
regression from the features at p to the target's last state at p+1 makes a head that often is; its attention and MLP
stay random, at a size at which they change some of its proposals, so that RoPE, norms and masks count.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from draftsmith.decoding.engine import Engine
from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.export.checkpoint import HeadCheckpoint, TargetCard, rope_parameters
from draftsmith.export.served import Endless
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


def eagle3(target: HFTarget, folder: str, texts: Sequence[Sequence[int]], draft_vocab: int) -> HeadCheckpoint:
    """A fitted EAGLE-3 head; `folder` is the target's."""
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
    return HeadCheckpoint("eagle3", options.model_dump(), head.state_dict(), vocab, card(target, folder))


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


def with_rolled_fc(head: Eagle3) -> Eagle3:
    """The same head reading its auxiliary layers in another order: what a server makes of ids gone wrong."""
    out = Eagle3(head.options, head.vocab, head.embedding)
    weights = dict(head.state_dict())
    weights["fc.weight"] = weights["fc.weight"].roll(head.options.target_hidden_size, dims=1)
    out.load_state_dict(weights)
    return out.eval().requires_grad_(False)


def coarse(folder: Path, out: Path, bits: int = 4) -> Path:
    """A target's folder with the weights of its layers rounded to few bits a row: a draft that is often right."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    levels = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "layers." in name:
                step = weight.abs().amax(dim=1, keepdim=True) / levels
                weight.copy_((weight / step).round() * step)
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / name, out / name)
    return out


def standalone_accepts(draft: HFTarget, setting: Any, answers: Sequence[Sequence[int]], chain: int) -> list[int]:
    """Accepted tokens of each plain answer with a chain of a standalone draft, from one teacher-forced pass each.

    A drafted token counts only if all before it were accepted, so each was drafted behind the answer's own tokens: the
    chain that starts at t accepts as many as the draft's first choices from t on agree with the text.
    """
    out = []
    on = Endless(setting.target)
    for prompt, answer in zip(setting.prompts, answers, strict=True):
        (more,) = Engine(on).generate([[*prompt, *answer]], max_new_tokens=chain + 2)
        text = [*prompt, *answer, *more.token_ids]
        hidden = draft.read(torch.tensor([text]), [len(text)], FeatureSpec())["final"]
        agrees = (draft.project(hidden)[0, :-1].argmax(-1) == torch.tensor(text[1:])).tolist()
        out.append(walk(agrees, len(prompt), len(answer), chain))
    return out


def walk(agrees: Sequence[bool], prompt: int, answer: int, chain: int) -> int:
    """Accepted tokens of chains over an answer; `agrees[t]`: the token after t is the one that would be drafted."""
    written, accepted = 1, 0
    while written < answer:
        depth = 0
        while depth < chain and agrees[prompt + written - 1 + depth]:
            depth += 1
        accepted += depth
        written += depth + 1
    return accepted


def eagle_accepts(head: HeadCheckpoint, setting: Any, answers: Sequence[Sequence[int]], chain: int) -> list[int]:
    """Accepted tokens of each plain answer with a chain of an EAGLE head, by the formula: no cache, no engine."""
    target, on = setting.target, Endless(setting.target)
    out = []
    for prompt, answer in zip(setting.prompts, answers, strict=True):
        (more,) = Engine(on).generate([[*prompt, *answer]], max_new_tokens=chain + 2)
        text = [*prompt, *answer, *more.token_ids]
        states = target.read(torch.tensor([text]), [len(text)], FeatureSpec())["final"][0]
        written, accepted = 1, 0
        while written < len(answer):
            known = len(prompt) + written
            tokens, features = list(text[1:known]), states[: known - 1]
            depth = 0
            while depth < chain:
                last = eagle_rows(head, target.embedding[torch.tensor(tokens)].float(), features)[-1:]
                token = int(target.project(last).argmax())
                if token != text[known + depth]:
                    break
                depth += 1
                tokens, features = [*tokens, token], torch.cat([features, last])
            accepted += depth
            written += depth + 1
        out.append(accepted)
    return out


def eagle_rows(head: HeadCheckpoint, embeddings: Tensor, features: Tensor) -> Tensor:
    """EAGLE's layer (2401.15077, §3.1) over rows (embedding of the next token, state): `[n, H]`, plain causal."""
    c, w = head.config, head.tensors
    rows, d = len(features), c["head_dim"]
    angles = torch.arange(rows)[:, None] * c["rope_theta"] ** (-torch.arange(0, d, 2) / d)
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def heads(name: str, turned: bool) -> Tensor:
        x = (inputs @ w[f"layers.0.self_attn.{name}.weight"].T).unflatten(1, (-1, d)).transpose(0, 1)
        return x * cos + torch.cat([-x[..., d // 2 :], x[..., : d // 2]], dim=-1) * sin if turned else x

    inputs = torch.cat([embeddings, features], dim=1) @ w["fc.weight"].T
    groups = c["num_attention_heads"] // c["num_key_value_heads"]
    k, v = (heads(*which).repeat_interleave(groups, 0) for which in (("k_proj", True), ("v_proj", False)))
    scores = heads("q_proj", True) @ k.transpose(1, 2) / d**0.5
    mixed = scores.masked_fill(~torch.ones(rows, rows).tril().bool(), -torch.inf).softmax(-1) @ v
    x = inputs + mixed.transpose(0, 1).flatten(1) @ w["layers.0.self_attn.o_proj.weight"].T
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c["rms_norm_eps"])
    normed = normed * w["layers.0.post_attention_layernorm.weight"]
    gate, up = (normed @ w[f"layers.0.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    out: Tensor = x + (torch.nn.functional.silu(gate) * up) @ w["layers.0.mlp.down_proj.weight"].T
    return out
