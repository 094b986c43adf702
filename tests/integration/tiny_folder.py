"""A tiny random target as a transformers folder, and a recipe that takes seconds on it, for the real command line.

draftsmith quickstart --run TMP/run --recipe TMP/recipe.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml

from draftsmith.foundation import seeding
from tests.unit.target.tokenizers_for_tests import CHATML

VOCAB = 104
SPECIAL = ("<unk>", "<|im_start|>", "<|im_end|>")
END = "<|im_end|>"

RECIPE: dict[str, dict[str, object]] = {
    "target": {"dtype": "float32", "device": "cpu"},
    "data": {"train": 6, "dev": 2, "test": 2},
    "regenerate": {"max_new_tokens": 12, "batch": 4},
    "features": {"batch_positions": 1024},
    "drafter": {"draft_vocab_size": 64},
    "train": {
        "steps": 6,
        "row_length": 64,
        "batch_positions": 128,
        "unroll_steps": 3,
        "evaluations": 3,
        "precision": "float32",
    },
    "tune": {"growths": [{"node_budget": 3, "depth": 2, "width": 2}, {"node_budget": 5, "depth": 3, "width": 2}]},
    "bench": {"prompts": 2, "max_new_tokens": 8},
}


def tokenizer(template: str | None = CHATML) -> object:
    """One token for each printable ASCII character and the line break; anything else is `<unk>`."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {text: i for i, text in enumerate((*SPECIAL, *characters))}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, unk_token="<unk>", pad_token=END)
    fast.chat_template = template
    return fast


def write_target(folder: Path, seed: int = 0, template: str | None = CHATML, positions: int = 1024) -> Path:
    """Write a random Llama (8 layers, hidden 32) with its tokenizer; equal arguments give equal bytes.

    `<|im_end|>` is likelier than other tokens, so that some answers end and some are cut.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    made = tokenizer(template)
    end = made.convert_tokens_to_ids(END)  # type: ignore[attr-defined]
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=positions,
        eos_token_id=end,
        bos_token_id=None,
        pad_token_id=end,
        tie_word_embeddings=False,
        initializer_range=0.25,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key("tiny folder", seed) % 2**31)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight[end] *= 6
    model.generation_config.eos_token_id = end
    model.save_pretrained(folder)
    made.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def write_recipe(path: Path, target: Path, **parts: dict[str, object]) -> Path:
    """Write `RECIPE` for a target; `parts` replace options, by group."""
    recipe = {name: {**values, **parts.get(name, {})} for name, values in RECIPE.items()}
    recipe |= {name: values for name, values in parts.items() if name not in RECIPE}
    recipe["target"] = {"name": str(target), **recipe["target"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_recipe(root / "recipe.yaml", write_target(root / "target"))
