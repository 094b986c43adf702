"""draftsmith trains, proves and measures drafters that make a language model answer faster, its answers unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftsmith.api import Answer, Model, Stream, TextPiece, load

__version__ = "0.1.0"
__all__ = ["Answer", "Model", "Stream", "TextPiece", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only what needs them waits for them
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("draftsmith.api"), name)
    raise AttributeError(f"module 'draftsmith' has no attribute {name!r}")
