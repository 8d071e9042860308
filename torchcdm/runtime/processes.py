"""Devices by name; processes that share a training step or the samples of a measurement; bars; batches and memory."""

import ctypes
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from importlib import import_module
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from torchcdm.errors import UserError, reason, warn

# Values, and least and most samples, of a batch on a CPU: beyond its caches a batch of images takes twice as long;
# values and least samples on a GPU, if its memory holds as many.
CPU_VALUES, CPU_ROWS, GPU_VALUES, GPU_ROWS = 2**15, (16, 4096), 2**18, 64
# Samples that memory held when it ran out, by their values and device: later batches are no larger.
_HELD: dict[tuple[int, torch.device], int] = {}
# The others wait while the first process validates or writes a report: NCCL's own limit of ten minutes would end them.
LONGEST_WAIT = timedelta(days=1)
Rows = TypeVar("Rows", Tensor, tuple[Tensor, ...])  # results with one entry per sample: a tensor, or several


@final
class Processes:
    """One process of one or several that work together, started by ``accelerate launch`` or ``torchrun``.

    Process ``rank`` of ``world`` works on its own ``device``; the ``main`` one writes files. ``accelerator`` is
    accelerate's. UserError for a device that is not there, or a training within :func:`sharing`.
    """

    def __init__(self, device: str | None) -> None:
        if _SHARED_BY.get() is not None:
            # Only the first process validates, which would wait for the others; and its end is that of their group.
            raise UserError("a training shares its steps itself; call it outside of sharing()")
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

        together = several()
        if together:
            # Imported later, by a wrapped module, its functions would keep the group as default of an argument.
            import_module("torch.distributed.nn")
        # Left to itself accelerate takes each of several processes without a GPU for one that is alone.
        on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
        # Precision and placement are the trainer's own: accelerate keeps a choice of them for the whole process.
        wishes = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
        self.accelerator = Accelerator(cpu=together and on_cpu, mixed_precision="no", kwargs_handlers=wishes)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        if together and self.world == 1:
            raise UserError(f"device {device} cannot be used by several processes; leave --device out, or give cpu")
        self.device = self.accelerator.device if together else chosen_device(device)

    def end(self) -> None:
        """Ends the group, with its threads: these would abort an interpreter that is taken down while they work."""
        if self.world > 1:
            self.accelerator.free_memory()  # wrapped modules hold the group; it collects garbage, which takes a while
        self.accelerator.end_training()

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over the processes: what all of them act on."""
        gathered = self.accelerator.gather(torch.tensor([values], dtype=torch.long, device=self.device))
        return tuple(gathered.amax(0).tolist())


def chosen_device(name: str | torch.device | None) -> torch.device:
    """The device asked for; when None the GPU where there is one: not Apple's, which have no float64. UserError where
    it is not there, holds no values (``meta``), or has no float64, in which densities are kept."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros(1, device=name, dtype=torch.float64).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        why = reason(error).split(". ")[0]
        raise UserError(f"device {str(name)!r} cannot be used: {why}; leave --device out, or give cpu") from None
    return torch.device(name)


def is_first() -> bool:
    """Whether this process is the one that speaks, before there is a group: the launcher tells the others theirs."""
    return int(os.environ.get("RANK", "0")) == 0


def progress_bar(items: Any, what: str, shown: bool, leave: bool = False, **options: Any) -> Any:
    """tqdm's bar over ``items``, if any. A log keeps all that is drawn of it: it is drawn there every ten seconds."""
    from tqdm.auto import tqdm

    plain = sys.stderr is sys.__stderr__  # a notebook has a stderr of its own
    options |= {"file": _Unread(), "dynamic_ncols": True} if plain else {}  # else it would not ask for the width
    often, shown = 10.0 if plain and not os.isatty(2) else 0.5, shown and sys.stderr is not None
    return tqdm(items, what, leave=leave, disable=not shown, mininterval=often, **options)


class _Unread:
    """stderr, whose reader may go away, or its disk be full: the work goes on without a bar."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def several() -> bool:
    """Whether a launcher started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


_SHARED_BY: ContextVar[Processes | None] = ContextVar("shared_by", default=None)
_KEEPING, SHORT = list[object](), 1.0  # blocks of memory_kept in all threads, and seconds that are short for one
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # what glibc's ``mallopt`` calls its parameters, ``malloc.h``


@contextmanager
def memory_kept() -> Iterator[None]:
    """Memory that is freed meanwhile stays with the process, where its C library is glibc.

    A network on a CPU asks for what it has just freed: pages that the system zeroes again take a tenth of a training
    step, and up to a third of a denoising one. Within another block this one changes nothing. It takes milliseconds
    to give the memory back, so that glibc is left to do so after a short one.
    """
    library, began = ctypes.CDLL(None) if sys.platform == "linux" else None, time.monotonic()
    if not hasattr(library, "malloc_trim"):
        yield
        return
    _KEEPING.append(block := object())
    library.mallopt(TRIM_THRESHOLD, -1)
    library.mallopt(MMAP_MAX, 0)
    try:
        yield
    finally:
        _KEEPING.remove(block)
        if not _KEEPING:
            # What glibc itself comes to after large tensors.
            for parameter, value in ((MMAP_MAX, 65536), (MMAP_THRESHOLD, 32 << 20), (TRIM_THRESHOLD, 64 << 20)):
                library.mallopt(parameter, value)
            if time.monotonic() - began > SHORT:
                library.malloc_trim(0)


