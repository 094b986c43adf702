"""The command line in this process: arguments in; exit code, output and errors out."""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest.mock import patch

from draftsmith import cli


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def draftsmith(*arguments: object) -> Ended:
    """Run `draftsmith <arguments>` as the installed program does; anything but SystemExit is raised on.

    The output is as wide as in a log: a test runner's own width (pytest-xdist sets one) would fold the tables.
    """
    out, err = io.StringIO(), io.StringIO()
    wide = patch.dict(os.environ, {"COLUMNS": "140"})
    argv = patch.object(sys, "argv", ["draftsmith", *map(str, arguments)])
    with wide, argv, redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Ended(code, out.getvalue(), err.getvalue())
