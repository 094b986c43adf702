"""benchmarks/decoding_speed.py on a tiny run: everybody is in the table, and the parts of a round add up."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml

from draftsmith.foundation import artefacts
from draftsmith.target.model import load_target
from tests.integration.tiny_folder import write_target
from tests.unit.test_api import write_drafter

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "decoding_speed.py"


def test_everybody_is_measured_and_a_rounds_parts_add_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_target(tmp_path / "target")
    target = load_target(folder, "float32", "cpu")
    write_drafter(tmp_path / "run" / "drafter", target)
    own = {"target": {"name": str(folder), "dtype": "float32", "device": "cpu"}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(own))
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"{i} + 1?"}]} for i in range(3)]
    artefacts.write_jsonl(tmp_path / "sums.jsonl", rows)
    given = {"--run": tmp_path / "run", "--assistant": folder, "--benchmark": tmp_path / "sums.jsonl"}
    given |= {"--prompts": 2, "--tokens": 10, "--compose": "chain=head@chain:2", "--out": tmp_path / "out"}
    script = runpy.run_path(str(SCRIPT))
    script["main"]([str(part) for pair in given.items() for part in pair])
    found = {r["drafters"]: r for r in json.loads((tmp_path / "out" / "speed.json").read_text())["results"]}
    ours = {"head", "chain", "prompt-lookup"}
    assert found.keys() == ours | {
        *("transformers", "transformers-prompt-lookup:3", "transformers-prompt-lookup:10"),
        *("assisted", "assisted:2", "assisted:4"),
    }
    assert all(r["compared_with"] == "plain" for r in found.values())
    for name in ours:
        split = found[name]["split"]
        parts = [split[part] for part in ("draft", "verify", "commit", "rest")]
        assert all(part > 0 for part in parts)
        whole = sum(found[name][part] for part in ("draft_ms", "verify_ms", "rest_ms"))
        assert whole / 3 < sum(parts) < 3 * whole, "the warm-up is in one of them only"
        assert split["besides"] == pytest.approx((split["commit"] + split["rest"]) / sum(parts))
    # headings may be broken at a terminal's width, names of modes too
    assert "speed.json" in capsys.readouterr().out.replace("\n", "")
