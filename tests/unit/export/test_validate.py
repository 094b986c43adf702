"""Planted faults: each is found, by a finding that names the field and says what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.export.checkpoint import Extras, Golden, HeadCheckpoint
from draftsmith.export.findings import Finding
from draftsmith.export.hand_over import export
from draftsmith.export.validate import check
from draftsmith.target.vocabulary import VocabMap
from tests.unit.export.heads import BOUNDARIES, LLAMA3_ROPE, H, V, card, edit, head, replant, vocabulary

TOP, NESTED = "eagle_aux_hidden_state_layer_ids", "eagle_config"


def errors(folder: Path, **how: Any) -> list[Finding]:
    found = check(folder, how.pop("target", card()), **how)
    assert all(finding.fix for finding in found)
    return [finding for finding in found if finding.severity == "error"]


@pytest.fixture(params=["vllm", "speculators"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return export(head(), request.param, tmp_path / "out").folder


@pytest.fixture
def native(tmp_path: Path) -> Path:
    return export(head(), "vllm", tmp_path / "out").folder


def stored_name(folder: Path, name: str) -> str:
    layered = "speculators_model_type" in json.loads((folder / "config.json").read_text())
    return name.replace("midlayer.", "layers.0.") if layered else name


@pytest.mark.parametrize(
    ("top", "nested", "named"),
    [
        ([1, 3, 6], [1, 3, 6], "off by one"),  # one convention in both fields
        ([0, 2, 5], [0, 2, 5], "off by one"),
        (None, [0, 2, 5], "vLLM as boundaries [0, 2, 5] or not at all"),  # as ModelOpt writes it
        (None, [1, 3, 6], "SGLang reads it as layer outputs"),
        ([1, 3, 6], None, "would take [2, 4, 5]"),  # as vLLM's tools write it
        ([2, 4, 7], [1, 3, 6], "was trained on [1, 3, 6]"),  # both shifted alike
        ([0, 2, 5], [-1, 1, 4], "was trained on [1, 3, 6]"),
        (None, None, "was trained on [1, 3, 6]"),  # the servers' default
    ],
)
def test_auxiliary_ids_off_by_one(native: Path, top: list[int] | None, nested: list[int] | None, named: str) -> None:
    inner = {"use_aux_hidden_state": True} | ({TOP: nested} if nested else {})
    edit(native, **{TOP: top, NESTED: inner})
    found = errors(native)
    assert any(finding.field == TOP and named in finding.problem for finding in found), found
    # The two repairs offered when ids clash are those of this head or of the ids as given.
    assert all("[" in finding.fix for finding in found)


@pytest.mark.parametrize(
    ("ids", "named"),
    [([1, 6, 3], "not ascending"), ([1, 3, 3], "not ascending"), ([1, 3, 8], "final norm"), ([-1, 3, 6], "negative")],
)
def test_auxiliary_ids_that_no_server_can_mean(folder: Path, ids: list[int], named: str) -> None:
    edit(folder, **{TOP: ids, NESTED: {TOP: [k - 1 for k in ids]}})
    assert any(finding.field == TOP and named in finding.problem for finding in errors(folder))


def test_a_shuffled_map(folder: Path) -> None:
    ids = vocabulary().target_ids.clone()
    ids[[3, 7]] = ids[[7, 3]]
    replant(folder, {"d2t": ids - torch.arange(ids.numel())})
    found = errors(folder)
    assert [finding.field for finding in found] == ["d2t"]
    assert "shuffled" in found[0].problem


def test_a_map_one_off(folder: Path) -> None:
    for shift in (-1, 1):
        replant(folder, {"d2t": vocabulary().d2t + shift})
        assert "d2t" in {finding.field for finding in errors(folder)}


def test_a_map_one_off_within_the_vocabulary(tmp_path: Path) -> None:
    inner = VocabMap(torch.arange(5, 29, 2), V)
    folder = export(replace(head(), vocab=inner), "vllm", tmp_path / "out").folder
    replant(folder, {"d2t": inner.d2t + 1})
    assert [finding.field for finding in errors(folder)] == ["t2d", "d2t"]


def test_a_map_of_target_ids_instead_of_offsets(folder: Path) -> None:
    replant(folder, {"d2t": vocabulary().target_ids})
    found = errors(folder)
    assert found[0].field == "d2t"
    assert "subtract" in found[0].fix


def test_a_map_of_another_run_that_is_right_in_itself(folder: Path) -> None:
    """Strictly increasing, in range, agreeing with t2d: only the recorded digest tells."""
    other = replace(vocabulary(), target_ids=torch.arange(0, 24, 2))
    replant(folder, {"d2t": other.d2t, "t2d": other.t2d})
    found = errors(folder)
    assert [finding.field for finding in found] == ["d2t"]
    assert "digest" in found[0].problem


@pytest.mark.parametrize(
    ("planted", "field"),
    [
        ({"t2d": ~vocabulary().t2d}, "t2d"),
        ({"t2d": torch.ones(V - 1, dtype=torch.bool)}, "t2d"),
        ({"d2t": vocabulary().d2t.int()}, "d2t"),
        ({"d2t": vocabulary().d2t[:-1]}, "d2t"),
        ({"d2t": None, "t2d": None}, "d2t"),
    ],
)
def test_broken_maps(folder: Path, planted: dict[str, Tensor | None], field: str) -> None:
    replant(folder, planted)
    assert field in {finding.field for finding in errors(folder)}


def test_a_map_where_there_is_no_place_for_one(tmp_path: Path) -> None:
    folder = export(head(draft_vocab_size=V), "vllm", tmp_path / "out").folder
    replant(folder, {"d2t": torch.zeros(V, dtype=torch.int64)})
    assert [finding.field for finding in errors(folder)] == ["d2t"]


@pytest.mark.parametrize(
    "name",
    ["norm.weight", "midlayer.hidden_norm.weight", "midlayer.input_layernorm.weight", "lm_head.weight", "d2t"],
)
def test_a_missing_tensor(folder: Path, name: str) -> None:
    replant(folder, {stored_name(folder, name): None})
    found = errors(folder)
    assert [finding.field for finding in found] == [name]
    assert "missing" in found[0].problem


@pytest.mark.parametrize(
    "name",
    ["fc.bias", "midlayer.self_attn.q_proj.bias", "midlayer.mlp.up_proj.bias", "midlayer.self_attn.q_norm.weight"],
)
def test_an_extra_tensor(folder: Path, name: str) -> None:
    replant(folder, {stored_name(folder, name): torch.zeros(H, dtype=torch.bfloat16)})
    found = errors(folder)
    assert [finding.field for finding in found] == [name]
    assert "belongs to no eagle3 head" in found[0].problem


def test_a_norm_that_the_configuration_denies_and_one_that_it_invents(native: Path) -> None:
    edit(native, norm_before_fc=True)
    assert [finding.field for finding in errors(native)] == ["input_norm.weight"]
    replant(native, {"fc_norm.0.weight": torch.ones(H, dtype=torch.bfloat16)})
    assert {finding.field for finding in errors(native)} == {"input_norm.weight", "fc_norm.0.weight"}


def test_nan(folder: Path) -> None:
    name = stored_name(folder, "midlayer.mlp.down_proj.weight")
    weight = load_file(folder / "model.safetensors")[name]
    weight[0, 0], weight[1, 1] = float("nan"), float("inf")
    replant(folder, {name: weight})
    found = errors(folder)
    assert [finding.field for finding in found] == ["midlayer.mlp.down_proj.weight"]
    assert "2 of its values are NaN or infinite" in found[0].problem


def test_a_shape(folder: Path) -> None:
    replant(folder, {"fc.weight": torch.zeros(H, 2 * H, dtype=torch.bfloat16)})
    found = errors(folder)
    assert [finding.field for finding in found] == ["fc.weight"]
    assert "[16, 32]" in found[0].problem


def test_another_targets_head(folder: Path) -> None:
    fine_tuned = card(name="somebody/tuned", fingerprint="fedcba9876543210")
    found = errors(folder, target=fine_tuned)
    assert [finding.field for finding in found] == ["draftsmith.target.fingerprint"]
    assert "another target's head: somebody/tiny-target" in found[0].problem
    larger = card(vocab_size=V + 8, hidden_size=2 * H)
    assert {finding.field for finding in errors(folder, target=larger)} == {"vocab_size", "hidden_size"}


@pytest.mark.parametrize(
    "rope",
    [{"rope_theta": 10000.0, "rope_type": "default"}, {"rope_theta": 100000.0, **LLAMA3_ROPE}],
    ids=["theta", "scaling"],
)
def test_a_wrong_rope(folder: Path, rope: dict[str, object]) -> None:
    found = errors(folder, target=card(rope=rope))
    assert [finding.field for finding in found] == ["rope_parameters"]
    assert "the target's" in found[0].problem


def test_rope_fields_that_contradict_one_another(native: Path) -> None:
    edit(native, rope_theta=10000.0)
    found = errors(native, target=None)
    assert [finding.field for finding in found] == ["rope_parameters"]
    assert "readers differ" in found[0].problem


def test_lengths_shorter_than_the_targets(native: Path) -> None:
    edit(native, max_position_embeddings=64)
    assert [finding.field for finding in errors(native)] == ["max_position_embeddings"]


def test_embeddings(folder: Path) -> None:
    target = torch.randn(V, H)
    replant(folder, {"embed_tokens.weight": target.to(torch.bfloat16)})
    assert errors(folder, embeddings=target) == []
    assert "for nothing" in check(folder, card(), embeddings=target)[0].problem
    assert "not compared" in check(folder, card())[0].problem
    found = errors(folder, embeddings=target.roll(1, 0))
    assert [finding.field for finding in found] == ["embed_tokens.weight"]


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"draft_vocab_size": None}, "draft_vocab_size"),
        ({"draft_vocab_size": 13}, "draft_vocab_size"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"bias": True}, "bias"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
    ],
)
def test_fields_of_the_configuration(native: Path, fields: dict[str, object], field: str) -> None:
    edit(native, **fields)
    assert field in {finding.field for finding in errors(native)}


def test_a_field_that_vllm_takes_for_true_where_it_is_missing(tmp_path: Path) -> None:
    folder = export(head(), "speculators", tmp_path / "out").folder
    edit(folder, norm_before_residual=None)
    assert [finding.field for finding in errors(folder)] == ["norm_before_residual"]


def test_eagle_folders_lack_a_bias_or_have_too_many_tensors(tmp_path: Path) -> None:
    folder = export(head("eagle"), "sglang", tmp_path / "sg").folder
    replant(folder, {"fc.bias": None})
    assert {finding.field for finding in errors(folder)} == {"fc.bias"}
    folder = export(head("eagle"), "vllm", tmp_path / "vl").folder
    replant(folder, {"layers.0.input_layernorm.weight": torch.ones(H), "norm.weight": torch.ones(H)})
    found = errors(folder)
    assert {finding.field for finding in found} == {"layers.0.input_layernorm.weight", "norm.weight"}
    replant(folder, {"layers.0.input_layernorm.weight": None, "norm.weight": None, "fc.bias": torch.ones(H)})
    warned = [finding for finding in check(folder, card()) if "vLLM" in finding.problem]
    assert [finding.field for finding in warned] == ["fc.bias"]


def test_a_file_that_servers_would_load_as_weights(native: Path) -> None:
    save_file({"x": torch.zeros(1)}, native / "golden.safetensors")
    assert "golden.safetensors" in {finding.field for finding in errors(native)}


def test_a_changed_file_of_an_export_is_told(native: Path) -> None:
    text = (native / "README.md").read_text()
    (native / "README.md").write_text(text + "more")
    found = check(native, card())
    assert [(finding.field, finding.severity) for finding in found] == [("manifest.json", "warning")]


def test_a_folder_name_that_means_eagle_one(native: Path) -> None:
    renamed = native.rename(native.with_name("EAGLE-3-mine"))
    assert [finding.field for finding in check(renamed, card())] == ["folder name"]


def forward(head: HeadCheckpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Not the head's arithmetic, but something in which each of its weights and its RoPE base counts."""
    total = sum(tensor.double().abs().sqrt().sum() for _, tensor in sorted(head.tensors.items()))
    return {"out": inputs["x"] * float(total) * float(head.config["rope_theta"]) ** 0.1}


