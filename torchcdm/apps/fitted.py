"""What a failed fit leaves behind: what was there before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def all_or_nothing(learner: object) -> Iterator[None]:
    """Puts the attributes of ``learner`` back as they were where the block fails or is interrupted."""
    before = dict(vars(learner))
    try:
        yield
    except BaseException:
        vars(learner).clear()
        vars(learner).update(before)
        raise
