"""The score file: a row for each sample, its means those of its answer tokens."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet
import pytest
from tests.tiny import VOCAB, tiny_target
from tests.unit.training.stored import random_samples, stored

from draftsmith.selection.files import write_scores
from draftsmith.selection.samples import Selection
from draftsmith.selection.scores import DRAFT_AWARE, SCORES


def test_means_are_over_answer_tokens_and_choices_are_told(tmp_path: Path) -> None:
    store = stored(random_samples(8), tmp_path)
    kept, dropped = store.ids[:5], dict.fromkeys(store.ids[5:], "not chosen")
    chosen = Selection(tuple(kept), dropped, {"s0": 0.5}, (0.1,), 1, 2, 3, 4)
    write_scores(tmp_path / "scores.parquet", store, chosen, VOCAB)
    rows = {row["id"]: row for row in pyarrow.parquet.read_table(tmp_path / "scores.parquet").to_pylist()}
    assert list(rows) == store.ids
    assert (rows["s0"]["rank_score"], rows["s1"]["rank_score"]) == (0.5, None)
    assert [rows[i]["kept"] for i in store.ids] == [True] * 5 + [False] * 3
    assert rows[store.ids[7]]["reason"] == "not chosen"
    compared = 0
    for sample in store:
        row = rows[sample.id]
        assert set(SCORES) - DRAFT_AWARE <= set(row)
        p = tiny_target().project(sample.hidden["final"]).double().softmax(-1)[sample.answer_rows]
        assert row["answer_tokens"] == len(p)
        if len(p):
            assert row["flatness"] == pytest.approx(float((1 / (p.norm(dim=-1) * VOCAB**0.5)).mean()), rel=1e-5)
            assert row["top-1"] == pytest.approx(-float(p.amax(-1).mean()), rel=1e-5)
            compared += 1
        else:
            assert row["flatness"] is None
    assert compared > 3
