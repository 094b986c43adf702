"""`draftsmith bench --benchmark`: the command from a benchmark file to a summary, a report, and a comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftsmith.evaluation.summary import read_summary, write_summary
from draftsmith.foundation import artefacts
from draftsmith.target.model import load_target
from tests.integration.command_line import Ended, draftsmith
from tests.integration.tiny_folder import write_target
from tests.unit.test_api import write_drafter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target, a drafter for it, and a benchmark's file in the layout of DRAFTSMITH_DATA."""
    folder = tmp_path_factory.mktemp("bench")
    target = load_target(write_target(folder / "target"), "float32", "cpu")
    write_drafter(folder / "drafter", target)
    rows = [
        {"id": f"gsm8k/test/{i}", "messages": [{"role": "user", "content": f"{i} + 1?"}], "reference": str(i + 1)}
        for i in range(5)
    ]
    artefacts.write_jsonl(folder / "data" / "eval_gsm8k_test.jsonl", rows)
    turns = [{"role": "user", "content": "Write."}, {"role": "assistant", "content": ""}]
    again = [*turns, {"role": "user", "content": "Rewrite."}]
    artefacts.write_jsonl(folder / "mine.jsonl", [{"id": "m", "messages": again}])
    return folder


def bench(root: Path, out: Path, *more: object) -> Ended:
    return draftsmith(
        "bench",
        "--run",
        out / "run",
        "--target",
        root / "target",
        "--prompts",
        2,
        "--max-new-tokens",
        8,
        "--out",
        out,
        "target.dtype=float32",
        "target.device=cpu",
        "bench.warmup=0",
        *more,
    )


def test_benchmarks_drafters_and_baselines(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_DATA", str(root / "data"))
    out = tmp_path / "out"
    arguments = [
        *("--benchmark", f"gsm8k,{root / 'mine.jsonl'}", "--drafters", f"head={root / 'drafter'}"),
        *("--baselines", "prompt-lookup,transformers-prompt-lookup,transformers-prompt-lookup:2"),
        *("--baselines", f"assisted={root / 'target'},assisted:1={root / 'target'}"),
        *("--temperatures", "0,1", "--assistant-tokens", 3),
    ]
    ended = bench(root, out, *arguments)
    assert ended.code == 0, ended.err
    found = read_summary(out / "summary.json").results
    who = {"head", "prompt-lookup", "transformers", "transformers-prompt-lookup", "assisted"}
    who |= {"transformers-prompt-lookup:2", "assisted:1"}
    assert {(r.set, r.temperature, r.drafters) for r in found} == {
        (name, t, w) for name in ("gsm8k", "mine") for t in (0.0, 1.0) for w in who
    }
    by_name = {(r.set, r.drafters): r for r in found if not r.temperature}
    assert by_name["gsm8k", "assisted"].compared_with == "transformers"
    assert by_name["gsm8k", "assisted"].acceptance_length > 2, "the target itself assists: all is accepted"
    assert 1 < by_name["gsm8k", "assisted:1"].acceptance_length <= 2, "one token is drafted in a round"
    assert by_name["gsm8k", "transformers-prompt-lookup:2"].node_budget == 2
    assert by_name["gsm8k", "head"].graded == 2
    assert by_name["mine", "head"].prompts == 2, "two turns"
    assert "answers are right" in ended.out
    assert json.loads((out / "provenance.json").read_text(encoding="utf-8"))["facts"]["Prompts"] == "gsm8k, mine"
    table = (out / "table.md").read_text(encoding="utf-8")
    assert "--benchmark gsm8k," in table
    assert table.count("\n| gsm8k |") == table.count("\n| mine |") == 2 * len(who)
    rows = list(artefacts.read_jsonl(out / "bench.jsonl"))
    assert len(rows) == 4 * 2 * 8
    # again: everything is there
    before = (out / "bench.jsonl").read_bytes()
    assert bench(root, out, *arguments).code == 0
    assert (out / "bench.jsonl").read_bytes() == before
    # other prompts, another drafter: refused by name
    refused = bench(root, out, *arguments, "--assistant-tokens", 2)
    assert refused.code == 2
    assert "assistant_tokens was 3" in refused.err
    assert "--redo" in refused.err
    assert bench(root, out, *arguments, "--assistant-tokens", 2, "--redo").code == 0


def test_against_an_earlier_summary(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_DATA", str(root / "data"))
    out = tmp_path / "out"
    arguments = ["--benchmark", "gsm8k", "--drafters", root / "drafter", "--prompts", 5]
    assert bench(root, out, *arguments).code == 0
    earlier = tmp_path / "earlier.json"
    earlier.write_bytes((out / "summary.json").read_bytes())
    same = bench(root, out, *arguments, "--against", earlier)
    assert (same.code, "no regression against" in same.out) == (0, True)
    summary = read_summary(earlier)
    (result,) = summary.results
    better = result.model_copy(
        update={"acceptance_length": 4.0, "acceptance_length_low": 3.9, "acceptance_length_high": 4.1}
    )
    write_summary(earlier, summary.model_copy(update={"results": [better]}))
    worse = bench(root, out, *arguments, "--against", earlier)
    assert worse.code == 1
    assert "gsm8k, T = 0, drafter: acceptance length fell from 4.000" in worse.err


def test_drafters_put_together_and_a_report(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_DATA", str(root / "data"))
    out = tmp_path / "out"
    arguments = [
        *("--benchmark", "gsm8k", "--drafters", f"head={root / 'drafter'}"),
        *("--compose", "both=merge:trie(head,ngram,budget=7)", "--baselines", "transformers"),
    ]
    ended = bench(root, out, *arguments)
    assert ended.code == 0, ended.err
    assert {r.drafters for r in read_summary(out / "summary.json").results} == {"head", "both", "transformers"}
    members = {row["drafters"]: row["members"] for row in artefacts.read_jsonl(out / "bench.jsonl")}
    assert members == {None: [], "head": [], "both": ["head", "ngram"], "transformers": []}
    assert draftsmith("report", out).code == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in ("both", "ngram", "transformers"))
    ended = draftsmith("report", out, out, "--out", tmp_path / "both")
    assert (ended.code, (tmp_path / "both" / "report.html").is_file()) == (0, True)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--benchmark", "gsm8k"], "nothing is measured beside plain decoding"),
        (["--benchmark", "gsm9k", "--baselines", "prompt-lookup"], "there is no benchmark 'gsm9k'"),
        (["--benchmark", "gsm8k", "--baselines", "lookup"], "there is no baseline 'lookup': choose prompt-lookup"),
        (["--benchmark", "gsm8k", "--drafters", "a="], "write name=path"),
        (["--benchmark", "gsm8k", "--drafters", "a=nowhere"], "nowhere does not exist"),
        (["--benchmark", "gsm8k", "--temperatures", "warm"], "write numbers with commas"),
        (["--baselines", "transformers"], "belongs to --benchmark"),
    ],
)
def test_what_is_wrong_is_said(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], said: str
) -> None:
    monkeypatch.setenv("DRAFTSMITH_DATA", str(root / "data"))
    ended = bench(root, tmp_path / "out", *more)
    assert ended.code == 2
    assert said in ended.err
