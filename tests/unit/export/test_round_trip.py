"""export ▸ import gives the same head back, bit for bit, in every format, and `check` finds nothing in an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.export.checkpoint import Extras, Golden, HeadCheckpoint
from draftsmith.export.hand_over import export
from draftsmith.export.import_ import import_checkpoint, recognise
from draftsmith.export.validate import check, read_golden
from draftsmith.foundation.artefacts import opened
from draftsmith.foundation.errors import UserError
from tests.unit.export.heads import LLAMA3_ROPE, V, card, head

FORMATS = [
    ("eagle3", "vllm", "eagle3"),
    ("eagle3", "sglang", "eagle3"),
    ("eagle3", "gguf", "eagle3"),
    ("eagle3", "speculators", "speculators"),
    ("eagle", "vllm", "eagle"),
    ("eagle", "sglang", "eagle"),
]


def assert_same_head(found: HeadCheckpoint, wanted: HeadCheckpoint) -> None:
    assert found.kind == wanted.kind
    assert dict(found.config) == dict(wanted.config)
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, tensor in wanted.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor), name
    assert torch.equal(found.vocab.target_ids, wanted.vocab.target_ids)
    assert (found.vocab.vocab_size, found.vocab.filled) == (wanted.vocab.vocab_size, wanted.vocab.filled)


@pytest.mark.parametrize(("kind", "server", "form"), FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_then_import_is_the_identity(
    kind: str, server: str, form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    before = head(kind, dtype)
    exported = export(before, server, tmp_path / "out")
    assert recognise(exported.folder) == form
    after = import_checkpoint(exported.folder, before.target)
    assert_same_head(after, before)
    assert after.notes == ()
    assert check(exported.folder, before.target) == []


@pytest.mark.parametrize(("kind", "server", "form"), FORMATS)
def test_import_needs_no_target_for_our_own_exports(kind: str, server: str, form: str, tmp_path: Path) -> None:
    before = head(kind)
    after = import_checkpoint(export(before, server, tmp_path / "out").folder)
    assert_same_head(after, before)
    assert (after.target.name, after.target.fingerprint) == (before.target.name, before.target.fingerprint)


@pytest.mark.parametrize(
    "changes",
    [
        {"draft_vocab_size": V},
        {"norm_before_fc": True},
        {"fc_norm": True},
        {"norm_output": True, "fc_norm": True, "norm_before_fc": True},
        {"norm_before_residual": True},
        {"attention_bias": True},
        {"rope_scaling": LLAMA3_ROPE},
        {"auxiliary_layers": (2, 4, 5)},
    ],
    ids=lambda c: ",".join(c),
)
@pytest.mark.parametrize("server", ["vllm", "speculators"])
def test_every_variant_of_the_head_comes_back(changes: dict[str, object], server: str, tmp_path: Path) -> None:
    before = head("eagle3", **changes)
    folder = export(before, server, tmp_path / "out").folder
    assert_same_head(import_checkpoint(folder, before.target), before)
    assert check(folder, before.target) == []
    assert ("d2t" in load_file(folder / "model.safetensors")) == (not before.vocab.is_identity)


def test_a_bias_of_fc_survives_sglang_and_is_refused_by_vllm(tmp_path: Path) -> None:
    before = head("eagle", fc_bias=True)
    after = import_checkpoint(export(before, "sglang", tmp_path / "sg").folder, before.target)
    assert_same_head(after, before)
    with pytest.raises(UserError, match="fc.bias"):
        export(before, "vllm", tmp_path / "vl")
    assert not (tmp_path / "vl").exists()


def test_sglang_gets_zeros_where_the_head_has_no_bias(tmp_path: Path) -> None:
    folder = export(head("eagle"), "sglang", tmp_path / "out").folder
    bias = load_file(folder / "model.safetensors")["fc.bias"]
    assert bias.shape == (16,)
    assert not bias.any()
    assert json.loads((folder / "config.json").read_text())["bias"] is False


def test_the_golden_output_lies_where_servers_do_not_take_it_for_weights(tmp_path: Path) -> None:
    golden = Golden({"features": torch.randn(2, 3)}, {"log_q": torch.randn(2, 4)})
    folder = export(head(), "vllm", tmp_path / "out", Extras(golden=golden)).folder
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    again = read_golden(folder)
    assert torch.equal(again.inputs["features"], golden.inputs["features"])
    assert torch.equal(again.outputs["log_q"], golden.outputs["log_q"])


def test_an_export_is_an_artefact_and_replaces_an_older_one(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(head(), "vllm", folder)
    export(head(dtype=torch.float32), "vllm", folder)
    meta = opened(folder, "export")
    assert (meta["server"], meta["kind"], meta["target"]["fingerprint"]) == ("vllm", "eagle3", "0123456789abcdef")
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


def test_equal_heads_give_equal_bytes(tmp_path: Path) -> None:
    folders = [export(head(), "vllm", tmp_path / name / "out").folder for name in ("a", "b")]
    for name in ("config.json", "model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize("rope", [{"rope_theta": 100000.0, "rope_type": "default"}, {"rope_theta": 5e5, **LLAMA3_ROPE}])
def test_transformers_reads_the_targets_rope_from_the_folder(rope: dict[str, object], tmp_path: Path) -> None:
    from transformers import AutoConfig

    scaling = {k: v for k, v in rope.items() if k != "rope_theta"} if rope["rope_type"] != "default" else None
    folder = export(head(rope_theta=rope["rope_theta"], rope_scaling=scaling), "vllm", tmp_path / "out").folder
    read = AutoConfig.from_pretrained(folder)
    assert dict(read.rope_parameters) == rope
    assert (read.max_position_embeddings, read.head_dim, str(read.dtype)) == (512, 6, "torch.bfloat16")


def test_lengths_are_the_targets_not_the_heads(tmp_path: Path) -> None:
    before = head(max_position_embeddings=64)
    folder = export(before, "vllm", tmp_path / "out").folder
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 512


def test_another_rope_than_the_targets_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    before = head()
    other = HeadCheckpoint("eagle3", before.config, before.tensors, before.vocab, card(rope={"rope_theta": 1e4}))
    with pytest.raises(UserError, match="rope_parameters"):
        export(other, "vllm", tmp_path / "out")
    folder = export(other, "vllm", tmp_path / "out", Extras(keep_rope=True)).folder
    assert json.loads((folder / "config.json").read_text())["rope_theta"] == 100000.0


@pytest.mark.parametrize(
    ("changes", "server", "named"),
    [
        ({"norm_before_residual": True}, "sglang", "norm_before_residual"),
        ({"attention_bias": True}, "sglang", "attention_bias"),
        ({"attention_bias": True}, "gguf", "attention_bias"),
        ({"norm_output": True}, "gguf", "norm_output"),
        ({"fc_norm": True}, "gguf", "fc_norm"),
        ({"hidden_act": "gelu"}, "vllm", "hidden_act"),
        ({"hidden_act": "gelu"}, "sglang", "hidden_act"),
        ({}, "transformers", "hidden states"),
        ({}, "tensorrt", "vllm, sglang, speculators, transformers, gguf"),
    ],
)
def test_what_a_server_cannot_run_is_refused_with_the_reason(
    changes: dict[str, object], server: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        export(head("eagle3", **changes), server, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("server", ["speculators", "gguf", "transformers"])
def test_eagle_heads_are_refused_where_there_is_no_place_for_them(server: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="EAGLE|hidden states"):
        export(head("eagle"), server, tmp_path / "out")


def test_a_head_whose_parts_do_not_fit_is_not_exported(tmp_path: Path) -> None:
    whole = head()
    short = {name: tensor for name, tensor in whole.tensors.items() if name != "norm.weight"}
    for tensors, named in (
        (short, "norm.weight is missing"),
        ({**whole.tensors, "fc.bias": torch.zeros(16)}, "fc.bias"),
        ({**whole.tensors, "norm.weight": torch.ones(8)}, r"\[8\]"),
    ):
        broken = HeadCheckpoint("eagle3", whole.config, tensors, whole.vocab, whole.target)
        with pytest.raises(UserError, match=named):
            export(broken, "vllm", tmp_path / "out")
    other = HeadCheckpoint("eagle3", whole.config, whole.tensors, whole.vocab, card(vocab_size=41))
    with pytest.raises(UserError, match="vocab_size is 40 in the head and 41"):
        export(other, "vllm", tmp_path / "out")


def test_a_folder_name_that_chooses_the_wrong_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eagle-3-head"):
        export(head(), "vllm", tmp_path / "eagle-3-head")
