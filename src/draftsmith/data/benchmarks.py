"""Benchmarks as conversations: from a folder of the user's, from the Hugging Face hub, or from a file.

`DRAFTSMITH_DATA` names a folder with one jsonl file for each benchmark (`eval_gsm8k_test.jsonl`, …), rows as in
`conversations.py`, the user's message being the bare problem. What is put around a problem before a model reads it:

| benchmark | what the model reads |
|---|---|
| mt-bench, spec-bench | the questions as they are; the answer between two turns is a placeholder, to be generated |
| gsm8k, svamp | the problem, then "Solve the problem step by step and give the final number at the end." |
| math-500 | the problem, then "Solve the problem step by step and put the final answer in \\boxed{}." |
| humaneval | "Complete the following Python function.", then the function's head in a code block |
| mbpp | the task and its tests, then "Answer with the Python function only." |
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from draftsmith.data.conversations import Conversation, Message, asked, read_conversations, subset
from draftsmith.data.rows import SUFFIXES, hub_rows
from draftsmith.foundation.errors import UserError

VARIABLE = "DRAFTSMITH_DATA"
# Spec-Bench counts MT-Bench's eight categories as one of its six tasks.
SPEC_BENCH_MT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


# id, user turns, gold answer
Problem = tuple[str, list[str], str | None]


@dataclass(frozen=True)
class Hub:
    """A data set on the hub, and what `problem` makes of a row and its number."""

    name: str
    config: str | None
    split: str
    problem: Callable[[Mapping[str, Any], int], Problem]


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark is found and how its problems are put.

    Attributes:
        file: its name in the user's folder.
        wrap: a bare problem → what the model reads.
        hub: the data set on the hub, None where there is no official one.
    """

    file: str
    wrap: Callable[[str], str]
    hub: Hub | None


def as_is(problem: str) -> str:
    """The problem as it is."""
    return problem


def final_number(problem: str) -> str:
    """A word problem, with the request to solve it step by step."""
    return f"{problem}\n\nSolve the problem step by step and give the final number at the end."


def boxed(problem: str) -> str:
    """A competition problem, with the request for a boxed answer."""
    return f"{problem}\n\nSolve the problem step by step and put the final answer in \\boxed{{}}."


def complete_function(head: str) -> str:
    """A function's head and docstring, with the request to complete it."""
    return f"Complete the following Python function.\n\n```python\n{head.rstrip()}\n```"


def function_only(task: str) -> str:
    """A programming task, with the request for nothing but code."""
    return f"{task}\n\nAnswer with the Python function only."


def _mt_bench(row: Mapping[str, Any], number: int) -> Problem:
    return f"mt_bench/{row['prompt_id']}", list(row["prompt"]), None


def _gsm8k(row: Mapping[str, Any], number: int) -> Problem:
    return f"gsm8k/test/{number}", [row["question"]], row["answer"].rsplit("####", 1)[-1].strip().replace(",", "")


def _math500(row: Mapping[str, Any], number: int) -> Problem:
    return f"math500/{row['unique_id']}", [row["problem"]], row["answer"]


def _svamp(row: Mapping[str, Any], number: int) -> Problem:
    # some stories end without a full stop before the question
    story = row["Body"].strip()
    text = f"{story}{'' if story.endswith(('.', '!', '?', ',')) else '.'} {row['Question'].strip()}"
    return f"svamp/test/{row['ID']}", [text], str(row["Answer"]).removesuffix(".0")


def _humaneval(row: Mapping[str, Any], number: int) -> Problem:
    return row["task_id"], [row["prompt"]], row["canonical_solution"]


def _mbpp(row: Mapping[str, Any], number: int) -> Problem:
    tests = "\n".join(row["test_list"])
    return f"mbpp/{row['task_id']}", [f"{row['text']}\nYour code should pass these tests:\n\n{tests}"], row["code"]


BENCHMARKS: Mapping[str, Benchmark] = {
    "mt-bench": Benchmark("eval_mtbench.jsonl", as_is, Hub("HuggingFaceH4/mt_bench_prompts", None, "train", _mt_bench)),
    "gsm8k": Benchmark("eval_gsm8k_test.jsonl", final_number, Hub("openai/gsm8k", "main", "test", _gsm8k)),
    "math-500": Benchmark("eval_math500.jsonl", boxed, Hub("HuggingFaceH4/MATH-500", None, "test", _math500)),
    "svamp": Benchmark("eval_svamp_test.jsonl", final_number, Hub("ChilleD/SVAMP", None, "test", _svamp)),
    "humaneval": Benchmark(
        "eval_humaneval.jsonl", complete_function, Hub("openai/openai_humaneval", None, "test", _humaneval)
    ),
    "mbpp": Benchmark(
        "eval_mbpp_test.jsonl", function_only, Hub("google-research-datasets/mbpp", "full", "test", _mbpp)
    ),
    "spec-bench": Benchmark("eval_specbench.jsonl", as_is, None),
}


