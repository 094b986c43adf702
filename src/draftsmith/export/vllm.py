"""Export for vLLM: the portable EAGLE-3 folder, EAGLE heads under vLLM's architecture name, standalone drafts as they
are.

Read from vLLM 0.32.0: model_executor/models/llama_eagle3.py and llama_eagle.py, transformers_utils/configs/eagle.py.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.export import native, transformers
from draftsmith.export.checkpoint import PLAIN, Drafter, Exported, Extras, HeadCheckpoint, StandaloneDraft
from draftsmith.foundation.errors import UserError


def export(drafter: Drafter, folder: Path, extras: Extras = PLAIN) -> Exported:
    """Write a folder for `vllm serve`.

    Raises:
        UserError: vLLM can't run this drafter; the text says why.
    """
    if isinstance(drafter, StandaloneDraft):
        return transformers.copy(drafter, folder, "vllm", extras)
    if (act := drafter.config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"hidden_act: vLLM runs heads with silu only, this one has {act}")
    if drafter.kind == "eagle3":
        native.require(drafter, "eagle3")
        refuse_other_width(drafter, "vLLM")
        config = native.eagle3_config(drafter, "vllm", extras)
        return native.write(folder, "vllm", drafter, config, native.eagle3_tensors(drafter), extras)
    return _eagle(drafter, folder, extras)


def _eagle(head: HeadCheckpoint, folder: Path, extras: Extras) -> Exported:
    native.require(head, "eagle")
    bias = head.tensors.get("fc.bias")
    if bias is not None and bool((bias != 0).any()):
        raise UserError(
            "fc.bias: vLLM's EAGLE layer has no bias on fc and drops this one without a word, so the head would draft "
            "something else; SGLang loads it (--to sglang), or train the head without it"
        )
    # Its name is rewritten to Eagle… unless it starts so, and SGLang's LlamaForCausalLMEagle would become an unknown
    # class.
    config = {
        "architectures": ["EagleLlamaForCausalLM"],
        **native.layer_config(head, extras),
        "bias": False,
        "draftsmith": native.record(head, "vllm", extras),
    }
    tensors = {name: tensor for name, tensor in head.tensors.items() if name != "fc.bias"}
    return native.write(folder, "vllm", head, config, tensors, extras)


def refuse_other_width(head: HeadCheckpoint, server: str) -> None:
    """Refuse a head narrower or wider than its target: it would need embeddings of its own.

    Raises:
        UserError: always where the widths differ.
    """
    features = head.config.get("target_hidden_size") or head.config["hidden_size"]
    if features != head.config["hidden_size"]:
        raise UserError(
            f"target_hidden_size is {features} and hidden_size {head.config['hidden_size']}: {server} shares the "
            "target's embeddings with the head, so both must be equal"
        )
