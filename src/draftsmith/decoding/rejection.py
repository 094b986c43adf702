"""Rules that judge sampled candidates by what they were drawn from: options beside the keyed verifier.

Each keeps the target's distribution exactly, but not plain decoding's text at the same seed. With P the target's
processed distribution after a node and Q what its candidates were drawn from:

- token, one candidate (Leviathan et al., 2211.17192, Alg. 1): accept x with min(1, P(x) / Q(x)); if refused, the next
  token is drawn from norm(max(P − Q, 0)).
- token, several candidates x_1 … x_k: the same once more on what is left. P_1 = P, Q_1 = Q; accept x_j with
  min(1, P_j(x_j) / Q_j(x_j)), else P_{j+1} = norm(max(P_j − Q_j, 0)). Drawn independently, Q_{j+1} = Q (SpecInfer,
  2305.09781, Alg. 3); without replacement, Q_{j+1} = Q_j without x_j, renormalised (2402.14160, Alg. 2).
- block, chains (Sun et al., 2403.10444, Alg. 2): see `block_chances`.

`chances` and `block_chances` are pure; all randomness is in `drawn.flip` and `drawn.pick`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from draftsmith.decoding import drawn
from draftsmith.decoding.drawn import Draws
from draftsmith.decoding.tree import DraftTree, Sampled
from draftsmith.decoding.verification import Verdict
from draftsmith.foundation.errors import UserError
from draftsmith.target.sampling import Sampling, processed

Rule = Literal["token", "block"]


def chances(p: Tensor, q: Tensor, tokens: Tensor, live: Tensor, replacement: bool) -> tuple[Tensor, Tensor]:
    """The token rule at one node of each sequence.

    Args:
        p, q: `[B, V]` float64, the target's distribution and the candidates'.
        tokens: `[B, K]` int64, candidates in the order in which they were drawn.
        live: `[B, K]` bool, which of them were drawn at all.
        replacement: whether they were drawn independently.

    Returns:
        `[B, K]` the probability with which each is accepted if those before it were refused; `[B, V]` what the next
        token is drawn from if all were.
    """
    accepted: list[Tensor] = []
    for j in range(tokens.shape[1]):
        token, there = tokens[:, j : j + 1], live[:, j : j + 1]
        share = p.gather(1, token) / q.gather(1, token)
        accepted.append(torch.where(there, share.clamp(max=1), 0.0))
        p = torch.where(there, left_over(p, q), p)
        if not replacement:
            q = torch.where(there, _normalised(q.scatter(1, token, 0.0), q), q)
    return torch.cat(accepted, 1), p


def block_chances(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Block verification of chains X_1 … X_γ: τ is the largest i whose coin falls, X_1 … X_τ are committed.

        w_0 = 1,  w_i = min(1, w_{i−1} · P_{i−1}(X_i) / Q_{i−1}(X_i)),
        coin i falls with S_i / (S_i + 1 − w_i), S_i = Σ_x max(w_i P_i(x) − Q_i(x), 0), for i < γ, with w_γ for i = γ;
        then the next token is drawn from norm(max(w_τ P_τ − Q_τ, 0)), after the whole chain from P_γ.

    A chain ends at an end token: what follows it is certain, for target and drafter alike, so this is the rule itself.

    Args:
        p: `[B, 1+G, V]` float64, the target's distributions after the root and each node.
        q: `[B, G, V]` float64, what each node was drawn from.
        tokens: `[B, G]` int64.
        lengths: `[B]` int64, γ of each sequence, at most G.

    Returns:
        `[B, G]` the coins' probabilities (0 beyond γ); `[B, 1+G, V]` what is drawn from after τ = 0 … G tokens.
    """
    size = tokens.shape[1]
    weight = torch.ones_like(p[:, :1, 0])
    coins: list[Tensor] = []
    rest: list[Tensor] = []
    for i in range(size + 1):
        if i:
            token = tokens[:, i - 1 : i]
            weight = (weight * p[:, i - 1].gather(1, token) / q[:, i - 1].gather(1, token)).clamp(max=1)
        last = (lengths == i)[:, None]
        surplus = (weight * p[:, i] - q[:, i]).clamp(min=0) if i < size else p[:, i]
        mass = surplus.sum(1, keepdim=True)
        rest.append(torch.where(last | (mass == 0), p[:, i], surplus))
        if i:
            # mass and 1 − weight are both 0 where P and Q are equal: then some later coin is certain to fall
            going = mass / (mass + 1 - weight).clamp(min=torch.finfo(mass.dtype).tiny)
            coins.append(torch.where(last, weight, torch.where(lengths[:, None] > i, going, 0.0)))
    return torch.cat(coins, 1) if coins else weight[:, :0], torch.stack(rest, 1)


