"""Tiny heads, targets and folders as others publish them, for the tests of export, check and import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.export.checkpoint import HeadCheckpoint, TargetCard, rope_parameters
from draftsmith.target.vocabulary import VocabMap

V, VD, H, LAYERS = 40, 12, 16, 8
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Neither the default (2, 4, 5) nor the default less one, so that a fallback can't pass for what was written.
BOUNDARIES = (1, 3, 6)


def card(**changes: Any) -> TargetCard:
    """A Llama-like target of 8 layers."""
    fields: dict[str, Any] = {
        "name": "somebody/tiny-target",
        "fingerprint": "0123456789abcdef",
        "architectures": ("LlamaForCausalLM",),
        "model_type": "llama",
        "vocab_size": V,
        "hidden_size": H,
        "layers": LAYERS,
        "rope": {"rope_theta": 100000.0, "rope_type": "default"},
        "max_positions": 512,
        "licence": "apache-2.0",
    }
    return TargetCard(**{**fields, **changes})


def config(kind: str, **changes: Any) -> dict[str, Any]:
    """A head's configuration under draftsmith's names; heads wider than H/heads, so that sizes can't be confused."""
    out: dict[str, Any] = {
        "hidden_size": H,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "max_position_embeddings": 512,
        "vocab_size": V,
        "hidden_act": "silu",
        "attention_bias": False,
    }
    if kind == "eagle":
        out["fc_bias"] = False
    else:
        norms = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
        out |= {"draft_vocab_size": VD, "target_hidden_size": H, "auxiliary_layers": BOUNDARIES}
        out |= dict.fromkeys(norms, False)
    return {**out, **changes}


def tensors(kind: str, c: Mapping[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Random weights; the table of formats.md 2a and 2b, spelled out here a second time on purpose."""
    draw = torch.Generator().manual_seed(seed)
    nq, nkv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    width, inner = c["hidden_size"], c["intermediate_size"]
    layer, into = ("midlayer", 2 * width) if kind == "eagle3" else ("layers.0", width)
    shapes = {
        f"{layer}.self_attn.q_proj.weight": (nq, into),
        f"{layer}.self_attn.k_proj.weight": (nkv, into),
        f"{layer}.self_attn.v_proj.weight": (nkv, into),
        f"{layer}.self_attn.o_proj.weight": (width, nq),
        f"{layer}.mlp.gate_proj.weight": (inner, width),
        f"{layer}.mlp.up_proj.weight": (inner, width),
        f"{layer}.mlp.down_proj.weight": (width, inner),
        f"{layer}.post_attention_layernorm.weight": (width,),
    }
    if kind == "eagle":
        shapes["fc.weight"] = (width, 2 * width)
        if c["fc_bias"]:
            shapes["fc.bias"] = (width,)
    else:
        shapes["fc.weight"] = (width, 3 * width)
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.hidden_norm.weight"] = (width,)
        shapes["norm.weight"] = (width,)
        shapes["lm_head.weight"] = (c["draft_vocab_size"], width)
        if c["norm_before_fc"]:
            shapes["input_norm.weight"] = (3 * width,)
        if c["fc_norm"]:
            shapes |= {f"fc_norm.{i}.weight": (width,) for i in range(3)}
    if c["attention_bias"]:
        for name, size in (("q", nq), ("k", nkv), ("v", nkv), ("o", width)):
            shapes[f"{layer}.self_attn.{name}_proj.bias"] = (size,)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def vocabulary(size: int = VD) -> VocabMap:
    """`size` of the V ids, with gaps; the whole vocabulary for V."""
    if size == V:
        return VocabMap.identity(V)
    counts = torch.zeros(V)
    counts[torch.randperm(V, generator=torch.Generator().manual_seed(3))[: size - 2]] = 1.0
    return VocabMap.from_counts(counts, size, (V - 1,), V)


def head(kind: str = "eagle3", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> HeadCheckpoint:
    """A random head for `card()`."""
    c = config(kind, **changes)
    vocab = vocabulary(c["draft_vocab_size"]) if kind == "eagle3" else VocabMap.identity(V)
    target = card(rope=rope_parameters(c))
    return HeadCheckpoint(kind, c, tensors(kind, c, dtype), vocab, target)  # type: ignore[arg-type]


def edit(folder: Path, **fields: Any) -> None:
    """Plant fields in a folder's config.json; None removes one."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **fields}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")
    (folder / "manifest.json").unlink(missing_ok=True)


def replant(folder: Path, changed: Mapping[str, Tensor | None]) -> None:
    """Plant tensors in a folder's weights; None removes one."""
    stored = {**load_file(folder / "model.safetensors"), **changed}
    save_file({k: t for k, t in stored.items() if t is not None}, folder / "model.safetensors")
    (folder / "manifest.json").unlink(missing_ok=True)


def publish(folder: Path, c: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Path:
    """A folder as somebody else would publish it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(c)), encoding="utf-8")
    save_file({k: t.contiguous() for k, t in stored.items()}, folder / "model.safetensors")
    return folder
