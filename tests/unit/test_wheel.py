"""The wheel holds the package's data beside its code, and works outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd="/", env={**os.environ, **environment}, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT))
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_the_recipes(wheel: Path) -> None:
    package = ROOT / "src" / "draftsmith"
    wanted = {
        f"draftsmith/{path.relative_to(package).as_posix()}"
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {f"draftsmith/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    wanted |= {f"draftsmith/studies/presets/{path.name}" for path in (ROOT / "studies" / "presets").iterdir()}
    assert {"draftsmith/py.typed", "draftsmith/cli.py"} <= wanted
    held = set(zipfile.ZipFile(wheel).namelist())
    assert wanted - held == set()
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not any(name.startswith("tests/") for name in held)


def test_the_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    )
    where = run(sys.executable, "-c", "import draftsmith; print(draftsmith.__file__)", PYTHONPATH=str(target))
    assert Path(where.strip()).is_relative_to(target)
    shown = run(sys.executable, str(target / "bin" / "draftsmith"), "--help", PYTHONPATH=str(target))
    assert "Usage: draftsmith" in shown
