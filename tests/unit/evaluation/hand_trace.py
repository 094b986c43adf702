"""Three answers written by hand: one ends inside an accepted path, one lacks room, one is a single token."""

from __future__ import annotations

from draftsmith.decoding.trace import Generation, Round


def a_round(
    request: int,
    nodes: int,
    reached: int,
    owners: tuple[int, ...],
    kept: int,
    context: int,
    draft: float,
    verify: float,
) -> Round:
    depth = len(owners)
    return Round(
        request, nodes, reached, depth, depth + 1, kept, owners, context, draft_ms=draft, verify_ms=verify, rest_ms=1.0
    )


FIRST = Generation(
    request=0,
    token_ids=[11, 12, 13, 14, 15, 2],
    finish="stop",
    rounds=[
        a_round(0, 4, 2, (0, 1), 3, 10, 2.0, 6.0),  # the tree ended at its last accepted node
        a_round(0, 4, 1, (), 1, 13, 2.0, 5.0),  # refused at depth 1
        a_round(0, 4, 3, (1, 1), 1, 14, 2.0, 7.0),  # refused at depth 3; the end token leaves one of three tokens
    ],
    prefill_ms=20.0,
    total_ms=48.0,
)
SECOND = Generation(
    request=1,
    token_ids=[21, 22, 23, 24, 25, 26],
    finish="length",
    rounds=[
        a_round(1, 3, 3, (0, 0, 1), 4, 300, 3.0, 6.0),  # a chain, accepted whole
        a_round(1, 0, 0, (), 1, 304, 0.0, 6.0),  # no room to draft
    ],
    prefill_ms=30.0,
    total_ms=47.0,
)
THIRD = Generation(request=2, token_ids=[2], finish="stop", prefill_ms=25.0, total_ms=25.0)
SPECULATIVE = [FIRST, SECOND, THIRD]
PLAIN = [
    Generation(request=0, token_ids=[11, 12, 13, 14, 15, 2], finish="stop", prefill_ms=20.0, total_ms=60.0),
    Generation(request=1, token_ids=[21, 22, 23, 24, 25, 26], finish="length", prefill_ms=30.0, total_ms=70.0),
    Generation(request=2, token_ids=[2], finish="stop", prefill_ms=25.0, total_ms=25.0),
]
