"""The probe: which tokens are taught, that nothing else is, and what is told of each decile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.studies import grid, heads, probe
from draftsmith.studies.grid import Setting
from draftsmith.studies.probe import Marked, MarkedObjective, Probe
from tests.unit.studies.rows import row
from tests.unit.studies.tiny_study import study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    whole = study(tmp_path_factory.mktemp("probe"))
    return Probe(whole.options, whole.out)


def test_halves_part_the_tokens_by_flatness_or_chance(made: Probe) -> None:
    made.prepare()
    store, ids = made.sfdd.corpus.training, made.sfdd.corpus.train_ids
    marks = {part: made.marks(Setting(part)) for part in probe.PARTS}
    answers = torch.cat([store[i].answer_rows for i in ids])
    flatness = torch.cat([made.flatness(store[i]) for i in ids])
    joined = {part: torch.cat([by_id[i] for i in ids]) for part, by_id in marks.items()}
    assert bool(joined[probe.ALL].all())
    assert bool((joined[probe.FLAT] ^ joined[probe.PEAKED]).all())
    assert flatness[joined[probe.FLAT] & answers].min() > flatness[joined[probe.PEAKED] & answers].max()
    for part in (probe.FLAT, probe.PEAKED):
        assert joined[part][answers].float().mean() == pytest.approx(0.5, abs=0.02)
    assert joined[probe.RANDOM].float().mean() == pytest.approx(0.5, abs=0.1)
    other = made.marks(Setting(probe.RANDOM, seed=1))
    assert any(not other[i].equal(marks[probe.RANDOM][i]) for i in ids)


def test_only_marked_rows_enter_the_loss(made: Probe) -> None:
    made.prepare()
    corpus = made.sfdd.corpus
    head = heads.fresh_head(corpus, made.sfdd.vocab, 0)
    ids = corpus.train_ids[:3]
    marks = made.marks(Setting(probe.RANDOM))
    plain = heads.objective_of(corpus, head, made.options.train)
    marked = MarkedObjective(**vars(plain), scale=2.0)
    samples = Marked(corpus.training, marks).fetch(ids, 0)
    batch = marked.collate([[samples[0], samples[1]], [samples[2]]], head.device)
    # by hand: the row of x_{p+1+k} of each draft, found by walking the packed samples
    for term, whole in zip(marked.losses(batch, (0, 0)), plain.losses(batch, (0, 0)), strict=True):
        where = batch.counted[term.step].nonzero()
        taught = batch.unroll.starts[where[:, 0], where[:, 1]] + 1 + term.step
        flags = torch.tensor(
            [float(_mark(samples, marks, int(r), int(t))) for r, t in zip(where[:, 0], taught, strict=True)]
        )
        assert 0 < flags.mean() < 1
        torch.testing.assert_close(term.values, whole.values * flags * 2.0)


def _mark(samples: list, marks: dict[str, torch.Tensor], row: int, place: int) -> bool:  # type: ignore[type-arg]
    first = [samples[0], samples[1]] if row == 0 else [samples[2]]
    for sample in first:
        if place < len(sample.ids):
            return bool(marks[sample.id][place])
        place -= len(sample.ids)
    raise AssertionError("a draft beyond its row")


def test_a_whole_probe_tells_each_decile_s_tokens(made: Probe, tmp_path: Path) -> None:
    assert grid.run(made, tmp_path) == grid.Progress(4, 4)
    rows = grid.read_rows(tmp_path / "results" / grid.ROWS)
    assert {r.method for r in rows} == set(probe.PARTS)
    assert len({r.training_positions for r in rows}) == 1
    for r in rows:
        store = made.sfdd.corpus.test_store(r.temperature)
        # no draft teaches an answer's first token
        counted = sum(int(store[i].answer_rows.sum()) - 1 for i in r.prompts)
        assert sum(int(r.extra[f"tokens_{d}"]) for d in range(1, 11)) == counted
        assert all(0 <= float(r.extra[f"after_{d}"]) <= int(r.extra[f"tokens_{d}"]) for d in range(1, 11))
    titles = [table.title for table in probe.tables(rows)]
    assert titles[0] == "Flat against peaked tokens: acceptance length, T=0"
    assert titles[1] == "Overlap gained by decile of flatness, T=0"
    assert [plot.name for plot in probe.figures(rows)] == ["probe-0", "probe-1"]


def test_gains_are_means_over_all_rows_tokens() -> None:
    zero = {f"{name}_{d}": 0 for name in ("tokens", "before", "after") for d in range(1, 11)}
    rows = [
        row(extra={**zero, "tokens_1": 4, "before_1": 1.0, "after_1": 3.0}),
        row(extra={**zero, "tokens_1": 6, "before_1": 1.0, "after_1": 2.0}),
    ]
    before, gained = probe.gains(rows)[0]
    assert (before, gained) == pytest.approx((0.2, 0.3))
    assert probe.tables([]) == probe.figures([]) == []
