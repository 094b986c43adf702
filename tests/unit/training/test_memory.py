"""The memory that training is predicted to take, against what a process of its own took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("hidden", "vocabulary", "row_length", "precision", "checkpoint_steps"),
    [(192, 2048, 256, "bfloat16", "no"), (384, 4096, 512, "float32", "no"), (384, 2048, 512, "bfloat16", "yes")],
)
def test_it_is_predicted_within_a_quarter(
    hidden: int, vocabulary: int, row_length: int, precision: str, checkpoint_steps: str
) -> None:
    arguments = [hidden, vocabulary, row_length, precision, checkpoint_steps]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.unit.training.measured_memory", *map(str, arguments)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["measured"] > 150 << 20, "something that can be predicted wrongly"
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.25), found
