"""What is known of a transformers model's inside, for targets and for standalone drafts: its attention windows and the
masks that they ask for, and what stands between its final hidden states and its logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from draftsmith.foundation.errors import UserError


def attention_windows(config: Any, name: str) -> dict[str, int | None]:
    """Layer type → window in positions (None: sees everything).

    Raises:
        UserError: the model `name` has layers whose state can't be rolled back.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    known: dict[str, int | None] = {"full_attention": None, "sliding_attention": window}
    if strange := sorted(kinds - known.keys()):
        raise UserError(
            f"{name}: layers of type {', '.join(strange)} can't drop rejected tokens, so this model can't be decoded "
            "speculatively here"
        )
    return {kind: known[kind] for kind in sorted(kinds)}


def cached_masks(
    windows: Mapping[str, int | None], lengths: Tensor, positions: Tensor, visible: Tensor, span: int
) -> dict[str, Tensor]:
    """Attention masks `[B, 1, R, span]` by layer type for a pass over a `KeyValueCache`: committed rows, and of the
    provisional ones those that are visible.

    transformers hands a 4-D mask to every layer as it is, so the windows of sliding layers have to be in it.

    Args:
        lengths: `[B]` int64, committed rows.
        positions: `[B, P]` int64, of all provisional rows; the pass's own R are the last of them.
        visible: `[B, R, P]` bool, which provisional rows each row of the pass attends to.
    """
    rows = visible.shape[1]
    slots = torch.arange(span, device=lengths.device)
    own = lengths[:, None] + torch.arange(positions.shape[1], device=lengths.device)
    full = (slots < lengths[:, None])[:, None, :].expand(-1, rows, -1).contiguous()
    full.scatter_(2, own[:, None, :].expand_as(visible), visible)
    masks: dict[str, Tensor] = {}
    for kind, window in windows.items():
        mask = full
        if window is not None:
            slot_positions = slots.expand(lengths.shape[0], -1).scatter(1, own, positions)
            asking = positions[:, positions.shape[1] - rows :]
            mask = full & (asking[:, :, None] - slot_positions[:, None, :] < window)
        masks[kind] = mask[:, None]
    return masks


def packed_masks(windows: Mapping[str, int | None], segments: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Attention masks `[R, 1, L, L]` by layer type for rows in which several texts stand one after another: each token
    sees its own text's tokens up to itself.

    Args:
        segments: `[R, L]` int64, which text a token belongs to; −1 for padding, which sees itself.
        positions: `[R, L]` int64, within the text.
    """
    index = torch.arange(segments.shape[1], device=segments.device)
    full = (segments[:, :, None] == segments[:, None, :]) & (index[:, None] >= index[None, :])
    masks: dict[str, Tensor] = {}
    for kind, window in windows.items():
        near = full if window is None else full & (positions[:, :, None] - positions[:, None, :] < window)
        masks[kind] = (near | torch.eye(len(index), dtype=torch.bool, device=index.device))[:, None]
    return masks


def as_model_takes(masks: Mapping[str, Tensor], additive: torch.dtype | None) -> Tensor | dict[str, Tensor]:
    """Masks in a model's form: one for a model with one layer type; with `additive`, numbers of that type to be added
    to the scores (eager attention)."""
    given = dict(masks)
    if additive is not None:
        lowest = torch.finfo(additive).min
        given = {k: torch.zeros_like(m, dtype=additive).masked_fill_(~m, lowest) for k, m in masks.items()}
    return given if len(given) > 1 else next(iter(given.values()))


def finished(config: Any, logits: Tensor) -> Tensor:
    """Logits as the model's forward gives them, from the plain product with its output embedding: scaled, capped."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def output_rows(model: Any, ids: Tensor | None, name: str) -> Tensor:
    """Rows `[N, H]` whose products with final hidden states are the logits of tokens `ids [N]` (None: of all); a scale
    is in them. They carry the output embedding's gradient.

    Raises:
        UserError: there are none, for the model's logits are capped or have a bias.
    """
    config = model.config.get_text_config()
    output = model.get_output_embeddings()
    if getattr(config, "final_logit_softcapping", None) is not None or getattr(output, "bias", None) is not None:
        raise UserError(
            f"{name}: this model caps its logits or adds a bias to them; drafters can't be trained with its hidden "
            "states by this version"
        )
    weight: Tensor = output.weight
    rows = weight if ids is None else weight[ids.to(weight.device)]
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return rows if scale == 1.0 else rows * scale
