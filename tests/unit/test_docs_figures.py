"""The figures in docs/serving.md are those of docs/interop.json, which `make interop` measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.interop import concurrency

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_real_servers_is_the_json() -> None:
    found = json.loads((DOCS / "interop.json").read_text(encoding="utf-8"))
    lines = (DOCS / "serving.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    rows = {first: rest for first, *rest in cells}
    for name, figures in found["results"].items():
        if "text_as_without_speculation" in figures:
            equal = f"{figures['text_as_without_speculation']} of {figures['prompts']}"
            counts = [figures["accepted_where_the_text_is_equal"], figures["accepted_by_our_engine"]]
            wanted = [equal, f"{figures['acceptance_length']:.3f}", *(f"{n:,}" for n in counts)]
            assert rows[name] == wanted, name
        elif "acceptance_length_of_our_engine" in figures:
            lengths = [figures["acceptance_length"], figures["acceptance_length_of_our_engine"]]
            assert rows[name] == [str(figures["prompts"]), *(f"{length:.3f}" for length in lengths)], name
    assert sum("text_as_without_speculation" in figures for figures in found["results"].values()) >= 4


def test_the_concurrency_curve_is_the_json() -> None:
    if not (path := DOCS / "concurrency.json").is_file():
        pytest.skip("docs/concurrency.json was not measured (python -m tests.interop.concurrency --docs)")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert concurrency.table(found) in (DOCS / "serving.md").read_text(encoding="utf-8")
    assert len({row["requests"] for row in found["results"]}) >= 3


def test_every_requirement_is_met_by_the_figures() -> None:
    """What issue 9 asks for: 28 of 30 texts, counts ± 1 by prompt and 1 % in total, llama.cpp within 5 %."""
    results = json.loads((DOCS / "interop.json").read_text(encoding="utf-8"))["results"]
    for name, found in results.items():
        if "text_as_without_speculation" in found:
            assert found["prompts"] == 30, name
            assert found["text_as_without_speculation"] >= 28, name
            assert found["largest_difference_of_a_prompt"] <= 1, name
            here, there = found["accepted_by_our_engine"], found["accepted_where_the_text_is_equal"]
            assert abs(here - there) <= 0.01 * here, name
        elif "acceptance_length_of_our_engine" in found:
            ours = found["acceptance_length_of_our_engine"]
            assert abs(found["acceptance_length"] - ours) <= 0.05 * ours, name
