"""Publishing an export on the Hugging Face hub, only when asked; nothing that tells of the machine goes along."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from draftsmith.foundation.artefacts import PROVENANCE, opened
from draftsmith.foundation.errors import UserError

# Written beside every artefact: command line, folders and processor of the machine.
PRIVATE = (PROVENANCE,)
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"(?<![\w/:.~])(?:~|/[\w.@+-]+)(?:/[\w.@+-]+)+")
_TEXTS = (".md", ".json", ".jinja", ".txt")


def push(folder: Path, hub_id: str, *, private: bool = True, api: Any = None) -> str:
    """Upload an export folder as a model repository, which is made if it is not there.

    Args:
        folder: an export, made with `Extras.published_as`, so that its card names the repository.
        hub_id: `owner/name`.
        private: of a repository that is made now; one that exists stays as it is.
        api: a `huggingface_hub.HfApi`; default: one with the token that is logged in.

    Returns:
        The repository's address.

    Raises:
        UserError: no such id, no export, a file that names a path of this machine, or the hub refuses.
    """
    from httpx import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    check_id(hub_id)
    opened(folder, "export")
    if found := machine_paths(folder):
        raise UserError(f"not pushed: {found[0]}, which is of this machine only; give public names, then push again")
    api = api or HfApi()
    try:
        address = api.create_repo(repo_id=hub_id, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=hub_id,
            folder_path=str(folder),
            repo_type="model",
            commit_message="Drafter for speculative decoding, exported by draftsmith",
            ignore_patterns=list(PRIVATE),
        )
    except LocalTokenNotFoundError:
        raise UserError(f"{hub_id}: nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{hub_id}: HF_HUB_OFFLINE is set, so nothing can be pushed: unset it") from None
    except (HfHubHTTPError, HFValidationError, HTTPError) as problem:
        said = str(problem).strip().splitlines() or [type(problem).__name__]
        raise UserError(f"{hub_id}: the hub refuses: {said[0]}; see that the token may write there") from None
    return str(address)


def check_id(hub_id: str) -> None:
    """Raises UserError unless it is an id of the hub, `owner/name`."""
    if not _ID.fullmatch(hub_id) or ".." in hub_id or "--" in hub_id:
        raise UserError(f"--push {hub_id}: an id on the hub is owner/name, of letters, digits, '-', '_' and '.'")


def machine_paths(folder: Path) -> list[str]:
    """Where the texts of a folder that would be pushed name a file or folder of this machine: `file: path`."""
    out = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.suffix not in _TEXTS or path.name in PRIVATE:
            continue
        for named in _PATH.findall(path.read_text(encoding="utf-8")):
            if named.startswith("~") or Path(named).exists() or Path(named).is_relative_to(Path.home()):
                out.append(f"{path.relative_to(folder)} names {named}")
    return out
