"""The card says what is known, what is not, and how to serve; standalone drafts are copied whole."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from draftsmith.export.checkpoint import Extras, Serving, StandaloneDraft
from draftsmith.export.hand_over import export
from draftsmith.export.validate import check
from draftsmith.foundation.errors import UserError
from tests.unit.export.heads import V, card, edit, head

FACTS = {
    "data": {"prompts": "200 word problems", "answers": "the target's own, greedy"},
    "training_cost": {"seconds": 312.5, "target passes": 2},
    "acceptance": [
        {"set": "word-problems", "temperature": 0.0, "acceptance length": 2.1234},
        {"set": "chat", "temperature": 0.0, "acceptance length": 1.8, "by depth": [0.6, 0.4]},
    ],
    "licence": "apache-2.0",
    "known_limits": "English only",
}


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_what_is_known_and_names_what_is_missing(tmp_path: Path) -> None:
    text = readme(export(head(), "vllm", tmp_path / "out", Extras(facts=FACTS)).folder)
    for wanted in (
        "- prompts: 200 word problems",
        "- seconds: 312.5",
        "| set | temperature | acceptance length | by depth |",
        "| word-problems | 0 | 2.123 | not recorded |",
        "| chat | 0 | 1.8 | [0.6, 0.4] |",
        "## Known limits\n\nEnglish only",
        "## Training\n\nnot recorded",
        "- weights' fingerprint: 0123456789abcdef",
        "- quantisation: not recorded",
        "- this drafter: apache-2.0",
        "- target: apache-2.0",
        "- training data: not recorded",
        "inputs of the target's layers 1, 3, 6",
        "12 of 40 tokens",
        'license: "apache-2.0"',
        'base_model: "somebody/tiny-target"',
    ):
        assert wanted in text, wanted


def test_an_unknown_licence_is_not_made_up(tmp_path: Path) -> None:
    text = readme(export(head(), "sglang", tmp_path / "out").folder)
    assert "license:" not in text
    assert "- this drafter: not recorded" in text


def option(command: str, name: str) -> str:
    words = shlex.split(command)
    return words[words.index(name) + 1]


@pytest.mark.parametrize(("kind", "method"), [("eagle3", "eagle3"), ("eagle", "eagle")])
def test_the_vllm_command_names_the_method(kind: str, method: str, tmp_path: Path) -> None:
    exported = export(head(kind), "vllm", tmp_path / "my out", Extras(serving=Serving(tokens=5)))
    (command,) = exported.commands
    assert command in readme(exported.folder)
    assert shlex.split(command)[:3] == ["vllm", "serve", "somebody/tiny-target"]
    wanted = {"method": method, "model": str(tmp_path / "my out"), "num_speculative_tokens": 5}
    assert json.loads(option(command, "--speculative-config")) == wanted


@pytest.mark.parametrize(
    ("kind", "algorithm", "numbers", "steps", "top_k", "tokens"),
    [
        ("eagle3", "EAGLE3", Serving(depth=4, top_k=4, nodes=15), 4, 4, 16),
        ("eagle", "EAGLE", Serving(depth=3, top_k=8, nodes=63), 3, 8, 64),
        ("eagle3", "EAGLE3", Serving(depth=3, top_k=1, nodes=15), 3, 1, 4),
    ],
)
def test_the_sglang_command_counts_the_root(
    kind: str, algorithm: str, numbers: Serving, steps: int, top_k: int, tokens: int, tmp_path: Path
) -> None:
    (command,) = export(head(kind), "sglang", tmp_path / "out", Extras(serving=numbers)).commands
    assert option(command, "--speculative-algorithm") == algorithm
    assert option(command, "--speculative-num-steps") == str(steps)
    assert option(command, "--speculative-eagle-topk") == str(top_k)
    assert option(command, "--speculative-num-draft-tokens") == str(tokens)
    assert option(command, "--speculative-draft-model-path") == str(tmp_path / "out")
    assert option(command, "--model-path") == "somebody/tiny-target"


def test_the_speculators_folder_is_served_alone(tmp_path: Path) -> None:
    exported = export(head(), "speculators", tmp_path / "out", Extras(serving=Serving(tokens=2)))
    assert exported.commands[1] == f"vllm serve {tmp_path / 'out'}"
    assert json.loads(option(exported.commands[0], "--speculative-config"))["method"] == "eagle3"
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 2


def test_the_llama_cpp_commands(tmp_path: Path) -> None:
    convert, serve = export(head(), "gguf", tmp_path / "out").commands
    assert option(convert, "convert_hf_to_gguf.py") == str(tmp_path / "out")
    assert option(convert, "--target-model-dir") == "somebody/tiny-target"
    assert option(serve, "--spec-type") == "draft-eagle3"
    assert option(serve, "-md") == option(convert, "--outfile") == "out.gguf"


@pytest.fixture
def draft(tmp_path: Path) -> StandaloneDraft:
    """A one-layer Llama with its tokenizer's file, as `save_pretrained` leaves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=V, tie_word_embeddings=True, **shape)).save_pretrained(tmp_path / "draft")
    (tmp_path / "draft" / "tokenizer.json").write_text("{}")
    (tmp_path / "draft" / "pytorch_model.bin").write_text("left behind")
    return StandaloneDraft(tmp_path / "draft", card())


@pytest.mark.parametrize("server", ["vllm", "sglang", "transformers", "gguf"])
def test_a_standalone_draft_is_copied_bit_for_bit(draft: StandaloneDraft, server: str, tmp_path: Path) -> None:
    exported = export(draft, server, tmp_path / "out", Extras(facts=FACTS))
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (exported.folder / name).read_bytes() == (draft.folder / name).read_bytes()
    assert not (exported.folder / "pytorch_model.bin").exists()
    assert check(exported.folder, card()) == []
    text = readme(exported.folder)
    named = {"vllm": '"method": "draft_model"', "sglang": "STANDALONE", "gguf": "draft-simple"}
    assert named.get(server, "assistant_model=draft") in text
    assert all(command in text for command in exported.commands)


def test_the_transformers_snippet_is_python(draft: StandaloneDraft, tmp_path: Path) -> None:
    (snippet,) = export(draft, "transformers", tmp_path / "out").commands
    compile(snippet, "card", "exec")


def test_drafts_that_cannot_be_handed_over(draft: StandaloneDraft, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="speculators format holds heads"):
        export(draft, "speculators", tmp_path / "out")
    with pytest.raises(UserError, match="vocab_size is 40 in the draft and 41"):
        export(StandaloneDraft(draft.folder, card(vocab_size=41)), "vllm", tmp_path / "out")
    edit(draft.folder, auto_map={"AutoConfig": "x.Y"})
    with pytest.raises(UserError, match="auto_map"):
        export(draft, "vllm", tmp_path / "out")
    edit(draft.folder, auto_map=None)
    (draft.folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        export(draft, "vllm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_of_a_standalone_draft(draft: StandaloneDraft) -> None:
    (draft.folder / "tokenizer.json").unlink()
    weights = load_file(draft.folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, draft.folder / "model.safetensors")
    edit(draft.folder, tie_word_embeddings=False)
    found = check(draft.folder, card(vocab_size=V + 1))
    assert {finding.field for finding in found} == {
        "tokenizer.json",
        "model.norm.weight",
        "lm_head.weight",
        "vocab_size",
    }