def left_over(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(P − Q, 0)) of `[B, V]` distributions: what a refusal leaves of P."""
    return _normalised((p - q).clamp(min=0), p)


def verdict(
    tree: DraftTree,
    logits: Tensor,
    sampling: Sampling,
    requests: Sequence[int | str],
    committed: Sequence[Sequence[int]],
    rule: Rule,
    lasts: Sequence[int] | None = None,
) -> Verdict:
    """What is committed of trees of sampled candidates, from logits `[B, 1+N, V]`; arguments as in
    `verification.choices`.

    Raises:
        UserError: the candidates were not sampled, or block verification is asked for trees that are no chains.
    """
    sampled = tree.sampled
    if sampled is None:
        raise UserError(
            f"verification {rule!r} judges sampled candidates by what they were drawn from: set growth.kind to "
            "sampled, or verification to keyed"
        )
    if rule == "block" and max(sampled.branches, default=1) > 1:
        raise UserError("verification 'block' is for chains: let growth.branches be ones, or verification token")
    positions = torch.tensor([len(c) for c in committed], device=logits.device)
    draws = Draws(sampling, requests, positions)
    judged = _Judged(tree, sampled, logits, draws, committed, lasts)
    path, tokens = _block(judged) if rule == "block" else _tokens(judged)
    held = torch.zeros_like(logits[:, :, 0], dtype=torch.int64).scatter_reduce(
        1, tree.parents + 1, tree.live.long(), "amax"
    )
    nodes: list[list[int]] = []
    written: list[list[int]] = []
    reached: list[int] = []
    children = held.tolist()
    for b, (own, last, ids) in enumerate(zip(path.tolist(), tokens.tolist(), tree.tokens.tolist(), strict=True)):
        accepted = [node for node in own if node >= 0]
        nodes.append(accepted)
        written.append([*(ids[node] for node in accepted), last])
        reached.append(len(accepted) + children[b][accepted[-1] + 1 if accepted else 0])
    return Verdict(nodes, written, reached)


@dataclass(frozen=True)
class _Judged:
    tree: DraftTree
    sampled: Sampled
    logits: Tensor
    draws: Draws
    committed: Sequence[Sequence[int]]
    lasts: Sequence[int] | None

    def law(self, rows: Tensor, path: Sequence[Tensor]) -> Tensor:
        """The target's distribution `[B, V]` float64 after rows `[B]`, which nodes `path` lead to."""
        own = self.logits.gather(1, rows[:, None, None].expand(-1, 1, self.logits.shape[2]))[:, 0]
        sampling = self.draws.sampling
        contexts: list[list[int]] | None = None
        if sampling.path_dependent:
            taken = _stacked(path, rows)
            ids = self.tree.tokens.gather(1, taken.clamp(min=0)) if path else taken
            contexts = [
                [*before, *(token for node, token in zip(nodes, tokens, strict=True) if node >= 0)]
                for before, nodes, tokens in zip(self.committed, taken.tolist(), ids.tolist(), strict=True)
            ]
        scores = processed(own, contexts, sampling, self.lasts).double()
        if sampling.temperature == 0.0:
            return torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0)
        return scores.softmax(dim=1)

    def proposal(self, rows: Tensor) -> Tensor:
        """What candidates below rows `[B]` were drawn from, over the target's vocabulary: `[B, V]` float64."""
        q = self.sampled.log_q
        row = rows.clamp(max=q.shape[1] - 1)
        own = q.gather(1, row[:, None, None].expand(-1, 1, q.shape[2]))[:, 0].exp()
        wide = torch.zeros((len(rows), self.logits.shape[2]), dtype=own.dtype, device=own.device)
        return wide.index_copy_(1, self.sampled.target_ids, own)


