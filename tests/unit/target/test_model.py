"""A transformers model as a target, against the model's own passes; what is refused; fingerprints."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.exactness.checks import verification_equals_full_passes
from tests.tiny import END, KINDS, LAYERS, NoTokenizer, prompts, tiny_target

from draftsmith.foundation.errors import UserError
from draftsmith.target import inside
from draftsmith.target import model as model_module
from draftsmith.target.model import HFTarget, fingerprint, load_target
from draftsmith.target.protocol import FeatureSpec, Rows


def packed(texts: list[list[int]]) -> torch.Tensor:
    ids = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.int64)
    for b, text in enumerate(texts):
        ids[b, : len(text)] = torch.tensor(text)
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_verified_tree_equals_full_passes(kind: str) -> None:
    verification_equals_full_passes(kind)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("rows", [1, 6, 9, 30])
def test_a_prefill_in_chunks_equals_one(kind: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tiny_target(kind)
    texts = prompts(3, seed=12, low=5, high=20)
    lengths = [len(t) for t in texts]
    want = FeatureSpec((2, 5), final=True)
    ids = packed(texts)
    tree = Rows(torch.tensor([[9, 10]] * 3), torch.tensor([[0, 1]] * 3), torch.ones(2, 2).tril().bool().expand(3, 2, 2))
    whole = target.prefill(ids, lengths, want, 40)
    after_whole = target.verify(tree, want).logits
    monkeypatch.setattr(model_module, "MAX_PREFILL_ROWS", rows)
    parts = target.prefill(ids, lengths, want, 40)
    after_parts = target.verify(tree, want).logits
    torch.testing.assert_close(parts.logits, whole.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(after_parts, after_whole, rtol=0, atol=1e-4)
    for name in want.names:
        for b, n in enumerate(lengths):
            torch.testing.assert_close(parts.hidden[name][b, :n], whole.hidden[name][b, :n], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_states_are_transformers_hidden_states(kind: str) -> None:
    """`hidden[k]` is `output_hidden_states[k]`, the input of layer k; `final` is the last one, after the norm."""
    target = tiny_target(kind)
    texts = prompts(2, seed=3)
    lengths = [len(t) for t in texts]
    want = FeatureSpec(tuple(range(LAYERS)), final=True)
    read = target.read(packed(texts), lengths, want)
    prefilled = target.prefill(packed(texts), lengths, want, 32).hidden
    for b, text in enumerate(texts):
        with torch.no_grad():
            out = target.model(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False)
        assert len(out.hidden_states) == LAYERS + 1
        for k, expected in enumerate(out.hidden_states):
            name = "final" if k == LAYERS else k
            for found in (read[name], prefilled[name]):
                torch.testing.assert_close(found[b, : len(text)], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target.project(read["final"])[b, : len(text)], out.logits[0], rtol=1e-4, atol=1e-4)


def test_only_what_is_wanted_is_kept() -> None:
    target = tiny_target("llama")
    ids = packed(prompts(1))
    assert set(target.prefill(ids, [ids.shape[1]], FeatureSpec((3,)), 32).hidden) == {3}
    assert set(target.read(ids, [ids.shape[1]], FeatureSpec())) == {"final"}


def test_what_is_read_can_be_trained_on() -> None:
    target = tiny_target("llama")
    weight = torch.ones(32, requires_grad=True)
    states = target.read(packed(prompts(1)), [3], FeatureSpec((2,)))[2]
    (states * weight).sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.abs().sum()) > 0


def test_sequences_leave_the_batch() -> None:
    target = tiny_target("qwen3")
    texts = prompts(3, seed=6)
    target.prefill(packed(texts), [len(t) for t in texts], FeatureSpec(), 32)
    target.select([2, 0])
    found = target.verify(Rows.roots(torch.tensor([9, 11])), FeatureSpec()).logits
    assert found is not None
    for row, (text, token) in enumerate(((texts[2], 9), (texts[0], 11))):
        with torch.no_grad():
            expected = target.model(input_ids=torch.tensor([[*text, token]])).logits[0, -1]
        torch.testing.assert_close(found[row, 0], expected, rtol=1e-4, atol=1e-4)


def test_the_spec_says_what_the_model_is() -> None:
    spec = tiny_target("llama").spec
    assert (spec.vocab_size, spec.hidden_size, spec.layers, spec.max_positions) == (96, 32, LAYERS, 256)
    assert (spec.eos_ids, spec.dtype, spec.name) == ((END,), "float32", "tiny-llama")


def test_all_end_ids_are_collected() -> None:
    def holder(ids: Any) -> Any:
        return SimpleNamespace(eos_token_id=ids)

    def ends(generation: Any, tokenizer: Any) -> tuple[int, ...]:
        return model_module._end_ids(SimpleNamespace(generation_config=holder(generation)), holder(tokenizer))

    assert ends([5, 3], 9) == (3, 5, 9)
    assert ends(5, 5) == (5,)
    assert ends(None, 2) == (2,)
    assert ends(None, None) == ()


def test_an_eager_model_gets_additive_masks() -> None:
    eager = copy.deepcopy(tiny_target("gemma3").model)
    eager.set_attn_implementation("eager")
    target = HFTarget(eager, NoTokenizer(), "eager")
    other = tiny_target("gemma3")
    texts = prompts(2, seed=14, low=7, high=12)
    ids, lengths = packed(texts), [len(t) for t in texts]
    found = target.prefill(ids, lengths, FeatureSpec(), 32).logits
    expected = other.prefill(ids, lengths, FeatureSpec(), 32).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def linear_attention_model() -> Any:
    import transformers

    sizes = {"hidden_size": 32, "vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "intermediate_size": 16}
    config = transformers.Qwen3NextConfig(
        **sizes, **linear, **experts, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def test_layers_that_cannot_be_rolled_back_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"some-hybrid: .*linear_attention"):
        HFTarget(linear_attention_model(), NoTokenizer(), "some-hybrid")


@pytest.mark.parametrize(
    ("kinds", "message"),
    [(["chunked_attention"], "chunked_attention"), (["mamba", "full_attention"], "mamba"), (["hybrid"], "hybrid")],
)
def test_unknown_layer_types_are_refused_by_name(kinds: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"odd: .*{message}"):
        inside.attention_windows(SimpleNamespace(layer_types=kinds, sliding_window=None), "odd")


def test_a_model_that_does_something_after_its_layers_is_refused() -> None:
    """The probe compares what is built from the layers with the model's own logits."""
    odd = copy.deepcopy(tiny_target("llama").model)
    forward = odd.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    odd.forward = doubled
    with pytest.raises(UserError, match=r"odd-one: .*logits could not be reproduced"):
        HFTarget(odd, NoTokenizer(), "odd-one")


