"""Errors that are the user's to mend: the command line prints one sentence, no traceback, and ends with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The text says what was wrong, where (file, line, field) and what to do."""


class StaleError(UserError):
    """An artefact made with other options or inputs than those wanted now. The text names the field and `--redo`.

    Attributes:
        field: its dotted name, where there is one; stored, wanted: its values, as text.
    """

    def __init__(self, text: str, field: str = "", stored: str = "", wanted: str = "") -> None:
        super().__init__(text)
        self.field, self.stored, self.wanted = field, stored, wanted
