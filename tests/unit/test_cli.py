"""The command line's frame: version, help, and how wrong input ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import draftsmith
from draftsmith import cli
from draftsmith.commands import bench as measuring
from draftsmith.commands import stage
from draftsmith.foundation.errors import StaleError, UserError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from draftsmith.cli import main; main()", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])


def test_version_and_help() -> None:
    version = run("--version")
    assert (version.returncode, version.stdout) == (0, f"draftsmith {draftsmith.__version__}\n")
    shown = run("--help")
    assert shown.returncode == 0
    assert "--version" in shown.stdout


def test_an_unknown_command_ends_with_code_2() -> None:
    assert run("fly").returncode == 2


@pytest.mark.parametrize("kind", [UserError, StaleError])
def test_wrong_input_is_one_sentence_and_code_2(
    kind: type[UserError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kind("recipe.yaml:3: train.stpes is no option; did you mean train.steps?")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "error: recipe.yaml:3: train.stpes is no option; did you mean train.steps?\n"
    assert captured.out == ""


def test_bench_measures_a_server_beside_a_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--server` is the writer of answers everywhere else, and with `--benchmark` something to measure."""
    opened: list[object] = []
    asked: list[measuring.Asked] = []
    monkeypatch.setattr(stage, "opened", lambda run, recipe, assigned: opened.append(list(assigned)))
    monkeypatch.setattr(measuring, "bench", lambda run, wanted, out, redo: asked.append(wanted) or [])
    given = ["bench", "--benchmark", "gsm8k", "--baselines", "server-plain=http://b:1", "--server", "http://a:1"]
    assert CliRunner().invoke(cli.app, given).exit_code == 0
    assert (opened, asked[0].baselines) == ([[]], ["server-plain=http://b:1", "server=http://a:1"])