@contextmanager
def sharing(device: str | None = None) -> Iterator[tuple[torch.device, bool]]:
    """The processes of a launcher share what :func:`map_rows` does within; without a launcher nothing is shared.

    All processes must do the same work within, and all have all results. Their group ends with it: once in a program,
    one within another is part of it. Trainings share their steps themselves, and are refused within. Gives the device
    of this process, as :func:`chosen_device`, and whether it is the one that speaks and writes files.
    """
    processes = _SHARED_BY.get()
    if processes is not None:
        yield processes.device, processes.main
        return
    if not several():
        yield chosen_device(device), True
        return
    processes = Processes(device)
    with alone(processes):
        yield processes.device, processes.main
    # Not after a failure: the others may be elsewhere, and the launcher ends them.
    processes.end()


@contextmanager
def alone(processes: Processes | None = None) -> Iterator[None]:
    """Meanwhile every process does all rows itself, for work in which samples depend on each other; or ``processes``
    share them."""
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


def gathered(value: Any, n: int) -> list[Any]:
    """What each process that shares ``n`` rows has, by rank; tensors in it must be on the CPU."""
    if len(share(n)) == n:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def rows_at_a_time(dim: int, device: torch.device) -> int:
    """Samples of ``dim`` values in a batch for a network on ``device``."""
    least, most = CPU_ROWS
    found = min(max(least, CPU_VALUES // dim), most) if device.type == "cpu" else max(GPU_ROWS, GPU_VALUES // dim)
    return min(found, _HELD.get((dim, device), found))


def map_rows(
    function: Callable[[slice], Rows], n: int, size: int | None = None, *, dim: int, device: torch.device
) -> Rows:
    """Applies ``function`` to ``n`` samples, batch by batch, and joins the results in the samples' order.

    A sample's result must not depend on the rest of its batch. Under :func:`sharing` each process does its share of
    the samples; a failure of one is a failure of all, a RuntimeError if no UserError. UserError for no samples.

    Args:
        function: Takes the slice of a batch among the samples; gives a tensor or a tuple of them, (B, ...).
        n: Number of samples.
        size: Samples in a batch. None for :func:`rows_at_a_time`, halved with a warning whenever memory runs out.
        dim: Values of a sample.
        device: Where ``function`` works, and leaves the results (n, ...) in every process.
    """
    if n < 1:
        raise UserError("there is nothing to score: the data are empty")
    rows = share(n)
    if len(rows) == n:
        return _in_batches(function, rows, size, dim, device)
    mine = failure = None
    try:
        with alone():
            mine = _in_batches(function, rows, size, dim, device)
    except Exception as error:  # whatever it is, the others wait for this process
        failure = error
    # As text: not every exception can be sent.
    what = UserError(str(failure)) if isinstance(failure, UserError) else failure and repr(failure)
    shares = gathered((None, what) if mine is None else (_each(lambda one: one[0].cpu(), [mine]), None), n)
    if failure is not None:
        raise failure
    for rank, (_, what) in enumerate(shares):
        if what is not None:
            raise what if isinstance(what, UserError) else RuntimeError(f"process {rank} failed: {what}")
    return _each(torch.cat, [_each(lambda pair: pair[0].to(pair[1].device), (theirs, mine)) for theirs, _ in shares])


@memory_kept()
def _in_batches(
    function: Callable[[slice], Rows], rows: range, size: int | None, dim: int, device: torch.device
) -> Rows:
    """``function`` of ``size`` rows at a time; None: of :func:`rows_at_a_time`, and of fewer where memory runs out."""
    asked = at_most = min(rows_at_a_time(dim, device) if size is None else size, len(rows))
    parts: list[Rows] = []
    while not parts:
        try:
            starts = range(rows.start, rows.stop, at_most)
            parts = [function(slice(start, min(start + at_most, rows.stop))) for start in starts]
        except RuntimeError as error:
            from accelerate.utils.memory import should_reduce_batch_size

            full = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
            if size is not None or at_most == 1 or not full:
                raise
            at_most //= 2
        if not parts:  # after the handler: until then the error holds the frames, and these what is to be freed
            gc.collect()
            torch.cuda.empty_cache()
    if at_most < asked:
        _HELD[dim, device] = at_most
        warn(f"out of memory: went on with {at_most} samples at a time")
    return _each(torch.cat, parts)


def _each(function: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Rows]) -> Rows:
    """``function`` of the parts, or of the first tensors of all of them, of the second ones, and so on."""
    if isinstance(parts[0], Tensor):
        return function(parts)
    return tuple(function(column) for column in zip(*parts, strict=True))


def labels_of(y: Tensor | None, rows: slice, device: torch.device) -> Tensor | None:
    """The classes of a batch, where there are any."""
    return None if y is None else y[rows].to(device)
