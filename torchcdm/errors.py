"""The one exception that stands for a user's mistake, and what its messages are made of."""

import difflib
import importlib
import sys
import warnings
from collections.abc import Iterable
from typing import Any

# Packages whose lines are not the user's.
CALLERS = ("torchcdm", "sklearn", "joblib", "torch", "pydantic", "contextlib")


class UserError(ValueError):
    """A mistake in what the user gave: one line that names what is wrong and how to mend it.

    The command line prints the line on stderr and leaves with exit code 2. Line ends and other characters that cannot
    be printed are escaped: names of files hold them.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(message)))


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
    return f"did you mean '{close[0]}'? (choices: {listing})" if close else f"choose from: {listing}"


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its type where that is nothing."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]


def warn(message: str) -> None:
    """A warning that points at the user's line, whatever calls us for it: scikit-learn's tools, torch's decorators."""
    at, level = sys._getframe(), 1
    while at.f_back and at.f_globals.get("__name__", "").partition(".")[0] in CALLERS:
        at, level = at.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def needed(library: str, extra: str, what: str) -> Any:
    """A library that is an ``extra`` of the package; UserError where ``what`` needs it and it is not there."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise UserError(f"{what} needs {library.partition('.')[0]}; pip install 'torchcdm[{extra}]'") from None
