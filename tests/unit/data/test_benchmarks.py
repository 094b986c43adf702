"""Benchmarks from a folder, from the hub (a stand-in), from a file; the real files where DRAFTSMITH_DATA names them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from draftsmith import stages
from draftsmith.data.benchmarks import BENCHMARKS, load_benchmark, posed
from draftsmith.data.conversations import Conversation, Message
from draftsmith.foundation.errors import UserError
from draftsmith.recipe import DataOptions, Recipe

REAL = os.environ.get("DRAFTSMITH_DATA")


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def problem(number: str, *turns: str, **more: str) -> dict[str, Any]:
    messages: list[dict[str, str]] = []
    for turn in turns:
        if messages:
            messages.append({"role": "assistant", "content": ""})
        messages.append({"role": "user", "content": turn})
    return {"id": number, "source": "X", "messages": messages, **more}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAFTSMITH_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)  # whoever asks for the hub fails
    return tmp_path


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return rows

    monkeypatch.delenv("DRAFTSMITH_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gsm8k", "1 + 1?\n\nSolve the problem step by step and give the final number at the end."),
        ("svamp", "1 + 1?\n\nSolve the problem step by step and give the final number at the end."),
        ("math-500", "1 + 1?\n\nSolve the problem step by step and put the final answer in \\boxed{}."),
        ("humaneval", "Complete the following Python function.\n\n```python\n1 + 1?\n```"),
        ("mbpp", "1 + 1?\n\nAnswer with the Python function only."),
        ("mt-bench", "1 + 1?"),
        ("spec-bench", "1 + 1?"),
    ],
)
def test_folder_and_wrapping(folder: Path, name: str, expected: str) -> None:
    written(folder / BENCHMARKS[name].file, [problem("x/1", "1 + 1?", reference="2")])
    (conversation,) = load_benchmark(name)
    assert conversation.messages == (Message("user", expected),)
    assert (conversation.id, conversation.reference) == ("x/1", "2")


def test_two_turns_keep_their_placeholder(folder: Path) -> None:
    written(folder / "eval_mtbench.jsonl", [problem("mt_bench/81", "Write.", "Rewrite.")])
    (conversation,) = load_benchmark("mt-bench")
    assert [(m.role, m.content) for m in conversation.messages] == [
        ("user", "Write."),
        ("assistant", ""),
        ("user", "Rewrite."),
    ]
    assert conversation.waits


def test_subset_by_seed_in_order(folder: Path) -> None:
    written(folder / "eval_gsm8k_test.jsonl", [problem(f"g/{i}", f"{i}?") for i in range(40)])
    chosen = [c.id for c in load_benchmark("gsm8k", limit=8, seed=1)]
    assert chosen == [c.id for c in load_benchmark("gsm8k", limit=8, seed=1)]
    assert len(set(chosen)) == 8
    assert chosen == sorted(chosen, key=lambda name: int(name[2:]))
    assert chosen != [c.id for c in load_benchmark("gsm8k", limit=8, seed=2)]
    assert len(load_benchmark("gsm8k", limit=100)) == len(load_benchmark("gsm8k")) == 40


def test_categories(folder: Path) -> None:
    rows = [problem(f"spec_bench/{c}/{i}", "a", "b") for i, c in enumerate(("writing", "qa", "stem", "qa"))]
    written(folder / "eval_specbench.jsonl", rows)
    assert [c.id for c in load_benchmark("spec-bench:qa")] == ["spec_bench/qa/1", "spec_bench/qa/3"]
    assert [c.id for c in load_benchmark("spec-bench:mt_bench")] == ["spec_bench/writing/0", "spec_bench/stem/2"]
    with pytest.raises(UserError, match="no category 'rag': choose mt_bench, qa, stem, writing"):
        load_benchmark("spec-bench:rag")
    written(folder / "eval_gsm8k_test.jsonl", rows)
    with pytest.raises(UserError, match="gsm8k has no categories"):
        load_benchmark("gsm8k:hard")


@pytest.mark.parametrize(
    ("name", "row", "asked", "expected"),
    [
        (
            "mt-bench",
            {"prompt_id": 7, "prompt": ["a", "b"], "category": "math", "reference": []},
            ("HuggingFaceH4/mt_bench_prompts", None, "train"),
            ("mt_bench/7", ["a", "", "b"], None),
        ),
        (
            "gsm8k",
            {"question": "Q", "answer": "1 + 2 = <<1+2=3>>3\n#### 1,003"},
            ("openai/gsm8k", "main", "test"),
            ("gsm8k/test/0", ["Q"], "1003"),
        ),
        (
            "math-500",
            {"problem": "P", "answer": "\\pi", "unique_id": "test/algebra/1.json", "subject": "Algebra"},
            ("HuggingFaceH4/MATH-500", None, "test"),
            ("math500/test/algebra/1.json", ["P"], "\\pi"),
        ),
        (
            "svamp",
            {"ID": "chal-1", "Body": "He has 2", "Question": "How many? ", "Answer": 2.0},
            ("ChilleD/SVAMP", None, "test"),
            ("svamp/test/chal-1", ["He has 2. How many?"], "2"),
        ),
        (
            "humaneval",
            {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "  pass"},
            ("openai/openai_humaneval", None, "test"),
            ("HumanEval/0", ["def f():"], "  pass"),
        ),
        (
            "mbpp",
            {"task_id": 11, "text": "Do it.", "test_list": ["assert f()", "assert g()"], "code": "def f(): 1"},
            ("google-research-datasets/mbpp", "full", "test"),
            ("mbpp/11", ["Do it.\nYour code should pass these tests:\n\nassert f()\nassert g()"], "def f(): 1"),
        ),
    ],
)
def test_hub_rows(
    name: str,
    row: dict[str, Any],
    asked: tuple[Any, ...],
    expected: tuple[str, list[str], str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = hub(monkeypatch, [row])
    (conversation,) = load_benchmark(name)
    assert calls == [asked]
    number, turns, reference = expected
    assert (conversation.id, conversation.reference, conversation.source) == (number, reference, name)
    for message, turn in zip(conversation.messages, turns, strict=True):
        assert message.content == (BENCHMARKS[name].wrap(turn) if message.role == "user" else "")


def test_a_folder_without_the_file_falls_back_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = hub(monkeypatch, [{"question": "Q", "answer": "#### 3"}])
    monkeypatch.setenv("DRAFTSMITH_DATA", str(tmp_path))
    assert [c.reference for c in load_benchmark("gsm8k")] == ["3"]
    assert len(calls) == 1


def test_neither_here_nor_there_names_both_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.delenv("DRAFTSMITH_DATA", raising=False)
    with pytest.raises(
        UserError,
        match=r"eval_gsm8k_test\.jsonl into a folder .* DRAFTSMITH_DATA \(not set\).*openai/gsm8k.*no network",
    ):
        load_benchmark("gsm8k")
    monkeypatch.setenv("DRAFTSMITH_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"spec-bench has no data set on the hub: put eval_specbench.*where it is not"):
        load_benchmark("spec-bench")


def test_a_file_of_the_users_is_taken_as_it_is_without_its_answers(tmp_path: Path) -> None:
    rows = [
        {"prompt": "What?", "response": "That."},
        {"messages": [{"role": "user", "content": "Who?"}]},
    ]
    path = written(tmp_path / "mine.jsonl", rows)
    assert [c.messages for c in load_benchmark(str(path))] == [(Message("user", "What?"),), (Message("user", "Who?"),)]
    with pytest.raises(UserError, match="does not exist"):
        load_benchmark(str(tmp_path / "other.jsonl"))


def test_a_broken_benchmark_is_refused(folder: Path) -> None:
    path = written(folder / "eval_gsm8k_test.jsonl", [problem("a", "1?")])
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(UserError, match="must be whole; the first is line 2: not valid JSON"):
        load_benchmark("gsm8k")


def test_unknown_benchmarks() -> None:
    with pytest.raises(UserError, match="choose mt-bench, gsm8k, math-500, svamp, humaneval, mbpp, spec-bench"):
        load_benchmark("gsm9k")


@pytest.mark.skipif(REAL is None, reason="DRAFTSMITH_DATA is not set")
def test_the_real_files() -> None:
    sizes = {
        "mt-bench": 80,
        "gsm8k": 1319,
        "math-500": 500,
        "svamp": 300,
        "humaneval": 164,
        "mbpp": 500,
        "spec-bench": 480,
    }
    for name, size in sizes.items():
        found = load_benchmark(name)
        assert len(found) == size
        assert len({c.id for c in found}) == size
        assert all(c.waits for c in found)
    assert len(load_benchmark("spec-bench:math_reasoning")) == len(load_benchmark("spec-bench:mt_bench")) == 80
    assert all(len(c.messages) == 3 for c in load_benchmark("mt-bench"))
    assert load_benchmark("gsm8k")[0].reference == "18"
    assert load_benchmark("svamp")[0].messages[0].content.startswith("Each pack of dvds costs 76 dollars. If there")


def test_training_problems_are_put_as_the_benchmark_puts_its_own(folder: Path) -> None:
    written(folder / BENCHMARKS["gsm8k"].file, [problem("a", "1 + 1?")])
    solved = Conversation("b", (Message("user", "1 + 1?"), Message("assistant", "1 + 1?")), reference="2")
    found = posed([solved], "gsm8k")
    assert found[0].messages[0] == load_benchmark("gsm8k")[0].messages[0]
    assert found[0].messages[1] == solved.messages[1], "an answer is no problem"
    assert (found[0].id, found[0].reference) == ("b", "2")


def test_a_recipe_says_how_a_files_problems_are_put(tmp_path: Path) -> None:
    rows = [problem(str(i), f"{i} + 1?") for i in range(12)]
    given = {"path": str(written(tmp_path / "sums.jsonl", rows)), "train": 4, "dev": 2, "test": 2}
    put = Recipe(data=DataOptions(**given, posed_as="svamp"))
    stages.prompts(SimpleNamespace(recipe=put), tmp_path / "prompts", {})  # type: ignore[arg-type]
    train = (tmp_path / "prompts" / "train.jsonl").read_text().splitlines()
    assert len(train) == 4
    assert all("+ 1?\\n\\nSolve the problem" in line for line in train)
    assert "posed_as" not in DataOptions(**given).model_dump(), "runs from before the option must not become stale"
    with pytest.raises(ValueError, match="there is no benchmark 'gsm9k'"):
        DataOptions(**given, posed_as="gsm9k")
    with pytest.raises(ValueError, match="give data.path"):
        DataOptions(posed_as="gsm8k")
