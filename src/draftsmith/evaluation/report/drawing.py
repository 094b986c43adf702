"""Matplotlib figures as SVG that follows the page: colours are CSS variables, so one drawing serves light and dark.

Figures are drawn in the light colours below; inline, each colour becomes the variable of its name, which style.css sets
for both schemes. Files beside the report keep the light colours on white, for documents and slides.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#1c2128", "#5b6470", "#d9dde3", "#fefefe"
# After Okabe and Ito's palette for colour-blind readers, darkened where it would vanish on white.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0b6fae", "#d27d00", "#00916a", "#cf5500", "#a8558c", "#8b939d"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    RED: "--red",
    PURPLE: "--purple",
    GREY: "--grey",
}
WIDTH = 4.2  # inches: narrow enough that a phone hardly shrinks the text
STYLE: Any = {  # as Any: newer matplotlib types the names, older has no types
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.loc": "upper right",
    "legend.handlelength": 1.4,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
    "svg.hashsalt": "draftsmith",
}


@dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Attributes:
        name: of its files and its element.
        title: what it shows.
        caption: how to read it.
        figure: drawn, in the light colours.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    def inline(self) -> str:
        """An `<svg>` element for the page: no references outward, colours and fonts by CSS variables, unique ids."""
        text = _svg(self.figure)
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
        head, body = text.split(">", 1)
        box = re.search(r'viewBox="[^"]+"', head)
        if box is None:
            raise ValueError(f"the drawing {self.name} has no viewBox")
        body = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', body)
        body = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{self.name}-\1"', body)
        body = re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", body)
        body = re.sub(r"'DejaVu Sans'|DejaVu Sans", "var(--sans)", body)
        for colour, variable in _VARIABLES.items():
            body = body.replace(colour, f"var({variable})")
        body = re.sub(r"\s*\n\s*", "\n", body)
        label = re.sub(r'[&<>"]', "", f"{self.title}. {self.caption}")
        return f'<svg {box.group()} role="img" aria-label="{label}">{body.strip()}'

    def save(self, folder: Path) -> None:
        """`name.svg` and `name.png` (200 dots per inch) in the folder, on white."""
        import matplotlib

        folder.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            (folder / f"{self.name}.svg").write_text(_svg(self.figure, "white"), encoding="utf-8")
            self.figure.savefig(folder / f"{self.name}.png", dpi=200, facecolor="white", metadata={"Software": None})


def canvas(height: float) -> tuple[Figure, Any]:
    """An empty figure, `height` inches high, and its axes; call inside `rc_context(STYLE)`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, background: str = "none") -> str:
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        # without a date the same run gives the same bytes
        figure.savefig(buffer, format="svg", facecolor=background, metadata={"Date": None})
    return buffer.getvalue()
