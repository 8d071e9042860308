"""The one exception that stands for a user's mistake, and the hint that goes with a wrong name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: one line that names what is wrong and how to mend it.

    The command line prints the line on stderr and leaves with exit code 2. Line ends and other characters that cannot
    be printed are escaped: names of files hold them.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def nearest(name: str, choices: Iterable[str]) -> str:
    """The second half of an "unknown name" message: the nearest name, or all of them.

    Example:
        >>> nearest("ddmp", ["ddim", "ddpm"])
        "did you mean 'ddpm'? (choices: ddim, ddpm)"
        >>> nearest("x", ["ddim", "ddpm"])
        'choose from: ddim, ddpm'
    """
    choices = sorted(map(str, choices))
    listing = ", ".join(choices)
    close = difflib.get_close_matches(str(name)[:80], choices, n=1)
    if close:
        return f"did you mean '{close[0]}'? (choices: {listing})"
    return f"choose from: {listing}"
