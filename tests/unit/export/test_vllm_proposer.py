"""The n-gram proposer for vLLM, called as vLLM calls it, against draftsmith's own chains over the same texts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from draftsmith.decoding.growth import ChainGrowth, Limits
from draftsmith.drafters.ngram import NgramDrafter, NgramOptions
from draftsmith.export.vllm_proposer import NgramProposer
from draftsmith.target.vocabulary import VocabMap

V, TOKENS, LONGEST = 40, 3, 64


def config() -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=TOKENS),
        model_config=SimpleNamespace(get_vocab_size=lambda: V),
    )


def expected(ids: list[int]) -> list[int]:
    """Read at once, and grown by draftsmith's own chain."""
    drafter = NgramDrafter(NgramOptions(guess=False), VocabMap.identity(V))
    state = drafter.start(1, LONGEST)
    proposal = drafter.observe(state, torch.tensor([ids]), None, [len(ids)])
    none = torch.tensor([], dtype=torch.int64)
    tree = ChainGrowth(TOKENS).grow(drafter, state, proposal, Limits(torch.tensor([TOKENS]), none))
    return [token for token, depth in zip(tree.tokens[0].tolist(), tree.depths[0].tolist(), strict=True) if depth > 0]


def test_its_chains_are_draftsmiths_own_whatever_row_a_request_stands_in() -> None:
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, V, (LONGEST,), generator=draw).tolist() for _ in range(3)]
    proposer, lengths = NgramProposer(config()), [1, 9, 20]
    rows, seen = [0, 1, 2], set()
    for turn in range(12):
        if turn in (4, 8):  # a batch is put together anew
            rows = rows[1:] + rows[:1]
        ids = np.zeros((3, LONGEST), dtype=np.int32)
        steps = [1 + (turn + i) % 3 for i in range(3)]
        lengths = [n + more for n, more in zip(lengths, steps, strict=True)]
        for row, text in enumerate(rows):
            ids[row, : lengths[text]] = texts[text][: lengths[text]]
        counts = np.array([lengths[text] for text in rows])
        waiting = turn % 3  # its prompt is still being read
        sampled = [[] if row == waiting else [int(ids[row, counts[row] - 1])] for row in range(3)]
        found = proposer.propose(sampled, counts, ids, slot_mappings=None)
        for row, text in enumerate(rows):
            wanted = [] if row == waiting else expected(texts[text][: lengths[text]])
            assert found[row] == wanted
            seen.add(len(found[row]))
    assert seen == {0, TOKENS}, "what was followed before always has a follower itself"


def test_the_same_text_again_in_a_row_is_read_anew() -> None:
    proposer = NgramProposer(config())
    text = [1, 2, 3, 1, 2]
    assert [proposer.chain(0, text) for _ in range(2)] == [expected(text)] * 2
    assert proposer.chain(0, text)[0] == 3
