"""Export for llama.cpp: a folder that its own converter reads, and the commands that convert and serve it.

Read from llama.cpp b11434's convert_hf_to_gguf.py and eagle3.cpp: EAGLE-3 heads (three auxiliary layers, one decoder
layer) and whole models; ids only from the top level of the configuration.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.export import native, transformers
from draftsmith.export.checkpoint import PLAIN, Drafter, Exported, Extras, StandaloneDraft
from draftsmith.export.vllm import refuse_other_width
from draftsmith.foundation.errors import UserError


def export(drafter: Drafter, folder: Path, extras: Extras = PLAIN) -> Exported:
    """Write a folder for llama.cpp's converter; the commands in the result convert and serve it.

    Raises:
        UserError: llama.cpp can't run this drafter; the text says why.
    """
    if isinstance(drafter, StandaloneDraft):
        return transformers.copy(drafter, folder, "gguf", extras)
    if drafter.kind != "eagle3":
        raise UserError("llama.cpp runs EAGLE-3 heads and standalone drafts; it has no EAGLE, EAGLE-2 or HASS heads")
    native.require(drafter, "eagle3")
    refuse_other_width(drafter, "llama.cpp")
    if len(drafter.auxiliary_layers) != 3:
        raise UserError(
            f"auxiliary_layers: llama.cpp takes exactly three, this head has {len(drafter.auxiliary_layers)}"
        )
    for name in ("norm_output", "fc_norm", "attention_bias"):
        if drafter.config.get(name):
            raise UserError(
                f"{name}: llama.cpp's EAGLE-3 does not know it and would draft something else; serve the head with vLLM"
            )
    if (act := drafter.config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"hidden_act: llama.cpp runs heads with silu only, this one has {act}")
    notes = ("TARGET.gguf is the target, converted by the same script without --target-model-dir.",)
    config = native.eagle3_config(drafter, "gguf", extras)
    return native.write(folder, "gguf", drafter, config, native.eagle3_tensors(drafter), extras, notes)