def test_a_model_that_fails_with_our_cache_is_refused() -> None:
    odd = copy.deepcopy(tiny_target("llama").model)
    forward = odd.model.forward

    def strict(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            raise TypeError("unexpected cache")
        return forward(*args, **kwargs)

    odd.model.forward = strict
    with pytest.raises(UserError, match=r"odd-one: .*unexpected cache"):
        HFTarget(odd, NoTokenizer(), "odd-one")


def test_fingerprints_tell_models_apart_but_not_number_formats() -> None:
    prints = {kind: tiny_target(kind).spec.fingerprint for kind in KINDS}
    assert len(set(prints.values())) == len(KINDS)
    model = copy.deepcopy(tiny_target("llama").model)
    assert fingerprint(model) == prints["llama"]
    assert fingerprint(copy.deepcopy(model).double()) == prints["llama"]
    stored = copy.deepcopy(model).bfloat16()
    assert fingerprint(stored) == fingerprint(copy.deepcopy(stored).float())
    assert fingerprint(stored) != prints["llama"]
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight.mul_(1.01)
    assert fingerprint(model) != prints["llama"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_fingerprint_survives_saving_and_loading(tied: bool, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(tiny_target("llama").model.config)
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == fingerprint(model)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("./nowhere", "auto", "no such folder"),
        ("./model.gguf", "auto", "no such GGUF file"),
        (".", "auto", "no config.json"),
        (".", "float8", "float8"),
    ],
)
def test_a_target_that_is_not_there_is_refused(
    name: str, dtype: str, message: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if dtype != "auto":
        (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message):
        load_target(name, dtype)
