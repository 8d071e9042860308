"""Devices by name, and processes that share a training step or the samples of a measurement, on accelerate."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor

from torchcdm.errors import UserError, reason


@final
class Processes:
    """One process of one or several that work together, started by ``accelerate launch`` or ``torchrun``.

    Process ``rank`` of ``world`` works on its own ``device``; the ``main`` one writes files. ``accelerator`` is
    accelerate's.

    Raises:
        UserError: A device that is not there, or a training within :func:`sharing`.
    """

    def __init__(self, device: str | None) -> None:
        if _SHARED_BY.get() is not None:
            # Only the first process validates, which would wait for the others; and its end is that of their group.
            raise UserError("a training shares its steps itself; call it outside of sharing()")
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        several = _several()
        # Left to itself accelerate takes each of several processes without a GPU for one that is alone.
        on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
        # Precision and placement are the trainer's own: accelerate keeps a choice of them for the whole process.
        self.accelerator = Accelerator(
            cpu=several and on_cpu,
            mixed_precision="no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        if several and self.world == 1:
            raise UserError(f"device {device} cannot be used by several processes; leave --device out, or give cpu")
        self.device = self.accelerator.device if several else chosen_device(device)

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over the processes: what all of them act on."""
        if self.world == 1:
            return tuple(map(int, values))
        gathered = self.accelerator.gather(torch.tensor([values], device=self.device))
        return tuple(gathered.amax(0).tolist())

    def total(self, values: Tensor) -> Tensor:
        """Sums over the processes."""
        return values if self.world == 1 else self.accelerator.reduce(values, "sum")

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank; tensors in it must be on the CPU."""
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values


def chosen_device(name: str | torch.device | None) -> torch.device:
    """The device asked for; when None the GPU where there is one: not Apple's, which have no float64.

    UserError where it is not there, holds no values (``meta``), or has no float64, in which densities are kept.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.zeros(1, device=name, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        why = reason(error).split(". ")[0]
        raise UserError(f"device {str(name)!r} cannot be used: {why}; leave --device out, or give cpu") from None
    return torch.device(name)


def is_first() -> bool:
    """Whether this process is the one that speaks, before there is a group: the launcher tells the others theirs."""
    return int(os.environ.get("RANK", "0")) == 0


def _several() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


# --- measurements ------------------------------------------------------------------------------------------------

_SHARED_BY: ContextVar[Processes | None] = ContextVar("shared_by", default=None)


@contextmanager
def sharing(device: str | None = None) -> Iterator[tuple[torch.device, bool]]:
    """The processes of a launcher share what :func:`torchcdm.runtime.batching.map_rows` does within.

    All processes must do the same work within, and all have all results. Their group ends with it: once in a program,
    one within another is part of it. Trainings share their steps themselves, and are refused within. Without a
    launcher nothing is shared. ``device`` is as in :class:`Processes`.

    Yields:
        The device of this process, and whether it is the one that speaks and writes files.

    Raises:
        UserError: A device that is not there.
    """
    processes = _SHARED_BY.get()
    if processes is not None:
        yield processes.device, processes.main
        return
    if not _several():
        yield chosen_device(device), True
        return
    processes = Processes(device)
    with _shared_by(processes):
        yield processes.device, processes.main
    # Not after a failure: the others may be elsewhere, and the launcher ends them.
    processes.accelerator.end_training()


def alone() -> AbstractContextManager[None]:
    """Meanwhile every process does all rows itself: for work in which samples depend on each other."""
    return _shared_by(None)


@contextmanager
def _shared_by(processes: Processes | None) -> Iterator[None]:
    token = _SHARED_BY.set(processes)
    try:
        yield
    finally:
        _SHARED_BY.reset(token)


def sharers() -> Processes | None:
    """Those that share the work; None where each does all of its own."""
    return _SHARED_BY.get()


def share(n: int) -> range:
    """Those of ``n`` rows that are this process's: all where nothing is shared, or there are fewer than processes."""
    processes = sharers()
    if processes is None or n < processes.world:
        return range(n)
    return range(n * processes.rank // processes.world, n * (processes.rank + 1) // processes.world)
