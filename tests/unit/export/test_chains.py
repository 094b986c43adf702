"""How many speculative tokens: the formulas by hand, and the choice."""

from __future__ import annotations

from itertools import pairwise

import pytest

from draftsmith.export.chains import best, chains

VERIFY = {1: 20.0, 3: 24.0, 5: 40.0}


def test_by_hand() -> None:
    found = chains([0.6, 0.5, 0.4], VERIFY, [2.0, 4.0, 6.0])
    assert [c.tokens for c in found] == [0, 1, 2, 3]
    assert [c.acceptance_length for c in found] == pytest.approx([1.0, 1.6, 1.9, 2.02])
    assert [c.round_cost for c in found] == pytest.approx([1.0, 24 / 20, 28 / 20, 38 / 20])
    assert [c.speedup for c in found] == pytest.approx([1.0, 1.6 / 1.2, 1.9 / 1.4, 2.02 / 1.9])
    assert best(found).tokens == 2


def test_it_does_not_pay() -> None:
    assert best(chains([0.1, 0.1], VERIFY, [2.0, 4.0])).tokens == 0


def test_one_more_pays_as_long_as_it_adds_more_to_tau_than_to_the_cost() -> None:
    """The rule of docs/serving.md is the speed-up's own."""
    found = chains([0.7, 0.6, 0.5, 0.4, 0.3], {1: 20.0, 16: 60.0}, [2.0, 3.0, 4.0, 5.0, 6.0])
    for one, more in pairwise(found):
        adds = (more.acceptance_length - one.acceptance_length) / one.acceptance_length
        costs = (more.round_cost - one.round_cost) / one.round_cost
        assert (adds > costs) == (more.speedup > one.speedup)
