"""What a target needs, told from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Needs:
    """What a target needs.

    Attributes:
        name: as it was given.
        weights: bytes of its weights in the format it is loaded in.
        dtype: that format.
        cache_per_token: bytes of keys and values for a token.
        features_per_token: bytes on disk for a token's features (three auxiliary states and the final one).
        problem: why it can't be used, if it can't; chat: whether it has a chat template.
    """

    name: str
    weights: int = 0
    dtype: str = "bfloat16"
    cache_per_token: int = 0
    features_per_token: int = 0
    positions: int = 0
    problem: str | None = None
    chat: bool = True


def needs(target: str) -> Needs:
    """What a target needs, from its configuration alone: no weights are read, for a hub id only the small files."""
    try:
        return _needs(target)
    except Exception as problem:  # whatever is wrong with it is a finding
        said = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        return Needs(target, problem=said if said.startswith(target) else f"{target}: {said}")


def _needs(target: str) -> Needs:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from draftsmith.data.features import estimated_bytes
    from draftsmith.drafters.eagle3 import auxiliary_layers
    from draftsmith.target import gguf
    from draftsmith.target.inside import attention_windows
    from draftsmith.target.protocol import FeatureSpec

    place = target
    if target == "smollm2" or target.endswith(".gguf"):
        file = gguf.smollm2() if target == "smollm2" else Path(target)
        place = str(gguf.convert(file, gguf.cache_root()))
    whole = AutoConfig.from_pretrained(place)
    config = whole.get_text_config()
    attention_windows(config, target)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(whole)
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    # as `load_target` takes it by default
    dtype = getattr(config, "dtype", None) or torch.float32
    width = torch.empty((), dtype=dtype).element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = auxiliary_layers(None, config.num_hidden_layers)
    return Needs(
        name=target,
        weights=parameters * width,
        dtype=str(dtype).removeprefix("torch."),
        cache_per_token=2 * config.num_hidden_layers * heads * head * width,
        features_per_token=estimated_bytes(1, FeatureSpec(layers, True), config.hidden_size),
        positions=config.max_position_embeddings,
        chat=getattr(AutoTokenizer.from_pretrained(place), "chat_template", None) is not None,
    )
