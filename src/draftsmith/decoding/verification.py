"""Decide which drafted path is committed.

The default, *keyed* verifier: at each node draw the target's token x there; if x is one of the node's children,
descend; else x is the bonus token. With deterministic candidates this has exactly the law of "accept with probability
p, else renormalise the residual", and with draws keyed by (seed, request, position) it equals plain decoding token for
token (drafter-invariant speculative decoding, 2408.07978).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from draftsmith.decoding.tree import DraftTree
from draftsmith.target.sampling import Sampling, next_tokens

# keyed: this module's; token, block: the rules for sampled candidates in `rejection`
Verification = Literal["keyed", "token", "block"]


@dataclass(frozen=True)
class Verdict:
    """What one verification decided, one entry a sequence.

    Attributes:
        nodes: accepted nodes along the path (indices into the tree), shallowest first.
        tokens: the committed tokens: the nodes' and then the bonus.
        reached: accepted depth, plus one if the last accepted node (or the root) had a child to accept.
    """

    nodes: list[list[int]]
    tokens: list[list[int]]
    reached: list[int]


def choices(
    tree: DraftTree,
    logits: Tensor,
    sampling: Sampling,
    requests: Sequence[int | str],
    committed: Sequence[Sequence[int]],
    lasts: Sequence[int] | None = None,
) -> Tensor:
    """The target's token after the root and after each node, `[B, 1+N]` int64, from logits `[B, 1+N, V]`.

    Args:
        committed: each sequence's ids so far, the root last; a node's context is these and its own ancestors.
        lasts: as in `next_tokens`.
    """
    device = logits.device
    lengths = torch.tensor([len(c) for c in committed])
    depths = torch.cat([torch.zeros((tree.batch, 1), dtype=torch.int64), tree.depths.cpu()], dim=1)
    contexts = _contexts(tree, committed) if sampling.path_dependent else None
    return next_tokens(logits, sampling, requests, (lengths[:, None] + depths).to(device), contexts, lasts)


def walk(tree: DraftTree, chosen: Tensor) -> Verdict:
    """Follow the target's tokens `chosen [B, 1+N]` through the tree as far as they were drafted.

    A node is accepted if its parent is and the target chose it there. Where siblings are equal (trees merged without
    de-duplication) both are, and the deepest accepted node counts, of equals the first.
    """
    batch = tree.batch
    hit = (tree.tokens == chosen.gather(1, tree.parents + 1)) & tree.live
    accepted = (hit[:, None, :] | ~tree.lineage).all(dim=2)
    # One transfer to the host a round: everything below is plain lists.
    packed = torch.cat(
        [accepted.long(), tree.depths, tree.parents, tree.tokens, tree.live.long(), chosen], dim=1
    ).tolist()
    size = tree.size
    nodes: list[list[int]] = []
    tokens: list[list[int]] = []
    reached: list[int] = []
    for row in range(batch):
        flags, depths, parents, ids, real, picks = (
            packed[row][i * size : (i + 1) * size] if i < 5 else packed[row][5 * size :] for i in range(6)
        )
        last = max((i for i in range(size) if flags[i]), key=lambda i: (depths[i], -i), default=-1)
        path: list[int] = []
        node = last
        while node >= 0:
            path.append(node)
            node = parents[node]
        path.reverse()
        held = any(real[i] and parents[i] == last for i in range(size))
        nodes.append(path)
        tokens.append([*(ids[i] for i in path), picks[last + 1]])
        reached.append(len(path) + (1 if held else 0))
    return Verdict(nodes, tokens, reached)


def _contexts(tree: DraftTree, committed: Sequence[Sequence[int]]) -> list[list[int]]:
    contexts: list[list[int]] = []
    parents, tokens = tree.parents.tolist(), tree.tokens.tolist()
    for b, ids in enumerate(committed):
        own: list[list[int]] = []
        for parent, token in zip(parents[b], tokens[b], strict=True):
            own.append([*(own[parent] if parent >= 0 else ids), token])
        contexts += [list(ids), *own]
    return contexts
