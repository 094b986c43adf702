"""transformers' own decoding of the same target as a peer: plain `generate`, assisted generation, prompt lookup.

The model object is the target's, so weights, number format, threads and device are the same; mask, cache and loop are
transformers'. Rounds are counted where they happen: a hook sees what every target pass is given, a streamer what it
commits. transformers verifies drafted tokens together with the prompt: that pass is the prefill here, no round.

At temperatures above 0 transformers draws from torch's global generator, which is seeded by the request's name for the
call and put back; its text is another draw than the engine's, so only greedy texts can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from draftsmith.decoding.trace import Generation, Round
from draftsmith.evaluation.measured import PLAIN
from draftsmith.evaluation.modes import Decoded, Maker
from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.target.model import HFTarget
from draftsmith.target.sampling import Sampling

TRANSFORMERS = "transformers"
LOOKUP_TOKENS = 10  # drafted tokens of transformers' prompt lookup: what its documentation takes


class TransformersMode:
    """`model.generate` of the target.

    Args:
        name: of the mode.
        target: whose model decodes.
        assistant: a standalone draft model's folder (assisted generation).
        lookup: use transformers' prompt lookup.
        draft_tokens: tokens drafted in a round; None leaves them to transformers (a heuristic, with an assistant).
        against: the mode that speed-ups are over.

    Raises:
        UserError: the folder holds no model, or one of another vocabulary.
    """

    engine: Maker = "transformers"

    def __init__(
        self,
        name: str,
        target: HFTarget,
        *,
        assistant: str | Path | None = None,
        lookup: bool = False,
        draft_tokens: int | None = None,
        against: str = TRANSFORMERS,
    ) -> None:
        self.name = name
        self.target = target
        self.against = PLAIN if name == TRANSFORMERS else against
        self.node_budget = (draft_tokens or LOOKUP_TOKENS) if lookup else draft_tokens
        self._lookup = self.node_budget if lookup else None
        self._assistant = None if assistant is None else _load_assistant(assistant, target, draft_tokens)

    @property
    def drafts(self) -> bool:
        """Whether anything is drafted."""
        return self._lookup is not None or self._assistant is not None

    def decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[str], sampling: Sampling, max_new_tokens: int
    ) -> list[Decoded]:
        """transformers' answers. It drafts for one prompt at a time: a batch is decoded one after another then."""
        if self.drafts:
            pairs = zip(prompts, requests, strict=True)
            found = [self._decode([p], [r], sampling, max_new_tokens)[0] for p, r in pairs]
            for b, decoded in enumerate(found):
                decoded.generation.request = b
            return found
        return self._decode(prompts, requests, sampling, max_new_tokens)

    @torch.inference_mode()
    def _decode(
        self, prompts: Sequence[Sequence[int]], requests: Sequence[str], sampling: Sampling, max_new_tokens: int
    ) -> list[Decoded]:
        from transformers import GenerationConfig

        spec, device = self.target.spec, self.target.device
        longest = max(map(len, prompts))
        new = min(max_new_tokens, spec.max_positions - longest)
        pad = spec.eos_ids[0] if spec.eos_ids else 0
        ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for b, prompt in enumerate(prompts):  # padded on the left, as generate wants it
            ids[b, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask[b, longest - len(prompt) :] = 1
        config = GenerationConfig(
            max_new_tokens=new,
            do_sample=sampling.temperature > 0,
            # what is left None is filled from the model's own defaults
            temperature=sampling.temperature if sampling.temperature > 0 else 1.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p or None,
            repetition_penalty=sampling.repetition_penalty,
            no_repeat_ngram_size=sampling.no_repeat_ngram_size,
            suppress_tokens=list(sampling.suppress_tokens) or None,
            eos_token_id=list(spec.eos_ids),
            pad_token_id=pad,
            num_beams=1,
            use_cache=True,
            prompt_lookup_num_tokens=self._lookup,
        )
        more = {} if self._assistant is None else {"assistant_model": self._assistant}
        watch = _Watch(self.target.model)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), watch.watching():
            torch.manual_seed(seeding.key("transformers", sampling.seed, *requests) % 2**31)
            started = time.perf_counter()
            self.target.model.generate(
                ids.to(device), attention_mask=mask.to(device), generation_config=config, streamer=watch, **more
            )
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            total = (time.perf_counter() - started) * 1e3
        ends = frozenset(spec.eos_ids)
        return [_decoded(b, list(prompt), watch, ends, started, total) for b, prompt in enumerate(prompts)]


