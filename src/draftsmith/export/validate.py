"""`check`: all that is known to make a served drafter worse, or not load, without a word. Finds, never repairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftsmith.export.checkpoint import Golden, HeadCheckpoint, TargetCard
from draftsmith.export.findings import Finding
from draftsmith.export.head_findings import head_findings
from draftsmith.export.import_ import import_checkpoint, recognise_content
from draftsmith.export.native import GOLDEN
from draftsmith.export.weights import INDEX, read_config, read_tensors, weight_files
from draftsmith.foundation.artefacts import MANIFEST, load_tensors, opened
from draftsmith.foundation.errors import UserError

# Runs a head on stored inputs: (head, inputs by name) → outputs by name.
Forward = Callable[[HeadCheckpoint, Mapping[str, Tensor]], Mapping[str, Tensor]]

# Of the output's norm: another machine's kernels differ by less, a wrong weight or RoPE by more.
GOLDEN_TOLERANCE = 1e-3


def check(
    folder: Path,
    target: TargetCard | None = None,
    *,
    embeddings: Tensor | None = None,
    forward: Forward | None = None,
) -> list[Finding]:
    """Look for what is wrong with a checkpoint folder of any known make.

    Args:
        folder: the checkpoint.
        target: what it will draft for; without it, sizes, RoPE, lengths and fingerprint are not compared.
        embeddings: the target's `[V, H]`, to compare a stored copy with.
        forward: runs the head, for the stored golden output.

    Returns:
        Findings, errors first; empty: nothing found.

    Raises:
        UserError: the folder can't be read at all, or is none of the known formats.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    form = recognise_content(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, str(folder))
    out = _folder_findings(folder)
    if form == "standalone":
        out += _standalone_findings(folder, config, tensors, target)
    else:
        out += head_findings(form, config, tensors, target, embeddings)
        if forward is not None:
            out += _golden_findings(folder, target, forward)
    return sorted(out, key=lambda finding: finding.severity != "error")


def _folder_findings(folder: Path) -> list[Finding]:
    out: list[Finding] = []
    if "eagle-" in folder.name.lower():
        text = f"vLLM takes a path with 'eagle-' in it ({folder.name}) for EAGLE-1 where no method is named"
        out.append(Finding("folder name", text, 'rename it, or always pass "method"', "warning"))
    stray = [file.name for file in weight_files(folder) if not file.name.startswith("model")]
    if stray and not (folder / INDEX).is_file():
        text = f"{stray[0]} lies beside the weights, and servers load every *.safetensors there as weights"
        out.append(Finding(stray[0], text, "move it into a folder of its own"))
    if (folder / MANIFEST).is_file():
        try:
            opened(folder, "export")
        except UserError as problem:
            out.append(
                Finding(
                    MANIFEST,
                    str(problem),
                    "export it again; a hand-edited folder works without manifest.json",
                    "warning",
                )
            )
    return out


def _golden_findings(folder: Path, target: TargetCard | None, forward: Forward) -> list[Finding]:
    """Repeat the stored forward pass. A folder that can't be imported has been reported otherwise."""
    if not (folder / GOLDEN).is_file():
        text = "no golden output is stored, so the weights can't be shown to compute what they did when exported"
        return [Finding(GOLDEN, text, "export the head again with a golden pass", "warning")]
    try:
        head = import_checkpoint(folder, target)
    except UserError as problem:
        return [Finding(GOLDEN, f"the forward pass was not repeated: {problem}", "mend that first", "warning")]
    golden = read_golden(folder)
    outputs = forward(head, golden.inputs)
    out: list[Finding] = []
    for name, wanted in golden.outputs.items():
        found = outputs.get(name)
        if found is None or found.shape != wanted.shape:
            shape = None if found is None else list(found.shape)
            out.append(
                Finding(
                    f"{GOLDEN}: {name}", f"the pass gave {shape} where {list(wanted.shape)} is stored", "export again"
                )
            )
            continue
        error = float((found.float() - wanted.float()).norm() / wanted.float().norm().clamp(min=1e-12))
        if not error <= GOLDEN_TOLERANCE:
            out.append(
                Finding(
                    f"{GOLDEN}: {name}",
                    f"the forward pass differs from the stored one by {error:.2g} of its size: weights, RoPE or norms "
                    "are not those that were exported",
                    "export the head again and do not edit the folder",
                )
            )
    return out


def read_golden(folder: Path) -> Golden:
    """The forward pass stored with an export.

    Raises:
        UserError: none is stored.
    """
    stored = load_tensors(folder / GOLDEN)

    def part(name: str) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}

    return Golden(part("inputs"), part("outputs"))


def _standalone_findings(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetCard | None
) -> list[Finding]:
    out: list[Finding] = []
    text = config.get("text_config") or config
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            out.append(
                Finding(name, f"{bad} of its values are NaN or infinite", "take an earlier checkpoint of the run")
            )
    if not text.get("tie_word_embeddings", False) and "lm_head.weight" not in tensors:
        out.append(
            Finding(
                "lm_head.weight", "missing though embeddings are not tied", "write tie_word_embeddings true, or save it"
            )
        )
    if not (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        out.append(Finding("tokenizer.json", "the folder has no tokenizer", "save the target's tokenizer beside it"))
    if target is not None and text.get("vocab_size") != target.vocab_size:
        problem = (
            f"{text.get('vocab_size')}, the target {target.name} has {target.vocab_size}: servers want one vocabulary"
        )
        out.append(Finding("vocab_size", problem, "use a draft of the target's own family"))
    return out
