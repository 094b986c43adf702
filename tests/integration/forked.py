"""Runs the command line in processes of their own that can be killed at a chosen moment, with SIGKILL.

A server imports everything once and forks for each command, so that a kill costs no new import of torch:

    python -m tests.integration.forked     reads {"arguments", "kill"} and writes {"code", "events", "said", "seconds"},
                                           a JSON object a line

`kill` is null, {"event": n} (before the process's n-th change of the file system, from 0) or {"seconds": s}.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHANGES = ("replace", "rename", "fsync", "unlink", "rmdir", "mkdir")


class Commands:
    """The server's other end."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "140"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def __call__(self, *arguments: object, kill: dict[str, float] | None = None) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps({"arguments": list(map(str, arguments)), "kill": kill}) + "\n")
        self._server.stdin.flush()
        found: dict[str, Any] = json.loads(self._server.stdout.readline())
        return found

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(10)


def serve() -> None:
    """Answer commands until the input ends."""
    for module in ("transformers.models.llama.modeling_llama", "draftsmith.commands.stage", "matplotlib.pyplot"):
        importlib.import_module(module)
    for line in sys.stdin:
        command = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            answer = _run(command["arguments"], command["kill"] or {}, Path(folder))
        print(json.dumps(answer), flush=True)  # noqa: T201 - the protocol's


def _run(arguments: list[str], kill: dict[str, float], folder: Path) -> dict[str, Any]:
    started = time.perf_counter()
    (folder / "said").touch()
    child = os.fork()
    if not child:
        _in_child(arguments, kill.get("event"), folder)
    if "seconds" in kill:
        time.sleep(kill["seconds"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    counted = folder / "events"
    return {
        "code": os.waitstatus_to_exitcode(status),
        "events": int(counted.read_text()) if counted.is_file() else None,
        "said": (folder / "said").read_text(),
        "seconds": time.perf_counter() - started,
    }


def _in_child(arguments: list[str], fatal: float | None, folder: Path) -> None:
    from draftsmith import cli

    said = os.open(folder / "said", os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    count = 0

    def counting(original: Any) -> Any:
        def change(*values: Any, **more: Any) -> Any:
            nonlocal count
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return original(*values, **more)

        return change

    for name in CHANGES:
        setattr(os, name, counting(getattr(os, name)))
    sys.argv = ["draftsmith", *arguments]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        (folder / "events").write_text(str(count))
        os._exit(code)


if __name__ == "__main__":
    serve()
