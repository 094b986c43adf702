"""The feature store: what is in it is what the target says of the same text, and every sample is in it once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import VOCAB, tiny_target
from tests.unit.training.stored import LAYERS, WANT, random_samples

from draftsmith.data import features
from draftsmith.data.features import FeatureStore, PassOptions, estimated_bytes, plan, store
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import StaleError, UserError
from draftsmith.target.protocol import FeatureSpec

SAMPLES = random_samples(9, seed=1)


class Killed(BaseException):
    """Stands for a kill: no `except Exception` holds it back."""


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_a_plan_covers_everything_within_its_bound(lengths: list[int], most: int) -> None:
    batches = plan(lengths, most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= most or len(batch) == 1
    ordered = [lengths[i] for batch in batches for i in batch]
    assert ordered == sorted(lengths, reverse=True), "neighbours in length, so that little is padding"


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("batch_positions", [1, 70, 4096])
def test_the_store_holds_what_the_target_says_of_each_text_alone(
    tmp_path: Path, kind: str, batch_positions: int
) -> None:
    target = tiny_target(kind)
    store(target, SAMPLES, WANT, PassOptions(batch_positions=batch_positions), tmp_path / "s", {})
    source = FeatureStore(tmp_path / "s")
    assert source.ids == [sample.id for sample in SAMPLES]
    assert source.lengths == [len(sample.ids) for sample in SAMPLES]
    for sample, kept in zip(SAMPLES, source, strict=True):
        assert kept.ids.tolist() == sample.ids
        assert kept.mask.tolist() == sample.mask
        assert kept.complete == sample.complete
        assert kept.id == sample.id
        alone = target.read(torch.tensor([sample.ids]), [len(sample.ids)], WANT)
        assert kept.hidden.keys() == {*LAYERS, "final"}
        for name, states in kept.hidden.items():
            torch.testing.assert_close(states, alone[name][0], atol=2e-5, rtol=1e-4)
        assert torch.equal(source[sample.id].hidden["final"], kept.hidden["final"])


def test_statistics_stand_at_the_row_whose_next_token_they_are_of(tmp_path: Path) -> None:
    """Against the model's own logits, in float64."""
    target = tiny_target()
    store(target, SAMPLES, FeatureSpec(), PassOptions(batch_positions=90), tmp_path / "s", {})
    for sample, kept in zip(SAMPLES, FeatureStore(tmp_path / "s"), strict=True):
        assert kept.hidden == {}, "statistics only"
        logits = target.model(input_ids=torch.tensor([sample.ids])).logits[0].double()
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        found = {name: values.double() for name, values in kept.statistics.items()}
        expected = {
            "log_z": logits.logsumexp(-1),
            "log_norm": p.norm(dim=-1).log(),
            "entropy": -(p * log_p).sum(-1),
            "argmax": logits.argmax(-1).double(),
        }
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, atol=1e-4, rtol=1e-4, msg=name)
        following = torch.tensor(sample.ids[1:])
        nll = -log_p[:-1].gather(1, following[:, None])[:, 0]
        torch.testing.assert_close(found["nll"][:-1], nll, atol=1e-4, rtol=1e-4)
        assert found["nll"][-1] == 0, "the last position has no next token"
        rows = [t for t in range(len(sample.ids) - 1) if sample.mask[t + 1]]
        assert kept.answer_rows.nonzero()[:, 0].tolist() == rows


def test_its_size_is_what_was_estimated(tmp_path: Path) -> None:
    for want in (WANT, FeatureSpec()):
        place = store(tiny_target(), SAMPLES, want, PassOptions(batch_positions=4096), tmp_path / "s", {})
        positions = sum(len(sample.ids) for sample in SAMPLES)
        estimate = estimated_bytes(positions, want, 32, item_bytes=4)
        found = sum(path.stat().st_size for path in place.glob("shard-*"))
        # a safetensors header a shard comes on top
        assert estimate * 0.8 <= found <= estimate + 2000


def test_killed_between_shards_it_goes_on_and_stores_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PassOptions(batch_positions=60)
    store(tiny_target(), SAMPLES, WANT, options, tmp_path / "undisturbed", {})
    shards = len(list((tmp_path / "undisturbed").glob("shard-*")))
    assert shards > 2
    read, calls = features.read, 0

    def counted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Killed
        return read(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "read", counted)
    lives = 0
    while not (tmp_path / "s").exists():
        calls, lives = 0, lives + 1
        try:
            store(tiny_target(), SAMPLES, WANT, options, tmp_path / "s", {})
        except Killed:
            assert len(list((tmp_path / "s.partial").glob("shard-*"))) == lives
    assert lives == shards
    assert (tmp_path / "s" / "manifest.json").read_bytes() == (tmp_path / "undisturbed" / "manifest.json").read_bytes()


def test_another_targets_store_and_no_samples_are_refused(tmp_path: Path) -> None:
    place = store(tiny_target(), SAMPLES, FeatureSpec(), PassOptions(), tmp_path / "s", {})
    with pytest.raises(StaleError, match="target is"):
        FeatureStore(place, {"target": tiny_target("qwen3").spec.fingerprint})
    with pytest.raises(UserError, match="there is nothing to read"):
        store(tiny_target(), [], WANT, PassOptions(), tmp_path / "none", {})
    artefacts.opened(place, features.KIND, {"vocab_size": VOCAB, "hidden_size": 32})
