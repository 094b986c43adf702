"""Drafters on disk: an artefact (kind "drafter") of `config.json` and `model.safetensors`, bound to its target.

Every drafter that has weights says itself what it saves and how it is made again (`Saved`); here stands who they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from draftsmith.drafters.base import Drafter
from draftsmith.drafters.eagle import Eagle
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.drafters.standalone import FOLDER, Standalone
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.target.model import HFTarget

KIND = "drafter"


class Saved(Drafter, Protocol):
    """A drafter with weights, an `nn.Module`."""

    KIND: ClassVar[str]
    """Its name in `config.json` and in recipes."""
    LABEL: ClassVar[str]
    """Its name for people."""

    @property
    def options(self) -> Options:
        """What its shape follows from; the `options` of `config.json`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that is saved: its own weights by parameter name, and its draft vocabulary as `d2t`, `t2d`."""
        ...

    @classmethod
    def from_saved(cls, options: Mapping[str, Any], tensors: dict[str, Tensor], target: HFTarget, where: str) -> Self:
        """The drafter of saved options and `tensors()`; what it shares with its target is taken from there.

        Args:
            where: the file that the options stand in, for errors.

        Raises:
            UserError: options that are none.
        """
        ...


_KINDS: dict[str, type[Saved]] = {kind.KIND: kind for kind in (Eagle3, Eagle, Standalone)}


def kind(name: object, where: str) -> type[Saved]:
    """The drafters of a kind. UserError: there are none of this name, found in `where`."""
    if (found := _KINDS.get(str(name))) is None:
        raise UserError(
            f"{where}: drafters of kind {name!r} are not known to this version, which knows {', '.join(_KINDS)}"
        )
    return found


def write(drafter: Saved, scratch: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Put a drafter's options and tensors into an artefact under way; `weights` stand in for its own of those names."""
    config = {"kind": drafter.KIND, "options": drafter.options.model_dump(mode="json")}
    artefacts.write_json(scratch / "config.json", config)
    tensors = {**drafter.tensors(), **(weights or {})}
    if isinstance(drafter, Standalone):
        # a whole model: its weights go into a folder that other programs load
        tensors = drafter.tensors()
        drafter.write_folder(scratch / FOLDER, weights or {})
    artefacts.save_tensors(scratch / "model.safetensors", tensors)


def identity(drafter: Saved, target_fingerprint: str) -> dict[str, object]:
    """What an artefact's manifest says of a drafter."""
    return {"drafter": drafter.KIND, "target": target_fingerprint, "vocabulary": drafter.vocab.digest}


def load_drafter(folder: Path, target: HFTarget, dtype: torch.dtype | None = None, checksums: bool = True) -> Saved:
    """A trained drafter of any kind, for the target it was trained for, in the target's number format.

    Raises:
        UserError: no such artefact, damaged, or trained for another target (StaleError names both fingerprints).
    """
    artefacts.opened(folder, KIND, {"target": target.spec.fingerprint}, checksums=checksums)
    where = folder / "config.json"
    config = artefacts.read_json(where)
    tensors = artefacts.load_tensors(folder / "model.safetensors")
    drafter = kind(config.get("kind"), str(where)).from_saved(config["options"], tensors, target, str(where))
    assert isinstance(drafter, nn.Module)
    drafter.to(target.device, dtype or target.dtype).eval().requires_grad_(False)
    return drafter
