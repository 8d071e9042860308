"""What a fit leaves in its object: what was there before where the fit fails, and plain values for a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json
from torch import Tensor

from torchcdm.runtime.artefact import damaged

Readers = dict[str, Callable[[Any], Any]]
"""Names of the attributes that a fit sets, and what makes each of plain values."""


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


def plain_fields(learner: object, names: Iterable[str]) -> dict[str, Any]:
    """Attributes of ``learner`` as values that JSON holds; null for what it has no form for, such as generators."""
    fields = {name: getattr(learner, name, None) for name in names}
    return from_json(to_json(fields, inf_nan_mode="strings", fallback=_plain))


def restore(learner: object, readers: Readers, content: Mapping[str, Any], optional: Iterable[str] = ()) -> None:
    """Sets the attributes of ``learner`` from :func:`plain_fields`; the ``optional`` ones that are null stay unset.
    KeyError where one is missing, or another is null."""
    for name, read in readers.items():
        if content[name] is not None:
            setattr(learner, name, read(content[name]))
        elif name not in optional:
            raise KeyError(name)


@contextmanager
def restoring(file: Path) -> Iterator[None]:
    """Says of what is missing or wrong in a ``file`` that was read that the file is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        damaged(file, f"missing or wrong: {error}")


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    return value.to_config() if hasattr(value, "to_config") else None
