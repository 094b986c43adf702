"""The cost-aware budget in the engine, on counts: a given profile decides, for each batch size its own; and
benchmarks/cost_aware.py on a tiny run."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import yaml

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import GrowthOptions
from draftsmith.foundation import artefacts
from draftsmith.target.model import load_target
from tests.integration.tiny_folder import write_target
from tests.tiny import OracleDrafter, prompts, tiny_target
from tests.unit.test_api import write_drafter

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cost_aware.py"
ROWS = (1, 2, 4, 8, 16, 32)


def profile(folder: Path, **row_ms: float) -> Path:
    """A machine on which a verification takes 20 ms and this much for each row: `b1=0.1` alone, `b4=…` four together;
    a draft pass takes 2 ms."""
    batches = {int(name[1:]): ms for name, ms in row_ms.items()}
    verify = [
        {"batch": b, "context": 64, "ms": {str(rows): 20 + ms * rows for rows in ROWS}} for b, ms in batches.items()
    ]
    drafting = [
        {"drafter": "any", "batch": b, "context": 64, "depth": depth, "width": width, "ms": 2.0 * depth}
        for b in batches
        for depth in (1, 8)
        for width in (1, 8)
    ]
    path = folder / "profile.json"
    path.write_text(json.dumps({"format": 2, "verify": verify, "drafting": drafting}))
    return path


def nodes_of_a_round(path: Path, dial: float, batch: int) -> tuple[float, float]:
    """Mean nodes, and mean depth that was drafted to, in rounds of `batch` sequences."""
    target, asked = tiny_target(), prompts(batch, seed=5)
    plain = Engine(target).generate(asked, None, 32)
    oracle = OracleDrafter([p + g.token_ids for p, g in zip(asked, plain, strict=True)], dial)
    options = GrowthOptions(kind="cost-aware", profile=path, node_budget=31, depth=6, width=4, sequences=batch)
    calls: list[int] = []
    expand = oracle.expand
    oracle.expand = lambda state, frontier: (calls.append(frontier.depth), expand(state, frontier))[1]  # type: ignore
    found = Engine(target, Single(oracle, options.build())).generate(asked, None, 32)
    assert [g.token_ids for g in found] == [g.token_ids for g in plain]
    rounds = [r for g in found for r in g.rounds]
    return sum(r.nodes for r in rounds) / len(rounds), len(calls) / max(len(g.rounds) for g in found)


def test_other_budgets_where_the_profile_says_so(tmp_path: Path) -> None:
    cheap, passes = nodes_of_a_round(profile(tmp_path, b1=0.1, b4=2.0), 0.7, 1)
    assert cheap > 6, "rows cost next to nothing alone"
    together, _ = nodes_of_a_round(profile(tmp_path, b1=0.1, b4=2.0), 0.7, 4)
    assert 0 < together < cheap / 2, "the same profile, four at once"
    dear, _ = nodes_of_a_round(profile(tmp_path, b1=2.0), 0.7, 1)
    assert 0 < dear < cheap / 2
    none, fewer = nodes_of_a_round(profile(tmp_path, b1=50.0), 0.7, 1)
    assert none == 0, "plain decoding, where a row costs more than a token"
    assert 0 == fewer < passes, "and what can't pay is not drafted"


def test_the_benchmark_compares_with_the_best_fixed_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_target(tmp_path / "target")
    write_drafter(tmp_path / "run" / "drafter", load_target(folder, "float32", "cpu"))
    own = {"target": {"name": str(folder), "dtype": "float32", "device": "cpu"}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(own))
    rows = [{"id": str(i), "messages": [{"role": "user", "content": f"{i} + 1?"}]} for i in range(3)]
    artefacts.write_jsonl(tmp_path / "sums.jsonl", rows)
    given = {"--run": tmp_path / "run", "--profile": profile(tmp_path, b1=0.1, b2=30.0), "--batches": "1,2"}
    given |= {"--sets": f"math={tmp_path / 'sums.jsonl'}", "--budgets": "1,5", "--depth": 3, "--width": 2}
    given |= {"--prompts": 3, "--tokens": 8, "--out": tmp_path / "out"}
    runpy.run_path(str(SCRIPT))["main"]([str(part) for pair in given.items() for part in pair])
    alone, together = json.loads((tmp_path / "out" / "cost-aware.json").read_text())["results"]
    assert (alone["batch"], together["batch"]) == (1, 2)
    for one in (alone, together):
        assert one["best"] in ("1", "5")
        speeds = {name: growth["tokens_per_second"] for name, growth in one["growths"].items()}
        assert one["against_best"]["estimate"] == pytest.approx(speeds["cost-aware"] / max(speeds["1"], speeds["5"]))
    assert together["growths"]["cost-aware"]["nodes"] < alone["growths"]["cost-aware"]["nodes"]
    assert "against best" in capsys.readouterr().out
