"""How flat the target's distributions are over a corpus: one HTML page of its distribution and coloured answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from draftsmith.evaluation.report import figures, views
from draftsmith.evaluation.report.inputs import Run, Sample, Scored
from draftsmith.foundation import artefacts

BINS = 12
EACH = 2  # samples shown of the flattest, the middle and the least flat


def distribution(scores: Sequence[Scored], bins: int = BINS) -> list[tuple[float, float, float]]:
    """A corpus's tokens by flatness, in bins of equal width on a logarithmic scale: (from, to, share of the tokens)."""
    values = np.array([value for sample in scores for value in sample.flatness])
    if not len(values):
        return []
    edges = np.geomspace(values.min(), max(values.max(), values.min() * 1.01), bins + 1)
    # the ends of a logarithmic scale are rounded: the least and the largest belong inside
    edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
    counts = np.histogram(values, edges)[0]
    return [(float(a), float(b), float(n) / len(values)) for a, b, n in zip(edges, edges[1:], counts, strict=False)]


def ranked(scores: Sequence[Scored]) -> list[tuple[float, Scored]]:
    """The samples that hold an answer, by the mean flatness of its tokens, flattest first."""
    found = [(float(np.mean(sample.flatness)), sample) for sample in scores if sample.flatness]
    return sorted(found, key=lambda item: (-item[0], item[1].id))


def shown(scores: Sequence[Scored], each: int = EACH) -> list[tuple[str, float, Scored]]:
    """Samples to look at: some of the flattest, of the middle, of the least flat, each with its mean."""
    order = ranked(scores)
    if len(order) <= 3 * each:
        return [("", mean, sample) for mean, sample in order]
    middle = (len(order) - each) // 2
    parts = [("flattest", order[:each]), ("middle", order[middle : middle + each]), ("least flat", order[-each:])]
    return [(name, mean, sample) for name, part in parts for mean, sample in part]


def write_flatness_page(
    scores: Sequence[Scored],
    examples: Sequence[tuple[str, float, Scored]],
    kept: set[str] | None,
    name: str,
    out: Path,
) -> Path:
    """Write a page of a corpus's flatness, nothing loaded from elsewhere.

    Args:
        scores: every sample's flatness; text is needed of the examples only.
        examples: what they are called, mean flatness, the sample with its tokens' texts.
        kept: ids of the samples that a selection kept; None where none was made.
        name: of the corpus.
        out: the page.
    """
    import jinja2

    samples = [Sample(s.id, mean, kept is None or s.id in kept, len(s.flatness)) for mean, s in ranked(scores)]
    run = Run(Path(), samples=samples if kept is not None else [], scores=list(scores))
    plots = figures.draw_run(run)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("draftsmith.evaluation", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template("flatness.html.j2").render(
        name=name,
        samples=len(samples),
        tokens=sum(len(s.flatness) for s in scores),
        mean=float(np.mean([value for s in scores for value in s.flatness])) if samples else 0.0,
        kept=None if kept is None else len(kept),
        plots=plots,
        bins=distribution(scores),
        examples=examples,
        borders=views.shade_borders(scores),
        flatness_spans=views.flatness_spans,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    artefacts.write_text(out, text)
    return out
