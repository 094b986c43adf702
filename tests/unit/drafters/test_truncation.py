"""Drafts made of a target's layers: the same as the target with the others left out, and chosen by what is missed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draftsmith.drafters import truncation
from draftsmith.drafters.truncation import StandaloneOptions, made, sensitivity, spread, truncated
from draftsmith.foundation.errors import UserError
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import KINDS, LAYERS, VOCAB, prompts, tiny_draft, tiny_target

TEXTS = [(torch.tensor(p), torch.arange(len(p)) % 3 != 1) for p in prompts(3, seed=12, low=6, high=12)]


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_kept_layers_are_the_targets_with_the_others_left_out(kind: str) -> None:
    """Gemma's and Mistral's layers keep their own attention windows: the text is longer than these."""
    model = tiny_target(kind).model
    kept = (0, 2, 5, 7)
    ids = torch.tensor(prompts(1, seed=1, low=14, high=14)[0])
    small = truncated(model, kept, "tiny")
    layers = model.base_model.layers
    with pytest.MonkeyPatch.context() as patch:
        for index in set(range(LAYERS)) - set(kept):
            patch.setattr(layers[index], "forward", lambda hidden_states, *_, **__: hidden_states)
        expected = logits(model, ids)
    torch.testing.assert_close(logits(small, ids), expected, atol=1e-5, rtol=1e-5)
    assert (logits(model, ids) - expected).abs().max() > 0.1
    if kind == "gemma3":
        types = model.config.layer_types
        assert small.config.layer_types == [types[i] for i in kept]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_sensitivity_is_the_divergence_without_a_layer(kind: str) -> None:
    target = tiny_target(kind)
    found = sensitivity(target, TEXTS)
    for layer in range(LAYERS):
        small = truncated(target.model, [i for i in range(LAYERS) if i != layer], "tiny")
        values = []
        for ids, mask in TEXTS:
            p, q = (logits(m, ids).log_softmax(-1) for m in (target.model, small))
            values += [float((p[t].exp() * (p[t] - q[t])).sum()) for t in range(len(ids)) if mask[t]]
        assert float(found[layer]) == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_the_layers_missed_most_are_kept() -> None:
    target = tiny_target("mixtral")
    hurt = sensitivity(target, TEXTS)
    draft = made(target, VocabMap.identity(VOCAB), StandaloneOptions(keep_layers=3), TEXTS)
    assert draft.options.kept_layers is not None
    out = [float(hurt[i]) for i in range(LAYERS) if i not in draft.options.kept_layers]
    assert min(float(hurt[i]) for i in draft.options.kept_layers) >= max(out)
    assert list(draft.options.kept_layers) == sorted(draft.options.kept_layers)


def test_only_the_first_texts_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def counted(target: object, texts: list[object]) -> Tensor:
        seen.append(len(texts))
        return torch.arange(LAYERS).float()

    monkeypatch.setattr(truncation, "sensitivity", counted)
    draft = made(tiny_target(), VocabMap.identity(VOCAB), StandaloneOptions(keep_layers=2, texts=2), TEXTS)
    assert seen == [2]
    assert draft.options.kept_layers == (LAYERS - 2, LAYERS - 1)


@pytest.mark.parametrize(
    ("count", "layers", "expected"),
    [(1, 30, (0,)), (2, 30, (0, 29)), (4, 30, (0, 10, 19, 29)), (8, 8, tuple(range(8)))],
)
def test_spread_layers(count: int, layers: int, expected: tuple[int, ...]) -> None:
    assert spread(count, layers) == expected


@pytest.mark.parametrize("keep", [(0, 8), (3, 3), (-1, 2), 9])
def test_layers_that_are_none_of_the_targets_are_refused(keep: int | tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="keep_layers"):
        made(tiny_target(), VocabMap.identity(VOCAB), StandaloneOptions(keep_layers=keep), TEXTS)


def test_texts_without_answers_choose_nothing() -> None:
    silent = [(ids, torch.zeros_like(mask)) for ids, mask in TEXTS]
    with pytest.raises(UserError, match="keep_layers"):
        made(tiny_target(), VocabMap.identity(VOCAB), StandaloneOptions(), silent)


def test_the_target_is_left_alone_and_the_embedding_is_frozen_unless_asked() -> None:
    target = tiny_target()
    frozen = made(target, VocabMap.identity(VOCAB), StandaloneOptions(keep_layers=(0, 1)), [])
    assert not frozen.model.get_input_embeddings().weight.requires_grad
    assert sum(p.requires_grad for p in frozen.parameters()) == sum(1 for _ in frozen.parameters()) - 1
    assert all(p.requires_grad for p in tiny_draft("llama", 2).parameters())
    assert not any(p.requires_grad for p in target.model.parameters())
    own = {p.data_ptr() for p in target.model.parameters()}
    assert not own & {p.data_ptr() for p in frozen.parameters()}