def load_benchmark(name: str, limit: int | None = None, seed: int = 0) -> list[Conversation]:
    """The prompts of a benchmark, or of a file of the user's, which is taken as it is.

    Args:
        name: `mt-bench`, `gsm8k`, `math-500`, `svamp`, `humaneval`, `mbpp`, `spec-bench`, `spec-bench:<category>`
            (`mt_bench` stands for its eight categories), or a path.
        limit: this many prompts, chosen by a keyed shuffle, in the benchmark's order.
        seed: of that choice; the same seed chooses the same prompts on every machine.

    Returns:
        Conversations that wait for an answer; their ids say which problems they are.

    Raises:
        UserError: there is no such benchmark or category, or it is neither in the user's folder nor to be fetched.
    """
    base, _, category = name.partition(":")
    if base not in BENCHMARKS:
        if Path(name).suffix in SUFFIXES or Path(name).exists():
            found, _ = read_conversations(name)
            return subset(_unanswered(found), limit, seed, "benchmark")
        raise UserError(f"there is no benchmark {name!r}: choose {', '.join(BENCHMARKS)}, or give a jsonl file")
    benchmark = BENCHMARKS[base]
    found = _local(benchmark) or list(_fetched(base, benchmark))
    if category:
        found = _of_category(found, base, category)
    return subset(posed(_unanswered(found), base), limit, seed, "benchmark", name)


def posed(problems: Sequence[Conversation], name: str) -> list[Conversation]:
    """Bare problems put as those of the benchmark `name` are: to train on the like of what will be measured."""
    benchmark = BENCHMARKS[name]
    return [replace(c, messages=tuple(_wrapped(m, benchmark) for m in c.messages)) for c in problems]


def _local(benchmark: Benchmark) -> list[Conversation]:
    folder = os.environ.get(VARIABLE)
    path = Path(folder, benchmark.file) if folder else None
    if path is None or not path.is_file():
        return []
    found, quarantine = read_conversations(path, max_chars=10**7)
    if quarantine.rows:
        row = quarantine.rows[0]
        raise UserError(
            f"{path}: {quarantine}, and a benchmark must be whole; the first is line {row.line}: {row.reason}"
        )
    return found


def _fetched(name: str, benchmark: Benchmark) -> Iterator[Conversation]:
    folder = os.environ.get(VARIABLE)
    local = f"put {benchmark.file} into a folder and name the folder in {VARIABLE}"
    local += f" (now {folder}, where it is not)" if folder else " (not set)"
    if (hub := benchmark.hub) is None:
        raise UserError(f"the benchmark {name} has no data set on the hub: {local}")
    try:
        for index, row in enumerate(hub_rows(hub.name, hub.split, hub.config)):
            number, turns, reference = hub.problem(row, index)
            yield Conversation(number, tuple(asked(turns)), source=name, reference=reference)
    except UserError as problem:
        raise UserError(
            f"the benchmark {name} is not here: {local}; or let it be fetched from the hub, which failed ({problem})"
        ) from problem


def _of_category(found: list[Conversation], base: str, category: str) -> list[Conversation]:
    if base != "spec-bench":
        raise UserError(f"{base} has no categories: only spec-bench:<category> has")
    by_category: dict[str, list[Conversation]] = {}
    for conversation in found:
        match = re.fullmatch(r"spec_bench/([^/]+)/.*", conversation.id)
        by_category.setdefault(match[1] if match else "", []).append(conversation)
    if category == "mt_bench":
        return [conversation for part in SPEC_BENCH_MT for conversation in by_category.get(part, [])]
    if category not in by_category:
        raise UserError(f"spec-bench has no category {category!r}: choose mt_bench, {', '.join(sorted(by_category))}")
    return by_category[category]


def _unanswered(found: list[Conversation]) -> list[Conversation]:
    """Without gold answers at the end: what a benchmark measures is written by the target."""
    return [
        replace(c, messages=c.messages[:-1], answer=None) if c.messages[-1].role == "assistant" else c for c in found
    ]


def _wrapped(message: Message, benchmark: Benchmark) -> Message:
    return Message(message.role, benchmark.wrap(message.content)) if message.role == "user" else message
