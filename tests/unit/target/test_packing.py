"""Packed linear layers: the plain ones' numbers, the same for a row whatever stands beside it; decoding with them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.integration.tiny_folder import write_target
from tests.tiny import OracleDrafter, prompts, tiny_target
from torch import nn

from draftsmith.decoding.composition import Single
from draftsmith.decoding.engine import Engine
from draftsmith.decoding.growth import DynamicGrowth
from draftsmith.evaluation import equality
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget, load_target
from draftsmith.target.packing import PackedLinear, pack, packed
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.sampling import Sampling

torch_packs = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor or build of torch has no packed bfloat16 kernels",
)


def layer(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    torch.manual_seed(inputs)
    made = nn.Linear(inputs, outputs, bias).bfloat16().requires_grad_(False)
    pack(made, "layer")
    assert isinstance(made, PackedLinear)
    return made


@torch_packs
@pytest.mark.parametrize(("inputs", "outputs", "bias"), [(64, 96, False), (576, 192, True), (32, 40, False)])
def test_a_row_is_the_same_whatever_stands_beside_it(inputs: int, outputs: int, bias: bool) -> None:
    own = layer(inputs, outputs, bias)
    x = torch.randn(2, 40, inputs).bfloat16()
    with torch.no_grad():
        whole = own(x)
        exact = x.double() @ own.weight.double().T + (own.bias.double() if bias else 0)
        assert (whole.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
        for rows in (1, 3, 16, 40):
            assert torch.equal(own(x[:, :rows].contiguous()), whole[:, :rows])
    assert own(x.requires_grad_()).requires_grad, "gradients go through the layer as before"


@torch_packs
def test_decoding_with_packed_layers_writes_the_targets_tokens() -> None:
    model = copy.deepcopy(tiny_target().model).bfloat16()
    plain = HFTarget(copy.deepcopy(model), tiny_target().tokenizer, "plain")
    pack(model, "tiny")
    target = HFTarget(model, tiny_target().tokenizer, "tiny")
    assert (target.kernels, plain.kernels) == ("packed", "plain")
    assert target.spec.fingerprint == plain.spec.fingerprint
    asked = prompts(3)
    greedy = Sampling()
    texts = [g.token_ids for g in Engine(target).generate(asked, greedy, 40)]
    oracle = OracleDrafter([p + t for p, t in zip(asked, texts, strict=True)], 0.7)
    found = Engine(target, Single(oracle, DynamicGrowth(12, 4, 3))).generate(asked, greedy, 40)
    assert max(r.accepted for g in found for r in g.rounds) == 4
    for prompt, text, one in zip(asked, texts, found, strict=True):
        same = equality.check(target, prompt, text, one.token_ids, greedy, one.request)
        assert same.equal or same.near_tie
        assert equality.teacher_forced(target, prompt, one.token_ids, greedy) == 0
        assert equality.teacher_forced(plain, prompt, one.token_ids, greedy) == 0, "plain kernels agree"
    ids = torch.tensor([asked[0]])
    with torch.no_grad():
        a, b = (t.read(ids, [ids.shape[1]], FeatureSpec((3,)))[3].float() for t in (target, plain))
    assert (a - b).abs().max() <= 0.05 * b.abs().max()


@torch_packs
def test_a_copy_is_an_ordinary_layer_that_can_be_trained() -> None:
    own = layer(64, 96, True)
    made = copy.deepcopy(own)
    assert type(made) is nn.Linear
    assert torch.equal(made.weight, own.weight)
    assert made.weight.data_ptr() != own.weight.data_ptr()
    made.requires_grad_(True)(torch.randn(2, 64).bfloat16()).sum().backward()
    assert made.weight.grad is not None
    tied = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)).bfloat16().requires_grad_(False)
    tied[1].weight = tied[0].weight
    pack(tied, "tied")
    again = copy.deepcopy(tied)
    assert again[1].weight is again[0].weight
    assert packed(tied)
    assert not packed(again)


def test_float32_is_refused_with_the_way_out(tmp_path: Path) -> None:
    folder = write_target(tmp_path / "target")
    with pytest.raises(UserError, match="half precision on a CPU.*target.kernels to plain"):
        load_target(folder, "float32", "cpu", kernels="packed")


@torch_packs
def test_a_target_is_loaded_packed(tmp_path: Path) -> None:
    folder = write_target(tmp_path / "target")
    target = load_target(folder, "bfloat16", "cpu", kernels="packed")
    assert target.kernels == "packed"
    assert replace(target.spec, name="") == replace(load_target(folder, "bfloat16", "cpu").spec, name="")
