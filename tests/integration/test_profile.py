"""`draftsmith profile` on a tiny folder: what it stores is what the cost-aware growth reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import draftsmith
from draftsmith.decoding.growth import CostAwareGrowth, GrowthOptions
from draftsmith.drafters import checkpoint
from draftsmith.drafters.eagle3 import Eagle3, eagle3_options
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError
from draftsmith.target.model import load_target
from draftsmith.target.vocabulary import VocabMap
from tests.integration.command_line import draftsmith as run
from tests.integration.tiny_folder import write_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("profiled")
    target = load_target(write_target(root / "target"), "float32", "cpu")
    vocab = VocabMap.identity(target.spec.vocab_size)
    torch.manual_seed(0)
    head = Eagle3(eagle3_options(target.model.config, target.spec, vocab.size), vocab, target.embedding)
    with artefacts.writing(root / "head", checkpoint.KIND, checkpoint.identity(head, target.spec.fingerprint)) as place:
        checkpoint.write(head, place)
    return root / "target", root / "head"


def test_a_profile_is_what_the_cost_aware_growth_reads(folders: tuple[Path, Path], tmp_path: Path) -> None:
    target, head = folders
    out = tmp_path / "profile.json"
    given = ("--target", target, "--drafters", f"mine={head}", "--batch", "2,1", "--context", "16,64", "--repeats", 1)
    ended = run("profile", *given, "--out", out)
    assert ended.code == 0, ended.err
    assert "Milliseconds of verifying" in ended.out
    stored = json.loads(out.read_text())
    assert [(e["batch"], e["context"]) for e in stored["verify"]] == [(1, 16), (1, 64), (2, 16), (2, 64)]
    assert stored["threads"] == torch.get_num_threads()
    assert stored["provenance"]
    growth = GrowthOptions(kind="cost-aware", profile=out, node_budget=7, depth=3, width=3)
    built = growth.build()
    assert isinstance(built, CostAwareGrowth)
    assert built.contexts == (16, 64)
    assert len(built.by_context) == 2
    assert all(ms > 0 for row in built.by_context for ms in row)
    model = draftsmith.load(target, head, growth=growth, dtype="float32")
    plain = draftsmith.load(target, dtype="float32")
    assert model.generate("How?", max_new_tokens=12).token_ids == plain.generate("How?", max_new_tokens=12).token_ids
    other = write_target(tmp_path / "other", seed=1)
    with pytest.raises(StaleError, match="another target"):
        stored_elsewhere = load_target(other, "float32", "cpu")
        vocab = VocabMap.identity(stored_elsewhere.spec.vocab_size)
        fresh = Eagle3(
            eagle3_options(stored_elsewhere.model.config, stored_elsewhere.spec, vocab.size),
            vocab,
            stored_elsewhere.embedding,
        )
        identity = checkpoint.identity(fresh, stored_elsewhere.spec.fingerprint)
        with artefacts.writing(tmp_path / "head", checkpoint.KIND, identity) as place:
            checkpoint.write(fresh, place)
        draftsmith.load(stored_elsewhere, tmp_path / "head", growth=growth)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--batch", "0"), "--batch 0"),
        (("--context", "long"), "--context long"),
        (("--context", "4000"), "contexts of up to"),
    ],
)
def test_wrong_numbers_are_named(folders: tuple[Path, Path], wrong: tuple[str, str], said: str, tmp_path: Path) -> None:
    ended = run("profile", "--target", folders[0], "--out", tmp_path / "p.json", *wrong)
    assert ended.code == 2
    assert said in ended.err.replace("\n", " ")
