"""Standalone drafts: observing and expanding equal full passes, packed training rows equal each text alone, and the
engine writes the target's own text in as few passes as transformers' assisted generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters import checkpoint, standalone
from draftsmith.drafters.base import Frontier
from draftsmith.drafters.standalone import Standalone
from draftsmith.foundation import artefacts
from draftsmith.foundation.errors import UserError
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.tiny import KINDS, VOCAB, prompts, tiny_draft, tiny_target


def full_pass(draft: Standalone, text: list[int]) -> Tensor:
    """transformers' own log probabilities `[Vd]` of what follows a text."""
    with torch.no_grad():
        logits = draft.model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
    return logits[draft.vocab.target_ids].log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduced", [False, True])
def test_proposals_equal_full_passes(kind: str, reduced: bool) -> None:
    """Two rounds of a tree three deep in a batch of uneven texts; the windows of sliding layers are 6 positions."""
    vocab = VocabMap(torch.arange(0, VOCAB, 2), VOCAB) if reduced else VocabMap.identity(VOCAB)
    draft = tiny_draft(kind, 5, vocab).eval()
    texts = prompts(3, seed=8)
    state = draft.start(3, 8)
    width = max(map(len, texts))
    tokens = torch.tensor([t + [0] * (width - len(t)) for t in texts])
    found = draft.observe(state, tokens, None, [len(t) for t in texts]).log_q
    for turn in range(2):
        for b, text in enumerate(texts):
            torch.testing.assert_close(found[b, 0], full_pass(draft, text), atol=1e-4, rtol=1e-4)
        #  nodes: 0 and 1 below the root, 2 below 1 and 3 below 0, 4 below 2
        levels = [([-1, -1], [[]] * 2), ([1, 0], [[1], [0]]), ([2], [[1, 2]])]
        drafted: list[list[int]] = [[] for _ in texts]
        for depth, (parents, above) in enumerate(levels, start=1):
            fresh = torch.tensor(
                [[10 + (7 * b + 11 * depth + 5 * i) % 80 for i in range(len(parents))] for b in range(3)]
            )
            log_q = draft.expand(state, Frontier(fresh, torch.tensor([parents] * 3), depth)).log_q
            for b, text in enumerate(texts):
                for i, path in enumerate(above):
                    whole = [*text, *(drafted[b][n] for n in path), int(fresh[b, i])]
                    torch.testing.assert_close(log_q[b, i], full_pass(draft, whole), atol=1e-4, rtol=1e-4)
                drafted[b] += fresh[b].tolist()
        # the rounds commit different numbers of tokens, the second sequence none in the second round
        counts = [2, 1, 3] if turn == 0 else [1, 0, 2]
        committed = torch.tensor([[20 + 3 * b + turn + i for i in range(3)] for b in range(3)])
        before = found
        found = draft.observe(state, committed, None, counts).log_q
        for b, n in enumerate(counts):
            texts[b] = texts[b] + committed[b, :n].tolist()
        if turn == 1:
            torch.testing.assert_close(found[1], full_pass(draft, texts[1])[None], atol=1e-4, rtol=1e-4)
            assert not torch.equal(found[0], before[0])


