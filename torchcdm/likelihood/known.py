"""log Z that was measured once, beside the weights that it belongs to."""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from torchcdm.annealing.target import Fence
from torchcdm.likelihood.log_z import LogZ
from torchcdm.likelihood.restricted import Restricted, Step
from torchcdm.runtime.artefact import read_artefact, read_sealed, write_artefact

NAME, TENSORS = "log_z.json", "log_z.safetensors"
"""Files in the folder of a model."""

TRAINING = 5000
"""Training samples that say what is usual, at most."""


def weights_of(folder: Path) -> str | None:
    """Checksum of the weights in the folder of a model; None where there are none."""
    path = folder / "config.json"
    return read_sealed(path)["files"].get("model.safetensors") if path.exists() else None


def write_log_z(folder: Path, z: LogZ, weights: str | None) -> None:
    """Writes log Z into the folder of its model; UserError where that cannot be.

    It is not kept, which a warning says, where other weights lie there by now than those that it was measured with,
    ``weights`` by :func:`weights_of`.
    """
    if weights != weights_of(folder):
        warnings.warn(f"{folder}: log Z is not kept: other weights were written there meanwhile", stacklevel=2)
        return
    found, tensors, plain = z.restricted, {}, replace(z, x=None, restricted=None, check=None)
    check = z.check and asdict(replace(z.check, x=None))
    content: dict[str, Any] = {"weights": weights, "log_z": asdict(plain), "check": check}
    if found is not None:
        content |= {"steps": [step.level for step in found.steps], "fence": found.fence.levels}
        tensors = {"log_z": found.log_z, "mean": found.mean, "variances": found.variances}
        tensors |= {"middle": found.fence.middle, "whiten": found.fence.whiten}
        for k, step in enumerate(found.steps):
            kept = {"edges": step.edges, "variances": step.variances}
            if k in (0, len(found.steps) - 1):  # others decode nothing
                kept["table"] = step.table
            tensors |= {f"{k}.{name}": part for name, part in kept.items() if part is not None}
    write_artefact(folder / NAME, "log_z", content, {TENSORS: tensors})


def read_log_z(folder: Path, device: str | torch.device = "cpu") -> LogZ | None:
    """What :func:`write_log_z` wrote; None where there is nothing, or of other weights. UserError if damaged."""
    if not (folder / NAME).exists():
        return None
    content, (tensors,) = read_artefact(folder / NAME, "log_z", [TENSORS])
    if content["weights"] != weights_of(folder):
        return None
    tensors, restricted = {name: part.to(device) for name, part in tensors.items()}, None
    if "steps" in content:
        names = ("edges", "variances", "table")
        steps = [Step(t, *(tensors.get(f"{k}.{name}") for name in names)) for k, t in enumerate(content["steps"])]
        fence = Fence(content["fence"], tensors["middle"], tensors["whiten"])
        restricted = Restricted(steps, fence, tensors["log_z"], tensors["mean"], tensors["variances"])
    check = content["check"] and LogZ(**content["check"])
    return LogZ(**content["log_z"] | {"check": check, "restricted": restricted})
