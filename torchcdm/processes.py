"""Where work runs: devices, processes that share a training step or the batches of a measurement; on accelerate."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError, nearest

ROWS = 500
"""Samples that are evaluated at a time, where memory holds so many."""

Rows = TypeVar("Rows", Tensor, tuple[Tensor, ...])
"""A tensor, or several, with an entry for each of some samples."""


@final
class Processes:
    """One process of one or several that work together, started by ``accelerate launch`` or ``torchrun``.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:1``; the best there is when None. Of several processes each has
            its own.
        trackers: Names for accelerate's ``log_with``.
        folder: Where trackers write.

    Attributes:
        device: Of this process.
        rank: Number of this process.
        world: Number of processes.
        main: Whether this is the process that writes files.

    Raises:
        UserError: A device that is not there, a tracker that is not installed, or a training within :func:`sharing`.
    """

    def __init__(self, device: str | None, trackers: Sequence[str], folder: Path) -> None:
        if _SHARED_BY.get() is not None:
            # Only the first process validates, which would wait for the others; and its end is that of their group.
            raise UserError("a training shares its steps itself; call it outside of sharing()")
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        several = _several()
        # Left to itself accelerate takes each of several processes without a GPU for one that is alone.
        on_cpu = (best_device().type if device is None else device) == "cpu"
        _check_trackers(trackers)
        # Precision and placement are the trainer's own: accelerate keeps a choice of them for the whole process.
        self._accelerator = Accelerator(
            cpu=several and on_cpu,
            mixed_precision="no",
            log_with=list(trackers) or None,
            project_dir=str(folder),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        if trackers:
            self._accelerator.init_trackers("torchcdm")
        self.rank, self.world = self._accelerator.process_index, self._accelerator.num_processes
        self.main = self._accelerator.is_main_process
        if several and self.world == 1:
            raise UserError(f"device {device} cannot be used by several processes; leave --device out, or give cpu")
        if several:
            self.device = self._accelerator.device
        else:
            self.device = chosen_device(device)

    def wrap(self, loss: nn.Module) -> nn.Module:
        """The module whose gradients are averaged over the processes."""
        return self._accelerator.prepare_model(loss, device_placement=False)

    def backward(self, loss: Tensor) -> None:
        """Gradients of a scalar, averaged over the processes."""
        self._accelerator.backward(loss)

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over the processes: what all of them act on."""
        if self.world == 1:
            return tuple(map(int, values))
        gathered = self._accelerator.gather(torch.tensor([values], device=self.device))
        return tuple(gathered.amax(0).tolist())

    def total(self, values: Tensor) -> Tensor:
        """Sums over the processes."""
        return values if self.world == 1 else self._accelerator.reduce(values, "sum")

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank; tensors in it must be on the CPU."""
        values = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self._accelerator.wait_for_everyone()

    def track(self, values: dict[str, Any], step: int) -> None:
        """Hands values to the trackers."""
        self._accelerator.log(values, step=step)

    def finish(self) -> None:
        """Closes the trackers."""
        self._accelerator.end_training()


def _check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that accelerate would leave out with a warning."""
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [kind.value for kind in LoggerType if kind is not LoggerType.ALL]
    installed = [kind.value for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            raise UserError(f"train.trackers: unknown tracker '{name}'; {nearest(name, known)}")
        if name not in installed:
            raise UserError(f"train.trackers: {name} is not installed; pip install {name}, or leave it out")


def _several() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


# --- rows of samples ---------------------------------------------------------------------------------------------


_SHARED_BY: ContextVar[Processes | None] = ContextVar("shared_by", default=None)


@contextmanager
def sharing(device: str | None = None) -> Iterator[tuple[torch.device, bool]]:
    """Meanwhile :func:`map_rows` shares its rows among the processes of ``accelerate launch`` or ``torchrun``.

    All processes must do the same work within, and all have all results. Their group ends with it: once in a program,
    one within another is part of it. Trainings share their steps themselves, and are refused within. Without a
    launcher there is no group, and nothing is shared.

    Args:
        device: As in :class:`Processes`.

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
    processes = Processes(device, (), Path())
    with _shared_by(processes):
        yield processes.device, processes.main
    # Not after a failure: the others may be elsewhere, and the launcher ends them.
    processes.finish()


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


def share(n: int) -> range:
    """Those of ``n`` rows that are this process's: all where nothing is shared, or there are fewer than processes."""
    processes = _SHARED_BY.get()
    if processes is None or n < processes.world:
        return range(n)
    return range(n * processes.rank // processes.world, n * (processes.rank + 1) // processes.world)


def map_rows(function: Callable[[slice], Rows], n: int, size: int | None = None, own: int = ROWS) -> Rows:
    """``function`` of batches that cover ``n`` samples, joined in their order.

    What it gives for a sample must not depend on the rest of the batch. Under :func:`sharing` each process does its
    :func:`share`; a failure of one is a failure of all.

    Args:
        function: From the rows of a batch to a tensor or a tuple of them, (B, ...).
        n: Number of samples.
        size: Samples at a time. When None ``own``, and half as many, with a warning, whenever memory runs out.
        own: Samples at a time at first, where ``size`` is None.

    Returns:
        Of all samples (n, ...), in every process, on the device on which ``function`` left them.

    Raises:
        UserError: No samples, or a size below 1.
        UserError: Of another process too.
        RuntimeError: Another process failed otherwise.
    """
    if n < 1:
        raise UserError("there is nothing to score: the data are empty")
    if size is not None and size < 1:
        raise UserError(f"batch_size is {size}; it must be at least 1")
    processes, rows = _SHARED_BY.get(), share(n)
    if processes is None or len(rows) == n:
        return _each(torch.cat, _in_batches(function, rows, size, own))
    mine = failure = None
    try:
        with alone():
            mine = _each(torch.cat, _in_batches(function, rows, size, own))
    except Exception as error:  # whatever it is, the others wait for this process
        failure = error
    # As text: not every exception can be sent.
    reason = UserError(str(failure)) if isinstance(failure, UserError) else repr(failure)
    shares = processes.gather((None, reason) if mine is None else (_each(_on_cpu, [mine]), None))
    if failure is not None:
        raise failure
    for rank, (_, reason) in enumerate(shares):
        if isinstance(reason, UserError):
            raise reason
        if reason is not None:
            raise RuntimeError(f"process {rank} failed: {reason}")
    return _each(torch.cat, [_each(_beside, (theirs, mine)) for theirs, _ in shares])


def _in_batches(function: Callable[[slice], Rows], rows: range, size: int | None, own: int) -> list[Rows]:
    """``function`` of one batch after the other."""
    asked = at_most = min(size or own, len(rows))
    parts, start = [], rows.start
    while start < rows.stop:
        batch = slice(start, min(start + at_most, rows.stop))
        try:
            parts.append(function(batch))
        except RuntimeError as error:
            at_most = (batch.stop - batch.start) // 2
            if size is not None or at_most == 0 or not _out_of_memory(error):
                raise
        else:
            start = batch.stop
            continue
        # After the handler: until then the error holds the frames, and these what is to be freed.
        gc.collect()
        torch.cuda.empty_cache()
    if at_most < asked:
        warnings.warn(f"out of memory: went on with {at_most} samples at a time", stacklevel=2)
    return parts


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether fewer samples at a time may mend it."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _each(function: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Rows]) -> Rows:
    """``function`` of the parts, or of the first tensors of all of them, of the second ones, and so on."""
    if isinstance(parts[0], Tensor):
        return function(parts)
    return tuple(function(column) for column in zip(*parts, strict=True))


def _on_cpu(one: Sequence[Tensor]) -> Tensor:
    return one[0].cpu()


def _beside(pair: Sequence[Tensor]) -> Tensor:
    """The first of two, on the device of the second."""
    return pair[0].to(pair[1].device)


# --- devices -----------------------------------------------------------------------------------------------------


def chosen_device(name: str | None) -> torch.device:
    """The device asked for, checked; the best there is when None."""
    return best_device() if name is None else checked_device(name)


def checked_device(name: str) -> torch.device:
    """A device that is there.

    Raises:
        UserError: It is not, or it has no float64, in which schedules and densities are kept.
    """
    try:
        torch.zeros(1, device=name, dtype=torch.float64)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise UserError(f"device {name} cannot be used: {reason}; leave --device out, or give cpu") from None
    return torch.device(name)


def best_device() -> torch.device:
    """The GPU where there is one; Apple's are left out, they have no float64."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
