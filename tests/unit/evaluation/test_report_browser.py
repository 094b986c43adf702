"""Pages in a real browser: no error in the console, nothing wider than a phone.

`DRAFTSMITH_BROWSER=required`, as CI sets it, makes a missing browser a failure.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.unit.evaluation.synthetic_run import write_synthetic_run

from draftsmith.evaluation.report.flatness import shown, write_flatness_page
from draftsmith.evaluation.report.inputs import Scored
from draftsmith.evaluation.report.report import write_report

BROWSER = next((found for n in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(n))), None)
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--hide-scrollbars",
    "--window-size=1400,1000",
    "--virtual-time-budget=20000",
]
MEASURE = """
<script>
window.addEventListener("load", () => {
  const width = document.documentElement.clientWidth;
  const wide = [...document.querySelectorAll("body *")].filter(
    (e) => e.getBoundingClientRect().right > width + 1 && !e.closest(".scroll, pre, details:not([open])"));
  const page = document.documentElement;
  const small = [...document.querySelectorAll("svg text")].map((e) => e.getBoundingClientRect().height);
  const found = JSON.stringify({ width: innerWidth, scroll: page.scrollWidth,
    wide: wide.map((e) => e.outerHTML.slice(0, 120)), figures: document.querySelectorAll("svg").length,
    smallest: Math.min(...small), background: getComputedStyle(document.body).backgroundColor });
  parent.postMessage(found, "*");
});
</script></body>
"""
# a window can't be made narrower than 500 pixels, a frame can
FRAME = """<!DOCTYPE html>
<script>addEventListener("message", (e) => { document.title = "MEASURED" + e.data; });</script>
<iframe src="%s" style="width: %dpx; height: 900px; border: 0"></iframe>"""


def open_page(page: Path, width: int, *flags: str) -> tuple[dict[str, object], str]:
    """What the script above measured in a frame of this width, and the browser's log."""
    assert BROWSER is not None, "DRAFTSMITH_BROWSER=required, and no Chromium is installed: apt-get install chromium"
    folder = page.parent
    frame = folder / "frame.html"
    frame.write_text(FRAME % (page.name, width), encoding="utf-8")
    profile = folder / f"profile-{len(list(folder.iterdir()))}"
    command = [BROWSER, *QUIET, f"--user-data-dir={profile}", *flags, "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>MEASURED(.*?)</title>", done.stdout)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), done.stderr


needs_browser = pytest.mark.skipif(
    BROWSER is None and os.environ.get("DRAFTSMITH_BROWSER") != "required", reason="no Chromium is installed here"
)


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_page_in_a_browser(tmp_path: Path, width: int) -> None:
    run = write_synthetic_run(tmp_path / "run", drafters=2)
    page = write_report(run, tmp_path / "out")
    text = page.read_text(encoding="utf-8")
    measured = tmp_path / "measured.html"
    measured.write_text(text.replace("</body>", MEASURE), encoding="utf-8")

    light, log = open_page(measured, width, "--blink-settings=preferredColorScheme=1")
    assert "CONSOLE" not in log
    assert light["width"] == width
    assert light["scroll"] == width, "the page scrolls sideways"
    assert light["wide"] == []
    assert light["figures"] == 11
    assert float(str(light["smallest"])) >= 9, "text in a figure is too small to read"

    dark, log = open_page(measured, width, "--blink-settings=preferredColorScheme=0")
    assert "CONSOLE" not in log
    assert dark["background"] != light["background"]

    beside = write_report([run, write_synthetic_run(tmp_path / "another run, of a longer name")], tmp_path / "both")
    measured_both = beside.parent / "measured.html"
    measured_both.write_text(beside.read_text(encoding="utf-8").replace("</body>", MEASURE), encoding="utf-8")
    both, log = open_page(measured_both, width)
    assert "CONSOLE" not in log
    assert both["scroll"] == width, "the page of several runs scrolls sideways"
    assert both["wide"] == []

    # the check itself: an error and a wide element are seen
    broken = tmp_path / "broken.html"
    wide = "<div style='width: 3000px'>x</div><script>nonsense()</script>"
    broken.write_text(text.replace("</body>", wide + MEASURE), encoding="utf-8")
    seen, log = open_page(broken, width)
    assert "CONSOLE" in log
    assert seen["scroll"] != width
    assert seen["wide"] != []


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_of_flatness_in_a_browser(tmp_path: Path, width: int) -> None:
    scores = [Scored(f"{'long' * 20}-{i}", [0.005 * (i + 1)] * 40, [" token"] * 39 + ["x" * 200]) for i in range(9)]
    page = write_flatness_page(scores, shown(scores), {scores[0].id}, "a corpus", tmp_path / "flat.html")
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    found, log = open_page(page, width)
    assert "CONSOLE" not in log
    assert (found["scroll"], found["wide"], found["figures"]) == (width, [], 2)
