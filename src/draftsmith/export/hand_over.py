"""One door to the exporters: a drafter, a server's name, a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from draftsmith.export import gguf, sglang, speculators, transformers, vllm
from draftsmith.export.checkpoint import PLAIN, Drafter, Exported, Extras
from draftsmith.foundation.errors import UserError

Exporter = Callable[[Drafter, Path, Extras], Exported]

SERVERS: Mapping[str, Exporter] = MappingProxyType(
    {
        "vllm": vllm.export,
        "sglang": sglang.export,
        "speculators": speculators.export,
        "transformers": transformers.export,
        "gguf": gguf.export,
    }
)


def export(drafter: Drafter, server: str, folder: Path, extras: Extras = PLAIN) -> Exported:
    """Write `drafter` for `server` (a key of `SERVERS`) into `folder`.

    Raises:
        UserError: an unknown server, or one that can't run this drafter (with the reason).
    """
    if server not in SERVERS:
        raise UserError(f"--to {server}: unknown; the servers are {', '.join(SERVERS)}")
    name = extras.published_as or folder.name
    if "eagle-" in name.lower() and getattr(drafter, "kind", "") == "eagle3":
        raise UserError(
            f"{name}: vLLM takes a path with 'eagle-' in it for EAGLE-1 where no method is named; choose another name"
        )
    return SERVERS[server](drafter, folder, extras)