class _Watch:
    """What each target pass was given (a hook) and what came of it, when (a streamer)."""

    def __init__(self, model: nn.Module) -> None:
        self.size = 0
        self._model = model
        self.given: list[Tensor] = []  # [B, width] of each pass
        self.puts: list[tuple[float, Tensor]] = []  # seconds, [B, n]

    @contextmanager
    def watching(self) -> Iterator[None]:
        handle = self._model.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        self.given.append(ids)

    def put(self, tokens: Tensor) -> None:
        if not self.size:  # the prompts come first
            self.size = tokens.shape[0]
            return
        self.puts.append((time.perf_counter(), tokens.reshape(self.size, -1)))

    def end(self) -> None:
        pass


def _decoded(b: int, prompt: list[int], watch: _Watch, ends: frozenset[int], started: float, total: float) -> Decoded:
    share = watch.size
    written: list[int] = []
    origins: list[int] = []
    depths: list[int] = []
    rounds: list[Round] = []
    first = last = started
    for number, ((now, put), given) in enumerate(zip(watch.puts, watch.given, strict=False)):
        tokens = put[b].tolist()
        first = first if number else now
        known = 1 if number else len(prompt)  # the pass over the prompt verifies drafted tokens as well
        drafted = given[b, known:].tolist() if share == 1 else []
        accepted = 0
        while accepted < min(len(drafted), len(tokens)) and drafted[accepted] == tokens[accepted]:
            accepted += 1
        if number and not (written and written[-1] in ends):
            ended = accepted == len(tokens)  # an end token, or the limit, inside the path
            rounds.append(
                Round(
                    request=b,
                    nodes=len(drafted),
                    reached=accepted if ended else min(accepted + 1, len(drafted)),
                    accepted=accepted,
                    committed=accepted + 1,
                    kept=len(tokens),
                    owners=(0,) * accepted,
                    context=len(prompt) + len(written),
                    draft_ms=0.0,
                    verify_ms=0.0,
                    rest_ms=(now - last) * 1e3 / share,
                )
            )
        if not (written and written[-1] in ends):
            written += tokens
            origins += [*[0] * accepted, -1][: len(tokens)]
            depths += [*range(1, accepted + 1), 0][: len(tokens)]
        last = now
    finish: Literal["stop", "length"] = "stop" if written and written[-1] in ends else "length"
    first_ms = (first - started) * 1e3
    generation = Generation(b, written, finish, rounds, first_ms / share, total / share)
    return Decoded(generation, origins, depths, first_ms)


def _load_assistant(folder: str | Path, target: HFTarget, draft_tokens: int | None) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=target.dtype)
        model = model.to(target.device).eval()
    except (OSError, ValueError, KeyError) as problem:
        raise UserError(
            f"{folder}: no causal language model of transformers can be loaded from there, and assisted generation "
            f"needs one: {str(problem).splitlines()[0]}"
        ) from problem
    size = model.config.get_text_config().vocab_size
    if size != target.model.config.get_text_config().vocab_size:
        raise UserError(f"{folder} has a vocabulary of {size} tokens, {target.spec.name} another: they can't be paired")
    if draft_tokens is not None:
        model.generation_config.num_assistant_tokens = draft_tokens
        model.generation_config.num_assistant_tokens_schedule = "constant"
        model.generation_config.assistant_confidence_threshold = 0.0
    return model
