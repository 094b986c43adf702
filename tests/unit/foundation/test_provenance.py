"""Where an artefact comes from, without secrets."""

from __future__ import annotations

import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

from draftsmith.foundation import provenance


def test_collect_is_json_and_names_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["draftsmith", "train", "--name", "a b"])
    found = json.loads(json.dumps(provenance.collect()))
    assert found["command"] == "draftsmith train --name 'a b'"
    assert found["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["time"].endswith("+00:00")
    for path, said in (("/home/me/.venv/bin/draftsmith", "draftsmith"), ("/a/__main__.py", "python -m draftsmith")):
        monkeypatch.setattr("sys.argv", [path, "score"])
        assert provenance.collect()["command"] == f"{said} score"


def test_secrets_are_blanked_and_other_options_are_not() -> None:
    arguments = [
        "draftsmith",
        "--api-key",
        "hunter2",
        "--token=abc",
        "--max-tokens",
        "128",
        "--keep",
        "0.5",
        "--hf-token",
        "x",
    ]
    assert provenance.command_line(arguments) == (
        "draftsmith --api-key '***' '--token=***' --max-tokens 128 --keep 0.5 --hf-token '***'"
    )


def test_git_revision_only_for_tracked_files(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.invalid", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "tracked.py").write_text("x")
    git("add", "tracked.py")
    git("commit", "-q", "-m", "one")
    (tmp_path / "other.py").write_text("x")
    assert provenance._revision(tmp_path / "tracked.py") == git("rev-parse", "HEAD")
    assert provenance._revision(tmp_path / "other.py") is None
    (tmp_path / "tracked.py").write_text("y")
    assert provenance._revision(tmp_path / "tracked.py") == git("rev-parse", "HEAD") + " (with uncommitted changes)"
