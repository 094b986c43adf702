"""Samples read as training goes on: the numbers of the store, in the order asked for, and the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_target
from tests.unit.training.stored import WANT, answered, random_samples, stored
from tests.unit.training.test_trainer import FAST, dev, head, objective

from draftsmith.data.features import PassOptions
from draftsmith.data.online import OnlineSource
from draftsmith.foundation import artefacts
from draftsmith.training.trainer import train

SAMPLES = random_samples(9, seed=1)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("batch_positions", [1, 70, 4096])
def test_what_is_read_is_what_a_store_holds(tmp_path: Path, kind: str, batch_positions: int) -> None:
    kept = stored(SAMPLES, tmp_path, kind=kind)
    online = OnlineSource(tiny_target(kind), SAMPLES, WANT, PassOptions(batch_positions=batch_positions))
    assert online.ids == kept.ids
    assert online.lengths == kept.lengths
    asked = ["s4", "s0", "s7", "s4", "s2"]
    for name, found, expected in zip(asked, online.fetch(asked, 3), kept.fetch(asked, 3), strict=True):
        assert found.id == expected.id == name
        assert torch.equal(found.ids, expected.ids)
        assert torch.equal(found.mask, expected.mask)
        assert found.complete == expected.complete
        assert found.hidden.keys() == expected.hidden.keys()
        assert found.statistics.keys() == expected.statistics.keys()
        for layer, states in found.hidden.items():
            assert states.dtype == expected.hidden[layer].dtype
            torch.testing.assert_close(states, expected.hidden[layer], atol=2e-5, rtol=1e-4)
        for column, values in found.statistics.items():
            torch.testing.assert_close(values, expected.statistics[column], atol=2e-5, rtol=1e-4, msg=column)


def test_an_outline_needs_no_pass() -> None:
    online = OnlineSource(tiny_target(), SAMPLES, WANT, PassOptions())
    for sample in SAMPLES:
        outline = online.outline(sample.id)
        assert outline.ids.tolist() == sample.ids
        assert outline.mask.tolist() == sample.mask
        assert not outline.hidden


def test_training_reads_online_what_it_would_read_from_the_store(tmp_path: Path) -> None:
    """Twelve steps: losses within rounding, and the same checkpoint is the best."""
    samples = answered(8, 12)
    kept = stored(samples, tmp_path)
    online = OnlineSource(tiny_target(), samples, WANT, PassOptions())
    o = FAST.model_copy(update={"steps": 12, "batch_positions": 64})
    rows = []
    for name, source in (("kept", kept), ("online", online)):
        made = head()
        out, log = tmp_path / name / "drafter", tmp_path / name / "log.jsonl"
        summary = train(made, objective(made, o), source, source.ids, dev(kept), o, out, log, {})
        rows.append((summary, [row["loss_by_step"] for row in artefacts.read_jsonl(log) if "loss" in row]))
    (one, first), (other, second) = rows
    assert one == other
    assert len(first) == 12
    for here, there in zip(first, second, strict=True):
        assert here == pytest.approx(there, rel=1e-4)
