"""Trains and measures systems under one protocol, and keeps what is finished."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from studies import cache
from studies.budget import Budget
from studies.compare.peer import Diverged, Fitted, Peer, Score, Task
from studies.compare.peers import chosen_peers, library_of
from studies.compare.results import Comparison, Protocol, Result, Row, Sampling
from studies.quality.features import check_images
from studies.quality.frechet import SMALLEST_COUNT, Reference
from torchcdm.data import DataOptions, DataSource, fingerprint
from torchcdm.errors import UserError
from torchcdm.random import derive

DRAWN = 64
"""Samples that measure the speed of sampling, where no more are asked for."""

CHUNK = 250
"""Samples that are drawn together."""

FEATURES = "features"
"""In the folder: what Fréchet distances need of the training images."""


def compare(
    source: DataSource,
    seconds: float,
    folder: Path,
    peers: Sequence[str] | None = None,
    clock: str = "wall",
    seed: int = 0,
    limit: int | None = None,
    device: torch.device | None = None,
    data: DataOptions | None = None,
    progress: bool = False,
    log_z: int | None = None,
    normalised: Sequence[str] | None = None,
    frechet: int | None = None,
) -> Comparison:
    """Every system trained for the same time on the same split, and scored on the same noisy test samples.

    Args:
        source: The data, with a validation and a test split.
        seconds: Training time of each system.
        folder: Where results and runs are kept. A system whose result lies there is not made again.
        peers: Names; all that suit the data when None.
        clock: What a second is, see :data:`studies.budget.CLOCKS`.
        seed: Of training; the noise of scoring is the same for all seeds.
        limit: Score at most so many test samples, evenly spaced.
        device: Where to compute; the CPU when None.
        data: What the source was loaded from, which our own runs keep; its name alone when None.
        progress: Shows progress bars.
        log_z: Sweeps of the estimates of log Z of classification diffusion models, whose one pass then has a
            normalised row; None for no estimate.
        normalised: Names of those whose log Z is estimated; all when None.
        frechet: Samples of each system for its Fréchet distance to the training images; None for none.

    Returns:
        What was measured.

    Raises:
        UserError: No time, an unknown peer or clock, a library that is not installed, a missing split, a folder
            that holds a comparison under another protocol, too few samples for a Fréchet distance, or data that have
            none.
    """
    Budget(seconds, clock)  # refuses what makes no sense before anything is trained
    x, _ = source.split("test").tensors(limit)
    source.split("validation")
    found = chosen_peers(peers, source)
    device = device or torch.device("cpu")
    protocol = Protocol(
        source.name, len(source.train), len(source.validation), len(x), source.transform.dim,
        "nats" if source.transform.bin is None else "bits/dim", float(seconds), clock, seed,
        source.transform.gaussianized, log_z, frechet, fingerprint=fingerprint(source),
    )  # fmt: skip
    if frechet is not None and frechet < SMALLEST_COUNT:
        raise UserError(f"{frechet} samples are too few for a Fréchet distance; {SMALLEST_COUNT} are needed")
    paths, settings = {peer.name: folder / f"{peer.name}.json" for peer in found}, asdict(protocol)
    missing = None in [cache.read(path, settings) for path in paths.values()]
    if frechet is not None:
        check_images(source)  # what has no features is refused before anything is trained
    reference = Reference(source, device, folder / FEATURES) if missing and frechet is not None else None
    task = Task(source, data or DataOptions(spec=source.name), device, seed, folder, progress)
    results = []
    for peer in found:
        wanted = log_z if normalised is None or peer.name in normalised else None
        draw = partial(_sampling, seed=seed, count=frechet, reference=reference)
        measure = partial(_measured, peer, replace(task, log_z=wanted), Budget(seconds, clock), x, draw)
        values = cache.numbers(paths[peer.name], settings, lambda measure=measure: asdict(measure()))
        results.append(Result.from_plain(values))
    return Comparison(protocol, tuple(results), _machine(device))


def _measured(
    peer: Peer, task: Task, budget: Budget, x: torch.Tensor, draw: Callable[[Fitted, Budget], Sampling]
) -> Result:
    """Trains and measures; a system that diverges has a second attempt."""
    library, version = library_of(peer)
    note, seconds = "", 0.0
    for attempt, rate in ((1, 1.0), (2, peer.retry)):
        clock = budget.restarted()
        try:
            fitted = peer.fit(task, clock, rate)
            rows = tuple(_row(score) for score in fitted.scores(x, budget))
            notes = [f"second attempt: {note}"] if note else []
            notes += [fitted.note] if fitted.note else []
            return Result(
                peer.name, peer.title, library, version, "measured", attempt, fitted.training.setting,
                fitted.training.steps, fitted.training.best_step, fitted.training.seconds, fitted.parameters, rows,
                draw(fitted, budget), "; ".join(notes),
            )  # fmt: skip
        except Diverged as error:
            note, seconds = str(error), clock.elapsed
    return Result(
        peer.name, peer.title, library, version, "diverged", 2, f"learning rate lowered to {peer.retry:g} of it",
        0, 0, seconds, 0, (), None, note,
    )  # fmt: skip


def _row(score: Score) -> Row:
    values = score.likelihood.values()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise Diverged(f"{score.name}: no finite likelihood for {bad} of {len(values)} test samples")
    value, error = score.likelihood.mean_and_error()
    return Row(
        score.name, value, math.hypot(error, score.shared_se), score.likelihood.nfe, score.likelihood.level,
        score.normalised, len(values) / max(score.seconds, 1e-9), tuple(values.tolist()), score.shared_se,
    )  # fmt: skip


def _sampling(
    fitted: Fitted, budget: Budget, seed: int, count: int | None = None, reference: Reference | None = None
) -> Sampling:
    """Draws :data:`DRAWN` samples, or as many as a Fréchet distance takes."""
    clock, parts = budget.restarted(), []
    sizes = [DRAWN] if count is None else [min(CHUNK, count - first) for first in range(0, count, CHUNK)]
    for part, size in enumerate(sizes):
        parts.append(fitted.sample(size, derive(seed, "drawn", part)))
    x, nfe = torch.cat([part.x for part in parts]), parts[0].nfe
    speed = len(x) / max(clock.elapsed, 1e-9)
    if reference is None:
        return Sampling(nfe, speed)
    if not x.isfinite().all():
        raise Diverged("samples are not finite")
    return Sampling(nfe, speed, reference.distance(x), reference.header(len(x)))


def _machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name}), {torch.get_num_threads()} thread(s), PyTorch {torch.__version__}"
