"""`draftsmith verify-lossless` on a tiny folder: sound models pass, planted faults do not, and what is asked is refused
by name where it is not there. On SmolLM2 with a drafter of the user's (slow)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from draftsmith.decoding import verification
from draftsmith.decoding.tree import DraftTree
from draftsmith.drafters import checkpoint
from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.evaluation import lossless
from draftsmith.evaluation.equality import Equality
from draftsmith.evaluation.lossless import Compared
from draftsmith.foundation import artefacts
from draftsmith.target.cache import KeyValueCache
from draftsmith.target.model import load_target
from draftsmith.target.protocol import Rows
from draftsmith.target.vocabulary import VocabMap
from tests.integration.command_line import draftsmith
from tests.integration.tiny_folder import write_target

DRAFTER = "DRAFTSMITH_SMOLLM2_DRAFTER"  # a run's or a drafter's folder for SmolLM2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny target and an untrained head for it."""
    root = tmp_path_factory.mktemp("lossless")
    target = write_target(root / "target")
    # a target is the same in every number format that holds its stored values
    AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).save_pretrained(target)
    loaded = load_target(target, "float32", "cpu")
    vocab = VocabMap(torch.arange(0, loaded.spec.vocab_size, 2), loaded.spec.vocab_size)
    torch.manual_seed(0)
    head = Eagle3(eagle3_options(loaded.model.config, loaded.spec, vocab.size), vocab, loaded.embedding)
    with artefacts.writing(root / "head", checkpoint.KIND, checkpoint.identity(head, loaded.spec.fingerprint)) as place:
        checkpoint.write(head, place)
    return target, root / "head"


def asked(folders: tuple[Path, Path], *more: object) -> list[object]:
    given = ("--target", folders[0], "--drafters", f"mine={folders[1]}", "--count", 4, "--max-new-tokens", 24)
    return ["verify-lossless", *given, *more]


def test_sound_models_are_lossless(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "verdict.json"
    ended = draftsmith(*asked(folders, "--out", out))
    assert ended.code == 0, ended.err
    assert "lossless: 16 of 16 answers" in ended.out
    stored = json.loads(out.read_text())
    assert stored["lossless"] is True
    assert stored["target"]["dtype"] == "float32"
    assert {(g["drafters"], g["temperature"]) for g in stored["groups"]} == {
        (name, heat) for name in ("oracle", "mine") for heat in (0.0, 1.0)
    }
    oracle = [g for g in stored["groups"] if g["drafters"] == "oracle"]
    assert all(g["deepest"] >= 3 and g["acceptance_length"] > 1.5 for g in oracle)
    assert len(stored["answers"]) == 16
    assert all(row["sound"] and row["equality"]["equal"] for row in stored["answers"])
    assert stored["provenance"]


def test_compositions_are_verified_too(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "verdict.json"
    ended = draftsmith(*asked(folders, "--compose", "both=merge:trie(mine,ngram)", "--temperatures", "0", "--out", out))
    assert ended.code == 0, ended.err
    names = [g["drafters"] for g in json.loads(out.read_text())["groups"]]
    assert names[0] == "oracle"
    assert "both" in names


def test_half_precision_is_judged_token_by_token(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "verdict.json"
    ended = draftsmith(*asked(folders, "--dtype", "bfloat16", "--temperatures", "0", "--batch", 3, "--out", out))
    assert ended.code == 0, ended.err
    rows = json.loads(out.read_text())["answers"]
    assert all(row["far_tokens"] == 0 and row["plain_far_tokens"] is not None for row in rows)


def siblings_are_visible(patch: pytest.MonkeyPatch) -> None:
    def planted(tree: DraftTree) -> Tensor:
        deeper = tree.depths[:, :, None] > tree.depths[:, None, :]
        return deeper | torch.eye(tree.size, dtype=torch.bool)

    patch.setattr(DraftTree, "ancestors", planted)


def cache_is_not_compacted(patch: pytest.MonkeyPatch) -> None:
    keep = KeyValueCache.keep

    def planted(cache: KeyValueCache, rows: Tensor, counts: Sequence[int]) -> None:
        keep(cache, torch.arange(rows.shape[1]).expand_as(rows), counts)

    patch.setattr(KeyValueCache, "keep", planted)


def position_is_the_index(patch: pytest.MonkeyPatch) -> None:
    rows = DraftTree.rows

    def planted(tree: DraftTree, roots: Tensor) -> Rows:
        made = rows(tree, roots)
        return replace(made, depths=torch.arange(1 + tree.size).expand(tree.batch, -1))

    patch.setattr(DraftTree, "rows", planted)


@pytest.mark.parametrize("plant", [siblings_are_visible, cache_is_not_compacted, position_is_the_index])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_engine_is_told(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, plant: object, dtype: str
) -> None:
    plant(monkeypatch)  # type: ignore[operator]
    ended = draftsmith(*asked(folders, "--dtype", dtype))
    assert ended.code == 1
    assert "NOT lossless" in ended.err
    assert "with oracle" in ended.err


def test_nothing_accepted_proves_nothing(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    walk = verification.walk
    monkeypatch.setattr(verification, "walk", lambda tree, chosen: walk(replace(tree, counts=tree.counts * 0), chosen))
    ended = draftsmith(*asked(folders))
    assert ended.code == 1
    assert "nothing proven" in ended.err


def compared(equal: bool, near_tie: bool, far: int | None, plain_far: int | None = None) -> Compared:
    same = Equality(equal, None if equal else 3, near_tie, 0.0 if equal else 1e-5)
    return Compared("x", 0.0, "p", 9, same, far, plain_far, 4, 5, 2)


@pytest.mark.parametrize(
    ("one", "sound"),
    [
        (compared(True, False, None), True),
        (compared(False, True, 0), True),
        (compared(False, True, 1), False),
        (compared(False, False, 0), False),
        (compared(False, False, 0, 0), True),
        (compared(True, False, 1, 0), False),
    ],
    ids=["equal", "near tie", "near tie, then wrong", "different", "half: rounding", "half: wrong"],
)
def test_what_counts_as_sound(one: Compared, sound: bool) -> None:
    assert one.sound == sound
    found, said = lossless.verdict([one], "float32")
    assert found == sound
    assert said.startswith("lossless: " if sound else "NOT lossless: 1 of 1")


def test_what_is_not_there_is_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for more, said in (
        (("--drafters", tmp_path / "none"), "none does not exist"),
        (("--prompts", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--temperatures", "hot"), "--temperatures hot"),
    ):
        ended = draftsmith(*asked(folders, *more))
        assert ended.code == 2
        assert said in ended.err.replace("\n", "")
    ended = draftsmith("verify-lossless", "--drafters", folders[1])
    assert ended.code == 2
    assert "--target" in ended.err


@pytest.mark.slow
@pytest.mark.skipif(DRAFTER not in os.environ, reason=f"{DRAFTER} names no drafter")
def test_smollm2_is_lossless(tmp_path: Path) -> None:
    out = tmp_path / "verdict.json"
    ended = draftsmith("verify-lossless", "--target", "smollm2", "--drafters", os.environ[DRAFTER], "--out", out)
    assert ended.code == 0, ended.err
    groups = json.loads(out.read_text())["groups"]
    assert all(g["answers"] == 20 and g["deepest"] >= 3 for g in groups)
