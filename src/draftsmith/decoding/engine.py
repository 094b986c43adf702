"""The round: grow a tree, verify it in one target pass, commit the accepted path and the bonus token.

Plain decoding is the same engine without a drafter: trees without nodes. One sequence is a batch of one; a sequence
that has finished stays in the batch with an empty tree until the others have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from draftsmith.decoding import rejection, verification
from draftsmith.decoding.composition import Composition
from draftsmith.decoding.drawn import Draws
from draftsmith.decoding.growth import Limits
from draftsmith.decoding.trace import Generation, Round
from draftsmith.decoding.tree import DraftTree, empty
from draftsmith.decoding.verification import Verification
from draftsmith.foundation.errors import UserError
from draftsmith.target.protocol import FeatureSpec, Layer, Target, TargetOut
from draftsmith.target.sampling import Sampling, next_tokens


@dataclass(frozen=True)
class Piece:
    """Tokens just written in one sequence: their drafters (−1: the target's own bonus token) and depths in the tree
    (0: bonus)."""

    request: int
    token_ids: list[int]
    owners: list[int]
    depths: list[int]


class Engine:
    """Decodes with a target and whoever drafts for it (None: plain decoding).

    `verification` other than keyed judges sampled candidates by what they were drawn from: the target's distribution is
    kept, plain decoding's text at the same seed is not.
    """

    def __init__(
        self, target: Target, composition: Composition | None = None, verification: Verification = "keyed"
    ) -> None:
        self.target = target
        self.composition = composition
        self.verification: Verification = verification

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        max_new_tokens: int | Sequence[int] = 128,
        requests: Sequence[int | str] | None = None,
    ) -> list[Generation]:
        """Write an answer to each prompt (a batch); see `stream`."""
        done: list[Generation] = []
        for event in self.stream(prompts, sampling, max_new_tokens, requests):
            if isinstance(event, Generation):
                done.append(event)
        return sorted(done, key=lambda g: g.request)

    @torch.inference_mode()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        max_new_tokens: int | Sequence[int] = 128,
        requests: Sequence[int | str] | None = None,
    ) -> Iterator[Piece | Generation]:
        """The answers as they are written: a `Piece` whenever a sequence grew, its `Generation` when it ends.

        Args:
            prompts: token ids, the chat template's generation prompt included.
            max_new_tokens: for all, or for each; also bounded by the target's longest position.
            requests: what names each sequence in the random draws (default: its index); with the same seed and name a
                sequence is the same whatever else is in the batch, in exact arithmetic.

        Raises:
            UserError: an empty prompt, or one that leaves no room for an answer.
        """
        sampling = sampling or Sampling()
        names: list[int | str] = list(requests) if requests is not None else list(range(len(prompts)))
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        if prompts:
            yield from _Run(self, prompts, sampling, limits, names).events()


class _Run:
    """One batch from prefill to its last round."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: list[int],
        requests: list[int | str],
    ) -> None:
        target = engine.target
        spec = target.spec
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {index} is empty; give at least one token")
            if len(prompt) >= spec.max_positions:
                raise UserError(
                    f"prompt {index} has {len(prompt)} tokens; {spec.name} takes {spec.max_positions} with its answer"
                )
        self.target, self.composition, self.sampling, self.requests = target, engine.composition, sampling, requests
        self.rule = engine.verification if engine.composition else "keyed"
        self.prompts = [list(p) for p in prompts]
        self.ids = [list(p) for p in prompts]
        self.limits = [min(m, spec.max_positions - len(p)) for m, p in zip(limits, prompts, strict=True)]
        self.lasts = [len(p) + m - 1 for p, m in zip(self.prompts, self.limits, strict=True)]
        self.ends = frozenset(spec.eos_ids)
        self.end_tensor = torch.tensor(sorted(self.ends), dtype=torch.int64, device=target.device)
        self.alive = [m > 0 for m in self.limits]
        self.rounds: list[list[Round]] = [[] for _ in prompts]
        self.spent = [0.0] * len(prompts)
        self.prefill_ms = 0.0

    def events(self) -> Iterator[Piece | Generation]:
        wants = self.composition.wants if self.composition else FeatureSpec()
        room = max(len(p) + m for p, m in zip(self.prompts, self.limits, strict=True))
        capacity = room + 1 + (self.composition.budget if self.composition else 0)
        clock = _Clock(self.target.device)
        lengths = [len(p) for p in self.prompts]
        ids = torch.zeros((len(self.prompts), max(lengths)), dtype=torch.int64)
        for b, prompt in enumerate(self.prompts):
            ids[b, : lengths[b]] = torch.tensor(prompt)
        out = self.target.prefill(ids, lengths, wants, capacity)
        if out.choices is not None:
            first = out.choices[:, 0].tolist()
        else:
            assert out.logits is not None
            contexts = self.prompts if self.sampling.path_dependent else None
            positions = torch.tensor(lengths)[:, None]
            given = (self.sampling, self.requests, positions, contexts, self.lasts)
            first = next_tokens(out.logits[:, None], *given)[:, 0].tolist()
        tokens = torch.zeros((len(self.prompts), max(lengths) + 1), dtype=torch.int64)
        for b, token in enumerate(first):
            if self.alive[b]:
                self.ids[b].append(token)
            tokens[b, : len(self.ids[b])] = torch.tensor(self.ids[b])
        state = None
        if self.composition:
            state = self.composition.start(len(self.prompts), capacity)
            # A token's features are the state that produced it: the prompt's, one place later.
            shifted = {name: torch.nn.functional.pad(h, (0, 0, 1, 0)) for name, h in out.hidden.items()}
            self.composition.observe(state, tokens.to(self.target.device), shifted, [len(i) for i in self.ids])
        self.prefill_ms = clock.lap() / len(self.prompts)
        self.spent = [self.prefill_ms] * len(self.prompts)
        for b, token in enumerate(first):
            if self.alive[b]:
                yield Piece(b, [token], [-1], [0])
            yield from self._finish(b)
        while any(self.alive):
            yield from self._round(state, wants, clock)

    def _round(self, state: object, wants: FeatureSpec, clock: _Clock) -> Iterator[Piece | Generation]:
        device = self.target.device
        live = [b for b, a in enumerate(self.alive) if a]
        # The last token a row may write is the bonus, so a node may stand at most one place before the end of its room.
        left = [
            self.limits[b] - (len(self.ids[b]) - len(self.prompts[b])) if a else 1 for b, a in enumerate(self.alive)
        ]
        clock.lap()
        if self.composition:
            room = torch.tensor([n - 1 for n in left], device=device)
            places = torch.tensor([len(i) for i in self.ids], device=device)
            draws = Draws(self.sampling, self.requests, places)
            tree = self.composition.propose(state, Limits(room, self.end_tensor, draws))
        else:
            tree = empty(len(self.ids), device)
        draft_ms = clock.lap(self.composition is not None)
        roots = torch.tensor([i[-1] for i in self.ids], device=device)
        out = self.target.verify(tree.rows(roots), wants)
        verdict = self._verdict(tree, out)
        verify_ms = clock.lap()
        context = [len(i) for i in self.ids]
        pieces, lengths = self._commit(tree, verdict)
        rows = torch.zeros((len(self.ids), max(1, max(lengths))), dtype=torch.int64)
        for b, length in enumerate(lengths):
            # The committed rows are the root's and the accepted nodes'; the bonus is the next root and has no row yet.
            rows[b, :length] = torch.tensor([0, *(n + 1 for n in verdict.nodes[b])][:length])
        self.target.commit(rows, lengths)
        if self.composition and any(self.alive):
            self._observe(state, rows, out.hidden, lengths)
        rest_ms = clock.lap()
        share = len(live)
        counts = tree.counts.tolist()
        owners = tree.owner.tolist()
        names = self.composition.names if self.composition else ()
        for b in live:
            accepted = len(verdict.nodes[b])
            self.rounds[b].append(
                Round(
                    request=b,
                    nodes=counts[b],
                    reached=verdict.reached[b],
                    accepted=accepted,
                    committed=accepted + 1,
                    kept=len(pieces[b].token_ids),
                    owners=tuple(owners[b][n] for n in verdict.nodes[b]),
                    context=context[b],
                    draft_ms=draft_ms / share,
                    verify_ms=verify_ms / share,
                    rest_ms=rest_ms / share,
                    drafted=tuple(owners[b][: counts[b]].count(i) for i in range(len(names))),
                )
            )
            self.spent[b] += (draft_ms + verify_ms + rest_ms) / share
            yield pieces[b]
            yield from self._finish(b)

    def _verdict(self, tree: DraftTree, out: TargetOut) -> verification.Verdict:
        chosen = out.choices
        if chosen is not None and (tree.sampled or self.rule != "keyed"):
            raise UserError(
                "a stored answer replays deterministic candidates with keyed verification only: sampled candidates "
                "(growth.kind sampled, verification token or block) need the target's logits; decode instead"
            )
        if chosen is None:
            assert out.logits is not None
            given = (tree, out.logits, self.sampling, self.requests, self.ids)
            if self.rule != "keyed":
                return rejection.verdict(*given, self.rule, self.lasts)
            chosen = verification.choices(*given, self.lasts)
        return verification.walk(tree, chosen)

    def _commit(self, tree: DraftTree, verdict: verification.Verdict) -> tuple[dict[int, Piece], list[int]]:
        """Append what was accepted, up to an end token; returns the pieces and how many rows each sequence keeps."""
        pieces: dict[int, Piece] = {}
        lengths = [0] * len(self.ids)
        owners = tree.owner.tolist()
        for b, alive in enumerate(self.alive):
            if not alive:
                continue
            path, tokens = verdict.nodes[b], verdict.tokens[b]
            kept = next((i + 1 for i, t in enumerate(tokens) if t in self.ends), len(tokens))
            self.ids[b] += tokens[:kept]
            lengths[b] = kept
            origins = [*(owners[b][n] for n in path), -1][:kept]
            depths = [*range(1, len(path) + 1), 0][:kept]
            pieces[b] = Piece(b, tokens[:kept], origins, depths)
        return pieces, lengths

    def _observe(self, state: object, rows: Tensor, hidden: Mapping[Layer, Tensor], lengths: list[int]) -> None:
        assert self.composition is not None
        width = max(1, max(lengths))
        tokens = torch.zeros((len(self.ids), width), dtype=torch.int64)
        for b, length in enumerate(lengths):
            if length:
                tokens[b, :length] = torch.tensor(self.ids[b][-length:])
        index = rows.to(self.target.device)[:, :, None]
        states = {name: h.gather(1, index.expand(-1, -1, h.shape[2])) for name, h in hidden.items()}
        self.composition.observe(state, tokens.to(self.target.device), states, lengths)

    def _finish(self, b: int) -> Iterator[Generation]:
        written = self.ids[b][len(self.prompts[b]) :]
        ended = bool(written) and written[-1] in self.ends
        if ended or len(written) >= self.limits[b]:
            self.alive[b] = False
            yield Generation(b, written, "stop" if ended else "length", self.rounds[b], self.prefill_ms, self.spent[b])


class _Clock:
    """Milliseconds between laps; waits for a GPU's queue where a lap is asked to be exact."""

    def __init__(self, device: torch.device) -> None:
        self._wait: Callable[[], None] | None = torch.cuda.synchronize if device.type == "cuda" else None
        self._last = time.perf_counter()

    def lap(self, exact: bool = True) -> float:
        if exact and self._wait:
            self._wait()
        now = time.perf_counter()
        elapsed, self._last = (now - self._last) * 1e3, now
        return elapsed
