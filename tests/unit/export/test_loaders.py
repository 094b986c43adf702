"""The servers' published loading rules, replayed key by key over our folders: every parameter filled once, nothing
dropped.

Rules as read in SGLang 0.5.23 (srt/models/llama_eagle3.py, llama_eagle.py,
model_runner_components/spec_aux_hidden_state.py), vLLM 0.32.0 (model_executor/models/llama_eagle3.py, llama_eagle.py,
v1/worker/gpu_model_runner.py, v1/worker/gpu/spec_decode/eagle/eagle3_utils.py,
transformers_utils/configs/{eagle,speculators}) and llama.cpp's converter.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from draftsmith.export.hand_over import export
from draftsmith.export.validate import check
from draftsmith.foundation.errors import UserError
from tests.unit.export.heads import BOUNDARIES, LAYERS, VD, H, V, card, head, vocabulary

STACKED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")} | {
    "gate_proj": ("gate_up_proj", "0"),
    "up_proj": ("gate_up_proj", "1"),
}


def parameters(config: dict[str, Any], kind: str, *, fc_bias: bool) -> dict[str, tuple[int, ...]]:
    """What both servers' modules hold for a configuration, stacked projections as one parameter a shard."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    rows = {"q": heads * config["head_dim"], "k": config["num_key_value_heads"] * config["head_dim"]}
    rows |= {"v": rows["k"], "0": config["intermediate_size"], "1": config["intermediate_size"]}
    into = 2 * width if kind == "eagle3" else width
    layer = "model.layers.0."
    out: dict[str, tuple[int, ...]] = {
        f"{layer}self_attn.qkv_proj.weight[{shard}]": (rows[shard], into) for shard in "qkv"
    }
    out |= {f"{layer}mlp.gate_up_proj.weight[{shard}]": (rows[shard], width) for shard in "01"}
    out |= {
        f"{layer}self_attn.o_proj.weight": (width, rows["q"]),
        f"{layer}mlp.down_proj.weight": (width, config["intermediate_size"]),
        f"{layer}post_attention_layernorm.weight": (width,),
    }
    if fc_bias:
        out["model.fc.bias"] = (width,)
    if kind == "eagle":
        return {**out, "model.fc.weight": (width, 2 * width)}
    count = config["num_aux_hidden_states"]
    out |= {
        "model.fc.weight": (width, count * config.get("target_hidden_size", width)),
        f"{layer}input_layernorm.weight": (width,),
        f"{layer}hidden_norm.weight": (width,),
        "model.norm.weight": (width,),
        "lm_head.weight": (config["draft_vocab_size"], width),
    }
    if config.get("norm_before_fc"):
        out["model.input_norm.weight"] = (count * width,)
    if config.get("fc_norm"):
        out |= {f"model.fc_norm.{i}.weight": (width,) for i in range(count)}
    return out


def stack(name: str) -> str:
    for theirs, (stacked, shard) in STACKED.items():
        if f".{theirs}." in name:
            return name.replace(theirs, stacked) + f"[{shard}]"
    return name


def sglang_loads(config: dict[str, Any], stored: dict[str, Tensor]) -> tuple[set[str], list[str], Tensor | None]:
    """Parameters filled, names dropped, and the target ids of the draft vocabulary."""
    kind = "eagle3" if config["architectures"] == ["LlamaForCausalLMEagle3"] else "eagle"
    assert config["architectures"] in (["LlamaForCausalLMEagle3"], ["LlamaForCausalLMEagle"])  # its EntryClass
    assert config["tie_word_embeddings"] is False
    wanted = parameters(config, kind, fc_bias=kind == "eagle" or config.get("bias", False))
    if kind == "eagle":
        # either gives the attention biases
        assert not config["attention_bias"]
        assert not config.get("bias")
    filled: set[str] = set()
    dropped: list[str] = []
    hot: Tensor | None = None
    for name, tensor in stored.items():
        if kind == "eagle":
            if "lm_head" in name:
                dropped.append(name)
                continue
            place = stack("model." + name)
        else:
            renamed = name.replace("midlayer", "layers.0")
            if "d2t" in renamed:
                hot = tensor + torch.arange(tensor.shape[0])
                continue
            if "t2d" in renamed:
                continue
            place = stack(renamed) if stack(renamed) in wanted else stack("model." + renamed)
        if place not in wanted:
            dropped.append(name)
            continue
        assert tuple(tensor.shape) == wanted[place], name
        assert place not in filled, name
        filled.add(place)
    return wanted.keys() - filled, dropped, hot


