"""The native folder formats of EAGLE-3 and EAGLE heads, and how an export folder is written.

The EAGLE-3 folder is portable: vLLM, SGLang and llama.cpp read the same one. EAGLE folders differ by server (`vllm`,
`sglang`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.export import card, serving
from draftsmith.export.auxiliary import server_ids
from draftsmith.export.checkpoint import Exported, Extras, HeadCheckpoint, rope_parameters, split_rope
from draftsmith.export.layout import head_shapes
from draftsmith.foundation.artefacts import save_tensors, write_json, writing
from draftsmith.foundation.errors import UserError

FORMAT = 1
# In a folder of its own: vLLM and SGLang load every *.safetensors that lies beside the weights as weights.
GOLDEN = "draftsmith/golden.safetensors"


def record(head: HeadCheckpoint, server: str, extras: Extras) -> dict[str, object]:
    """What an export adds to `config.json` under `draftsmith`: servers ignore it, `check` and `import` read it."""
    out: dict[str, object] = {
        "format": FORMAT,
        "kind": head.kind,
        "server": server,
        "target": {"name": head.target.name, "fingerprint": head.target.fingerprint},
        "vocabulary": head.vocab.digest,
        "vocabulary_filled": head.vocab.filled,
        "serving": asdict(extras.serving),
    }
    if extras.keep_rope and dict(head.target.rope) != rope_parameters(head.config):
        out["own_rope"] = True
    if head.auxiliary_layers:
        out["auxiliary_boundaries"] = list(head.auxiliary_layers)
    return out


def layer_config(head: HeadCheckpoint, extras: Extras) -> dict[str, object]:
    """The part that all formats share: a one-layer Llama configuration with the target's RoPE and lengths.

    Raises:
        UserError: the head was trained with another RoPE than the target's.
    """
    config, target = head.config, head.target
    own = rope_parameters(config)
    if target.rope and dict(target.rope) != own and not extras.keep_rope:
        raise UserError(
            f"rope_parameters: the head was trained with {own}, its target {target.name} has {dict(target.rope)}; "
            "they should be the same. Train the head with the target's, or, if it was trained so elsewhere, keep its "
            "own with export.keep_rope=true"
        )
    theta, scaling = split_rope(own)
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "num_key_value_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "hidden_act": config.get("hidden_act", "silu"),
        "rms_norm_eps": config["rms_norm_eps"],
        "attention_bias": bool(config.get("attention_bias")),
        "mlp_bias": False,
        "vocab_size": head.vocab.vocab_size,
        "max_position_embeddings": target.max_positions or config["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": own,
        "tie_word_embeddings": False,
        "torch_dtype": head.dtype,
    }


def eagle3_config(head: HeadCheckpoint, server: str, extras: Extras) -> dict[str, object]:
    """`config.json` of the portable EAGLE-3 folder: both auxiliary-id conventions, sizes and norms spelled out."""
    config = head.config
    top, nested = server_ids(head.auxiliary_layers, head.target)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        **layer_config(head, extras),
        "draft_vocab_size": head.vocab.size,
        "norm_before_residual": bool(config.get("norm_before_residual")),
        "norm_before_fc": bool(config.get("norm_before_fc")),
        "fc_norm": bool(config.get("fc_norm")),
        "norm_output": bool(config.get("norm_output")),
        "num_aux_hidden_states": len(head.auxiliary_layers),
        "eagle_aux_hidden_state_layer_ids": top,
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": nested,
        },
        "draftsmith": record(head, server, extras),
    }


def eagle3_tensors(head: HeadCheckpoint) -> dict[str, Tensor]:
    """The stored tensors: the head's own, and the maps where the draft vocabulary is a part of the target's."""
    maps = {} if head.vocab.is_identity else {"d2t": head.vocab.d2t, "t2d": head.vocab.t2d}
    return {**head.tensors, **maps}


def require(head: HeadCheckpoint, kind: str) -> None:
    """Refuse a head whose parts do not fit together, before anything is written.

    Raises:
        UserError: names the field or tensor.
    """
    if head.kind != kind:
        raise UserError(f"this is an {head.kind} head, not an {kind} head")
    config, target, vocab = head.config, head.target, head.vocab
    wanted = head_shapes(kind, config)
    if missing := sorted(wanted.keys() - head.tensors.keys()):
        raise UserError(
            f"tensor {missing[0]} is missing from the head: its checkpoint is not whole, train or import it again"
        )
    if extra := sorted(head.tensors.keys() - wanted.keys()):
        raise UserError(f"tensor {extra[0]} belongs to no {kind} head of this configuration: no server would load it")
    for name, shape in wanted.items():
        if tuple(head.tensors[name].shape) != shape:
            raise UserError(
                f"tensor {name} is {list(head.tensors[name].shape)} where the configuration says {list(shape)}"
            )
    sizes = [
        ("vocab_size", config["vocab_size"], "the draft vocabulary's map", vocab.vocab_size),
        ("vocab_size", config["vocab_size"], f"the target {target.name}", target.vocab_size),
        ("hidden_size", config["hidden_size"], f"the target {target.name}", target.hidden_size),
    ]
    if kind == "eagle3":
        sizes.append(("draft_vocab_size", config["draft_vocab_size"], "the draft vocabulary's map", vocab.size))
    for field, own, whose, other in sizes:
        if own != other:
            raise UserError(
                f"{field} is {own} in the head and {other} in {whose}: this head was made for something else"
            )


def write(
    folder: Path,
    server: str,
    head: HeadCheckpoint,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    extras: Extras,
    notes: tuple[str, ...] = (),
) -> Exported:
    """Write the folder (configuration, weights, golden output, card, manifest) as one artefact of kind `export`."""
    commands = serving.commands(server, head.kind, head.target, folder, extras)
    exported = Exported(folder, server, commands, (*head.notes, *notes))
    meta = {key: value for key, value in record(head, server, extras).items() if key != "format"}
    with writing(folder, "export", meta) as scratch:
        write_json(scratch / "config.json", config)
        save_tensors(scratch / "model.safetensors", tensors, {"format": "pt"})
        if extras.golden is not None:
            stored = {
                f"{part}.{name}": t
                for part in ("inputs", "outputs")
                for name, t in getattr(extras.golden, part).items()
            }
            (scratch / GOLDEN).parent.mkdir()
            save_tensors(scratch / GOLDEN, stored)
        text = card.render(exported, head, extras.facts)
        (scratch / "README.md").write_text(text, encoding="utf-8")
    return exported
