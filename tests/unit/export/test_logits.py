"""A head computes the same after export and import, bit for bit; the golden pass of `check` on real arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from draftsmith.drafters.base import Frontier
from draftsmith.drafters.eagle import Eagle, EagleOptions
from draftsmith.drafters.eagle3 import Eagle3, Eagle3Options
from draftsmith.export.checkpoint import Extras, Golden, HeadCheckpoint
from draftsmith.export.hand_over import export
from draftsmith.export.import_ import import_checkpoint
from draftsmith.export.validate import check
from tests.unit.export.heads import LLAMA3_ROPE, H, V, edit, head, replant

EMBEDDING = torch.randn(V, H, generator=torch.Generator().manual_seed(1))
OUTPUT = torch.randn(V, H, generator=torch.Generator().manual_seed(3))  # the target's, which EAGLE heads use


def forward(checkpoint: HeadCheckpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Log probabilities after reading tokens with features, and after two drafted tokens on one path."""
    module = built(checkpoint)
    module.load_state_dict(dict(checkpoint.tensors))
    module = module.to(checkpoint.tensors["fc.weight"].dtype)
    tokens, features = inputs["tokens"], inputs["features"]
    state = module.start(1, 32)
    out = [module.observe(state, tokens, features, [tokens.shape[1]]).log_q]
    for depth in (1, 2):
        drafted = checkpoint.vocab.to_target(out[-1][:, 0].argmax(-1))[:, None]
        out.append(module.expand(state, Frontier(drafted, torch.tensor([[depth - 2]]), depth)).log_q)
    return {"log_q": torch.cat(out, dim=1)}


def built(checkpoint: HeadCheckpoint) -> Eagle3 | Eagle:
    if checkpoint.kind == "eagle":
        options = EagleOptions(**checkpoint.config, draft_vocab_size=V)
        return Eagle(options, checkpoint.vocab, EMBEDDING, OUTPUT)
    return Eagle3(Eagle3Options(**checkpoint.config), checkpoint.vocab, EMBEDDING)


def inputs(kind: str = "eagle3") -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(2)
    return {
        "tokens": torch.randint(0, V, (1, 20), generator=draw),
        "features": torch.randn(1, 20, H if kind == "eagle" else 3 * H, generator=draw),
    }


def sensible(kind: str = "eagle3", **changes: object) -> HeadCheckpoint:
    """A head whose weights are of a size that leaves its softmax neither flat nor one-hot."""
    raw = head(kind, torch.float32, **changes)
    return replace(raw, tensors={name: tensor * 0.3 for name, tensor in raw.tensors.items()})


@pytest.mark.parametrize("server", ["vllm", "sglang", "speculators", "gguf"])
@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": V, "rope_scaling": LLAMA3_ROPE}], ids=["plain", "rope"])
def test_the_same_logits_bit_for_bit(server: str, changes: dict[str, object], tmp_path: Path) -> None:
    before = sensible(**changes)
    golden = Golden(inputs(), forward(before, inputs()))
    folder = export(before, server, tmp_path / "out", Extras(golden=golden)).folder
    after = import_checkpoint(folder, before.target)
    assert torch.equal(forward(after, inputs())["log_q"], golden.outputs["log_q"])
    assert check(folder, before.target, forward=forward) == []


@pytest.mark.parametrize(("server", "changes"), [("vllm", {}), ("sglang", {}), ("sglang", {"fc_bias": True})], ids=str)
def test_eagles_logits_bit_for_bit(server: str, changes: dict[str, object], tmp_path: Path) -> None:
    before = sensible("eagle", **changes)
    golden = Golden(inputs("eagle"), forward(before, inputs("eagle")))
    folder = export(before, server, tmp_path / "out", Extras(golden=golden)).folder
    after = import_checkpoint(folder, before.target)
    assert torch.equal(forward(after, inputs("eagle"))["log_q"], golden.outputs["log_q"])
    assert check(folder, before.target, forward=forward) == []


@pytest.mark.parametrize("fault", ["theta", "scaling", "norm", "rows", "order"])
def test_what_only_the_golden_pass_can_tell(fault: str, tmp_path: Path) -> None:
    """The target is not given and everything is consistent in itself: the arithmetic is another."""
    before = sensible()
    folder = export(before, "vllm", tmp_path / "out", Extras(golden=Golden(inputs(), forward(before, inputs())))).folder
    if fault == "theta":
        edit(folder, rope_theta=1e4, rope_parameters={"rope_theta": 1e4, "rope_type": "default"})
    elif fault == "scaling":
        rope = {"rope_theta": 1e5, "rope_type": "linear", "factor": 4.0}
        edit(folder, rope_scaling={k: v for k, v in rope.items() if k != "rope_theta"}, rope_parameters=rope)
    elif fault == "norm":
        replant(folder, {"norm.weight": torch.ones(H)})
    elif fault == "rows":
        replant(folder, {"lm_head.weight": before.tensors["lm_head.weight"].roll(1, 0)})
    else:
        first, rest = before.tensors["fc.weight"].split([H, 2 * H], dim=1)
        replant(folder, {"fc.weight": torch.cat([rest, first], dim=1)})
    assert check(folder) == []
    (found,) = check(folder, forward=forward)
    assert found.field == "draftsmith/golden.safetensors: log_q"
    assert found.severity == "error"
