"""The error that a user can mend: bad input or a bad setting, told in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake of the user's. The message names the value, the rule and the remedy.

    Commands print it as one line and exit with status 2. Any other exception is a bug and keeps its traceback.
    """


class SharedError(UserError):
    """A UserError that all ranks raise together, in the same words; the main rank alone prints them."""
