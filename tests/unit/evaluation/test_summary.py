"""`summary.json`: the schema as promised, filled from traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.evaluation.hand_trace import PLAIN, SPECULATIVE, THIRD

from draftsmith.evaluation.summary import (
    Lossless,
    Result,
    StageTime,
    Summary,
    read_summary,
    result_markdown,
    result_table,
    summarise,
    write_summary,
)
from draftsmith.foundation.errors import UserError


def a_result(**changes: object) -> Result:
    lossless = Lossless(checked=3, equal=2, near_ties=1)
    return summarise("word-problems", 0.0, "eagle3", PLAIN, SPECULATIVE, lossless, node_budget=4).model_copy(
        update=changes
    )


def test_result_by_hand() -> None:
    result = a_result()
    assert result.acceptance_length == 12 / 5
    assert result.acceptance_by_depth == [3 / 4, 1.0, 1 / 2]
    assert result.round_cost == 9 / 8
    assert result.speedup.estimate == pytest.approx(155 / 120)
    assert result.speedup.low is not None
    assert result.speedup.high is not None
    assert result.speedup.low < result.speedup.estimate < result.speedup.high
    assert (result.draft_ms, result.verify_ms, result.rest_ms) == pytest.approx((1.8, 6.0, 1.2))
    assert (result.prompts, result.rounds, result.plain_token_ms, result.node_budget) == (3, 5, 8.0, 4)
    assert result.acceptance_length_without_loops == result.acceptance_length
    assert result.looping_answers == 0
    assert result.lossless.different == 0


def test_repeats_count_as_one_prompt() -> None:
    once = a_result()
    both = [*PLAIN, *PLAIN], [*SPECULATIVE, *SPECULATIVE]
    lossless = Lossless(checked=3, equal=3, near_ties=0)
    twice = summarise("s", 0.0, "d", *both, lossless, prompts=["a", "b", "c", "a", "b", "c"])
    assert twice.prompts == 3
    assert twice.speedup == once.speedup
    assert twice.acceptance_length == once.acceptance_length
    assert summarise("s", 0.0, "d", *both, lossless).prompts == 6


def test_file_has_the_promised_fields(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    summary = Summary(results=[a_result()], stages=[StageTime(name="train", seconds=300.5)])
    write_summary(path, summary)
    data = json.loads(path.read_text())
    assert list(data) == ["schema", "results", "stages"]
    assert data["schema"] == 1
    promised = {
        "set": str,
        "temperature": float,
        "drafters": str,
        "acceptance_length": float,
        "acceptance_by_depth": list,
        "round_cost": float,
        "speedup": dict,
        "plain_tokens_per_second": float,
        "tokens_per_second": float,
        "lossless": dict,
    }
    row = data["results"][0]
    assert {name: type(row[name]) for name in promised} == promised
    assert set(row["speedup"]) == {"estimate", "low", "high"}
    assert set(row["lossless"]) == {
        "checked",
        "equal",
        "near_ties",
    }
    assert data["stages"] == [{"name": "train", "seconds": 300.5}]
    assert read_summary(path) == summary


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    result = summarise("s", 1.0, "d", PLAIN[:1], SPECULATIVE[:1], Lossless(checked=0, equal=0, near_ties=0))
    path = tmp_path / "summary.json"
    write_summary(path, Summary(results=[result]))
    row = json.loads(path.read_text())["results"][0]
    assert row["speedup"]["low"] is None
    assert row["speedup"]["high"] is None
    assert "node_budget" not in row
    assert read_summary(path).results[0] == result
    assert result_table([result])[1][0][7] == "–"


def test_fields_of_others_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, Summary(results=[a_result(first_token_ms=31.5)]))
    write_summary(path, read_summary(path))
    assert json.loads(path.read_text())["results"][0]["first_token_ms"] == 31.5


def test_what_cannot_be_measured_is_refused() -> None:
    nothing = Lossless(checked=0, equal=0, near_ties=0)
    with pytest.raises(ValueError, match="in pairs: 3 plain, 2 speculative"):
        summarise("s", 0.0, "d", PLAIN, SPECULATIVE[:2], nothing)
    with pytest.raises(UserError, match="'s'.*no speculative round"):
        summarise("s", 0.0, "d", [THIRD], [THIRD], nothing)


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text('{"schema": 2, "results": []}')
    with pytest.raises(UserError, match=r"summary\.json.*'schema' is 2"):
        read_summary(path)
    row = json.loads(a_result().model_dump_json()) | {"round_cost": -1}
    path.write_text(json.dumps({"schema": 1, "results": [row]}))
    with pytest.raises(UserError, match=r"results\.0\.round_cost"):
        read_summary(path)


def test_table() -> None:
    columns, rows = result_table([a_result()])
    row = dict(zip(columns, rows[0], strict=True))
    assert row["τ"] == "2.40"
    assert row["speed-up"] == "1.29×"
    assert row["α by depth"] == "0.75 1.00 0.50"
    assert row["equal"] == "2 of 3 (1 near tie)"
    assert row["round cost"] == "1.12"
    assert row["T"] == "0"


def test_markdown_table() -> None:
    graded = a_result(graded=30, accuracy=0.5, plain_accuracy=0.4667, first_token_ms=51.2, plain_first_token_ms=50.0)
    for results in ([graded], [graded, a_result(drafters="other", acceptance_length_low=None)]):
        head, rule, *body = result_markdown(results).splitlines()
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *body)]
        assert len({len(row) for row in cells}) == 1 == len({rule.count("|") - 1, len(cells[0])})
        found = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]
        assert ("drafters" in found[0]) == (len(results) > 1)
        assert (found[0]["τ"], found[0]["speed-up"], found[0]["equal"]) == ("2.40", "1.29×", "2 of 3 (1 near tie)")
        assert (found[0]["right answers"], found[0]["first token"]) == ("47 % → 50 %", "50 ms → 51 ms")
    assert (found[1]["drafters"], found[1]["right answers"], found[1]["τ, 95 %"]) == ("other", "–", "–")
    assert "right answers" not in result_markdown([a_result()])
