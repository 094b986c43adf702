"""Where an artefact comes from: command, time, code, versions, machine. Written beside artefacts, never compared."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PACKAGES = ("draftsmith", "torch", "transformers", "safetensors", "numpy")
_SECRET = re.compile(r"(?i)(key|secret|password|token)$")


def collect() -> dict[str, object]:
    """Command line, UTC time, git revision (None outside a checkout), versions, threads and devices, ready for JSON."""
    import torch

    devices = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "command": command_line([*_program(sys.argv[0]), *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git": _git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": devices,
        "ranks": int(os.environ.get("WORLD_SIZE") or 1),
    }


def command_line(arguments: list[str]) -> str:
    """The command, to be typed again; values of `--…key`, `--…token`, `--…secret` and `--…password` are blanked."""
    shown: list[str] = []
    blank_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        secret = bool(_SECRET.search(name)) and name.startswith("-")
        shown.append("***" if blank_next else f"{name}=***" if secret and equals else argument)
        blank_next = secret and not equals
    return shlex.join(shown)


def _program(path: str) -> list[str]:
    """How a program is called, without where it lies: documents quote it."""
    return ["python", "-m", "draftsmith"] if Path(path).name == "__main__.py" else [Path(path).name]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def _git() -> str | None:
    return _revision(Path(__file__).resolve())


def _revision(file: Path) -> str | None:
    """The revision of the checkout that tracks `file`; None for an installed copy, even inside another checkout."""
    if _run_git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    revision = _run_git(file.parent, "rev-parse", "HEAD")
    changed = _run_git(file.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{revision} (with uncommitted changes)" if revision and changed else revision


def _run_git(folder: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@functools.cache
def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
