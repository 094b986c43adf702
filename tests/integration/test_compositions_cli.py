"""Drafters put together through the command line and the API: calibrate, bench, chat, load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import draftsmith as package
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError
from tests.integration.command_line import draftsmith
from tests.integration.tiny_folder import write_recipe, write_target


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on one target, of other seeds, and a question as a benchmark."""
    folder = tmp_path_factory.mktemp("specialists")
    target = write_target(folder / "target")
    for seed, name in enumerate(("math", "chat")):
        write_recipe(
            folder / name / "recipe.yaml", target, train={"seed": seed}, data={"train": 6, "dev": 4, "test": 1}
        )
        ended = draftsmith("quickstart", "--run", folder / name, "--recipe", folder / name / "recipe.yaml")
        assert ended.code == 0, ended.err
    rows = [{"id": str(i), "messages": [{"role": "user", "content": q}]} for i, q in enumerate(("2+2?", "Hi."))]
    artefacts.write_jsonl(folder / "asked.jsonl", rows)
    return folder


def named(root: Path, flag: str = "--drafter") -> list[object]:
    return [flag, f"math={root / 'math'}", flag, f"chat={root / 'chat'}"]


def test_calibrate_writes_beside_the_drafters_and_tries_read_it(root: Path) -> None:
    out, router = root / "temperatures.json", root / "router.json"
    ended = draftsmith(
        "calibrate", "--run", root / "math", *named(root), "--drafter", "ngram", "--out", out, "--router", router
    )
    assert ended.code == 0, ended.err
    stored = json.loads(out.read_text())["drafters"]
    assert set(stored) == {"math", "chat", "ngram"}
    for name in ("math", "chat"):
        beside = json.loads((root / name / "drafter-calibration.json").read_text())
        assert beside["temperatures"] == stored[name]["temperatures"]
        assert beside["drafter"] == artefacts.checksum(root / name / "drafter")
        artefacts.opened(root / name / "drafter", "drafter")
    assert "on dev answers held out" in " ".join(ended.out.split())
    assert list(json.loads(router.read_text())["members"]) == ["math", "chat", "ngram"]
    drafters = {"math": root / "math", "chat": root / "chat"}
    plain = package.load(root / "target", dtype="float32").generate("2+2?", max_new_tokens=10)
    for compose in (
        "merge:trie(math,chat,calibrated=true,budget=6)",
        f"merge:trie(math,chat,ngram,calibrated={out})",
        f"route:learned(math,chat,ngram,router={router},every=2)",
        "route:keyword(math=2|two,chat)",
        "average(math,chat,weights=0.3/0.7)",
        {"kind": "route:hedge", "members": ["math", {"drafter": "chat", "growth": "chain:2"}]},
    ):
        model = package.load(drafters=drafters, compose=compose)  # type: ignore[arg-type]
        assert model.generate("2+2?", max_new_tokens=10).token_ids == plain.token_ids
    with pytest.raises(UserError, match="ngram was not calibrated"):
        package.load(drafters=drafters, compose="merge:trie(math,ngram,calibrated=true)")
    with pytest.raises(UserError, match="say how math, chat are put together"):
        package.load(drafters=drafters)
    path = root / "chat" / "drafter-calibration.json"
    whole = path.read_text()
    path.write_text(whole.replace(json.loads(whole)["drafter"], "0" * 64))
    with pytest.raises(StaleError, match="made for other weights"):
        package.load(drafters=drafters, compose="merge:trie(math,chat)")
    path.write_text(whole)


def test_bench_measures_compositions_beside_their_members(root: Path) -> None:
    out = root / "bench"
    ended = draftsmith(
        *("bench", "--run", root / "math", "--benchmark", root / "asked.jsonl", "--out", out),
        *named(root, "--drafters"),
        *("--compose", "trie=merge:trie(math,chat,ngram,budget=5)", "--compose", "route:confidence(math,chat)"),
        *("--max-new-tokens", 8),
    )
    assert ended.code == 0, ended.err
    rows = list(artefacts.read_jsonl(out / "bench.jsonl"))
    assert {row["drafters"] for row in rows} == {None, "math", "chat", "trie", "route:confidence(math,chat)"}
    assert all(row["equality"]["equal"] for row in rows if row["drafters"])
    tries = [r for row in rows if row["drafters"] == "trie" for r in row["generation"]["rounds"]]
    assert tries
    assert all(len(r["drafted"]) == 3 and sum(r["drafted"]) == r["nodes"] <= 5 for r in tries)


def test_chat_takes_them_and_says_what_is_wrong(root: Path) -> None:
    spec = "merge:trie(math,chat,budget=5)"
    said = [
        draftsmith("chat", "--run", root / "math", *named(root), "--compose", spec, "--prompt", "Hi", *more).out
        for more in ((), ("--plain",))
    ]
    assert said[0].splitlines()[0] == said[1].splitlines()[0]
    ended = draftsmith(
        "chat", "--run", root / "math", *named(root), "--compose", "merge:trie(math chat)", "--prompt", "Hi"
    )
    assert ended.code == 2
    assert "expected ',' or ')'" in " ".join(ended.err.split())
    ended = draftsmith("chat", "--run", root / "math", "--drafter", "math=nowhere", "--prompt", "Hi")
    assert ended.code == 2
    assert "nowhere does not exist" in " ".join(ended.err.split())
