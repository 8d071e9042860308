"""What a fit leaves in its object: what was there before where the fit fails, and plain values beside a model."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import from_json, to_json
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.artefact import damaged
from torchcdm.training.checkpoint import ModelInfo, read_info

Readers = dict[str, Callable[[Any], Any]]  # names of attributes that a fit sets, and what makes each of plain values


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


def described(learner: Any, params: Iterable[str], info: ModelInfo) -> ModelInfo:
    """What is said of the model of ``learner``, with attributes that make it anew: its ``params``, and what a fit set.
    Values that JSON holds; null for what it has no form for, such as generators."""
    attributes = {"params": params, "fitted": learner._saved}
    fields = {part: {name: getattr(learner, name, None) for name in names} for part, names in attributes.items()}
    plain = from_json(to_json(fields, inf_nan_mode="strings", fallback=_plain))
    return replace(info, estimator={"kind": type(learner).__name__} | plain)


def description(path: str | Path, kind: type) -> ModelInfo:
    """What :func:`described` gave, of a folder; UserError where it holds no model, or one of another ``kind``."""
    info = read_info(path)
    held = (info.estimator or {}).get("kind", "run")
    if held != kind.__name__:
        by = "torchcdm" if held == "run" else held
        raise UserError(f"{path}: holds a {held}, no {kind.__name__}; load it by {by}.load")
    return info


def restore(learner: object, readers: Readers, content: Mapping[str, Any], optional: Iterable[str] = ()) -> None:
    """Sets the attributes of ``learner`` that a fit set; the ``optional`` ones that are null stay unset.
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
