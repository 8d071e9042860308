"""Names of weights that others gave, as ours."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torchcdm.errors import UserError


def renamed(key: str, names: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """The name that a weight has here.

    Args:
        key: Its name there.
        names: Patterns of whole names, and what they become; the first that fits counts.
        parts: Parts between two dots, and what they become.

    Raises:
        UserError: A name that no pattern fits.
    """
    for pattern, ours in names.items():
        if match := re.fullmatch(pattern, key, re.ASCII):
            return ".".join(parts.get(part, part) for part in match.expand(ours).split("."))
    raise UserError(f"'{key}' is no weight of the published network")