def test_a_long_prompt_is_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = tiny_draft("mistral", 4).eval()
    texts = prompts(2, seed=5, low=9, high=14)
    width = max(map(len, texts))
    tokens = torch.tensor([t + [0] * (width - len(t)) for t in texts])
    monkeypatch.setattr(standalone, "MAX_ROWS", 4)
    found = draft.observe(draft.start(2, 4), tokens, None, [len(t) for t in texts]).log_q
    for b, text in enumerate(texts):
        torch.testing.assert_close(found[b, 0], full_pass(draft, text), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_texts_equal_each_alone(kind: str) -> None:
    draft = tiny_draft(kind, 4)
    texts = prompts(4, seed=3, low=7, high=13)
    rows = [texts[:2], texts[2:]]
    width = max(sum(map(len, row)) for row in rows)
    ids = torch.zeros((2, width), dtype=torch.int64)
    segments, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    places = []
    for r, row in enumerate(rows):
        start = 0
        for text in row:
            span = slice(start, start + len(text))
            ids[r, span], positions[r, span] = torch.tensor(text), torch.arange(len(text))
            segments[r, span] = len(places)
            places.append((r, span, text))
            start = span.stop
    found = draft.states(ids, segments, positions)
    assert found.isfinite().all()
    for r, span, text in places:
        alone = draft.model.base_model(input_ids=torch.tensor([text]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(found[r, span], alone, atol=2e-5, rtol=1e-5)


def assisted(draft: Standalone, target: Any, prompt: list[int], new: int, depth: int) -> tuple[list[int], int]:
    """transformers' assisted generation: the text, and how often the target's forward was called."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    config = draft.model.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = depth, "constant"
    config.assistant_confidence_threshold = 0.0
    handle = target.model.register_forward_hook(count)
    ids = torch.tensor([prompt])
    try:
        out = target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=draft.model,
            do_sample=False,
            max_new_tokens=new,
        )
    finally:
        handle.remove()
    return out[0, len(prompt) :].tolist(), passes


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("depth", [1, 3])
def test_target_passes_are_those_of_assisted_generation(kind: str, depth: int) -> None:
    target = tiny_target(kind)
    draft = tiny_draft(kind, 6).eval()
    accepted = 0
    for prompt in prompts(6, seed=17):
        text, passes = assisted(draft, target, prompt, 40, depth)
        ours = Engine(target, Single(draft, ChainGrowth(depth))).generate([prompt], Sampling(), 40)[0]
        assert ours.token_ids == text
        # their first pass verifies a draft as well; ours only reads the prompt
        assert abs(len(ours.rounds) - passes) <= 1
        accepted += sum(r.accepted for r in ours.rounds)
    assert accepted > 20


def test_tied_embeddings_stay_tied_and_one_copy_is_saved(tmp_path: Path) -> None:
    """After a step of training, in the deployed copy and on disk; the saved folder is a plain transformers model."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    draft = tiny_draft("llama", 3).train().requires_grad_(True)
    ids = torch.tensor(prompts(1, seed=2, low=9, high=9))
    states = draft.states(ids, torch.zeros_like(ids), torch.arange(9)[None])
    (states @ draft.output_rows().T).logsumexp(-1).sum().backward()
    embedding = draft.model.get_input_embeddings().weight
    assert embedding.grad is not None
    with torch.no_grad():
        embedding -= 0.01 * embedding.grad
    draft.write_folder(tmp_path / "model", {})
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    twin = copy.deepcopy(draft)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for model in (draft.model, twin.model, read):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert read.config.num_hidden_layers == 3
    assert read.generation_config.num_assistant_tokens_schedule == "constant"


def test_a_draft_is_saved_in_the_targets_format_with_the_weights_given(tmp_path: Path) -> None:
    vocab = VocabMap(torch.arange(0, VOCAB, 3), VOCAB)
    draft = tiny_draft("llama", 3, vocab)
    draft.options = draft.options.model_copy(update={"dtype": "bfloat16"})
    name, parameter = next((n, p) for n, p in draft.named_parameters() if n.endswith("q_proj.weight"))
    before = parameter.detach().clone()
    target = tiny_target("llama")
    identity = checkpoint.identity(draft, target.spec.fingerprint)
    with artefacts.writing(tmp_path / "drafter", checkpoint.KIND, identity) as scratch:
        checkpoint.write(draft, scratch, {name: before + 1})
    assert torch.equal(parameter, before)
    found = checkpoint.load_drafter(tmp_path / "drafter", target, torch.bfloat16)
    assert isinstance(found, Standalone)
    assert found.options == draft.options
    assert found.vocab.digest == vocab.digest
    assert torch.equal(dict(found.named_parameters())[name], (before + 1).bfloat16())
    assert not any(p.requires_grad for p in found.parameters())


def test_rotary_frequencies_are_not_rounded_with_the_weights() -> None:
    draft = tiny_draft("llama", 3).eval()
    exact = {name: buffer.clone() for name, buffer in draft.named_buffers()}
    assert any("inv_freq" in name for name in exact)
    for name, buffer in copy.deepcopy(draft).to(torch.bfloat16).named_buffers():
        assert torch.equal(buffer, exact[name])


def test_the_head_slice_follows_the_weights() -> None:
    vocab = VocabMap(torch.arange(0, VOCAB, 3), VOCAB)
    draft = tiny_draft("llama", 3, vocab).eval()
    tokens = torch.tensor(prompts(1, seed=4))
    for _ in range(2):
        found = draft.observe(draft.start(1, 30), tokens, None, [tokens.shape[1]]).log_q[0, 0]
        torch.testing.assert_close(found, full_pass(draft, tokens[0].tolist()), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            draft.model.get_output_embeddings().weight.mul_(1.5)


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    tiny_draft("llama", 2).write_folder(tmp_path / "model", {})
    assert standalone.load_model(tmp_path / "model", VOCAB, torch.float32).config.num_hidden_layers == 2
    with pytest.raises(UserError, match="tokenizer"):
        standalone.load_model(tmp_path / "model", VOCAB + 1, torch.float32)
    with pytest.raises(UserError, match="not loadable"):
        standalone.load_model(tmp_path, VOCAB, torch.float32)
