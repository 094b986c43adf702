from __future__ import annotations

import pytest
import torch

from draftsmith.decoding.averaging import averaged
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.foundation.errors import UserError
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import VOCAB, tiny_head


def test_all_of_one_is_that_one() -> None:
    heads = {"a": tiny_head(seed=1), "b": tiny_head(seed=2), "c": tiny_head(seed=3)}
    for place, name in enumerate(heads):
        made = averaged(heads, [float(i == place) for i in range(3)])
        for key, value in heads[name].state_dict().items():
            assert torch.equal(made.state_dict()[key], value), key  # type: ignore[attr-defined]


def test_every_weight_is_the_weighted_mean() -> None:
    heads = {"a": tiny_head(seed=1), "b": tiny_head(seed=2), "c": tiny_head(seed=3)}
    before = {name: {k: v.clone() for k, v in head.state_dict().items()} for name, head in heads.items()}
    made = averaged(heads, [2, 1, -0.5])
    for key, value in made.state_dict().items():  # type: ignore[attr-defined]
        a, b, c = (before[name][key].double() for name in heads)
        assert torch.allclose(value.double(), (2 * a + b - 0.5 * c) / 2.5, atol=1e-6), key
    halves = averaged({"a": heads["a"], "b": heads["b"]})
    key = "fc.weight"
    assert torch.allclose(halves.state_dict()[key], (before["a"][key] + before["b"][key]) / 2, atol=1e-7)  # type: ignore[attr-defined]
    for name, head in heads.items():
        for key, value in head.state_dict().items():
            assert torch.equal(value, before[name][key]), "a member was changed"
    assert made.embedding is heads["a"].embedding  # type: ignore[attr-defined]


def test_what_cannot_be_averaged_is_refused_by_name() -> None:
    head = tiny_head()
    reduced = VocabMap(torch.arange(0, VOCAB, 2), VOCAB)
    shifted = VocabMap(torch.arange(1, VOCAB, 2), VOCAB)
    ngram = NgramDrafter(NgramOptions(), VocabMap.identity(VOCAB))
    with pytest.raises(UserError, match="ngram has no weights"):
        averaged({"head": head, "ngram": ngram})
    with pytest.raises(UserError, match="narrow has draft_vocab_size 48, head 96"):
        averaged({"head": head, "narrow": tiny_head(vocab=reduced)})
    with pytest.raises(UserError, match="odd and even draft from different vocabularies"):
        averaged({"even": tiny_head(vocab=reduced), "odd": tiny_head(vocab=shifted)})
    with pytest.raises(UserError, match="mlp has intermediate_size 16, head 48"):
        averaged({"head": head, "mlp": tiny_head(intermediate_size=16)})
    with pytest.raises(UserError, match="a weight for each of its 2"):
        averaged({"a": head, "b": head}, [1.0])
    with pytest.raises(UserError, match="no usable sum"):
        averaged({"a": head, "b": head}, [1.0, -1.0])
