"""Drafters on disk: what is written is what comes back, folders of earlier versions included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.drafters import checkpoint
from draftsmith.drafters.checkpoint import Saved, load_drafter
from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import VOCAB, tiny_head, tiny_target

PART = VocabMap(torch.arange(0, VOCAB, 3), VOCAB)


def written(drafter: Saved, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> Path:
    identity = checkpoint.identity(drafter, tiny_target().spec.fingerprint)
    with artefacts.writing(folder, checkpoint.KIND, identity) as scratch:
        checkpoint.write(drafter, scratch, weights)
    return folder


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    made = tiny_head(vocab=PART)
    found = load_drafter(written(made, tmp_path / "drafter"), tiny_target())
    assert isinstance(found, Eagle3)
    assert (found.options, found.vocab.digest) == (made.options, PART.digest)
    assert found.tensors().keys() == made.tensors().keys() == {*made.state_dict(), "d2t", "t2d"}
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in made.tensors().items())
    assert not any(p.requires_grad for p in found.parameters())


def test_other_weights_stand_in_for_its_own(tmp_path: Path) -> None:
    """The trainer keeps its best weights beside the drafter."""
    made = tiny_head()
    better = {name: p.detach() + 1 for name, p in made.named_parameters()}
    found = load_drafter(written(made, tmp_path / "drafter", better), tiny_target())
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in better.items())


def test_a_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """As the first version wrote EAGLE-3 heads, spelled out."""
    made = tiny_head(vocab=PART)
    meta = {"drafter": "eagle3", "target": tiny_target().spec.fingerprint, "vocabulary": PART.digest}
    with artefacts.writing(tmp_path / "drafter", "drafter", meta) as scratch:
        config = {"kind": "eagle3", "options": made.options.model_dump(mode="json")}
        artefacts.write_json(scratch / "config.json", config)
        stored = {**made.state_dict(), "d2t": PART.d2t, "t2d": PART.t2d}
        artefacts.save_tensors(scratch / "model.safetensors", stored)
    found = load_drafter(tmp_path / "drafter", tiny_target())
    assert all(torch.equal(found.tensors()[name], tensor) for name, tensor in stored.items())


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = written(tiny_head(), tmp_path / "drafter")
    with pytest.raises(StaleError, match="target"):
        load_drafter(folder, tiny_target("qwen3"))
    config = artefacts.read_json(folder / "config.json")
    artefacts.write_json(folder / "config.json", {**config, "kind": "medusa"})
    with pytest.raises(UserError, match="kind 'medusa' are not known to this version, which knows .*eagle3"):
        load_drafter(folder, tiny_target(), checksums=False)
