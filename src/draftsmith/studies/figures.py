"""Figures of a study: acceptance against training cost, and against the share that was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.evaluation.report.drawing import INK, MUTED, SERIES, STYLE, Plot, canvas

Drawing = Plot
MARKERS = "osD^vPX*<>h"


@dataclass(frozen=True)
class Point:
    """A method's place in a figure: `x` is cost or share, `low` and `high` bound `y`."""

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


def scatter(name: str, title: str, caption: str, points: Sequence[Point], x: str, y: str) -> Plot:
    """Labelled points with their intervals; what lies left and above is better."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(3.2 + 0.1 * max(0, len(points) - 8))  # a longer legend leaves the points their room
        for number, point in enumerate(points):
            colour = SERIES[number % len(SERIES)]
            _interval(axes, point, colour)
            marker = MARKERS[number % len(MARKERS)]
            axes.plot([point.x], [point.y], marker, color=colour, label=point.label)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(loc="best", ncols=2 if len(points) > 6 else 1)
    return Plot(name, title, caption, figure)


def lines(
    name: str, title: str, caption: str, series: Sequence[Sequence[Point]], x: str, y: str, level: Point | None = None
) -> Plot:
    """A line for each series, in the order of x; `level` is a dashed line across."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(3.2)
        if level is not None:
            axes.axhline(level.y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label=level.label)
        for number, points in enumerate(series):
            colour = SERIES[number % len(SERIES)]
            ordered = sorted(points, key=lambda point: point.x)
            for point in ordered:
                _interval(axes, point, colour)
            marker = MARKERS[number % len(MARKERS)]
            places = [[p.x for p in ordered], [p.y for p in ordered]]
            axes.plot(*places, f"{marker}-", color=colour, label=ordered[0].label)
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)
        axes.legend(loc="best", ncols=2 if len(series) > 5 else 1)
    return Plot(name, title, caption, figure)


def ranked(name: str, title: str, caption: str, points: Sequence[Point], x: str, mark: Point | None = None) -> Plot:
    """A line for each method, from the top down in the order given: `y` with its interval, to the right is more.

    Args:
        mark: what the others are compared with; a dashed line stands at its place.
    """
    import matplotlib

    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure, axes = canvas(0.6 + 0.24 * len(points))
        if mark is not None:
            axes.axvline(mark.y, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for place, point in enumerate(reversed(points)):
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [place, place], color=SERIES[0], linewidth=3, alpha=0.3)
            axes.plot([point.y], [place], "o", color=SERIES[0])
        axes.set_yticks(range(len(points)), [point.label for point in reversed(points)])
        axes.set_ylim(-0.6, len(points) - 0.4)
        axes.set_xlabel(x)
    return Plot(name, title, caption, figure)


def _interval(axes: object, point: Point, colour: str) -> None:
    if point.low is not None and point.high is not None:
        ends = [point.low, point.high]
        axes.plot([point.x, point.x], ends, color=colour, linewidth=3, alpha=0.3)  # type: ignore[attr-defined]
