"""Coloured pieces of text on a terminal."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable

from draftsmith.foundation import console


def coloured() -> bool:
    """Whether colours are seen: on a terminal, or where `FORCE_COLOR` is set; never with `NO_COLOR`."""
    return (sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))) and not os.environ.get("NO_COLOR")


def write_styled(texts: Iterable[str], styles: Iterable[str]) -> None:
    """Write texts, each in its rich style, neighbours of one style together; no line end is added."""
    for style, group in itertools.groupby(zip(texts, styles, strict=True), key=lambda item: item[1]):
        if text := "".join(text for text, _ in group):
            console.write(text, style)