def _tokens(judged: _Judged) -> tuple[Tensor, Tensor]:
    """Accepted nodes by depth `[B, D]` (−1 behind the last) and the token after them `[B]`."""
    tree, sampled, draws = judged.tree, judged.sampled, judged.draws
    live = tree.live
    at = torch.zeros_like(draws.positions)  # rows: 0 the root, 1 + n node n
    going = torch.ones_like(at, dtype=torch.bool)
    path: list[Tensor] = []
    rest = judged.law(at, path)
    first, wide = 0, 1  # the parents' first row and number; nodes above this depth: all rows to theirs but the root
    for depth, count in enumerate(sampled.branches, start=1):
        kids = first + wide - 1 + (at - first)[:, None] * count + torch.arange(count, device=at.device)
        kids = kids.clamp(0, tree.size - 1)
        there = live.gather(1, kids) & going[:, None]
        chance, after = chances(rest, judged.proposal(at), tree.tokens.gather(1, kids), there, sampled.replacement)
        fell = drawn.flip(chance, draws.keys("acceptance", depth))
        chosen = kids.gather(1, fell.byte().argmax(1, keepdim=True))[:, 0]
        going = going & fell.any(1)
        path.append(torch.where(going, chosen, -1))
        at = torch.where(going, chosen + 1, at)
        rest = torch.where(going[:, None], judged.law(at, path), after)
        first, wide = first + wide, wide * count
    return _stacked(path, at), _next(rest, path, draws)


def _block(judged: _Judged) -> tuple[Tensor, Tensor]:
    tree, draws = judged.tree, judged.draws
    index = torch.arange(tree.size, device=tree.tokens.device).expand(tree.batch, -1)
    rows = [torch.full_like(draws.positions, row) for row in range(1 + tree.size)]
    nodes = [row - 1 for row in rows[1:]]
    p = torch.stack([judged.law(row, nodes[:i]) for i, row in enumerate(rows)], 1)
    q = torch.stack([judged.proposal(row) for row in rows[:-1]], 1) if nodes else p[:, :0]
    coins, rest = block_chances(p, q, tree.tokens, tree.live.sum(1))
    fell = [drawn.flip(coins[:, i : i + 1], draws.keys("acceptance", i + 1)) for i in range(tree.size)]
    taken = torch.where(torch.cat(fell, 1), index + 1, 0).amax(1) if fell else draws.positions * 0
    path = torch.where(index < taken[:, None], index, -1)
    after = rest.gather(1, taken[:, None, None].expand(-1, 1, rest.shape[2]))[:, 0]
    return path, _next(after, list(path.unbind(1)), draws)


def _next(weights: Tensor, path: Sequence[Tensor], draws: Draws) -> Tensor:
    """The token behind the accepted path: drawn at each sequence's own depth."""
    depth = sum((node >= 0 for node in path), torch.zeros_like(draws.positions))
    keys = torch.stack([draws.keys("remainder", d) for d in range(1, len(path) + 2)], 1).to(weights.device)
    return drawn.pick(weights, keys.gather(1, depth[:, None])[:, 0])


def _stacked(path: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack(list(path), 1) if path else like[:, None][:, :0]


def _normalised(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Rows of `weights` as distributions; a row of zeros, which rounding alone can cause, becomes `otherwise`."""
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=torch.finfo(total.dtype).tiny), otherwise)
