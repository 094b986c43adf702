"""Fixtures for what reads from a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.unit.data.serving import Script, serving

from draftsmith.data import served


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(served, "FIRST_DELAY", 0.001)
    with serving(Script()) as script:
        yield script
