"""Checkpoints made elsewhere: recognised by what is in them, read into a `HeadCheckpoint`, doubts told or refused.

Public EAGLE, EAGLE-2 and HASS heads (one format), EAGLE-3 heads (`midlayer.` and `layers.0.` names, EAGLE's own
architecture name, ModelOpt's and SpecForge's nested layer ids), and the speculators format; and what `export` writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.export import auxiliary
from draftsmith.export.checkpoint import HeadCheckpoint, Kind, TargetCard, rope_parameters, split_rope
from draftsmith.export.findings import Finding, map_findings, tensor_findings
from draftsmith.export.layout import EMBEDDINGS, MAPS, native_names
from draftsmith.export.weights import read_config, read_shapes, read_tensors
from draftsmith.foundation.errors import UserError
from draftsmith.target.vocabulary import VocabMap

FORMATS = ("eagle", "eagle3", "speculators", "standalone")
_NORMS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")


def recognise(folder: Path) -> str:
    """The format of a checkpoint folder, by its tensors and configuration, never by its name: one of `FORMATS`.

    Raises:
        UserError: no folder, no readable weights, or none of these formats (with what was found).
    """
    config = read_config(folder)
    return recognise_content(config, read_shapes(folder), str(folder))


def recognise_content(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> str:
    """`recognise` for a configuration and tensors' shapes already read; `where` names them in errors."""
    kind = config.get("speculators_model_type")
    if kind is not None:
        if kind != "eagle3":
            raise UserError(
                f"{where}: speculators_model_type {kind!r}: of the speculators format only eagle3 heads are read"
            )
        return "speculators"
    bare = {name.removeprefix("model.") for name in shapes}
    fc = next((shapes[name] for name in ("fc.weight", "model.fc.weight") if name in shapes), None)
    if fc is not None and len(fc) == 2:
        # Any one of these, so that a head with a tensor missing is still told for what it is.
        eagle3 = any(name.endswith("hidden_norm.weight") or name.startswith("midlayer.") for name in bare)
        if eagle3 or fc[1] == 3 * fc[0] or "Eagle3" in str(config.get("architectures")):
            return "eagle3"
        if fc[1] == 2 * fc[0] and any(name.startswith("layers.0.") for name in bare):
            return "eagle"
    if any(name.startswith("model.layers.0.") for name in shapes) and "fc.weight" not in bare:
        return "standalone"
    shown = ", ".join(sorted(shapes)[:4])
    raise UserError(
        f"{where}: not recognised: an EAGLE head has fc.weight [H, 2H] and layers.0.*, an EAGLE-3 head fc.weight and a "
        f"hidden_norm, a standalone draft model.layers.0.*; this folder has {shown}{', …' if len(shapes) > 4 else ''}"
    )


def import_checkpoint(
    folder: Path,
    target: TargetCard | None = None,
    *,
    overrides: Mapping[str, object] | None = None,
    embeddings: Tensor | None = None,
    lm_head: Tensor | None = None,
    keep_rope: bool = True,
) -> HeadCheckpoint:
    """Read a head from a folder of any of the known makes.

    Args:
        folder: with `config.json` and safetensors.
        target: what it will draft for; needed where the checkpoint leaves its layers to the target's default.
        overrides: fields of `HeadCheckpoint.config` that the checkpoint leaves open or has wrong (`auxiliary_layers`,
            …).
        embeddings: the target's `[V, H]`; a stored copy is compared with it and dropped.
        lm_head: the target's `[V, H]`, for EAGLE-3 heads stored without one.
        keep_rope: take a head whose rotary embedding is not the target's, as it is; otherwise it is refused.

    Raises:
        UserError: unreadable, not a head, a tensor missing, extra or of another shape, a broken map, ambiguous layer
            ids, or made
            for another target. The text names the field and says what to do.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    form = recognise_content(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, str(folder))
    if form == "standalone":
        raise UserError(
            f"{folder} is a whole language model: use it as a standalone draft as it is, nothing is to be imported"
        )
    kind: Kind = "eagle" if form == "eagle" else "eagle3"
    flat = flatten(config)
    stored = {native: tensors[name] for name, native in native_names(kind, tensors).items()}
    notes: list[str] = []
    overrides = dict(overrides or {})
    _refuse_unknown_layers(flat, folder)
    card = target or _card(flat, folder)
    if kind == "eagle3" and "lm_head.weight" not in stored:
        stored["lm_head.weight"] = _lent_lm_head(flat, lm_head, folder)
    if kind == "eagle":
        _drop_lm_head(stored, notes)
        _drop_zero_bias(stored)
    _drop_embeddings(stored, embeddings, folder, notes)
    vocab = _vocabulary(flat, stored, kind, folder)
    maps = {name: stored.pop(name) for name in MAPS if name in stored}
    head = head_config(kind, flat, stored, vocab.size)
    if kind == "eagle3":
        head["auxiliary_layers"] = _layers(flat, target, overrides, folder, notes)
        if "norm_before_residual" not in flat and form == "speculators" and "norm_before_residual" not in overrides:
            raise UserError(
                f"{folder / 'config.json'}: norm_before_residual is missing; vLLM then takes true, speculators false: "
                "say which with --set norm_before_residual=true or false"
            )
        if flat.get("norm_output"):
            notes.append(
                "norm_output is read as servers read it (the next step reads the normed state); SpecForge means "
                "another thing"
            )
    head |= overrides
    _raise_first([*tensor_findings(kind, head, stored), *map_findings(vocab.size, vocab.vocab_size, maps)], folder)
    if target is not None:
        _refuse_other_target(head, vocab, target, folder)
        own = rope_parameters(head)
        if own != dict(target.rope):
            if not keep_rope:
                raise UserError(
                    f"{folder / 'config.json'}: rope_parameters: {own}, the target's are {dict(target.rope)}. Many "
                    "public heads were trained with such defaults: if this one was, import it with --keep-rope; if its "
                    "configuration merely lacks the field, say it (--set rope_theta=…)"
                )
            notes.append(f"its RoPE {own} is not the target's {dict(target.rope)}: it was trained so, and keeps it")
    return HeadCheckpoint(kind, head, stored, vocab, card, tuple(notes))


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """One flat native configuration of either form: the speculators format keeps the layer's fields one level down."""
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, Mapping):
        return dict(config)
    return {
        **layer,
        **{key: value for key, value in config.items() if key not in ("transformer_layer_config", "model_type")},
    }


