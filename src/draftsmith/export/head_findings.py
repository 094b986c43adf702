"""What can be wrong with a head's configuration, and between it, its weights and its target. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from draftsmith.export import auxiliary
from draftsmith.export.checkpoint import TargetCard, rope_parameters
from draftsmith.export.findings import Finding, map_findings, tensor_findings
from draftsmith.export.import_ import flatten, head_config, same_embeddings
from draftsmith.export.layout import EMBEDDINGS, MAPS, native_names
from draftsmith.foundation.errors import UserError
from draftsmith.target.vocabulary import VocabMap


def head_findings(
    form: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    target: TargetCard | None,
    embeddings: Tensor | None,
) -> list[Finding]:
    """Everything about a head but its folder: configuration, tensors, map, layers, embeddings, target.

    Args:
        form: `eagle`, `eagle3` or `speculators` (`import_.recognise`).
        config: its `config.json`.
        tensors: as stored.
        target: what it will draft for; None: not compared.
        embeddings: the target's `[V, H]`; None: not compared.
    """
    kind = "eagle" if form == "eagle" else "eagle3"
    flat = flatten(config)
    stored = {native: tensors[name] for name, native in native_names(kind, tensors).items()}
    maps = {name: stored.pop(name) for name in MAPS if name in stored}
    own_embeddings = stored.pop(EMBEDDINGS, None)
    rows = stored["lm_head.weight"].shape[0] if "lm_head.weight" in stored else 0
    draft_size = flat.get("draft_vocab_size") or rows or flat.get("vocab_size") or 0
    try:
        head = head_config(kind, flat, stored, draft_size)
    except UserError as problem:
        return [Finding("config.json", str(problem), "take config.json and the weights from one export")]
    sglang = (flat.get("draftsmith") or {}).get("server") == "sglang" or flat.get("architectures") == [
        "LlamaForCausalLMEagle"
    ]
    out = _config_findings(form, flat, stored)
    if kind == "eagle":
        if sglang and "fc.bias" not in stored:
            out.append(
                Finding(
                    "fc.bias",
                    "SGLang's fc has a bias, uninitialised where none is stored",
                    "store zeros: export --to sglang",
                )
            )
        if sglang:
            head["fc_bias"] = True
        elif head["fc_bias"]:
            # As it is stored it counts as the head's; what vLLM makes of it is told apart.
            out += _bias_findings(stored["fc.bias"])
    else:
        reading = auxiliary.read(flat, target)
        out += _auxiliary_findings(form, flat, reading, target)
        width = head["target_hidden_size"]
        blocks = stored["fc.weight"].shape[1] // width if width else 3
        head["auxiliary_layers"] = reading.boundaries or tuple(range(blocks))
    out += tensor_findings(kind, head, stored)
    if kind == "eagle3":
        out += map_findings(draft_size, head["vocab_size"], maps)
        out += _recorded_map_findings(flat, maps)
    out += _embedding_findings(own_embeddings, embeddings)
    out += _target_findings(flat, head, target)
    return out + _rope_findings(flat, target)


def _config_findings(form: str, flat: Mapping[str, Any], stored: Mapping[str, Tensor]) -> list[Finding]:
    out: list[Finding] = []
    if flat.get("tie_word_embeddings"):
        out.append(
            Finding("tie_word_embeddings", "it is true: SGLang would take the embedding for lm_head", "write false")
        )
    if (count := flat.get("num_hidden_layers", 1)) != 1:
        out.append(Finding("num_hidden_layers", f"it is {count}; a head has one decoder layer", "write 1"))
    if flat.get("bias"):
        out.append(
            Finding(
                "bias",
                "it is true: SGLang then gives the head's attention biases too, which no checkpoint fills",
                "write false; fc.bias is loaded there all the same",
            )
        )
    if "head_dim" not in flat:
        out.append(Finding("head_dim", "missing: readers divide hidden_size by the heads", "write it", "warning"))
    if form == "eagle":
        return out
    if flat.get("draft_vocab_size") is None:
        out.append(
            Finding(
                "draft_vocab_size",
                "missing or null: SGLang stops, or loads the target's lm_head in place of the head's",
                "write it",
            )
        )
    elif "lm_head.weight" in stored and flat["draft_vocab_size"] != stored["lm_head.weight"].shape[0]:
        out.append(
            Finding(
                "draft_vocab_size",
                f"it is {flat['draft_vocab_size']}, lm_head.weight has {stored['lm_head.weight'].shape[0]} rows",
                "write the number of rows",
            )
        )
    if "target_hidden_size" in flat and flat["target_hidden_size"] is None and form == "eagle3":
        out.append(Finding("target_hidden_size", "null, which SGLang multiplies with a number", "remove the field"))
    if "norm_before_residual" not in flat:
        severe: Any = "error" if form == "speculators" else "warning"
        out.append(
            Finding(
                "norm_before_residual",
                "missing: vLLM's default depends on the format",
                "write true or false, as trained",
                severe,
            )
        )
    if form == "eagle3" and flat.get("architectures") != ["LlamaForCausalLMEagle3"]:
        out.append(
            Finding(
                "architectures",
                f"{flat.get('architectures')} is not in SGLang's list (vLLM rewrites some names)",
                'write ["LlamaForCausalLMEagle3"]',
                "warning",
            )
        )
    return out


def _bias_findings(bias: Tensor) -> list[Finding]:
    if not bool((bias != 0).any()):
        return []
    return [
        Finding("fc.bias", "vLLM's EAGLE layer has none and drops it without a word", "serve it with SGLang", "warning")
    ]


def _auxiliary_findings(
    form: str, flat: Mapping[str, Any], reading: auxiliary.Reading, target: TargetCard | None
) -> list[Finding]:
    out: list[Finding] = []
    boundaries = reading.boundaries
    if boundaries is None:
        text = "not recorded, and without a target the default (2, n//2, n-3) is unknown"
        return [Finding(auxiliary.FIELD, text, "write the ids, or check with --target", "warning")]
    wanted, nested = auxiliary.server_ids(boundaries, target)
    if reading.clash:
        fix = f"if the head reads boundaries {wanted}, write {auxiliary.FIELD} {wanted} and {auxiliary.NESTED} {nested}"
        out.append(Finding(auxiliary.FIELD, reading.clash, fix))
    if form == "speculators" and auxiliary.FIELD not in flat:
        out.append(
            Finding(
                auxiliary.FIELD, "missing: servers take the default of the target", "write the boundary ids", "warning"
            )
        )
    out += [Finding(auxiliary.FIELD, problem, fix) for problem, fix in auxiliary.faults(boundaries, target)]
    trained = (flat.get("draftsmith") or {}).get("auxiliary_boundaries")
    if trained is not None and list(trained) != list(boundaries):
        out.append(
            Finding(
                auxiliary.FIELD,
                f"it says boundaries {list(boundaries)}, the head was trained on {list(trained)} "
                "(draftsmith.auxiliary_boundaries)",
                f"write {list(trained)}; in {auxiliary.NESTED} {auxiliary.server_ids(trained, target)[1]}",
            )
        )
    return out


def _recorded_map_findings(flat: Mapping[str, Any], maps: Mapping[str, Tensor]) -> list[Finding]:
    recorded = (flat.get("draftsmith") or {}).get("vocabulary")
    if recorded is None or "d2t" not in maps:
        return []
    try:
        found = VocabMap.from_d2t(maps["d2t"], flat["vocab_size"]).digest
    except UserError:
        return []  # told by map_findings
    if found == recorded:
        return []
    return [
        Finding(
            "d2t", f"it is not the map of the export (digest {found}, recorded {recorded})", "export the head again"
        )
    ]


def _embedding_findings(own: Tensor | None, target: Tensor | None) -> list[Finding]:
    if own is None:
        return []
    if target is None:
        text = "a copy is stored; vLLM shares the target's only if both are equal, which was not compared"
        return [Finding(EMBEDDINGS, text, "remove it (servers share the target's), or check with --target", "warning")]
    if same_embeddings(own, target):
        return [Finding(EMBEDDINGS, "a copy of the target's is stored for nothing", "remove it", "warning")]
    text = "it is not the target's embedding: SGLang would use the target's, vLLM this one"
    return [Finding(EMBEDDINGS, text, "use the target that the head was trained for, or remove the copy")]


def _target_findings(flat: Mapping[str, Any], head: Mapping[str, Any], target: TargetCard | None) -> list[Finding]:
    if target is None:
        return []
    out: list[Finding] = []
    recorded = (flat.get("draftsmith") or {}).get("target") or {}
    fingerprint = recorded.get("fingerprint")
    other = f"another target's head: {recorded.get('name') or 'unknown'}"
    width = head.get("target_hidden_size") or head["hidden_size"]
    for name, own, theirs in (
        ("vocab_size", head["vocab_size"], target.vocab_size),
        ("hidden_size", width, target.hidden_size),
    ):
        if own != theirs:
            out.append(
                Finding(
                    name, f"{own}, the target {target.name} has {theirs}: another target's head", "use the right target"
                )
            )
    if fingerprint and target.fingerprint and fingerprint != target.fingerprint:
        text = f"{fingerprint}, the target {target.name} is {target.fingerprint}: {other}"
        out.append(
            Finding("draftsmith.target.fingerprint", text, "use the target that it was trained for, or train it on")
        )
    longest = flat.get("max_position_embeddings")
    if target.max_positions and longest != target.max_positions:
        out.append(
            Finding(
                "max_position_embeddings",
                f"{longest}, the target's is {target.max_positions}: older servers break on prompts beyond it "
                "(vllm#48894)",
                f"write {target.max_positions}",
            )
        )
    return out


def _rope_findings(flat: Mapping[str, Any], target: TargetCard | None) -> list[Finding]:
    own = rope_parameters(flat)
    if "rope_parameters" in flat and "rope_theta" in flat:
        older = rope_parameters({key: flat.get(key) for key in ("rope_theta", "rope_scaling")})
        if older != rope_parameters({"rope_parameters": flat["rope_parameters"]}):
            text = (
                f"rope_parameters say {own}, rope_theta and rope_scaling say {older}: readers differ in which they take"
            )
            return [Finding("rope_parameters", text, "write the same in all three, as the head was trained")]
    if target is None or not target.rope or own == dict(target.rope):
        return []
    kept = (flat.get("draftsmith") or {}).get("own_rope")
    return [
        Finding(
            "rope_parameters",
            f"the head's RoPE is {own}, the target's {dict(target.rope)}"
            + (", and was meant to be kept so" if kept else ""),
            "write the target's (rope_theta, rope_scaling and rope_parameters) if the head was trained with it",
            "warning" if kept else "error",
        )
    ]
