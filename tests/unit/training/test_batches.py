"""What counts, what stands where in a batch, and how an epoch is planned: against naive loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.data.samples import Sample
from draftsmith.numerics.losses import STRIDE, rounded
from draftsmith.target.protocol import FeatureSpec
from draftsmith.training.batches import collate, counted_starts, epoch_plan
from tests.unit.training.stored import LAYERS, random_samples, stored


def counts(mask: list[bool], p: int, step: int) -> bool:
    """DESIGN's contract, word for word: all of x_{p+1} … x_{p+2+k} are answer tokens of one turn."""
    wanted = range(p + 1, p + 3 + step)
    return wanted.stop <= len(mask) and all(mask[i] for i in wanted)


@given(st.lists(st.booleans(), min_size=1, max_size=24), st.integers(1, 5))
def test_counted_starts_are_those_of_the_contract(mask: list[bool], steps: int) -> None:
    found = counted_starts(torch.tensor(mask), steps)
    assert found.shape == (steps, len(mask))
    assert found.tolist() == [[counts(mask, p, step) for p in range(len(mask))] for step in range(steps)]


def test_nothing_behind_an_answers_end_is_taught() -> None:
    """Prompt of 3, answer of 4 (its end token is the last), prompt of 2, answer of 2."""
    mask = [False] * 3 + [True] * 4 + [False] * 2 + [True] * 2
    found = counted_starts(torch.tensor(mask), 3)
    taught = [{p + 2 + step for p in range(len(mask)) if found[step, p]} for step in range(3)]
    # the first answer token is nobody's to draft (the prefill's), what follows an end belongs to no answer
    assert taught == [{4, 5, 6, 10}, {5, 6}, {6}]
    starts = {p for p in range(len(mask)) if found[0, p]}
    assert starts == {2, 3, 4, 8}, "the first draft reads the prompt's last state and the first answer token"


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths, st.integers(16, 40), st.integers(16, 120), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_holds_every_sample_once_in_rows_that_fit(
    sizes: list[int], row: int, batch: int, seed: int, epoch: int
) -> None:
    plan = epoch_plan(sizes, row, batch, seed, epoch)
    assert sorted(i for rows in plan for members in rows for i in members) == list(range(len(sizes)))
    for rows in plan:
        assert 1 <= len(rows) <= max(1, batch // row)
        for members in rows:
            assert members
            assert sum(sizes[i] for i in members) <= row or len(members) == 1


@settings(max_examples=30)
@given(lengths, st.integers(16, 40), st.integers(16, 120))
def test_a_row_is_opened_only_where_no_other_has_room(sizes: list[int], row: int, batch: int) -> None:
    for rows in epoch_plan(sizes, row, batch, 0, 0):
        free: list[int] = []
        for members in rows:
            assert all(room < sizes[members[0]] for room in free)
            free.append(row - sum(sizes[i] for i in members))


def test_epochs_differ_and_can_be_repeated() -> None:
    plans = [epoch_plan([10] * 20, 30, 60, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({str(plan) for plan in plans}) == 4
    assert epoch_plan([10] * 20, 30, 60, 1, 1) == plans[3]
    fuller = epoch_plan([10] * 20, 30, 60, 0, 0)
    assert [len(rows) for rows in fuller] == [2, 2, 2, 1], "20 samples of 10 fill 7 rows of 30, two a batch"


@pytest.mark.parametrize("steps", [1, 4])
def test_a_batch_against_naive_loops(tmp_path: Path, steps: int) -> None:
    samples = [*random_samples(7, seed=steps), Sample("silent", [9, 10, 11], [False] * 3, True)]
    source = stored(samples, tmp_path)
    rows = [["s0", "s1", "s2"], ["s3"], ["silent"], ["s4", "s5", "s6"]]
    wants = FeatureSpec(LAYERS)
    batch = collate([[source[i] for i in row] for row in rows], wants, steps, torch.device("cpu"))
    known = {sample.id: sample for sample in samples}
    width = rounded(max(sum(len(known[i].ids) for i in row) for row in rows))
    assert batch.unroll.starts.shape[1] % STRIDE == 0 or batch.unroll.starts.shape[1] == width
    unroll = batch.unroll
    assert unroll.ids.shape == unroll.segments.shape == unroll.positions.shape == batch.log_z.shape == (4, width)
    assert batch.positions == sum(len(sample.ids) for sample in samples)
    number = 0
    for r, row in enumerate(rows):
        at = 0
        expected: list[tuple[int, int]] = []  # start, sample
        flags: dict[int, list[bool]] = {}
        for name in row:
            sample, kept = known[name], source[name]
            for p in range(len(sample.ids)):
                assert unroll.ids[r, at + p] == sample.ids[p]
                assert unroll.segments[r, at + p] == number
                assert unroll.positions[r, at + p] == p
                features = torch.cat([kept.hidden[k][p] for k in LAYERS])
                assert torch.equal(unroll.features[r, at + p], features)
                assert torch.equal(batch.final[r, at + p], kept.hidden["final"][p])
                assert batch.log_z[r, at + p] == kept.statistics["log_z"][p]
                if counts(sample.mask, p, 0):
                    expected.append((at + p, number))
                    flags[at + p] = [counts(sample.mask, p, step) for step in range(steps)]
            at += len(sample.ids)
            number += 1
        assert (unroll.segments[r, at:] == -1).all()
        active = unroll.active[r]
        assert unroll.starts[r][active].tolist() == [start for start, _ in expected]
        assert batch.samples[r][active].tolist() == [owner for _, owner in expected]
        assert batch.counted[:, r, active].T.tolist() == [flags[start] for start, _ in expected]
        assert not batch.counted[:, r, ~active].any(), "padding may not count"
    assert number == len(samples)
