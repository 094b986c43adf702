"""Reading checkpoint folders of any make: their configuration, what tensors they hold, and the tensors; safetensors
only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from draftsmith.foundation.artefacts import load_tensors, read_json
from draftsmith.foundation.errors import UserError

INDEX = "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
        UserError: no folder, no configuration, or a broken one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give the folder of a checkpoint, downloaded first")
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json, so it is no checkpoint folder")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} holds no JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the checkpoint: those of its index, else all (as vLLM and SGLang load them).

    Raises:
        UserError: there are none (with advice where only pickled weights exist), or the index names a missing file.
    """
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        names = sorted(set(index.get("weight_map", {}).values())) if isinstance(index, dict) else []
        files = [folder / name for name in names]
        for file in files:
            if not file.is_file():
                raise UserError(f"{folder / INDEX} names {file.name}, which is missing: download the folder again")
        if files:
            return files
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt")) + sorted(folder.glob("*.pth"))
        if pickled:
            raise UserError(
                f"{pickled[0]} is a pickle, which can run code when it is read, and draftsmith reads none: convert it "
                "once in "
                'an environment you trust, e.g. python -c "import torch, safetensors.torch as s; s.save_file({k: '
                "v.contiguous() "
                f"for k, v in torch.load('{pickled[0].name}', map_location='cpu', weights_only=True).items()}}, "
                "'model.safetensors')\", then run this again"
            )
        raise UserError(f"{folder} holds no *.safetensors file, so no weights")
    return files


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the stored tensors, from the files' headers alone.

    Raises:
        UserError: as `weight_files`; a broken file; a tensor stored twice.
    """
    from safetensors import SafetensorError, safe_open

    out: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if name in out:
                        raise UserError(
                            f"{file}: tensor {name} is in another file of the folder too: remove one of them"
                        )
                    out[name] = tuple(opened.get_slice(name).get_shape())
        except SafetensorError as problem:
            raise UserError(
                f"{file} is not a whole safetensors file ({problem}): download or export it again"
            ) from None
    return out


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All stored tensors, on the CPU, under their stored names.

    Raises:
        UserError: as `read_shapes`.
    """
    read_shapes(folder)
    out: dict[str, Tensor] = {}
    for file in weight_files(folder):
        out |= load_tensors(file)
    return out