def vllm_loads(config: dict[str, Any], stored: dict[str, Tensor], vocab_size: int) -> tuple[set[str], Tensor | None]:
    """Parameters left empty, and the target ids of the draft vocabulary. An unknown name is an error there."""
    architecture = config["architectures"][0]
    kind = "eagle3" if "Eagle3" in architecture else "eagle"
    if kind == "eagle":  # EAGLEConfig prepends Eagle unless the name starts so
        architecture = architecture if architecture.startswith("Eagle") else f"Eagle{architecture}"
    known = {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "EagleLlamaForCausalLM"}
    assert architecture in known
    assert config["hidden_act"] == "silu"
    wanted = parameters(config, kind, fc_bias=False)
    filled: set[str] = set()
    hot: Tensor | None = None
    for name, tensor in stored.items():
        if kind == "eagle3" and "t2d" in name:
            continue
        if kind == "eagle3" and "d2t" in name:
            assert config["draft_vocab_size"] != vocab_size  # there is no such parameter otherwise
            assert (tensor.dtype, tuple(tensor.shape)) == (torch.int64, (config["draft_vocab_size"],))
            hot = tensor + torch.arange(tensor.shape[0])
            continue
        renamed = name if "lm_head" in name else "model." + name
        place = stack(renamed.replace("midlayer.", "layers.0."))
        assert place in wanted, f"vLLM would refuse {name}"
        assert tuple(tensor.shape) == wanted[place], name
        filled.add(place)
    return wanted.keys() - filled, hot


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


PORTABLE: list[dict[str, Any]] = [{}, {"draft_vocab_size": V}, {"norm_before_fc": True, "norm_output": True}]


@pytest.mark.parametrize("changes", [*PORTABLE, {"fc_norm": True}], ids=str)
@pytest.mark.parametrize("server", ["vllm", "sglang"])
def test_both_servers_load_either_eagle3_folder_whole(server: str, changes: dict[str, Any], tmp_path: Path) -> None:
    config, stored = read(export(head(**changes), server, tmp_path / "out").folder)
    wanted = None if config["draft_vocab_size"] == V else vocabulary().target_ids
    for missing, dropped, hot in (
        sglang_loads(config, stored),
        (*vllm_loads(config, stored, V)[:1], [], vllm_loads(config, stored, V)[1]),
    ):
        assert missing == set()
        assert dropped == []
        assert (hot is None) == (wanted is None)
        assert wanted is None or torch.equal(hot, wanted)


def test_each_server_loads_its_eagle_folder_whole(tmp_path: Path) -> None:
    config, stored = read(export(head("eagle"), "vllm", tmp_path / "vl").folder)
    assert vllm_loads(config, stored, V) == (set(), None)
    config, stored = read(export(head("eagle"), "sglang", tmp_path / "sg").folder)
    assert sglang_loads(config, stored) == (set(), [], None)


def test_the_replay_sees_what_it_is_there_for(tmp_path: Path) -> None:
    """Neither folder serves the other server, and a missing norm is a missing parameter: the replay can fail."""
    config, stored = read(export(head("eagle"), "vllm", tmp_path / "vl").folder)
    with pytest.raises(AssertionError):
        sglang_loads(config, stored)
    assert sglang_loads({**config, "architectures": ["LlamaForCausalLMEagle"]}, stored)[0] == {"model.fc.bias"}
    config, stored = read(export(head("eagle"), "sglang", tmp_path / "sg").folder)
    with pytest.raises(AssertionError):
        vllm_loads(config, stored, V)
    config, stored = read(export(head(), "sglang", tmp_path / "e3").folder)
    del stored["norm.weight"]
    assert sglang_loads(config, stored)[0] == {"model.norm.weight"}
    stored["midlayer.self_attn.q_proj.bias"] = torch.zeros(24)
    assert sglang_loads(config, stored)[1] == ["midlayer.self_attn.q_proj.bias"]


