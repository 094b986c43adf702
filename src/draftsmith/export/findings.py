"""What can be wrong with a checkpoint's tensors and maps: findings that name the field and the fix. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from draftsmith.export.layout import head_shapes, why

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """One thing wrong: the field or tensor, what is wrong with it, and what to do."""

    field: str
    problem: str
    fix: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}. Fix: {self.fix}"


def tensor_findings(kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[Finding]:
    """Key set, shapes, number formats and finiteness of a head's own tensors (native names, without maps and
    embeddings).

    Args:
        kind: `eagle` or `eagle3`.
        config: a `HeadCheckpoint.config`.
        tensors: to be judged.
    """
    wanted = head_shapes(kind, config)
    out = [
        Finding(
            name,
            "the tensor is missing: SGLang would run the head with an uninitialised one, vLLM may too",
            "export the head again from its run; if its configuration names a norm or bias it does not have, correct "
            "that",
        )
        for name in sorted(wanted.keys() - tensors.keys())
    ]
    out += [
        Finding(
            name,
            f"the tensor belongs to no {kind} head of this configuration: {why(name, kind)}",
            "remove it, or, if the head was trained with it, state it in config.json and use a server that knows it",
        )
        for name in sorted(tensors.keys() - wanted.keys())
    ]
    common = [name for name in sorted(wanted) if name in tensors]
    for name in common:
        if tuple(tensors[name].shape) != wanted[name]:
            out.append(
                Finding(
                    name,
                    f"its shape is {list(tensors[name].shape)} where config.json makes it {list(wanted[name])}",
                    "correct the sizes in config.json, or export the head again: its weights and configuration are of "
                    "different heads",
                )
            )
        if not tensors[name].is_floating_point():
            out.append(Finding(name, f"its number format is {tensors[name].dtype}", "store weights as floating point"))
        elif not bool(torch.isfinite(tensors[name]).all()):
            bad = int((~torch.isfinite(tensors[name])).sum())
            out.append(
                Finding(
                    name,
                    f"{bad} of its values are NaN or infinite",
                    "take an earlier checkpoint of the run; look at its training log",
                )
            )
    formats = sorted({str(tensors[name].dtype).removeprefix("torch.") for name in common})
    if len(formats) > 1:
        out.append(
            Finding(
                "model.safetensors",
                f"weights are stored in {' and '.join(formats)}",
                "store all in one format",
                "warning",
            )
        )
    return out


def map_findings(draft_size: int, vocab_size: int, maps: Mapping[str, Tensor]) -> list[Finding]:
    """The vocabulary map: `d2t` offsets int64 `[Vd]`, ascending and in range; `t2d` bool `[V]` agreeing with it."""
    out: list[Finding] = []
    d2t, t2d = maps.get("d2t"), maps.get("t2d")
    if d2t is None:
        if draft_size != vocab_size:
            out.append(
                Finding(
                    "d2t", f"missing, with {draft_size} of {vocab_size} tokens in the draft vocabulary", "export again"
                )
            )
        return out
    if draft_size == vocab_size:
        out.append(
            Finding(
                "d2t",
                "the draft vocabulary is the whole one, where vLLM has no place for d2t and refuses it",
                "remove d2t and t2d",
            )
        )
    if d2t.dtype != torch.int64:
        out.append(Finding("d2t", f"its number format is {d2t.dtype}, not int64", "store it as int64"))
    if tuple(d2t.shape) != (draft_size,):
        out.append(
            Finding(
                "d2t",
                f"its shape is {list(d2t.shape)}, the draft vocabulary has {draft_size} tokens",
                "export the head again",
            )
        )
        return out
    ids = torch.arange(draft_size) + d2t.to(torch.int64)
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raw = d2t.to(torch.int64)
        absolute = bool((raw.diff() > 0).all()) and int(raw.min()) >= 0 and int(raw.max()) < vocab_size
        hint = (
            "it holds target ids; servers expect offsets: subtract 0, 1, 2, …"
            if absolute
            else "it is another target's map"
        )
        span = f"{int(ids.min())} … {int(ids.max())}"
        out.append(Finding("d2t", f"it leads to target ids {span}, outside 0 … {vocab_size - 1}", hint))
        return out
    if bool((ids.diff() <= 0).any()):
        at = int((ids.diff() <= 0).nonzero()[0])
        out.append(
            Finding(
                "d2t",
                f"the map is shuffled: target ids must increase, and draft ids {at} and {at + 1} lead to "
                f"{int(ids[at])} and {int(ids[at + 1])}",
                "export the head again; sorting d2t alone would leave lm_head.weight's rows behind",
            )
        )
    if t2d is not None:
        out += _t2d_findings(t2d, ids, vocab_size)
    return out


def _t2d_findings(t2d: Tensor, ids: Tensor, vocab_size: int) -> list[Finding]:
    if tuple(t2d.shape) != (vocab_size,):
        return [
            Finding(
                "t2d", f"its shape is {list(t2d.shape)}, the target has {vocab_size} tokens", "make it again from d2t"
            )
        ]
    out: list[Finding] = []
    if t2d.dtype != torch.bool:
        out.append(Finding("t2d", f"its number format is {t2d.dtype}, not bool", "store it as bool", "warning"))
    present = torch.zeros(vocab_size, dtype=torch.bool)
    present[ids] = True
    differing = int((present != t2d.bool()).sum())
    if differing:
        out.append(
            Finding(
                "t2d",
                f"it disagrees with d2t about {differing} target tokens",
                "find out which is right: make t2d from d2t",
            )
        )
    return out
