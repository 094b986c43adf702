"""Measuring: interleaved, written as it goes, resumable, compared with plain decoding; and the numbers made of rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.data.conversations import Conversation, Message
from draftsmith.decoding import engine as engines
from draftsmith.decoding.composition import Composition, Single
from draftsmith.decoding.growth import ChainGrowth, DynamicGrowth
from draftsmith.evaluation import bench as benching
from draftsmith.evaluation import measured
from draftsmith.evaluation.bench import BenchOptions, bench, results
from draftsmith.evaluation.report.inputs import load as load_report
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError
from tests.talking import VOCAB, Memory, answers, conversation, talking_target

SETS = {
    "sums": [conversation(f"s{i}", f"What is {i} + {i}?") for i in range(3)],
    "chat": [conversation(f"c{i}", f"Say {'hi ' * (i + 1)}") for i in range(3)],
}
ALL = [c for group in SETS.values() for c in group]
OPTIONS = BenchOptions(prompts=3, max_new_tokens=14, temperatures=(0.0, 0.8), warmup=0)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return answers(talking_target(), ALL, 14, (0.0, 0.8))


@pytest.fixture
def drafters(texts: list[list[int]]) -> dict[str, Composition]:
    return {"tree": Single(Memory(texts), DynamicGrowth(7, 3, 3)), "chain": Single(Memory(texts, 3), ChainGrowth(2))}


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, str]]:
    """What is decoded, in order: set and ids, temperature, by whom."""
    seen: list[tuple[str, float, str]] = []
    decode = benching._decode

    def spy(mode: Any, unit: Any, prompts: Any, options: BenchOptions) -> Any:
        seen.append(("+".join(a.id for a in unit.asked), unit.temperature, mode.name))
        return decode(mode, unit, prompts, options)

    monkeypatch.setattr(benching, "_decode", spy)
    return seen


def test_rows_of_every_prompt_temperature_and_mode(tmp_path: Path, drafters: dict[str, Composition]) -> None:
    rows = bench(talking_target(), drafters, SETS, OPTIONS, tmp_path / "bench.jsonl")
    assert rows == list(artefacts.read_jsonl(tmp_path / "bench.jsonl"))
    assert not (tmp_path / "bench-failed.jsonl").exists()
    keys = Counter((r["set"], r["id"], r["temperature"], r["mode"], r["drafters"]) for r in rows)
    assert keys == Counter(
        (name, c.id, temperature, "plain" if drafter is None else "speculative", drafter)
        for name, group in SETS.items()
        for c in group
        for temperature in (0.0, 0.8)
        for drafter in (None, "tree", "chain")
    )
    tokenizer = talking_target().tokenizer
    for row in rows:
        tokens = row["generation"]["token_ids"]
        assert len(row["pieces"]) == len(row["origins"]) == len(row["depths"]) == len(tokens)
        assert "".join(row["pieces"]) == tokenizer.decode(tokens)
        assert row["prompt"] == next(c for c in ALL if c.id == row["id"]).messages[-1].content
        if row["mode"] == "plain":
            assert set(row["origins"]) == {-1}
            assert "equality" not in row
        else:
            assert row["equality"] == {"equal": True, "first_difference": None, "near_tie": False, "gap": 0.0}
            accepted = sum(min(r["kept"], r["accepted"]) for r in row["generation"]["rounds"])
            assert sum(origin == 0 for origin in row["origins"]) == accepted
            assert all(
                (origin < 0) == (depth == 0) for origin, depth in zip(row["origins"], row["depths"], strict=True)
            )
    deepest = {max(r["depths"]) for r in rows if r["drafters"] == "tree"}
    assert max(deepest) == 3, "nothing deep was accepted, so nothing was tested"


def test_plain_and_speculative_take_turns(
    tmp_path: Path, drafters: dict[str, Composition], order: list[tuple[str, float, str]]
) -> None:
    options = OPTIONS.model_copy(update={"prompts": 2, "warmup": 2, "repeats": 2})
    two = {"tree": drafters["tree"]}
    bench(talking_target(), two, SETS, options, tmp_path / "bench.jsonl")
    warm, counted = order[:4], order[4:]
    assert [name for _, _, name in warm] == ["plain", "tree"] * 2
    assert len({(i, t) for i, t, _ in warm}) == 1
    pairs = [counted[i : i + 2] for i in range(0, len(counted), 2)]
    assert len(pairs) == 2 * 2 * 2 * 2
    assert all(a[:2] == b[:2] and {a[2], b[2]} == {"plain", "tree"} for a, b in pairs)
    # in each set at each temperature, and for each prompt over its repeats, either begins as often as the other
    first = Counter((pair[0][0][0], pair[0][1], pair[0][2]) for pair in pairs)
    assert set(first.values()) == {2}
    assert set(Counter((pair[0][0], pair[0][1], pair[0][2]) for pair in pairs).values()) == {1}
    sets = [pair[0][0][0] for pair in pairs[: len(pairs) // 2]]
    assert sets[0] != sets[2], "sets are measured one after the other"


def test_the_numbers_are_those_of_the_rows(tmp_path: Path, drafters: dict[str, Composition]) -> None:
    options = OPTIONS.model_copy(update={"repeats": 2})
    rows = bench(talking_target(), drafters, SETS, options, tmp_path / "bench.jsonl")
    found = results(rows)
    groups = Counter((r.set, r.temperature, r.drafters) for r in found)
    assert groups == Counter((s, t, d) for s in SETS for t in (0.0, 0.8) for d in ("tree", "chain"))
    for result in found:

        def own(mode: str | None, result: Any = result) -> list[dict[str, Any]]:
            place = (result.set, result.temperature, mode)
            return [r["generation"] for r in rows if (r["set"], r["temperature"], r["drafters"]) == place]

        plain, drafted = own(None), own(result.drafters)
        assert len(plain) == len(drafted) == 6
        rounds = [r for g in drafted for r in g["rounds"]]
        assert result.rounds == len(rounds)
        assert result.acceptance_length == pytest.approx(sum(r["committed"] for r in rounds) / len(rounds))

        def rate(side: list[dict[str, Any]]) -> float:
            return sum(len(g["token_ids"]) for g in side) / sum(g["total_ms"] for g in side) * 1e3

        assert result.tokens_per_second == pytest.approx(rate(drafted))
        assert result.speedup.estimate == pytest.approx(rate(drafted) / rate(plain))
        spent = sum(g["total_ms"] - g["prefill_ms"] for g in drafted) / len(rounds)
        token = sum(g["total_ms"] - g["prefill_ms"] for g in plain) / sum(len(g["token_ids"]) - 1 for g in plain)
        assert result.round_cost == pytest.approx(spent / token)
        assert (result.prompts, result.node_budget) == (3, 7 if result.drafters == "tree" else 2)
        assert result.lossless.model_dump() == {"checked": 6, "equal": 6, "near_ties": 0}
    assert max(r.acceptance_length for r in found) > 2


def test_a_batch_writes_what_each_prompt_writes_alone(tmp_path: Path, drafters: dict[str, Composition]) -> None:
    alone = bench(talking_target(), drafters, SETS, OPTIONS, tmp_path / "alone.jsonl")
    together = bench(
        talking_target(), drafters, SETS, OPTIONS.model_copy(update={"batch": 2}), tmp_path / "together.jsonl"
    )

    def content(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        named = [
            (r["id"], r["temperature"], r["drafters"] or "", r["generation"]["token_ids"], r["depths"]) for r in rows
        ]
        return sorted(named)

    assert content(together) == content(alone)


@pytest.mark.parametrize("cut", ["between units", "inside a row", "between a unit's rows"])
def test_an_interrupted_run_goes_on(
    tmp_path: Path,
    drafters: dict[str, Composition],
    order: list[tuple[str, float, str]],
    monkeypatch: pytest.MonkeyPatch,
    cut: str,
) -> None:
    out = tmp_path / "bench.jsonl"
    append, written = measured.append, 0

    def killed(path: Path, rows: list[measured.Row]) -> None:
        nonlocal written
        written += 1
        if written < 5:
            append(path, rows)
            return
        text = "".join(json.dumps(row) + "\n" for row in rows)
        lines = text.splitlines(keepends=True)
        with path.open("a", encoding="utf-8") as file:
            file.write({"between units": "", "inside a row": text[:-40], "between a unit's rows": lines[0]}[cut])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measured, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            bench(talking_target(), drafters, SETS, OPTIONS, out)
    before = out.read_text(encoding="utf-8").splitlines()[: 4 * 3]
    order.clear()
    rows = bench(talking_target(), drafters, SETS, OPTIONS, out)
    assert len(order) == (6 * 2 - 4) * 3, "units that were done are decoded again, or one that was not is missing"
    assert out.read_text(encoding="utf-8").splitlines()[: 4 * 3] == before
    assert len(rows) == len({measured.key(row) for row in rows}) == 6 * 2 * 3
    order.clear()
    assert bench(talking_target(), drafters, SETS, OPTIONS, out) == rows
    assert order == []


def test_more_prompts_and_repeats_add_to_what_is_there(
    tmp_path: Path, drafters: dict[str, Composition], order: list[tuple[str, float, str]]
) -> None:
    out = tmp_path / "bench.jsonl"
    few = OPTIONS.model_copy(update={"prompts": 1, "temperatures": (0.0,)})
    bench(talking_target(), drafters, SETS, few, out)
    order.clear()
    rows = bench(talking_target(), drafters, SETS, OPTIONS, out)
    assert len(rows) == 36
    assert len(order) == 36 - 6
    # fewer again: only theirs are given back, the others stay in the file
    assert len(bench(talking_target(), drafters, SETS, few, out)) == 6
    assert len(list(artefacts.read_jsonl(out))) == 36


@pytest.mark.parametrize(
    ("change", "field"),
    [({"max_new_tokens": 9}, "max_new_tokens was 14 and is 9"), ({"seed": 1}, "seed"), ({"batch": 2}, "batch")],
)
def test_rows_of_other_conditions_are_refused(
    tmp_path: Path, drafters: dict[str, Composition], change: dict[str, int], field: str
) -> None:
    out = tmp_path / "bench.jsonl"
    options = OPTIONS.model_copy(update={"prompts": 1})
    bench(talking_target(), drafters, SETS, options, out, {"drafter": "abc"})
    with pytest.raises(StaleError, match=f"bench.jsonl:1: .*{field}.*--redo"):
        bench(talking_target(), drafters, SETS, options.model_copy(update=change), out, {"drafter": "abc"})
    with pytest.raises(StaleError, match="drafter was 'abc' and is 'abd'"):
        bench(talking_target(), drafters, SETS, options, out, {"drafter": "abd"})
    with pytest.raises(StaleError, match="modes"):
        bench(talking_target(), {"tree": drafters["tree"]}, SETS, options, out, {"drafter": "abc"})


def test_another_file_is_left_alone(tmp_path: Path, drafters: dict[str, Composition]) -> None:
    out = tmp_path / "bench.jsonl"
    out.write_text('{"id": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="bench.jsonl:1: this is no row of draftsmith bench"):
        bench(talking_target(), drafters, SETS, OPTIONS, out)
    assert out.read_text(encoding="utf-8") == '{"id": 1}\n'


class Failing(Memory):
    def observe(self, state: Any, tokens: Any, features: Any, lengths: Any) -> Any:
        if tokens.shape[1] > 60:  # the prompt of one conversation
            raise RuntimeError("out of luck")
        return super().observe(state, tokens, features, lengths)


def test_what_fails_is_listed_and_spoils_nothing(
    tmp_path: Path, texts: list[list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [
        conversation("long", "x" * 300),
        Conversation("silent", (Message("system", "Be kind"),)),
        conversation("unlucky", "say " * 10),
    ]
    out = tmp_path / "bench.jsonl"
    options = OPTIONS.model_copy(update={"prompts": 9, "temperatures": (0.0,), "batch": 1})
    drafter = {"tree": Single(Failing(texts), DynamicGrowth(7, 3, 3))}
    rows = bench(talking_target(), drafter, {"sums": [*SETS["sums"], *odd]}, options, out)
    assert {row["id"] for row in rows} == {"s0", "s1", "s2"}
    failed = {row["id"]: row["error"] for row in artefacts.read_jsonl(tmp_path / "bench-failed.jsonl")}
    assert failed.keys() == {"long", "silent", "unlucky"}
    assert "256" in failed["long"]
    assert "no user message" in failed["silent"]
    assert failed["unlucky"] == "RuntimeError: out of luck"
    assert "3 measurements failed" in capsys.readouterr().err
    assert results(rows)[0].prompts == 3
    # the next run tries them again; what works by then is no longer listed
    mended = {"tree": Single(Memory(texts), DynamicGrowth(7, 3, 3))}
    rows = bench(talking_target(), mended, {"sums": [*SETS["sums"], odd[2]]}, options, out)
    assert {row["id"] for row in rows} == {"s0", "s1", "s2", "unlucky"}
    assert not (tmp_path / "bench-failed.jsonl").exists()


def test_nothing_that_works_is_an_error(tmp_path: Path, drafters: dict[str, Composition]) -> None:
    with pytest.raises(UserError, match="no prompt could be measured: long: the prompt has"):
        bench(talking_target(), drafters, {"a": [conversation("long", "x" * 300)]}, OPTIONS, tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="no prompt"):
        bench(talking_target(), drafters, {}, OPTIONS, tmp_path / "b.jsonl")
    with pytest.raises(UserError, match="plain"):
        bench(talking_target(), {"plain": drafters["tree"]}, SETS, OPTIONS, tmp_path / "b.jsonl")


def _wrong_bonus(verdict: Any) -> Any:
    return replace(verdict, tokens=[[*tokens[:-1], (tokens[-1] + 1) % 256] for tokens in verdict.tokens])


def _accepts_anything(verdict: Any) -> Any:
    return verdict if verdict.nodes[0] else _wrong_bonus(verdict)


@pytest.mark.parametrize("fault", [_wrong_bonus, _accepts_anything])
def test_a_lossy_engine_is_seen(
    tmp_path: Path,
    drafters: dict[str, Composition],
    monkeypatch: pytest.MonkeyPatch,
    fault: Callable[[Any], Any],
) -> None:
    walk = engines.verification.walk
    monkeypatch.setattr(
        engines.verification,
        "walk",
        lambda tree, chosen: fault(walk(tree, chosen)) if tree.size else walk(tree, chosen),
    )
    rows = bench(talking_target(), {"tree": drafters["tree"]}, SETS, OPTIONS, tmp_path / "bench.jsonl")
    for result in results(rows):
        assert result.lossless.checked == 3
        assert result.lossless.different == 3


def test_in_half_precision_every_token_is_near_its_rows_maximum(tmp_path: Path) -> None:
    target = talking_target(torch.bfloat16)
    drafter = Single(Memory(answers(target, ALL, 14, (0.0, 0.8))), DynamicGrowth(7, 3, 3))
    rows = bench(target, drafter, SETS, OPTIONS, tmp_path / "bench.jsonl")
    speculative = [row for row in rows if row["mode"] == "speculative"]
    assert {row["drafters"] for row in speculative} == {"memory"}
    assert [row["equality"]["far_tokens"] for row in speculative] == [0] * 12
    assert all(r.lossless.different == 0 for r in results(rows))
    assert max(d for row in speculative for d in row["depths"]) == 3


def test_the_report_reads_the_rows(tmp_path: Path, drafters: dict[str, Composition]) -> None:
    rows = bench(talking_target(), drafters, SETS, OPTIONS, tmp_path / "bench.jsonl")
    run = load_report(tmp_path)
    assert len(run.answers) == len(rows)
    assert [a.generation.to_row() for a in run.answers] == [row["generation"] for row in rows]
    assert {a.drafters for a in run.answers if a.speculative} == {"tree", "chain"}


def test_groups_without_a_round_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = talking_target()
    drafter = Single(Memory(answers(target, ALL, 14)), ChainGrowth(2))
    rows = bench(target, drafter, SETS, OPTIONS.model_copy(update={"temperatures": (0.0,)}), tmp_path / "b.jsonl")
    for row in rows:
        if row["set"] == "chat":
            row["generation"]["rounds"] = []
    assert [r.set for r in results(rows)] == ["sums"]
    assert "'chat' has no speculative round" in capsys.readouterr().err


def test_options_are_checked() -> None:
    assert BenchOptions.model_validate({"temperatures": [0, 1.0]}).temperatures == (0.0, 1.0)
    for wrong in ({"temperatures": []}, {"temperatures": [-1]}, {"repeats": 0}, {"promts": 3}):
        with pytest.raises(ValueError):
            BenchOptions.model_validate(wrong)
    assert len(talking_target().tokenizer) - 1 < VOCAB