def sglang_layers(config: dict[str, Any], layers: int) -> list[int]:
    try:
        given = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    except (KeyError, TypeError):
        return [2, layers // 2, layers - 3]
    return [k + 1 for k in given]


def vllm_layers(config: dict[str, Any], layers: int, runner: int) -> list[int]:
    top, nested = config.get("eagle_aux_hidden_state_layer_ids"), config.get("eagle_config") or {}
    given = top or nested.get({1: "eagle_aux_hidden_state_layer_ids", 2: "layer_ids"}[runner])
    return sorted(set(given)) if given else [2, layers // 2, layers - 3]


def llama_cpp_layers(config: dict[str, Any], layers: int) -> list[int]:
    return config.get("eagle_aux_hidden_state_layer_ids") or [2, layers // 2, layers - 3]


@pytest.mark.parametrize("boundaries", [BOUNDARIES, (2, 4, 5), (2, 3, 4), (0, 1, 7)])
def test_all_servers_capture_the_layers_that_the_head_was_trained_on(
    boundaries: tuple[int, ...], tmp_path: Path
) -> None:
    for server in ("vllm", "sglang", "gguf"):
        config, _ = read(export(head(auxiliary_layers=boundaries), server, tmp_path / server).folder)
        found = [sglang_layers(config, LAYERS), llama_cpp_layers(config, LAYERS)]
        found += [vllm_layers(config, LAYERS, runner) for runner in (1, 2)]
        assert found == [list(boundaries)] * 4


@pytest.mark.parametrize("boundaries", [(2, 4, 5), (3, 4, 6)])
def test_sglangs_deepseek_rule_is_met(boundaries: tuple[int, ...], tmp_path: Path) -> None:
    """For these targets SGLang adds one only where the first id is 1."""
    before = head(auxiliary_layers=boundaries)
    target = card(architectures=("DeepseekV3ForCausalLM",))
    config, _ = read(export(replace(before, target=target), "sglang", tmp_path / "out").folder)
    nested = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert ([k + 1 for k in nested] if nested[0] == 1 else nested) == list(boundaries)
    assert vllm_layers(config, LAYERS, 1) == list(boundaries)
    assert check(tmp_path / "out", target) == []


def test_what_sglangs_deepseek_rule_can_not_express_is_refused(tmp_path: Path) -> None:
    target = card(architectures=("DeepseekV3ForCausalLM",))
    with pytest.raises(UserError, match="boundary 1"):
        export(replace(head(auxiliary_layers=(1, 3, 6)), target=target), "sglang", tmp_path / "out")


def test_vllm_reads_the_speculators_folder(tmp_path: Path) -> None:
    config, stored = read(export(head(), "speculators", tmp_path / "out").folder)
    # validate_speculators_config, build_vllm_speculative_config
    method = config["speculators_config"]["proposal_methods"][0]
    assert method["speculative_tokens"] == 3
    assert config["speculators_config"]["verifier"]["name_or_path"] == "somebody/tiny-target"
    assert config["speculators_model_type"] == "eagle3"
    # extract_transformers_pre_trained_config with update_eagle3
    layer = dict(config["transformer_layer_config"])
    assert {"llama": "Eagle3LlamaForCausalLM"}[layer["model_type"]]
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        assert isinstance(config[name], bool)
        layer[name] = config[name]
    layer |= {"architectures": ["Eagle3LlamaForCausalLM"], "draft_vocab_size": config["draft_vocab_size"]}
    layer["eagle_aux_hidden_state_layer_ids"] = config["eagle_aux_hidden_state_layer_ids"]
    assert vllm_layers(layer, LAYERS, 1) == vllm_layers(layer, LAYERS, 2) == list(BOUNDARIES)
    missing, hot = vllm_loads({**layer, "num_aux_hidden_states": 3}, stored, V)
    assert missing == set()
    assert hot is not None
    assert torch.equal(hot, vocabulary().target_ids)
    assert all(not name.startswith("midlayer") for name in stored)
    assert stored["lm_head.weight"].shape == (VD, H)
    assert torch.equal(stored["t2d"], vocabulary().t2d)
