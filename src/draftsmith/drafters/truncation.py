"""A standalone draft out of the target itself: keep some of its layers, drop the others, and train what is left.

Which layers: those whose absence hurts the target most, measured on a few texts, or evenly spread ones. Embeddings, the
final norm and the output embedding stay; what is tied stays tied.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from draftsmith.drafters.standalone import Standalone, StandaloneDraftOptions, load_model
from draftsmith.foundation import console
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.numerics.distributions import rows_that_fit
from draftsmith.target.model import HFTarget
from draftsmith.target.protocol import FeatureSpec
from draftsmith.target.vocabulary import VocabMap

BLOCK_BYTES = 1 << 26
_LAYER = re.compile(r"^(?P<before>.*\blayers\.)(?P<index>\d+)(?P<after>\..*)$")

Text = tuple[Tensor, Tensor]
"""Token ids `[T]` int64, and `[T]` bool: at which positions the next token is the target's own."""


class StandaloneOptions(Options):
    """Which standalone draft to train."""

    folder: str | None = Field(
        default=None, description="a smaller model of the target's family to begin from; none: keep the target's layers"
    )
    keep_layers: int | tuple[int, ...] = Field(
        default=3, description="the target's layers to keep: their numbers, or how many"
    )
    choose: Literal["sensitivity", "spread"] = Field(
        default="sensitivity",
        description="where only a number is given: the layers that are missed most on a few training texts, or evenly "
        "spread ones, the first and the last among them",
    )
    texts: int = Field(default=8, ge=1, description="texts that the layers are chosen on")
    train_embedding: bool = Field(
        default=False, description="train the embeddings too (tied ones are the output embedding as well)"
    )

    @field_validator("keep_layers")
    @classmethod
    def _some(cls, keep: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if not keep or (isinstance(keep, int) and keep < 1):
            raise ValueError("at least one layer must be kept")
        return keep


def made(target: HFTarget, vocab: VocabMap, o: StandaloneOptions, texts: Sequence[Text]) -> Standalone:
    """The draft that options describe, untrained, in float32.

    Raises:
        UserError: layers that the target has not, a model that can't be cut, or a folder that is no draft for it.
    """
    size = target.spec.vocab_size
    if o.folder is not None:
        model = load_model(o.folder, size, torch.float32)
        name, layers = o.folder, None
    else:
        name, layers = target.spec.name, kept_layers(target, o, texts)
        model = truncated(target.model, layers, name)
    saved = StandaloneDraftOptions(
        made_from=name, kept_layers=layers, vocab_size=size, draft_vocab_size=vocab.size, dtype=target.spec.dtype
    )
    model.requires_grad_(True)
    if not o.train_embedding:
        model.get_input_embeddings().requires_grad_(False)
        model.get_output_embeddings().requires_grad_(False)
    return Standalone(saved, vocab, model.to(target.device), target.tokenizer).float()


def kept_layers(target: HFTarget, o: StandaloneOptions, texts: Sequence[Text]) -> tuple[int, ...]:
    """The layers to keep, ascending.

    Raises:
        UserError: some are none of the target's.
    """
    n = target.spec.layers
    keep = o.keep_layers
    if not isinstance(keep, int):
        chosen = tuple(sorted(set(keep)))
        if len(chosen) != len(keep) or chosen[0] < 0 or chosen[-1] >= n:
            raise UserError(f"keep_layers {list(keep)}: name different layers from 0 to {n - 1}")
        return chosen
    if keep > n:
        raise UserError(f"keep_layers {keep}: the target has only {n} layers")
    if o.choose == "spread":
        return spread(keep, n)
    hurt = sensitivity(target, texts[: o.texts])
    best = tuple(sorted(sorted(range(n), key=lambda i: (-float(hurt[i]), i))[:keep]))
    console.say(f"of {n} layers these {keep} are missed most and kept: {', '.join(map(str, best))}")
    return best


def spread(count: int, layers: int) -> tuple[int, ...]:
    """`count` of `layers` layers, evenly spread: the first and, where there are two, the last among them."""
    if count == 1:
        return (0,)
    return tuple(round(i * (layers - 1) / (count - 1)) for i in range(count))


@torch.no_grad()
def sensitivity(target: HFTarget, texts: Sequence[Text]) -> Tensor:
    """How much each layer is missed: mean KL(p ‖ p without it) over the texts' own tokens, `[layers]` float32, nats.

    Raises:
        UserError: no text has a token of its own.
    """
    if not any(bool(mask.any()) for _, mask in texts):
        raise UserError("no text to choose layers on has an answer token: name the layers to keep (keep_layers)")
    width = max(len(ids) for ids, _ in texts)
    tokens = torch.zeros((len(texts), width), dtype=torch.int64)
    asked = torch.zeros((len(texts), width), dtype=torch.bool)
    for b, (ids, mask) in enumerate(texts):
        tokens[b, : len(ids)], asked[b, : len(ids)] = ids, mask
    lengths = [len(ids) for ids, _ in texts]
    asked = asked.to(target.device)

    def final() -> Tensor:
        return target.read(tokens, lengths, FeatureSpec())["final"][asked]

    whole = final()
    block = rows_that_fit(BLOCK_BYTES, target.spec.vocab_size)
    hurt = torch.zeros(target.spec.layers)
    with console.progress("which layers are missed most", target.spec.layers, "layers") as bar:
        for index, layer in enumerate(target.model.base_model.layers):
            with _left_out(layer):
                without = final()
            for rows in range(0, len(whole), block):
                log_p = target.project(whole[rows : rows + block]).float().log_softmax(-1)
                log_q = target.project(without[rows : rows + block]).float().log_softmax(-1)
                hurt[index] += float((log_p.exp() * (log_p - log_q)).sum()) / len(whole)
            bar.advance(1)
    return hurt


@contextmanager
def _left_out(layer: Any) -> Iterator[None]:
    """The model without one layer: what goes in comes out."""

    def through(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *out[1:]) if isinstance(out, tuple) else given

    handle = layer.register_forward_hook(through, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def truncated(model: Any, layers: Sequence[int], name: str) -> Any:
    """A copy of a transformers causal model with only these layers, in this order.

    Raises:
        UserError: its weights don't fit a model of fewer layers.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    # what a configuration says of each layer in turn (layer types, layers without rotary embedding, …)
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, key, [value[i] for i in layers])
    text.num_hidden_layers = len(layers)
    with torch.random.fork_rng(devices=[]):
        small: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    place = {old: new for new, old in enumerate(layers)}
    kept: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        found = _LAYER.match(key)
        if found is None:
            kept[key] = tensor
        elif (new := place.get(int(found["index"]))) is not None:
            kept[f"{found['before']}{new}{found['after']}"] = tensor
    try:
        small.load_state_dict(kept)
    except RuntimeError as problem:
        raise UserError(
            f"{name}: its layers can't be kept by themselves ({str(problem).splitlines()[0]}): draft with a smaller "
            "model of its family instead (folder)"
        ) from problem
    small.generation_config = copy.deepcopy(model.generation_config)
    return small