def head_config(kind: str, flat: Mapping[str, Any], tensors: Mapping[str, Tensor], draft_size: int) -> dict[str, Any]:
    """The fields of `HeadCheckpoint.config` but for `auxiliary_layers`, with transformers' defaults where a field is
    missing.

    Raises:
        UserError: a size without a default is missing.
    """
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if not isinstance(flat.get(name), int):
            raise UserError(
                f"config.json: {name} is missing: the checkpoint's configuration is not whole, download it again"
            )
    heads = flat["num_attention_heads"]
    theta, scaling = split_rope(rope_parameters(flat))
    out: dict[str, Any] = {
        "hidden_size": flat["hidden_size"],
        "intermediate_size": flat["intermediate_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": flat.get("num_key_value_heads") or heads,
        "head_dim": flat.get("head_dim") or flat["hidden_size"] // heads,
        "rms_norm_eps": flat.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": flat.get("max_position_embeddings") or 2048,
        "vocab_size": flat["vocab_size"],
        "hidden_act": flat.get("hidden_act", "silu"),
        "attention_bias": bool(flat.get("attention_bias")),
    }
    if kind == "eagle":
        # EAGLE's own code takes `bias` for true where it is missing; what is stored decides.
        return {**out, "fc_bias": "fc.bias" in tensors}
    norms = {name: bool(flat.get(name)) for name in _NORMS}
    nested = flat.get("eagle_config") or {}
    norms["norm_before_fc"] = bool(nested.get("norm_before_fc", norms["norm_before_fc"]))
    norms["fc_norm"] = norms["fc_norm"] or bool(flat.get("use_aux_norm"))
    width = flat.get("target_hidden_size") or flat["hidden_size"]
    return {**out, **norms, "draft_vocab_size": draft_size, "target_hidden_size": width}


def _refuse_unknown_layers(flat: Mapping[str, Any], folder: Path) -> None:
    where = folder / "config.json"
    if (count := flat.get("num_hidden_layers", 1)) != 1:
        raise UserError(f"{where}: num_hidden_layers is {count}; heads here have one decoder layer")
    if "sliding_attention" in (flat.get("layer_types") or []) or flat.get("use_sliding_window"):
        raise UserError(f"{where}: layer_types: the head attends to a sliding window, which is not supported here")


def _layers(
    flat: Mapping[str, Any], target: TargetCard | None, overrides: dict[str, object], folder: Path, notes: list[str]
) -> tuple[int, ...]:
    if "auxiliary_layers" in overrides:
        given = overrides.pop("auxiliary_layers")
        if not isinstance(given, list | tuple) or not all(isinstance(k, int) for k in given):
            raise UserError(f"auxiliary_layers: expected layer numbers such as [2, 15, 27], not {given!r}")
        reading = auxiliary.Reading(tuple(given))
    else:
        reading = auxiliary.read(flat, target)
    if reading.boundaries is None:
        raise UserError(
            f"{folder / 'config.json'}: no auxiliary layers are recorded, so they are the default (2, n//2, n-3) of "
            "its target: name the target (--target), or the layers (--set auxiliary_layers=[2,15,27])"
        )
    if not reading.decisive:
        raise UserError(
            f"{folder / 'config.json'}: auxiliary layers are ambiguous: {reading.clash}. Say which inputs of layers "
            "the head reads: --set auxiliary_layers=[…] (transformers' hidden_states[k])"
        )
    if reading.clash:
        notes.append(f"auxiliary layers: {reading.clash}; read as boundaries {list(reading.boundaries)}")
    for problem, fix in auxiliary.faults(reading.boundaries, target):
        raise UserError(f"{folder / 'config.json'}: auxiliary layers: {problem}; {fix}")
    return reading.boundaries


def _card(flat: Mapping[str, Any], folder: Path) -> TargetCard:
    """What a checkpoint itself tells of its target."""
    verifier = (flat.get("speculators_config") or {}).get("verifier") or {}
    recorded = (flat.get("draftsmith") or {}).get("target") or {}
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(flat.get(name), int):
            raise UserError(
                f"{folder / 'config.json'}: {name} is missing: the configuration is not whole, download it again"
            )
    return TargetCard(
        name=recorded.get("name") or verifier.get("name_or_path") or "",
        fingerprint=recorded.get("fingerprint"),
        architectures=tuple(verifier.get("architectures") or ()),
        model_type="",
        vocab_size=flat["vocab_size"],
        hidden_size=flat.get("target_hidden_size") or flat["hidden_size"],
        layers=0,
        rope=rope_parameters(flat),
        max_positions=int(flat.get("max_position_embeddings") or 0),
    )


def _vocabulary(flat: Mapping[str, Any], stored: Mapping[str, Tensor], kind: str, folder: Path) -> VocabMap:
    size = flat.get("vocab_size")
    if not isinstance(size, int):
        raise UserError(
            f"{folder / 'config.json'}: vocab_size is missing: the configuration is not whole, download it again"
        )
    if kind == "eagle":
        return VocabMap.identity(size)
    rows = stored["lm_head.weight"].shape[0]
    if "d2t" not in stored:
        if rows != size:
            raise UserError(
                f"{folder}: d2t is missing, and lm_head.weight has {rows} rows of a vocabulary of {size}: download it "
                "again"
            )
        return VocabMap.identity(size)
    filled = int((flat.get("draftsmith") or {}).get("vocabulary_filled") or 0)
    try:
        vocab = VocabMap.from_d2t(stored["d2t"], size)
    except UserError as problem:
        raise UserError(f"{folder}: {problem}") from None
    return VocabMap(vocab.target_ids, size, filled)


def _lent_lm_head(flat: Mapping[str, Any], lm_head: Tensor | None, folder: Path) -> Tensor:
    if flat.get("draft_vocab_size") not in (None, flat.get("vocab_size")):
        raise UserError(
            f"{folder}: lm_head.weight is missing: servers would run the head with random weights; download it again"
        )
    if lm_head is None:
        raise UserError(
            f"{folder}: lm_head.weight is not stored, so the head uses its target's: name the target (--target)"
        )
    return lm_head


def _drop_lm_head(stored: dict[str, Tensor], notes: list[str]) -> None:
    if stored.pop("lm_head.weight", None) is not None:
        notes.append("its copy of the target's lm_head was dropped: an EAGLE head uses the target's own")


def _drop_zero_bias(stored: dict[str, Tensor]) -> None:
    """Zeros are what an export for SGLang adds, and mean no bias."""
    if "fc.bias" in stored and not bool((stored["fc.bias"] != 0).any()):
        del stored["fc.bias"]


def _drop_embeddings(stored: dict[str, Tensor], embeddings: Tensor | None, folder: Path, notes: list[str]) -> None:
    own = stored.pop(EMBEDDINGS, None)
    if own is None:
        return
    if embeddings is None:
        notes.append("its copy of the embeddings was dropped without comparing it: the target was not given")
    elif not same_embeddings(own, embeddings):
        raise UserError(
            f"{folder}: embed_tokens.weight is not the target's embedding: the head was made for another target, or "
            "trained with embeddings of its own, which draftsmith does not run"
        )


def same_embeddings(own: Tensor, target: Tensor) -> bool:
    """Whether `own [V, H]` is the target's embedding, up to the rounding of a half-precision copy."""
    if own.shape != target.shape:
        return False
    return torch.allclose(own.float(), target.detach().cpu().float(), rtol=2**-7, atol=1e-5)


def _refuse_other_target(head: Mapping[str, Any], vocab: VocabMap, target: TargetCard, folder: Path) -> None:
    for name, own, other in (
        ("vocab_size", vocab.vocab_size, target.vocab_size),
        ("hidden_size", head.get("target_hidden_size") or head["hidden_size"], target.hidden_size),
    ):
        if own != other:
            raise UserError(
                f"{folder}: {name} is {own}, the target {target.name} has {other}: this head was made for another "
                "target"
            )


def _raise_first(findings: list[Finding], folder: Path) -> None:
    for finding in findings:
        if finding.severity == "error":
            raise UserError(f"{folder}: {finding}")
