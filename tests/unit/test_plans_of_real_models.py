"""Recipes for real models, planned from their configurations alone; docs/training.md holds what comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from draftsmith import plan
from draftsmith import recipe as recipes
from draftsmith.pipeline import Run

DOCS = Path(__file__).parents[2] / "docs" / "training.md"
ATTENTION = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    **ATTENTION,
}
QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    **ATTENTION,
}
MIXTURE = {
    **QWEN,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
# parameters as their makers publish them
MODELS = {
    "llama-3.1-8b": (LLAMA, 8_030_261_248),
    "qwen3-8b": (QWEN, 8_190_735_360),
    "qwen3-8b-no-thinking": (QWEN, 8_190_735_360),
    "qwen3-30b-a3b": (MIXTURE, 30_532_122_624),
}


def planned(name: str, folder: Path) -> plan.TrainingPlan:
    """The plan of a recipe for a folder that holds a configuration and nothing else."""
    target = folder / name
    target.mkdir()
    (target / "config.json").write_text(json.dumps(MODELS[name][0]))
    return plan.training(Run(recipes.load(name, [f"target.name={target}"]), folder / "run"))


@pytest.mark.parametrize("name", MODELS)
def test_the_documented_plan(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_process_bytes", lambda: 0)
    one = planned(name, tmp_path)
    assert plan._target(str(tmp_path / name))[1] == MODELS[name][1]
    monkeypatch.setenv("WORLD_SIZE", "8")
    (tmp_path / "eight").mkdir()
    eight = planned(name, tmp_path / "eight")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.read_text().splitlines()]
    row = next(cells for cells in rows if cells and cells[0] == f"`{name}`")
    said = [float(re.sub(r"[^\d.]", "", cell)) for cell in row[1:]]
    found = [one.parameters / 1e6, one.positions / 1e6, one.steps, one.memory / 2**30, eight.memory / 2**30]
    assert said == pytest.approx([round(float(value or 0)) for value in found]), found


def test_a_head_of_llama_counted_by_hand(tmp_path: Path) -> None:
    """fc, attention over embedding and state, MLP, norms, output."""
    h, i, kv, v = 4096, 14336, 8 * 128, 32000
    expected = 3 * h * h + 2 * h * (h + 2 * kv) + h * h + 3 * h * i + 4 * h + v * h
    assert planned("llama-3.1-8b", tmp_path).parameters == expected
