"""Scores in a file: a row for each sample, for pandas, DuckDB or another trainer's own selection."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from draftsmith.data.features import StoredSample
from draftsmith.numerics.distributions import TokenStatistics
from draftsmith.selection.samples import Selection
from draftsmith.selection.scores import Evidence, available


def write_scores(path: Path, samples: Iterable[StoredSample], chosen: Selection, vocab_size: int) -> None:
    """Write a parquet file of samples: `id, answer_tokens, positions, complete, kept, reason, rank_score`, and the mean
    over the answer's tokens of every score that the target's statistics give, by its name.

    `rank_score` is what the sample was ranked by; it and the means are null where there is none.
    """
    import pyarrow
    import pyarrow.parquet

    rows = []
    for sample in samples:
        answer = sample.answer_rows
        columns = {name: values[answer] for name, values in sample.statistics.items()}
        found = available(Evidence(TokenStatistics(**columns, vocab_size=vocab_size)))
        rows.append(
            {
                "id": sample.id,
                "answer_tokens": int(answer.sum()),
                "positions": len(sample.ids),
                "complete": sample.complete,
                "kept": sample.id not in chosen.dropped,
                "reason": chosen.dropped.get(sample.id),
                "rank_score": chosen.scores.get(sample.id),
                **{name: float(values.double().mean()) if len(values) else None for name, values in found.items()},
            }
        )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
