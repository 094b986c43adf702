"""One form of RoPE for the many in which configurations state it; target cards from configurations."""

from __future__ import annotations

import pytest

from draftsmith.export.checkpoint import TargetCard, rope_parameters, split_rope
from draftsmith.foundation.errors import UserError
from tests.unit.export.heads import LLAMA3_ROPE

PLAIN = {"rope_theta": 5e5, "rope_type": "default"}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({}, {"rope_theta": 10000.0, "rope_type": "default"}),
        ({"rope_theta": None, "rope_scaling": None}, {"rope_theta": 10000.0, "rope_type": "default"}),
        ({"rope_theta": 500000}, PLAIN),
        ({"rope_theta": 5e5, "rope_scaling": None}, PLAIN),
        ({"rope_parameters": PLAIN}, PLAIN),
        # transformers 5 keeps the truth in rope_parameters; the older field may be a class default
        ({"rope_theta": 1e4, "rope_parameters": PLAIN}, PLAIN),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, {"rope_theta": 5e5, **LLAMA3_ROPE}),
        ({"rope_scaling": {**LLAMA3_ROPE, "rope_theta": 5e5}}, {"rope_theta": 5e5, **LLAMA3_ROPE}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {**PLAIN, "rope_type": "linear", "factor": 2.0},
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": PLAIN}},
            PLAIN,
        ),
    ],
)
def test_rope_parameters(config: dict[str, object], wanted: dict[str, object]) -> None:
    found = rope_parameters(config)
    assert found == wanted
    theta, scaling = split_rope(found)
    assert rope_parameters({"rope_theta": theta, "rope_scaling": scaling}) == wanted
    assert (scaling is None) == (wanted["rope_type"] == "default")


def test_a_card_from_a_configuration() -> None:
    layers = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_hidden_layers": 8,
        "max_position_embeddings": 512,
        "rope_theta": 5e5,
    }
    text = TargetCard.from_config({**layers, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}, name="t")
    assert (text.architectures, text.model_type, text.rope) == (("LlamaForCausalLM",), "llama", PLAIN)
    assert (text.layers, text.max_positions, text.default_layers) == (8, 512, (2, 4, 5))
    seeing = TargetCard.from_config({"architectures": ["SeeingModel"], "text_config": layers}, name="t")
    assert (seeing.layers, seeing.architectures) == (8, ("SeeingModel",))
    with pytest.raises(UserError, match="no hidden_size"):
        TargetCard.from_config({"vocab_size": 40}, name="t")
