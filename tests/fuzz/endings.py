"""How a command may end: with success, or with one line on stderr and exit code 2. Nothing else."""

from __future__ import annotations

import io
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass

from torchcdm.cli import main

SECONDS = 60
"""Far beyond what any case takes on a busy machine: what is still running then hangs."""


class Hang(BaseException):
    """A command that did not end; no ``except Exception`` can swallow it."""


@dataclass(frozen=True)
class Ending:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises :class:`Hang` in the main thread after so many seconds."""

    def stop(*_: object) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def ending(words: Sequence[str]) -> Ending:
    """Runs ``cdm`` in this process and checks how it ends.

    Raises:
        AssertionError: An exit code other than 0 and 2, more or less than one line on stderr with code 2.
    """
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), time_limit(SECONDS), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            code = main(list(words))
        except SystemExit as leave:  # --help and --version
            code = int(leave.code or 0)
    result = Ending(code, out.getvalue(), err.getvalue())
    assert result.code in (0, 2), (words, result)
    if result.code == 2:
        assert re.fullmatch(r"cdm: [^\n]+\n", result.err), (words, result.err)

    return result
