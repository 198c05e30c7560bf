"""The error that the command line shows as one line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that only the user can fix.

    The message is one line: what is wrong, where, and what to do. The command line prints it to stderr and exits
    with status 2.
    """
