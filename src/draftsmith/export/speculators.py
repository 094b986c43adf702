"""Export in the format of the speculators library, which `vllm serve FOLDER` runs without further options. EAGLE-3
only.

Read from speculators' config.py and models/eagle3/config.py, and vLLM 0.32.0's transformers_utils/configs/speculators.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.export import native
from draftsmith.export.checkpoint import PLAIN, Drafter, Exported, Extras, StandaloneDraft
from draftsmith.export.vllm import refuse_other_width
from draftsmith.foundation.errors import UserError

VERSION = "0.9.0"  # of the library whose format this is


def export(drafter: Drafter, folder: Path, extras: Extras = PLAIN) -> Exported:
    """Write a folder in the speculators format.

    Raises:
        UserError: the format has no place for this drafter; the text says why.
    """
    if isinstance(drafter, StandaloneDraft):
        raise UserError("the speculators format holds heads; a standalone draft is a plain model: use --to vllm")
    if drafter.kind != "eagle3":
        raise UserError(
            "the speculators format, and vLLM's reader of it, have no EAGLE or HASS type: use --to vllm or --to sglang"
        )
    native.require(drafter, "eagle3")
    refuse_other_width(drafter, "vLLM")
    if (act := drafter.config.get("hidden_act", "silu")) != "silu":
        raise UserError(f"hidden_act: vLLM runs heads with silu only, this one has {act}")
    head, target = drafter, drafter.target
    # No `torch_dtype` inside the layer's configuration: it is the checkpoint's, one level up.
    layer = {key: value for key, value in native.layer_config(head, extras).items() if key not in ("torch_dtype",)}
    config: dict[str, object] = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": extras.serving.tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": target.name, "architectures": list(target.architectures)},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": head.vocab.size,
        "target_hidden_size": None,
        # vLLM takes true where this is missing, the library false.
        "norm_before_residual": bool(head.config.get("norm_before_residual")),
        "norm_before_fc": bool(head.config.get("norm_before_fc")),
        "fc_norm": bool(head.config.get("fc_norm")),
        "norm_output": bool(head.config.get("norm_output")),
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": list(head.auxiliary_layers),
        "tie_word_embeddings": False,
        "torch_dtype": head.dtype,
        "draftsmith": native.record(head, "speculators", extras),
    }
    tensors = {
        name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name: tensor
        for name, tensor in native.eagle3_tensors(head).items()
    }
    return native.write(folder, "speculators", head, config, tensors, extras)
