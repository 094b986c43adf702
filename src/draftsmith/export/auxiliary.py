"""Auxiliary layer ids: two conventions share one name in the configurations of the world.

Inside draftsmith id k is a *boundary*: transformers' `hidden_states[k]`, what layer k reads. vLLM, speculators,
llama.cpp and EAGLE's own code count so. ModelOpt, SpecForge, NeMo, and SGLang where ids are given, count layer
*outputs*: boundary − 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.export.checkpoint import TargetCard

FIELD = "eagle_aux_hidden_state_layer_ids"
NESTED = f"eagle_config.{FIELD}"

# sglang 0.5.23 srt/models/deepseek_v2.py and glm4_moe_lite.py, set_eagle3_layers_to_capture: 1 is added only if the
# first id is 1.
_ADDS_ONLY_TO_ONE = {
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "KimiK25ForConditionalGeneration",
}


def captured_by_sglang(nested: Sequence[int], target: TargetCard | None) -> list[int]:
    """The boundaries that SGLang reads for ids in `eagle_config`."""
    special = target is not None and not _ADDS_ONLY_TO_ONE.isdisjoint(target.architectures)
    if special and nested and nested[0] != 1:
        return list(nested)
    return [k + 1 for k in nested]


def server_ids(boundaries: Sequence[int], target: TargetCard | None) -> tuple[list[int], list[int]]:
    """The ids to write at the top level (boundaries) and in `eagle_config` (what makes SGLang read the same
    boundaries).
    """
    outputs = [k - 1 for k in boundaries]
    if captured_by_sglang(outputs, target) == list(boundaries):
        return list(boundaries), outputs
    return list(boundaries), list(boundaries)


@dataclass(frozen=True)
class Reading:
    """Auxiliary layers as found in a configuration.

    Attributes:
        boundaries: what was most likely meant; None where nothing is recorded and the target is unknown.
        clash: why two readers of this configuration would take different layers; empty: they agree.
        decisive: False where even a careful reader can't tell which was meant.
    """

    boundaries: tuple[int, ...] | None
    clash: str = ""
    decisive: bool = True


def read(config: Mapping[str, Any], target: TargetCard | None) -> Reading:
    """Find the auxiliary layers of a native EAGLE-3 configuration, and whether all servers find the same ones.

    A pair of fields as this package writes it agrees. A top-level field alone is boundaries, which SGLang does not
    read. A nested field alone is layer outputs, as ModelOpt and SpecForge write it and SGLang reads it, which vLLM
    takes for boundaries (or does not read at all, by version): decisive unless the ids taken literally are the target's
    default boundaries.
    """
    eagle_config = config.get("eagle_config") or {}
    top, nested = _ids(config.get(FIELD)), _ids(eagle_config.get(FIELD))
    default = target.default_layers if target else None
    if top is None and nested is None:
        return Reading(default)
    if top is not None and nested is not None:
        seen = captured_by_sglang(nested, target)
        if seen == list(top):
            return Reading(top)
        return Reading(
            top,
            f"{FIELD} says boundaries {list(top)} (the input of layer k), {NESTED} says {list(nested)}, from which "
            f"SGLang reads boundaries {seen}: off by one",
            decisive=False,
        )
    if top is not None:
        # The speculators format is vLLM's alone, where the top level decides.
        if top == default or "speculators_model_type" in config:
            return Reading(top)
        shown = list(default) if default else "2, n//2, n-3"
        return Reading(
            top, f"only the top-level {FIELD} {list(top)} is there; SGLang reads {NESTED} and would take {shown}"
        )
    assert nested is not None
    meant = tuple(captured_by_sglang(nested, target))
    return Reading(
        meant,
        f"only {NESTED} {list(nested)} is there: SGLang reads it as layer outputs (boundaries {list(meant)}), vLLM as "
        f"boundaries {list(nested)} or not at all, llama.cpp not at all",
        decisive=nested != default,
    )


def faults(boundaries: Sequence[int], target: TargetCard | None) -> list[tuple[str, str]]:
    """What is wrong with boundary ids in themselves: (problem, fix) pairs."""
    out: list[tuple[str, str]] = []
    ids = list(boundaries)
    if ids != sorted(set(ids)):
        out.append(
            (
                f"{ids} are not ascending and different; vLLM sorts them and drops repetitions, which pairs features "
                "with the wrong columns of fc.weight",
                "order the blocks of fc.weight by ascending layer and write the ids so; repeated layers need another "
                "head",
            )
        )
    if any(k < 0 for k in ids):
        out.append((f"{ids} holds a negative boundary", "count layers from 0 (the embedding)"))
    if target is not None and target.layers and any(k >= target.layers for k in ids):
        out.append(
            (
                f"{ids} names boundary {max(ids)} of a target with {target.layers} layers: the last one is after the "
                "final norm in transformers and before it in servers, and later ones do not exist",
                f"use boundaries below {target.layers}",
            )
        )
    return out


def _ids(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(k, int) for k in value):
        return None
    return tuple(value)
