"""Speculative text with a standalone draft, cache, masks and all, equals plain text token for token."""

from __future__ import annotations

import pytest
import torch

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import ChainGrowth
from draftsmith.drafters.truncation import StandaloneOptions, made
from draftsmith.target.model import load_target
from draftsmith.target.sampling import Sampling
from draftsmith.target.vocabulary import VocabMap
from tests.exactness.checks import GROWTHS, NEW
from tests.tiny import KINDS, VOCAB, prompts, tiny_draft, tiny_target
from tests.unit.drafters.test_standalone import assisted

THIRDS = VocabMap(torch.arange(VOCAB)[torch.arange(VOCAB) % 3 != 1], VOCAB)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("growth", ["chain-4", "tree-15"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculative_equals_plain(kind: str, growth: str, batch: int, temperature: float) -> None:
    target = tiny_target(kind)
    draft = tiny_draft(kind, 6, THIRDS if growth == "tree-15" else None).eval()
    accepted = 0
    for seed in range(2):
        asked = prompts(batch, seed=50 + seed)
        sampling = Sampling(temperature=temperature, seed=seed, suppress_tokens=(7,))
        plain = Engine(target).generate(asked, sampling, NEW)
        found = Engine(target, Single(draft, GROWTHS[growth])).generate(asked, sampling, NEW)
        assert [g.token_ids for g in found] == [g.token_ids for g in plain]
        accepted += sum(r.accepted for g in found for r in g.rounds)
    assert accepted > 2 * batch, "next to nothing was accepted: nothing was tested"


def test_a_batch_drafts_what_each_sequence_would_alone() -> None:
    target, draft = tiny_target("gemma3"), tiny_draft("gemma3", 6).eval()
    asked = prompts(4, seed=77)
    engine = Engine(target, Single(draft, GROWTHS["tree-15"]))
    together = engine.generate(asked, Sampling(), [NEW, 5, NEW, 11])
    for i, prompt in enumerate(asked):
        alone = engine.generate([prompt], Sampling(), [NEW, 5, NEW, 11][i], requests=[i])[0]
        assert [(r.nodes, r.accepted) for r in alone.rounds] == [(r.nodes, r.accepted) for r in together[i].rounds]
    assert any(r.accepted >= 3 for g in together for r in g.rounds)


@pytest.mark.slow
def test_passes_on_the_real_model_are_those_of_assisted_generation() -> None:
    """SmolLM2 in float32 with all but two of its layers as its draft: untrained, but right often enough to test."""
    target = load_target("smollm2", dtype="float32", device="cpu")
    layers = tuple(i for i in range(target.spec.layers) if i not in (21, 24))
    vocab = VocabMap.identity(target.spec.vocab_size)
    draft = made(target, vocab, StandaloneOptions(keep_layers=layers), []).eval()
    accepted = 0
    for question in ("What is 17 + 25?", "Name three fruits.", "Why is the sky blue?"):
        messages = [{"role": "user", "content": question}]
        prompt = target.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        text, passes = assisted(draft, target, prompt, 40, 4)
        ours = Engine(target, Single(draft, ChainGrowth(4))).generate([prompt], Sampling(), 40)[0]
        assert ours.token_ids == text
        assert abs(len(ours.rounds) - passes) <= 1
        accepted += sum(r.accepted for r in ours.rounds)
    assert accepted > 20
