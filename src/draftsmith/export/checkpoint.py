"""What an exporter is given and an import gives back: a head or a standalone draft, and the target that it was made
for.

These records know nothing of the drafters' modules, so that a checkpoint can be read, checked and written without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from draftsmith.foundation.errors import UserError
from draftsmith.target.vocabulary import VocabMap

Kind = Literal["eagle", "eagle3"]

ROPE_THETA = 10000.0  # what transformers, vLLM and SGLang take where a configuration names none


@dataclass(frozen=True)
class TargetCard:
    """What an export says of the target, and what a checkpoint is compared with.

    Attributes:
        name: as the server is given it: a hub id or a folder.
        fingerprint: of its weights (`target.model.fingerprint`); None where it is unknown.
        architectures: as in its `config.json`.
        model_type: likewise.
        vocab_size: width of its logits.
        hidden_size: H.
        layers: decoder layers; 0 where unknown.
        rope: its rotary embedding as `rope_parameters` gives it.
        max_positions: longest position it was made for; 0 where unknown.
        quantisation: a note for people ("Q4_1, de-quantised"); empty: none known.
        licence: likewise ("apache-2.0").
    """

    name: str
    fingerprint: str | None
    architectures: tuple[str, ...]
    model_type: str
    vocab_size: int
    hidden_size: int
    layers: int
    rope: Mapping[str, object]
    max_positions: int
    quantisation: str = ""
    licence: str = ""

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        *,
        name: str,
        fingerprint: str | None = None,
        quantisation: str = "",
        licence: str = "",
    ) -> TargetCard:
        """The card of a target whose `config.json` (or `PretrainedConfig.to_dict()`) this is; either generation of RoPE
        fields.

        Raises:
            UserError: a size is missing.
        """
        text = config.get("text_config") or config
        missing = [key for key in ("vocab_size", "hidden_size", "num_hidden_layers") if key not in text]
        if missing:
            raise UserError(f"the configuration of {name} has no {missing[0]}: it is no decoder-only language model")
        return cls(
            name=name,
            fingerprint=fingerprint,
            architectures=tuple(config.get("architectures") or ()),
            model_type=str(config.get("model_type") or ""),
            vocab_size=int(text["vocab_size"]),
            hidden_size=int(text["hidden_size"]),
            layers=int(text["num_hidden_layers"]),
            rope=rope_parameters(text),
            max_positions=int(text.get("max_position_embeddings") or 0),
            quantisation=quantisation,
            licence=licence,
        )

    @property
    def default_layers(self) -> tuple[int, int, int] | None:
        """The auxiliary layers that servers take where a checkpoint names none; None where `layers` is unknown."""
        return (2, self.layers // 2, self.layers - 3) if self.layers else None


@dataclass(frozen=True)
class HeadCheckpoint:
    """A head that reads target features.

    Attributes:
        kind: `eagle` (EAGLE, EAGLE-2, HASS: one format) or `eagle3`.
        config: sizes and switches under the names of `drafters.eagle3.Eagle3Options`; `auxiliary_layers` are boundary
            ids
            (transformers' `hidden_states[k]`, the input of layer k).
        tensors: under the native names (EAGLE-3 with `midlayer.`, EAGLE with `layers.0.`); neither embeddings nor maps.
        vocab: the draft vocabulary (EAGLE heads propose the whole one).
        target: what it was trained for.
        notes: what the reader of an imported checkpoint should know.
    """

    kind: Kind
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    vocab: VocabMap
    target: TargetCard
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> str:
        """The number format of the weights ("bfloat16")."""
        return str(self.tensors["fc.weight"].dtype).removeprefix("torch.")

    @property
    def auxiliary_layers(self) -> tuple[int, ...]:
        """Boundary ids, ascending; empty for an EAGLE head."""
        return tuple(self.config.get("auxiliary_layers") or ())


@dataclass(frozen=True)
class StandaloneDraft:
    """A whole small causal language model that drafts for a larger one: a transformers folder with its tokenizer."""

    folder: Path
    target: TargetCard


Drafter = HeadCheckpoint | StandaloneDraft


@dataclass(frozen=True)
class Golden:
    """A stored forward pass: what went into a head and what came out, for `check` to repeat. Names are the caller's."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Serving:
    """How the card's commands run the drafter.

    Attributes:
        tokens: speculative tokens of a chain (vLLM, llama.cpp, transformers).
        depth: deepest node of a tree (SGLang's steps).
        top_k: children kept of each node (SGLang's eagle-topk).
        nodes: node budget, the root not counted (SGLang's num-draft-tokens counts it).
    """

    tokens: int = 3
    depth: int = 4
    top_k: int = 4
    nodes: int = 15


@dataclass(frozen=True)
class Extras:
    """What goes beside the weights.

    Attributes:
        facts: for the model card (`export.card`): data, training, acceptance, licences.
        golden: stored under `draftsmith/golden.safetensors`.
        serving: the numbers in the commands.
        keep_rope: write the head's own RoPE though the target's is another (a head imported from elsewhere, trained
            so).
        published_as: the hub id under which the folder will be found; the card's commands then name it, not the folder.
    """

    facts: Mapping[str, object] = field(default_factory=dict)
    golden: Golden | None = None
    serving: Serving = Serving()
    keep_rope: bool = False
    published_as: str | None = None


@dataclass(frozen=True)
class Exported:
    """A written folder, the commands that serve it, and what its user should know."""

    folder: Path
    server: str
    commands: tuple[str, ...]
    notes: tuple[str, ...] = ()


def rope_parameters(config: Mapping[str, Any]) -> dict[str, object]:
    """One form for the many in which configurations state a rotary embedding: `rope_theta`, `rope_type`, scaling
    fields.

    Reads transformers 5's `rope_parameters` (of full-attention layers, where they differ by layer type) before the
    older `rope_theta` and `rope_scaling`: a configuration may carry both, and the older field may be a class default.
    """
    new = config.get("rope_parameters")
    if isinstance(new, Mapping) and isinstance(new.get("full_attention"), Mapping):
        new = new["full_attention"]
    out: dict[str, object] = {}
    for source in (config.get("rope_scaling"), new):
        if isinstance(source, Mapping):
            out |= {key: value for key, value in source.items() if value is not None}
    old_type = out.pop("type", None)
    out.setdefault("rope_type", old_type or "default")
    if "rope_theta" not in out:
        theta = config.get("rope_theta")
        out["rope_theta"] = ROPE_THETA if theta is None else theta
    theta = out["rope_theta"]
    out["rope_theta"] = float(theta) if isinstance(theta, int | float) else theta
    return out


def split_rope(rope: Mapping[str, object]) -> tuple[object, dict[str, object] | None]:
    """`rope_theta` and the older `rope_scaling` (None where nothing is scaled) of what `rope_parameters` gives."""
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return rope["rope_theta"], None if scaling == {"rope_type": "default"} else scaling


PLAIN = Extras()
