"""From logits to the next token: transformers' processors in transformers' order, then one keyed draw.

The draw is the Gumbel-max form of sampling: argmax over v of log p(v) + g(v), where the noise g depends only on
(seed, request, position). Plain decoding and speculative decoding therefore write the *same text* at the same seed,
token for token, at any temperature; that is how losslessness is tested, and how users get reproducible samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from draftsmith.foundation import seeding
from draftsmith.foundation.errors import UserError
from draftsmith.foundation.options import Options
from draftsmith.target.protocol import FeatureSpec, Rows, Target


class Sampling(Options):
    """How the target's distribution is processed before a token is drawn; names and order are transformers'."""

    temperature: float = Field(default=0.0, ge=0.0, description="0 takes the most likely token")
    top_k: int = Field(default=0, ge=0, description="keep the k most likely tokens; 0 keeps all")
    top_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="keep the smallest set of tokens with this probability"
    )
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="drop tokens below this fraction of the likeliest one's probability"
    )
    typical_p: float = Field(
        default=1.0, gt=0.0, le=1.0, description="keep the tokens of most typical information with this probability"
    )
    epsilon_cutoff: float = Field(default=0.0, ge=0.0, lt=1.0, description="drop tokens below this probability")
    eta_cutoff: float = Field(
        default=0.0, ge=0.0, lt=1.0, description="drop tokens below this probability, less where all are unlikely"
    )
    repetition_penalty: float = Field(default=1.0, gt=0.0, description="divide the logits of tokens already seen")
    no_repeat_ngram_size: int = Field(default=0, ge=0, description="never write an n-gram twice; 0 allows it")
    forced_bos_token_id: int | None = Field(
        default=None, ge=0, description="written second, behind a prompt of one token (translation models)"
    )
    forced_eos_token_id: int | None = Field(
        default=None, ge=0, description="written where only one more token fits into the answer"
    )
    suppress_tokens: tuple[int, ...] = Field(default=(), description="token ids that are never written")
    seed: int = Field(default=0, description="the same seed gives the same text")

    @property
    def path_dependent(self) -> bool:
        """Whether a row's processing depends on the tokens before it."""
        forced = self.forced_bos_token_id is not None or self.forced_eos_token_id is not None
        return self.repetition_penalty != 1.0 or self.no_repeat_ngram_size > 0 or forced


Processor = Callable[[Tensor, Tensor], Tensor]


