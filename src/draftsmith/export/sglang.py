"""Export for SGLang: the portable EAGLE-3 folder, EAGLE heads with the bias that its layer has, standalone drafts as
they are.

Read from SGLang 0.5.23: srt/models/llama_eagle3.py, llama_eagle.py and llama.py.
"""

from __future__ import annotations

from pathlib import Path

import torch

from draftsmith.export import native, transformers
from draftsmith.export.auxiliary import captured_by_sglang, server_ids
from draftsmith.export.checkpoint import PLAIN, Drafter, Exported, Extras, HeadCheckpoint, StandaloneDraft
from draftsmith.export.vllm import refuse_other_width
from draftsmith.foundation.errors import UserError


def export(drafter: Drafter, folder: Path, extras: Extras = PLAIN) -> Exported:
    """Write a folder for `python -m sglang.launch_server`.

    Raises:
        UserError: SGLang can't run this drafter; the text says why.
    """
    if isinstance(drafter, StandaloneDraft):
        return transformers.copy(drafter, folder, "sglang", extras)
    if (act := drafter.config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"hidden_act: SGLang runs heads with silu only, this one has {act}")
    if drafter.kind == "eagle3":
        return _eagle3(drafter, folder, extras)
    return _eagle(drafter, folder, extras)


def _eagle3(head: HeadCheckpoint, folder: Path, extras: Extras) -> Exported:
    native.require(head, "eagle3")
    refuse_other_width(head, "SGLang")
    if head.config.get("norm_before_residual"):
        raise UserError(
            "norm_before_residual: SGLang's EAGLE-3 layer always takes the state before the norm as its residual, so "
            "this head would draft something else; serve it with vLLM, or train it with norm_before_residual=false"
        )
    if head.config.get("attention_bias"):
        raise UserError(
            "attention_bias: SGLang's EAGLE-3 layer has no bias on q, k and v, and would drop them; serve it with vLLM"
        )
    boundaries = list(head.auxiliary_layers)
    if captured_by_sglang(server_ids(boundaries, head.target)[1], head.target) != boundaries:
        raise UserError(
            f"auxiliary_layers {boundaries}: SGLang can't be made to capture boundary 1 of "
            f"{head.target.architectures[0]} (it adds "
            "one to the ids where the first is 1, and only there); train the head on other layers"
        )
    config = native.eagle3_config(head, "sglang", extras)
    return native.write(folder, "sglang", head, config, native.eagle3_tensors(head), extras)


def _eagle(head: HeadCheckpoint, folder: Path, extras: Extras) -> Exported:
    native.require(head, "eagle")
    weight = head.tensors["fc.weight"]
    # Its fc has a bias whatever the configuration says: uninitialised where the checkpoint has none (sglang#5773).
    bias = head.tensors.get("fc.bias", torch.zeros(weight.shape[0], dtype=weight.dtype))
    config = {
        "architectures": ["LlamaForCausalLMEagle"],
        **native.layer_config(head, extras),
        # `bias: true` would give its *attention* uninitialised biases (srt/models/llama.py reads it beside
        # attention_bias).
        "bias": False,
        "draftsmith": native.record(head, "sglang", extras),
    }
    return native.write(folder, "sglang", head, config, {**head.tensors, "fc.bias": bias}, extras)
