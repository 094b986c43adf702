"""Overlaps against drafting token by token and comparing whole distributions."""

from __future__ import annotations

from pathlib import Path

import torch

from draftsmith.drafters.eagle3 import Eagle3
from draftsmith.numerics import losses
from draftsmith.target.vocabulary import VocabMap
from draftsmith.training.objectives.eagle3 import Eagle3Objective
from draftsmith.training.overlaps import overlaps
from tests.tiny import VOCAB, tiny_head, tiny_target
from tests.unit.training.stored import random_samples, stored


def test_overlaps_are_those_of_the_drafted_distribution(tmp_path: Path) -> None:
    target = tiny_target()
    vocab = VocabMap(torch.arange(0, VOCAB, 3), VOCAB)
    head: Eagle3 = tiny_head(vocab=vocab)
    store = stored(random_samples(12), tmp_path)
    objective = Eagle3Objective(head, target.output_rows(vocab.target_ids), losses.by_name("forward-kl"), steps=3)
    seen, compared = set(), 0
    for sample, found in overlaps(objective, store, store.ids, batch_positions=60):
        seen.add(sample.id)
        mask = sample.mask.tolist()
        p = target.project(sample.hidden["final"]).softmax(-1)
        for t in range(len(mask)):
            if 0 < t < len(mask) - 1 and mask[t] and mask[t + 1]:
                state = head.start(1, 64)
                features = head.wants.gather(sample.hidden)
                assert features is not None
                # a head is shown each token with the state that produced it; what comes first has none
                shown = torch.cat([torch.zeros_like(features[:1]), features[:t]])[None]
                q = head.observe(state, sample.ids[None, : t + 1], shown, [t + 1]).log_q[0, 0].exp()
                wanted = torch.minimum(p[t, vocab.target_ids], q).sum()
                torch.testing.assert_close(found[t], wanted, atol=1e-5, rtol=1e-4)
                compared += 1
            else:
                assert bool(found[t].isnan())
    assert seen == set(store.ids)
    assert compared > 20
