"""The command line: `draftsmith <command>`. Wrong input ends in one sentence and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from draftsmith import __version__
from draftsmith.foundation import console
from draftsmith.foundation.errors import UserError

app = typer.Typer(
    name="draftsmith",
    help="Train, prove and measure drafters that make a language model answer faster without changing its answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        console.say(f"draftsmith {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; a UserError is printed without a traceback, with exit code 2."""
    try:
        app()
    except UserError as problem:
        console.error(str(problem))
        sys.exit(2)
