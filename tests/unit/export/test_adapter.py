"""From drafters to what exporters take and back: numbers of a growth, golden passes, heads of each kind, drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth, GrowthOptions
from draftsmith.drafters.eagle import Eagle, eagle_options
from draftsmith.export.adapter import (
    checker,
    drafter_of,
    exportable,
    forward,
    golden,
    head_checkpoint,
    serving,
    standalone_of,
    target_card,
)
from draftsmith.export.checkpoint import Extras, Serving, StandaloneDraft
from draftsmith.export.hand_over import export
from draftsmith.export.import_ import import_checkpoint
from draftsmith.export.validate import check
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget, load_target
from draftsmith.target.vocabulary import VocabMap
from tests.integration.tiny_folder import VOCAB, write_target
from tests.tiny import prompts, tiny_head, tiny_target
from tests.unit.export.heads import edit


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"kind": "dynamic", "node_budget": 11, "depth": 3, "width": 5}, Serving(2, 3, 5, 11)),
        ({"kind": "best-first", "node_budget": 11, "depth": 3, "width": 5}, Serving(2, 3, 5, 11)),
        ({"kind": "chain", "depth": 5}, Serving(2, 5, 1, 5)),
        ({"kind": "adaedl", "depth": 6}, Serving(2, 6, 1, 6)),
        # depth and width are of the shape, not of the options beside it
        ({"kind": "static", "paths": [[0], [2], [0, 0], [0, 0, 1]]}, Serving(2, 3, 3, 4)),
    ],
    ids=str,
)
def test_the_numbers_of_a_growth(options: dict[str, Any], wanted: Serving) -> None:
    assert serving(GrowthOptions(**options), 2) == wanted


def eagle(target: HFTarget, vocab: VocabMap | None = None) -> Eagle:
    torch.manual_seed(5)
    vocab = vocab or VocabMap.identity(target.spec.vocab_size)
    options = eagle_options(target.model.config, target.spec, vocab.size)
    return Eagle.for_target(options.model_copy(update={"initializer_range": 0.2}), vocab, target).eval()


@pytest.mark.parametrize(("kind", "server"), [("eagle3", "vllm"), ("eagle", "vllm"), ("eagle", "sglang")])
def test_a_head_comes_back_and_computes_the_same(kind: str, server: str, tmp_path: Path) -> None:
    """With its golden pass: `check` finds nothing, the import decodes the same rounds."""
    target = tiny_target()
    head: Any = tiny_head() if kind == "eagle3" else eagle(target)
    card = target_card(target, "somebody/tiny")
    checkpoint = head_checkpoint(head, card)
    folder = export(checkpoint, server, tmp_path / "out", Extras(golden=golden(checkpoint, target))).folder
    assert check(folder, card, embeddings=target.embedding, forward=checker(target)) == []
    back = drafter_of(import_checkpoint(folder, card), target, "it")
    assert isinstance(back, nn.Module)
    before, after = (
        Engine(target, Single(drafter, ChainGrowth(2))).generate(prompts(3), max_new_tokens=12)
        for drafter in (head, back)
    )
    shown = [[(g.token_ids, [(r.accepted, r.nodes) for r in g.rounds]) for g in found] for found in (before, after)]
    assert shown[0] == shown[1]


def test_a_changed_weight_of_an_eagle_head_is_told_by_its_golden_pass(tmp_path: Path) -> None:
    target = tiny_target()
    card = target_card(target, "somebody/tiny")
    checkpoint = head_checkpoint(eagle(target), card)
    folder = export(checkpoint, "vllm", tmp_path / "out", Extras(golden=golden(checkpoint, target))).folder
    edit(folder, rms_norm_eps=0.5)
    found = check(folder, card, forward=checker(target))
    assert [finding.field for finding in found] == ["draftsmith/golden.safetensors: log_q"]


def test_an_eagle_head_trained_on_a_part_of_the_vocabulary_is_served_with_all_of_it() -> None:
    """The same distribution over what both may propose."""
    target = tiny_target()
    ids = torch.tensor([3, 7, 8, 20, 55])
    vocab = VocabMap(ids, target.spec.vocab_size)
    head = eagle(target, vocab)
    checkpoint = head_checkpoint(head, target_card(target, "somebody/tiny"))
    assert checkpoint.vocab.is_identity
    inputs = golden(checkpoint, target).inputs
    part = forward(head, inputs, target.device)["log_q"]
    whole = forward(drafter_of(checkpoint, target, "it"), inputs, target.device)["log_q"]
    torch.testing.assert_close(whole[:, ids].log_softmax(-1), part)


def test_the_bias_of_an_eagle_head_goes_where_it_is_loaded(tmp_path: Path) -> None:
    target = tiny_target()
    card = target_card(target, "somebody/tiny")
    options = eagle_options(target.model.config, target.spec).model_copy(update={"fc_bias": True})
    head = Eagle.for_target(options, VocabMap.identity(target.spec.vocab_size), target)
    checkpoint = head_checkpoint(head, card)
    with pytest.raises(UserError, match="fc.bias: vLLM"):
        export(checkpoint, "vllm", tmp_path / "vl")
    folder = export(checkpoint, "sglang", tmp_path / "sg", Extras(golden=golden(checkpoint, target))).folder
    back = drafter_of(import_checkpoint(folder, card), target, "it")
    assert isinstance(back, Eagle)
    assert back.options.fc_bias
    assert torch.equal(back.fc.bias, head.fc.bias)
    assert check(folder, card, forward=checker(target)) == []


@pytest.mark.parametrize("server", ["transformers", "vllm", "sglang", "gguf"])
def test_a_standalone_draft_goes_through_as_a_folder(server: str, tmp_path: Path) -> None:
    folder = write_target(tmp_path / "target")
    target = load_target(folder, dtype="float32", device="cpu")
    draft = standalone_of(write_target(tmp_path / "drafter" / "model", seed=1), target)
    card = target_card(target, str(folder))
    taken = exportable(draft, tmp_path / "drafter", card)
    assert taken == StandaloneDraft(tmp_path / "drafter" / "model", card)
    exported = export(taken, server, tmp_path / "out")
    again = standalone_of(exported.folder, target)
    weights = draft.state_dict()
    assert weights.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.state_dict().items())
    ids = torch.tensor([[5, 17, 3, 60, 8]])
    before, after = (model.observe(model.start(1, 8), ids, None, [5]).log_q for model in (draft, again))
    assert torch.equal(before, after)
    assert check(exported.folder, card) == []
    assert again.vocab.size == VOCAB


def test_a_rope_that_is_not_the_targets_is_imported_only_if_it_is_meant(tmp_path: Path) -> None:
    target = tiny_target()
    card = target_card(target, "somebody/tiny")
    folder = export(head_checkpoint(tiny_head(), card), "vllm", tmp_path / "out").folder
    own = {"rope_theta": 77.0, "rope_type": "default"}
    edit(folder, rope_theta=77.0, rope_parameters=own)
    with pytest.raises(UserError, match="rope_parameters.*--keep-rope"):
        import_checkpoint(folder, card, keep_rope=False)
    kept = import_checkpoint(folder, card)
    assert kept.config["rope_theta"] == 77.0
    with pytest.raises(UserError, match="export.keep_rope=true"):
        export(kept, "vllm", tmp_path / "again")
    again = export(kept, "vllm", tmp_path / "again", Extras(keep_rope=True)).folder
    assert [(f.field, f.severity) for f in check(again, card)] == [("rope_parameters", "warning")]
