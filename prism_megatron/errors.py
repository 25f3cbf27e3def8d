"""Errors that a user can fix: bad input or a bad setting, described in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A user error. The message names the value, the rule and the remedy.

    Commands print it as one line and exit with status 2. Any other exception is a bug and keeps its traceback.
    """


class SharedError(UserError):
    """A UserError that all ranks raise together, in the same words; the main rank alone prints them."""