def processors(
    sampling: Sampling, last: int | None = None, device: torch.device | None = None
) -> tuple[list[Processor], list[Processor]]:
    """transformers' processors that read a row's ids, and its warpers that don't, each in `generate`'s order.

    Args:
        last: the position of the last token that fits, for `forced_eos_token_id`; None: it is not near.
        device: of the scores; default: the CPU.
    """
    from transformers import (
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        ForcedBOSTokenLogitsProcessor,
        ForcedEOSTokenLogitsProcessor,
        MinPLogitsWarper,
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
        TypicalLogitsWarper,
    )

    place = str(device or "cpu")
    first: list[Any] = []
    if sampling.repetition_penalty != 1.0:
        first.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.no_repeat_ngram_size:
        first.append(NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.forced_bos_token_id is not None:
        first.append(ForcedBOSTokenLogitsProcessor(sampling.forced_bos_token_id))
    if sampling.forced_eos_token_id is not None and last is not None:
        first.append(ForcedEOSTokenLogitsProcessor(last + 1, sampling.forced_eos_token_id, place))
    if sampling.suppress_tokens:
        first.append(SuppressTokensLogitsProcessor(list(sampling.suppress_tokens), place))
    if sampling.temperature == 0.0:
        return first, []
    warpers: list[Any] = []
    if sampling.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1.0:
        warpers.append(TypicalLogitsWarper(sampling.typical_p))
    if sampling.epsilon_cutoff:
        warpers.append(EpsilonLogitsWarper(sampling.epsilon_cutoff))
    if sampling.eta_cutoff:
        warpers.append(EtaLogitsWarper(sampling.eta_cutoff, device=place))
    return first, warpers


def processed(
    logits: Tensor,
    contexts: Sequence[Sequence[int]] | None,
    sampling: Sampling,
    lasts: Sequence[int] | None = None,
) -> Tensor:
    """Scores `[R, V]` float32 that `generate` would draw from: log p up to a constant, −inf where filtered.

    Args:
        logits: `[R, V]`, any float format; float64 stays float64.
        contexts: for each row all ids before the token to draw (its own ancestors included); needed only where
            `sampling.path_dependent`.
        lasts: for each row the position of the last token that fits into its answer; needed only for
            `forced_eos_token_id`.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    first, warpers = processors(sampling, device=scores.device)
    unused = torch.empty((scores.shape[0], 0), dtype=torch.int64, device=scores.device)
    if sampling.path_dependent:
        assert contexts is not None
        assert lasts is not None or sampling.forced_eos_token_id is None
        # A row at a time: its ancestors are its own, and rows differ in length. These options are rare and the row is
        # what transformers' code is written for.
        rows = []
        for r in range(scores.shape[0]):
            ids = torch.tensor([list(contexts[r])], dtype=torch.int64, device=scores.device)
            row = scores[r : r + 1]
            for process in first if lasts is None else processors(sampling, lasts[r], scores.device)[0]:
                row = process(ids, row)
            rows.append(row)
        scores = torch.cat(rows)
        first = []
    for process in (*first, *warpers):
        scores = process(unused, scores)
    return scores


def draw(scores: Tensor, keys: Tensor | None, sampling: Sampling) -> Tensor:
    """Token `[R]` int64 for each row of scores `[R, V]`: argmax at temperature 0, else Gumbel-max with `keys[r]`."""
    if sampling.temperature == 0.0:
        return _first_largest(scores)
    assert keys is not None
    # Rows of one position share a key: draw its noise once.
    distinct, inverse = torch.unique(keys, return_inverse=True)
    noise = -torch.log(-torch.log(seeding.uniform(distinct, scores.shape[-1])))
    return _first_largest(scores.double() + noise[inverse])


def _first_largest(scores: Tensor) -> Tensor:
    # On a CPU `max` is vectorised along the row and `argmax` is not: ten times as fast for a tree's rows.
    return scores.max(dim=-1).indices


def next_tokens(
    logits: Tensor,
    sampling: Sampling,
    requests: Sequence[int | str],
    positions: Tensor,
    contexts: Sequence[Sequence[int]] | None = None,
    lasts: Sequence[int] | None = None,
) -> Tensor:
    """The target's token after each row.

    Args:
        logits: `[B, R, V]`.
        requests: what names each sequence of the batch; part of the key.
        positions: `[B, R]` int64, the position at which the token would stand.
        contexts: for each of the B·R rows the ids before that position; only where `sampling.path_dependent`.
        lasts: for each of the B sequences the position of the last token that fits; only for `forced_eos_token_id`.

    Returns:
        `[B, R]` int64.
    """
    batch, rows, vocab = logits.shape
    keys = None
    if sampling.temperature > 0.0:
        keys = seeding.position_keys(sampling.seed, requests, positions, "token").reshape(-1).to(logits.device)
    scores = logits.reshape(batch * rows, vocab)
    if sampling.temperature > 0.0 or processors(sampling)[0]:
        each = None if lasts is None else [last for last in lasts for _ in range(rows)]
        scores = processed(scores, contexts, sampling, each)  # the largest is the largest in any number format
    return draw(scores, keys, sampling).reshape(batch, rows)


@dataclass(frozen=True)
class Written:
    """A finished row: its index, what was written (the end token included), and whether it ended by itself."""

    row: int
    token_ids: list[int]
    complete: bool


@torch.inference_mode()
def write(
    target: Target,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[int | str],
    sampling: Sampling,
    max_new_tokens: int,
    watch: Callable[[Tensor, Sequence[int], Tensor], None] | None = None,
) -> Iterator[Written | int]:
    """Plain batched decoding; rows that have finished leave the batch.

    Yields a `Written` for each row when it finishes, and after each pass the number of tokens just written.

    Args:
        watch: called after each pass with the target's logits `[n, V]` as no processor has seen them, the n rows that
            they are of, and the tokens `[n]` that were drawn.

    Raises:
        UserError: an empty prompt, or one that leaves no room for an answer.
    """
    if not prompts:
        return
    spec = target.spec
    lengths = [len(p) for p in prompts]
    for index, length in enumerate(lengths):
        if not 0 < length < spec.max_positions:
            raise UserError(
                f"prompt {index} has {length} tokens; {spec.name} takes 1 to {spec.max_positions - 1}, "
                "so that an answer fits"
            )
    room = [min(max_new_tokens, spec.max_positions - n) for n in lengths]
    ids = torch.zeros((len(prompts), max(lengths)), dtype=torch.int64)
    for b, prompt in enumerate(prompts):
        ids[b, : lengths[b]] = torch.tensor(prompt)
    out = target.prefill(ids, lengths, FeatureSpec(), max(lengths) + max_new_tokens + 1)
    assert out.logits is not None
    logits = out.logits[:, None]
    alive = list(range(len(prompts)))
    texts: list[list[int]] = [[] for _ in prompts]
    while alive:
        positions = torch.tensor([[lengths[b] + len(texts[b])] for b in alive])
        contexts = [[*prompts[b], *texts[b]] for b in alive] if sampling.path_dependent else None
        names, lasts = [requests[b] for b in alive], [lengths[b] + room[b] - 1 for b in alive]
        drawn = next_tokens(logits, sampling, names, positions, contexts, lasts)[:, 0]
        if watch is not None:
            watch(logits[:, 0], alive, drawn)
        tokens = drawn.cpu()
        stay = []
        for i, (b, token) in enumerate(zip(alive, tokens.tolist(), strict=True)):
            texts[b].append(token)
            if token in spec.eos_ids or len(texts[b]) >= room[b]:
                yield Written(b, texts[b], token in spec.eos_ids)
            else:
                stay.append(i)
        yield len(alive)
        if len(stay) < len(alive):
            alive = [alive[i] for i in stay]
            if alive:
                target.select(stay)
                tokens = tokens[stay]
        if alive:
            verified = target.verify(Rows.roots(tokens), FeatureSpec())
            assert verified.logits is not None
            logits = verified.logits
            target.commit(torch.zeros((len(alive), 1), dtype=torch.int64), [1] * len(alive))
