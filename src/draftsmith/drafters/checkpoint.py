"""Drafters on disk: an artefact (kind "drafter") of `config.json` and `model.safetensors`, bound to its target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from draftsmith.drafters.eagle3 import Eagle3, Eagle3Options
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import validate
from draftsmith.target.model import HFTarget
from draftsmith.target.vocabulary import VocabMap

KIND = "drafter"


def write_head(head: Eagle3, scratch: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Put a head's configuration and weights (`weights` instead of its own, where given) into an artefact under way."""
    config = {"kind": "eagle3", "options": head.options.model_dump(mode="json")}
    artefacts.write_json(scratch / "config.json", config)
    tensors = dict(weights if weights is not None else head.state_dict())
    artefacts.save_tensors(scratch / "model.safetensors", {**tensors, "d2t": head.vocab.d2t, "t2d": head.vocab.t2d})


def identity(head: Eagle3, target_fingerprint: str) -> dict[str, object]:
    """What an artefact's manifest says of a head."""
    return {"drafter": "eagle3", "target": target_fingerprint, "vocabulary": head.vocab.digest}


def load_drafter(folder: Path, target: HFTarget, dtype: torch.dtype | None = None, checksums: bool = True) -> Eagle3:
    """A trained drafter, for the target it was trained for, in the target's number format.

    Raises:
        UserError: no such artefact, damaged, or trained for another target (StaleError names both fingerprints).
    """
    artefacts.opened(folder, KIND, {"target": target.spec.fingerprint}, checksums=checksums)
    config = artefacts.read_json(folder / "config.json")
    if config.get("kind") != "eagle3":
        raise UserError(
            f"{folder / 'config.json'}: drafters of kind {config.get('kind')!r} are not known to this version"
        )
    options = validate(Eagle3Options, config["options"], str(folder / "config.json"))
    tensors = artefacts.load_tensors(folder / "model.safetensors")
    vocab = VocabMap.from_d2t(tensors.pop("d2t"), options.vocab_size)
    tensors.pop("t2d", None)
    head = Eagle3(options, vocab, target.embedding)
    head.load_state_dict(tensors)
    return head.to(target.device, dtype or target.dtype).eval().requires_grad_(False)
