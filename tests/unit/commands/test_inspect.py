"""`draftsmith inspect`: data files and artefacts, answers marked, flatness coloured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tests.talking import talking_target
from tests.unit.test_api import write_drafter

from draftsmith.commands import terminal
from draftsmith.commands.inspect import ANSWER, FLATNESS, inspect, shade_borders
from draftsmith.data import features, regenerate
from draftsmith.data.conversations import Answer, Conversation, Message, to_row
from draftsmith.data.features import FeatureStore
from draftsmith.data.samples import Sample, samples_of
from draftsmith.evaluation.report.flatness import BINS, distribution, shown
from draftsmith.evaluation.report.inputs import Scored
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.selection.samples import Selection
from draftsmith.target.protocol import FeatureSpec

TALK = (Message("user", "One?"), Message("assistant", "Yes 🙂."), Message("user", "Two?"), Message("assistant", "No."))


@pytest.fixture(autouse=True)
def _no_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "COLUMNS", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the talking target's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "talking"
    talking_target().tokenizer.save_pretrained(folder)
    return str(folder)


def write(path: Path, *conversations: Conversation) -> Path:
    artefacts.write_jsonl(path, (to_row(c) for c in conversations))
    return path


def test_a_data_file_token_by_token(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "talks.jsonl", Conversation("a", TALK[:2], "made"), Conversation("b", TALK, reference="42"))
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    inspect(path, row=1, target=place)
    out = capsys.readouterr().out
    assert "2 conversations; 1 row set aside: 1 not JSON" in out
    assert "talks.jsonl:3: " in out
    assert "conversation 1 of 2: b" in out
    assert "assistant\n⟦Yes 🙂.<|im_end|>⟧\n" in out
    assert "assistant\n⟦No.<|im_end|>⟧" in out
    assert "user\nTwo?<|im_end|>" in out
    (sample,) = samples_of(Conversation("b", TALK), talking_target().tokenizer)
    assert f"{len(sample.ids)} tokens, {sum(sample.mask)} of them the answer's\n" in out
    assert "reference: 42" in out


def test_without_a_target_it_is_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "talks.jsonl", Conversation("b", TALK[:3]))
    inspect(path)
    assert "user: One?\nassistant: Yes 🙂.\nuser: Two?\n" in capsys.readouterr().out


def test_on_a_terminal_answers_are_coloured(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(terminal.console, "write", lambda text, style="": seen.append((text, style)))
    inspect(write(tmp_path / "talks.jsonl", Conversation("a", TALK[:2])), target=place)
    assert seen[1] == ("Yes 🙂.<|im_end|>", ANSWER)
    assert [style for _, style in seen] == ["dim", ANSWER, "dim"]


def test_regenerated_answers_are_shown_as_they_were_sampled(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = talking_target().tokenizer
    ids = tokenizer("Hi", add_special_tokens=False)["input_ids"]
    answer = Answer(prompt_ids=tuple(ids), token_ids=tuple(ids[:1] * 3), complete=False, temperature=0.0, seed=0)
    run = tmp_path / "run"
    with artefacts.writing(run / "answers", regenerate.KIND, {"target": "abc", "deep": {"er": 3}}) as scratch:
        write(scratch / regenerate.FILE, Conversation("a", (TALK[0], Message("assistant", "HHH")), answer=answer))
    (run / "recipe.yaml").write_text(f"target: {place}\n", "utf-8")
    inspect(run / "answers")
    out = capsys.readouterr().out
    assert "answers: conversations" in out
    assert re.search(r"deep\.er\s*│\s*3", out)
    assert re.search(r"conversations\.jsonl\s*│\s*\d+ B", out)
    assert "Hi⟦HHH⟧" in out
    assert "3 of them the answer's; cut at the limit" in out


def test_a_drafter_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = talking_target()
    inspect(write_drafter(tmp_path / "drafter", target))
    out = capsys.readouterr().out
    assert "drafter: drafter" in out
    assert target.spec.fingerprint in out
    size = (tmp_path / "drafter" / "model.safetensors").stat().st_size
    assert re.search(rf"model\.safetensors\s*│\s*{size / 1024:.1f} KiB", out)
    assert "conversation" not in out


@pytest.fixture
def store(tmp_path: Path) -> Path:
    target = talking_target()
    (sample,) = samples_of(Conversation("a", TALK), target.tokenizer)
    other = Sample("b", sample.ids[:20], [False] * 15 + [True] * 5, False)
    return features.store(target, [sample, other], FeatureSpec(), features.PassOptions(), tmp_path / "scores", {})


def test_a_feature_store_and_its_flatness(
    store: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inspect(store, target=place)
    out = capsys.readouterr().out
    assert "sample 0 of 2: a" in out
    assert "⟦Yes 🙂.<|im_end|>⟧" in out
    inspect(store, row=1)
    out = capsys.readouterr().out
    (whole,) = samples_of(Conversation("a", TALK), talking_target().tokenizer)
    assert f"⟦{' '.join(map(str, whole.ids[15:20]))} ⟧" in out
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(terminal.console, "write", lambda text, style="": seen.append((text, style)))
    inspect(store, flatness=True, target=place)
    # cos(p, uniform) at the position before each answer token, from the model's own logits
    target = talking_target()
    with torch.no_grad():
        p = target.model(torch.tensor([whole.ids])).logits[0].double().softmax(-1)
    values = 1 / (p.shape[1] ** 0.5 * p.norm(dim=1))
    wanted = [float(values[i - 1]) for i in range(len(whole.ids)) if whole.mask[i]]
    out = capsys.readouterr().out
    assert f"{len(wanted)} answer tokens, mean flatness {sum(wanted) / len(wanted):.4f}" in out
    flattest = max(range(len(whole.ids)), key=lambda i: values[i - 1] if whole.mask[i] else 0.0)
    shaded = [text for text, style in seen if style == f"on {FLATNESS[-1]}"]
    assert any(target.tokenizer.decode([whole.ids[flattest]]) in text for text in shaded)
    assert "<|im_start|>user\nOne?<|im_end|>" in seen[0][0]
    assert seen[0][1] == "dim"
    assert {"", *(f"on {shade}" for shade in FLATNESS)} <= {style for _, style in seen}


def test_the_corpus_s_flatness_and_its_page(
    store: Path, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "pages" / "flat.html"
    inspect(store, row=1, flatness=True, target=place, html=page)
    out = capsys.readouterr().out
    found = FeatureStore(store)
    vocab = int(found.meta["vocab_size"])
    norms = torch.cat([s.statistics["log_norm"][s.answer_rows] for s in found])
    values = (torch.exp(-norms.double()) / vocab**0.5).tolist()
    assert f"{len(values)} answer tokens by flatness" in out
    bins = [tuple(map(float, row)) for row in re.findall(r"│ (0\.\d{4}) │ (\d\.\d{4}) │ +([\d.]+)%", out)]
    assert len(bins) == BINS
    assert (bins[0][0], bins[-1][1]) == pytest.approx((min(values), max(values)), abs=1e-4)
    assert sum(share for *_, share in bins) == pytest.approx(100, abs=0.1 * BINS)
    # shares of whole tokens, counted one by one; a value within rounding of a border may fall on either side
    for low, high, share in bins:
        surely = sum(low + 1e-4 < v < high - 1e-4 for v in values)
        perhaps = sum(low - 1e-4 <= v <= high + 1e-4 for v in values)
        assert 100 * surely / len(values) - 0.06 <= share <= 100 * perhaps / len(values) + 0.06
    text = page.read_text(encoding="utf-8")
    read = re.sub(r"<[^>]+>", "", text)
    assert "Yes 🙂." in read
    assert read.index("this one") < read.index("Yes 🙂."), "sample 1 stands before sample 0"
    assert not re.search(r"(src|href)=\"http|url\(http", text)
    assert text.count("<svg") == 1, "no selection, so only the tokens are drawn"
    own = [float(v) for v in re.findall(r'title="flatness ([\d.]+)"', text)]
    assert sorted(own) == pytest.approx(sorted(values), abs=1e-4)
    chosen = Selection(("a",), {"b": "not chosen"}, {"a": 0.5, "b": 0.1}, (0.5,), 3, 5, 10, 20)
    artefacts.write_jsonl(store.parent / "selection" / "selection.jsonl", chosen.to_rows())
    inspect(store, flatness=True, target=place, html=page)
    text = page.read_text(encoding="utf-8")
    assert (text.count("<svg"), "1 samples were kept" in text) == (2, True)
    with pytest.raises(UserError, match="give --flatness too"):
        inspect(store, html=page)


def test_the_corpus_s_examples_are_flat_middling_and_peaked() -> None:
    scores = [Scored(f"s{i:02}", [0.01 * i] * 3, None) for i in range(1, 12)]
    names = [(what, sample.id) for what, _, sample in shown(scores)]
    assert names == [
        ("flattest", "s11"),
        ("flattest", "s10"),
        ("middle", "s07"),
        ("middle", "s06"),
        ("least flat", "s02"),
        ("least flat", "s01"),
    ]
    assert [sample.id for _, _, sample in shown([*scores[:3], Scored("none", [], None)])] == ["s03", "s02", "s01"]
    assert distribution([]) == []


def test_shades_begin_at_the_median() -> None:
    assert shade_borders([]) == []
    assert shade_borders([float(i) for i in range(100)]) == [50.0, 60.0, 70.0, 80.0, 90.0]


def test_what_is_wrong_is_said(tmp_path: Path, store: Path) -> None:
    path = write(tmp_path / "talks.jsonl", Conversation("a", TALK[:2]))
    with pytest.raises(UserError, match="1 conversations, so there is no number 1"):
        inspect(path, row=1)
    with pytest.raises(UserError, match="2 samples, so there is no number 2"):
        inspect(store, row=2)
    with pytest.raises(UserError, match="no feature store"):
        inspect(path, flatness=True)
    with pytest.raises(UserError, match="nowhere"):
        inspect(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        (tmp_path / "empty").mkdir()
        inspect(path, target=str(tmp_path / "empty"))
    (store / "index.jsonl").write_text(json.dumps({"id": "a"}), "utf-8")
    with pytest.raises(UserError, match="index.jsonl has"):
        inspect(store)
