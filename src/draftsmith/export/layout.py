"""Which tensors a head consists of, with their shapes; and the other names under which the world stores them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Shape = tuple[int, ...]

# Written by others for the same tensors: EAGLE-3's layer, and the per-layer norms of early fc_norm heads
# (sglang srt/models/llama_eagle3.py, load_weights).
_LEGACY = {
    "layers.0.": "midlayer.",
    "aux_norm_low.": "fc_norm.0.",
    "aux_norm_mid.": "fc_norm.1.",
    "aux_norm_high.": "fc_norm.2.",
}

MAPS = ("d2t", "t2d")
EMBEDDINGS = "embed_tokens.weight"


def head_shapes(kind: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor that a head of this configuration must have, by its name inside draftsmith.

    Args:
        kind: `eagle` or `eagle3`.
        config: a `HeadCheckpoint.config`.

    Raises:
        KeyError: a size is missing from `config`.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    joined = 2 * width if kind == "eagle3" else width
    layer = layer_prefix(kind)
    shapes: dict[str, Shape] = {
        f"{layer}self_attn.q_proj.weight": (queries, joined),
        f"{layer}self_attn.k_proj.weight": (keys, joined),
        f"{layer}self_attn.v_proj.weight": (keys, joined),
        f"{layer}self_attn.o_proj.weight": (width, queries),
        f"{layer}mlp.gate_proj.weight": (inner, width),
        f"{layer}mlp.up_proj.weight": (inner, width),
        f"{layer}mlp.down_proj.weight": (width, inner),
        f"{layer}post_attention_layernorm.weight": (width,),
    }
    if config.get("attention_bias"):
        rows = {"q": queries, "k": keys, "v": keys, "o": width}
        shapes |= {f"{layer}self_attn.{name}_proj.bias": (size,) for name, size in rows.items()}
    if kind == "eagle":
        shapes["fc.weight"] = (width, 2 * width)
        if config.get("fc_bias"):
            shapes["fc.bias"] = (width,)
        return shapes
    features, count = config.get("target_hidden_size") or width, len(config["auxiliary_layers"])
    shapes |= {
        "fc.weight": (width, count * features),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}hidden_norm.weight": (width,),
        "norm.weight": (width,),
        "lm_head.weight": (config["draft_vocab_size"], width),
    }
    if config.get("norm_before_fc"):
        shapes["input_norm.weight"] = (count * features,)
    if config.get("fc_norm"):
        shapes |= {f"fc_norm.{index}.weight": (features,) for index in range(count)}
    return shapes


def layer_prefix(kind: str) -> str:
    """The prefix of the decoder layer's tensors inside draftsmith."""
    return "midlayer." if kind == "eagle3" else "layers.0."


def native_names(kind: str, names: Iterable[str]) -> dict[str, str]:
    """Stored names → names inside draftsmith. A prefix `model.` that all of a head's own tensors carry is dropped."""
    stored = list(names)
    prefixed = "model.fc.weight" in stored
    out: dict[str, str] = {}
    for name in stored:
        native = name.removeprefix("model.") if prefixed else name
        if kind == "eagle3":
            for theirs, ours in _LEGACY.items():
                if native.startswith(theirs):
                    native = ours + native.removeprefix(theirs)
        out[name] = native
    return out


def why(name: str, kind: str) -> str:
    """What an unexpected tensor usually means, for the person who has to mend it."""
    if name.endswith("input_layernorm.weight") and kind == "eagle":
        return "EAGLE heads have no norm before their attention; servers drop this tensor and decode something else"
    if name == "norm.weight" and kind == "eagle":
        return "EAGLE heads have no final norm; servers drop this tensor"
    if name == "lm_head.weight" and kind == "eagle":
        return "EAGLE heads use the target's lm_head; SGLang drops this tensor"
    if name == "fc.bias" and kind == "eagle3":
        return "EAGLE-3 heads have no bias on fc; both servers drop it without a word"
    if name.endswith(".bias"):
        return "no server loads it: it would be dropped without a word"
    if "q_norm" in name or "k_norm" in name:
        return "a Qwen3-style layer with query and key norms, which this head does not have"
    if name.startswith(("layers.1.", "midlayer.1.")):
        return "a second decoder layer; heads here have one"
    return "servers drop unknown tensors without a word, or refuse the folder"
