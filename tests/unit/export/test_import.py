"""Folders as others publish them, re-created at tiny size: recognised by content, read, doubts told or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from draftsmith.export.hand_over import export
from draftsmith.export.import_ import import_checkpoint, recognise
from draftsmith.export.validate import check
from draftsmith.foundation.errors import UserError
from tests.unit.export.heads import LAYERS, LLAMA3_ROPE, VD, H, V, card, config, head, publish, tensors, vocabulary

# eagle/traineagle3/config.json and the published EAGLE3-… folders: no RoPE, no layer ids, no head_dim, 2048 positions.
EAGLE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": H,
    "initializer_range": 0.02,
    "intermediate_size": 24,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": V,
}
MAPS = {"d2t": vocabulary().d2t, "t2d": vocabulary().t2d}


def eagle3_tensors(**changes: Any) -> dict[str, Tensor]:
    return tensors("eagle3", config("eagle3", head_dim=4, **changes), torch.float16)


def layered(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("midlayer.", "layers.0."): tensor for name, tensor in stored.items()}


def assert_weights(found: Any, wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_eagles_own_eagle3(tmp_path: Path) -> None:
    weights = eagle3_tensors()
    folder = publish(tmp_path / "a", {**EAGLE_CONFIG, "draft_vocab_size": VD}, {**weights, **MAPS})
    assert recognise(folder) == "eagle3"
    found = import_checkpoint(folder, card(rope={"rope_theta": 10000.0, "rope_type": "default"}))
    assert_weights(found.tensors, weights)
    assert found.auxiliary_layers == (2, 4, 5)  # its target's default
    assert (found.config["head_dim"], found.config["rope_theta"]) == (4, 10000.0)
    assert torch.equal(found.vocab.target_ids, vocabulary().target_ids)
    assert found.notes == ()
    with pytest.raises(UserError, match=r"name the target \(--target\)"):
        import_checkpoint(folder)
    assert import_checkpoint(folder, overrides={"auxiliary_layers": [1, 3, 6]}).auxiliary_layers == (1, 3, 6)


def test_what_was_imported_is_exported_and_checked(tmp_path: Path) -> None:
    """The way of a public head into every server: what was ambiguous before is not so after."""
    weights = eagle3_tensors()
    folder = publish(tmp_path / "a", {**EAGLE_CONFIG, "draft_vocab_size": VD}, {**weights, **MAPS})
    target = card(rope={"rope_theta": 10000.0, "rope_type": "default"})
    assert check(folder, target) != []
    for server in ("vllm", "sglang", "speculators", "gguf"):
        again = export(import_checkpoint(folder, target), server, tmp_path / server).folder
        assert check(again, target) == []
        assert_weights(import_checkpoint(again, target).tensors, weights)


def test_specforge(tmp_path: Path) -> None:
    """`midlayer.` names, the maps, a copy of the embeddings, layer *outputs* nested in eagle_config."""
    weights, embeddings = eagle3_tensors(), torch.randn(V, H).half()
    c = {**EAGLE_CONFIG, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": VD, "head_dim": 4}
    c["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [0, 2, 5], "use_aux_hidden_state": True}
    folder = publish(tmp_path / "a", c, {**weights, **MAPS, "embed_tokens.weight": embeddings})
    found = import_checkpoint(folder, card(), embeddings=embeddings.bfloat16().float())
    assert_weights(found.tensors, weights)
    assert found.auxiliary_layers == (1, 3, 6)
    assert any("read as boundaries [1, 3, 6]" in note for note in found.notes)
    with pytest.raises(UserError, match="embed_tokens.weight is not the target's"):
        import_checkpoint(folder, card(), embeddings=torch.randn(V, H))
    assert any("without comparing" in note for note in import_checkpoint(folder, card()).notes)


def modelopt(tmp_path: Path, nested: list[int]) -> Path:
    """`layers.0.` names, d2t without t2d, no maps where the vocabulary is whole, ids only in eagle_config."""
    c = {**EAGLE_CONFIG, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": VD, "head_dim": 4}
    c |= {"rope_theta": 100000.0, "rope_scaling": None}
    c["eagle_config"] = {
        "eagle_aux_hidden_state_layer_ids": nested,
        "use_aux_hidden_state": True,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "next_layer_regular": True,
    }
    return publish(tmp_path / "mo", c, {**layered(eagle3_tensors()), "d2t": MAPS["d2t"]})


@pytest.mark.parametrize("target", [None, card()])
def test_modelopts_ids_are_outputs_of_layers(target: Any, tmp_path: Path) -> None:
    folder = modelopt(tmp_path, [1, LAYERS // 2 - 1, LAYERS - 4])
    found = import_checkpoint(folder, target)
    assert found.auxiliary_layers == (2, LAYERS // 2, LAYERS - 3)
    assert_weights(found.tensors, eagle3_tensors())
    assert "layer outputs" in found.notes[0]


def test_nested_ids_that_may_mean_either_are_refused_and_can_be_settled(tmp_path: Path) -> None:
    """Taken literally they are the target's default boundaries: somebody may well have meant those."""
    folder = modelopt(tmp_path, [2, LAYERS // 2, LAYERS - 3])
    with pytest.raises(UserError, match=r"ambiguous.*--set auxiliary_layers"):
        import_checkpoint(folder, card())
    settled = import_checkpoint(folder, card(), overrides={"auxiliary_layers": (2, 4, 5)})
    assert settled.auxiliary_layers == (2, 4, 5)


def test_ids_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    folder = export(head(), "vllm", tmp_path / "out").folder
    c = json.loads((folder / "config.json").read_text())
    c["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [1, 3, 6]
    (folder / "config.json").write_text(json.dumps(c))
    with pytest.raises(UserError, match="off by one"):
        import_checkpoint(folder, card())


@pytest.mark.parametrize("names", ["layers.0", "model"])
def test_eagle_one_two_and_hass(names: str, tmp_path: Path) -> None:
    """One format: no input norm, no final norm, no lm_head; embeddings beside it; `bias` false."""
    weights = tensors("eagle", config("eagle", head_dim=4), torch.float16)
    embeddings = torch.randn(V, H).half()
    stored = {**weights, "embed_tokens.weight": embeddings}
    if names == "model":
        stored = {f"model.{name}": tensor for name, tensor in stored.items()} | {"lm_head.weight": torch.randn(V, H)}
    folder = publish(tmp_path / "a", {**EAGLE_CONFIG, "rope_theta": 5e5, "bias": False}, stored)
    assert recognise(folder) == "eagle"
    found = import_checkpoint(folder, card(rope={"rope_theta": 5e5, "rope_type": "default"}), embeddings=embeddings)
    assert_weights(found.tensors, weights)
    assert found.vocab.is_identity
    assert found.config["fc_bias"] is False
    assert found.auxiliary_layers == ()
    assert ("lm_head was dropped" in " ".join(found.notes)) == (names == "model")


def test_eagle_with_a_bias(tmp_path: Path) -> None:
    weights = tensors("eagle", config("eagle", head_dim=4, fc_bias=True), torch.float16)
    found = import_checkpoint(publish(tmp_path / "a", EAGLE_CONFIG, weights), card())
    assert_weights(found.tensors, weights)
    assert found.config["fc_bias"] is True


def speculators_config(**changes: Any) -> dict[str, Any]:
    """As speculators 0.9.0 saves it; the layer as `LlamaConfig.to_diff_dict` of transformers 5 gives it."""
    layer = {
        key: EAGLE_CONFIG[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    }
    layer |= {"model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 4}
    layer |= {"rms_norm_eps": 1e-5, "max_position_embeddings": 512}
    layer |= {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3_ROPE}}
    out: dict[str, Any] = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "somebody/tiny-target", "architectures": ["LlamaForCausalLM"]},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": VD,
        "target_hidden_size": None,
        "norm_before_residual": True,
        "norm_before_fc": True,
        "norm_output": True,
        "eagle_aux_hidden_state_layer_ids": [1, 3, 6],
        "tie_word_embeddings": False,
    }
    return {key: value for key, value in {**out, **changes}.items() if value != "absent"}


def test_speculators(tmp_path: Path) -> None:
    weights = eagle3_tensors(norm_before_fc=True)
    stored = {**layered(weights), **MAPS, "embed_tokens.weight": torch.randn(V, H).half()}
    folder = publish(tmp_path / "a", speculators_config(), stored)
    assert recognise(folder) == "speculators"
    found = import_checkpoint(folder)
    assert_weights(found.tensors, weights)
    assert found.auxiliary_layers == (1, 3, 6)
    assert [found.config[name] for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")] == [
        True,
        True,
        False,
        True,
    ]
    assert found.config["rope_theta"] == 500000.0
    assert found.config["rope_scaling"] == LLAMA3_ROPE
    assert (found.target.name, found.target.architectures) == ("somebody/tiny-target", ("LlamaForCausalLM",))
    assert any("SpecForge" in note for note in found.notes)


def test_speculators_without_the_field_whose_default_differs(tmp_path: Path) -> None:
    weights = {**layered(eagle3_tensors(norm_before_fc=True)), **MAPS}
    folder = publish(tmp_path / "a", speculators_config(norm_before_residual="absent"), weights)
    with pytest.raises(UserError, match="norm_before_residual is missing"):
        import_checkpoint(folder)
    assert import_checkpoint(folder, overrides={"norm_before_residual": True}).config["norm_before_residual"] is True


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"speculators_model_type": "dflash"}, "dflash"),
        (
            {"transformer_layer_config": {**speculators_config()["transformer_layer_config"], "num_hidden_layers": 2}},
            "2",
        ),
        (
            {
                "transformer_layer_config": {
                    **speculators_config()["transformer_layer_config"],
                    "layer_types": ["sliding_attention"],
                }
            },
            "sliding window",
        ),
    ],
)
def test_speculators_that_are_not_ours_to_run(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    weights = {**layered(eagle3_tensors(norm_before_fc=True)), **MAPS}
    with pytest.raises(UserError, match=named):
        import_checkpoint(publish(tmp_path / "a", speculators_config(**changes), weights))


def test_a_qwen3_layer_is_refused_by_its_norms(tmp_path: Path) -> None:
    stored = {**layered(eagle3_tensors(norm_before_fc=True)), **MAPS, "layers.0.self_attn.q_norm.weight": torch.ones(4)}
    with pytest.raises(UserError, match="query and key norms"):
        import_checkpoint(publish(tmp_path / "a", speculators_config(), stored))


def test_early_names_of_the_norms(tmp_path: Path) -> None:
    weights = eagle3_tensors(fc_norm=True)
    early = {"fc_norm.0": "aux_norm_low", "fc_norm.1": "aux_norm_mid", "fc_norm.2": "aux_norm_high"}
    stored = {}
    for name, tensor in weights.items():
        for ours, theirs in early.items():
            name = name.replace(ours, theirs)
        stored[name] = tensor
    c = {**EAGLE_CONFIG, "draft_vocab_size": VD, "use_aux_norm": True}
    found = import_checkpoint(publish(tmp_path / "a", c, {**stored, **MAPS}), card())
    assert found.config["fc_norm"] is True
    assert_weights(found.tensors, weights)


def test_a_head_that_borrows_its_targets_lm_head(tmp_path: Path) -> None:
    weights = eagle3_tensors(draft_vocab_size=V)
    lent = weights.pop("lm_head.weight")
    folder = publish(tmp_path / "a", {**EAGLE_CONFIG, "draft_vocab_size": None}, weights)
    with pytest.raises(UserError, match="lm_head.weight is not stored"):
        import_checkpoint(folder, card())
    found = import_checkpoint(folder, card(), lm_head=lent)
    assert found.vocab.is_identity
    assert torch.equal(found.tensors["lm_head.weight"], lent)


def test_pickled_weights_are_refused_with_advice(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a", EAGLE_CONFIG, {"x": torch.zeros(1)})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle.*weights_only=True"):
        import_checkpoint(folder)


def test_the_advice_converts(tmp_path: Path) -> None:
    """The command in the error is run as it stands, in the folder, by this Python."""
    import shlex
    import subprocess
    import sys

    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weight = torch.arange(6.0).reshape(2, 3)
    # Stands for a download: the test needs a pickle without this package writing one.
    script = "import torch; torch.save({'w': torch.arange(6.0).reshape(3, 2).t().contiguous()}, 'pytorch_model.bin')"
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    with pytest.raises(UserError) as told:
        recognise(folder)
    words = shlex.split(str(told.value).split("e.g. ")[1].split(", then run")[0])
    subprocess.run([sys.executable, *words[1:]], cwd=folder, check=True)
    (folder / "pytorch_model.bin").unlink()
    assert load_file(folder / "model.safetensors")["w"].shape == weight.shape


def test_sharded_weights(tmp_path: Path) -> None:
    weights = {**eagle3_tensors(), **MAPS}
    folder = publish(tmp_path / "a", {**EAGLE_CONFIG, "draft_vocab_size": VD}, weights)
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"stray": torch.zeros(1)}, folder / "consolidated.safetensors")
    found = import_checkpoint(folder, card())
    assert_weights(found.tensors, eagle3_tensors())
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match="model-2.safetensors, which is missing"):
        import_checkpoint(folder, card())


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ({"0.0.linear.weight": torch.zeros(2, 2)}, "not recognised"),  # Medusa
        ({"fc.weight": torch.zeros(H, 4 * H)}, "not recognised"),
    ],
)
def test_what_is_none_of_these(stored: dict[str, Tensor], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        recognise(publish(tmp_path / "a", EAGLE_CONFIG, stored))


def test_a_whole_model_is_not_a_head(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a", EAGLE_CONFIG, {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)})
    assert recognise(folder) == "standalone"
    with pytest.raises(UserError, match="standalone draft"):
        import_checkpoint(folder)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        recognise(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        recognise(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        recognise(tmp_path / "empty")


def test_another_targets_head_and_a_broken_map_are_refused(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a", {**EAGLE_CONFIG, "draft_vocab_size": VD}, {**eagle3_tensors(), **MAPS})
    with pytest.raises(UserError, match="made for another target"):
        import_checkpoint(folder, card(hidden_size=2 * H))
    other = publish(
        tmp_path / "b",
        {**EAGLE_CONFIG, "draft_vocab_size": VD},
        {**eagle3_tensors(), "d2t": MAPS["d2t"].flip(0)},
    )
    with pytest.raises(UserError, match="d2t"):
        import_checkpoint(other, card())
    missing = publish(tmp_path / "c", {**EAGLE_CONFIG, "draft_vocab_size": VD}, eagle3_tensors())
    with pytest.raises(UserError, match="d2t is missing"):
        import_checkpoint(missing, card())


def test_another_rope_is_kept_and_told(tmp_path: Path) -> None:
    folder = publish(tmp_path / "a", {**EAGLE_CONFIG, "draft_vocab_size": VD}, {**eagle3_tensors(), **MAPS})
    found = import_checkpoint(folder, card())
    assert found.config["rope_theta"] == 10000.0
    assert any("keeps it" in note for note in found.notes)


def test_an_import_fits_the_drafters_options(tmp_path: Path) -> None:
    """What an import gives is what `Eagle3Options` takes, field by field."""
    from draftsmith.drafters.eagle3 import Eagle3Options

    before = head()
    found = import_checkpoint(export(before, "vllm", tmp_path / "out").folder, replace(before.target))
    options = Eagle3Options(**found.config)
    assert options.auxiliary_layers == (1, 3, 6)
    assert options.head_dim == 6