def golden_export(tmp_path: Path) -> Path:
    before = head()
    inputs = {"x": torch.randn(3, 5)}
    golden = Golden(inputs, forward(before, inputs))
    return export(before, "vllm", tmp_path / "out", Extras(golden=golden)).folder


def test_the_golden_output_of_an_untouched_folder(tmp_path: Path) -> None:
    assert check(golden_export(tmp_path), card(), forward=forward) == []


def test_the_golden_output_tells_a_changed_weight_and_a_changed_rope(tmp_path: Path) -> None:
    folder = golden_export(tmp_path)
    weight = load_file(folder / "model.safetensors")["fc.weight"]
    replant(folder, {"fc.weight": weight * 1.5})
    assert "differs from the stored one" in errors(folder, forward=forward)[0].problem
    replant(folder, {"fc.weight": weight})
    assert errors(folder, forward=forward) == []
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    edit(folder, rope_theta=10000.0, rope_parameters=rope)
    found = errors(folder, target=card(rope=rope), forward=forward)
    assert [finding.field for finding in found] == ["draftsmith/golden.safetensors: out"]


def test_a_missing_golden_output_is_told_only_where_it_is_asked_for(native: Path) -> None:
    assert check(native, card()) == []
    assert [finding.severity for finding in check(native, card(), forward=forward)] == ["warning"]


def test_errors_come_before_warnings(native: Path) -> None:
    edit(native, architectures=["LlamaForCausalLM"], draft_vocab_size=13)
    severities = [finding.severity for finding in check(native, card())]
    assert severities == sorted(severities)
    assert set(severities) == {"error", "warning"}


def test_a_finding_reads_as_a_sentence(native: Path) -> None:
    edit(native, **{TOP: list(BOUNDARIES), NESTED: {TOP: list(BOUNDARIES)}})
    (found,) = errors(native)
    assert str(found) == (
        "eagle_aux_hidden_state_layer_ids: eagle_aux_hidden_state_layer_ids says boundaries [1, 3, 6] (the input of "
        "layer k), eagle_config.eagle_aux_hidden_state_layer_ids says [1, 3, 6], from which SGLang reads boundaries "
        "[2, 4, 7]: off by one. Fix: if the head reads boundaries [1, 3, 6], write eagle_aux_hidden_state_layer_ids "
        "[1, 3, 6] and eagle_config.eagle_aux_hidden_state_layer_ids [0, 2, 5]"
    )
