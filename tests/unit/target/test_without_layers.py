"""A target without its decoder layers: what trains on stored states gets the same, what would read is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.integration.tiny_folder import write_target

from draftsmith.target.model import load_target
from draftsmith.target.protocol import FeatureSpec


def test_it_is_the_same_target_but_can_not_read(tmp_path: Path) -> None:
    folder = write_target(tmp_path / "target")
    whole, without = load_target(folder, device="cpu"), load_target(folder, device="cpu", whole=False)
    assert without.spec == whole.spec
    assert torch.equal(without.embedding, whole.embedding)
    assert torch.equal(without.output_rows(None), whole.output_rows(None))
    assert torch.equal(without.model.base_model.norm.weight, whole.model.base_model.norm.weight)
    assert not any("layers." in name for name, _ in without.model.named_parameters())
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(RuntimeError, match="without its decoder layers"):
        without.read(ids, [3], FeatureSpec())
    with pytest.raises(RuntimeError, match="without its decoder layers"):
        without.prefill(ids, [3], FeatureSpec(), 8)
