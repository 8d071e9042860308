"""Samples in batches of a size that suits the machine, shared among the processes that share a measurement."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.processes import alone, share, sharers

CPU_VALUES, CPU_ROWS = 2**15, (16, 4096)
"""Values, and least and most samples, of a batch on a CPU: beyond its caches a batch of images takes twice as long."""

OTHER_VALUES, OTHER_ROWS = 2**18, 64
"""Values and least samples of a batch on a GPU, if its memory holds as many."""

Rows = TypeVar("Rows", Tensor, tuple[Tensor, ...])
"""Results with one entry per sample: a tensor, or several."""


def rows_at_a_time(dim: int, device: torch.device) -> int:
    """Samples of ``dim`` values in a batch for a network on ``device``."""
    if device.type != "cpu":
        return max(OTHER_ROWS, OTHER_VALUES // dim)
    least, most = CPU_ROWS
    return min(max(least, CPU_VALUES // dim), most)


def map_rows(
    function: Callable[[slice], Rows], n: int, size: int | None = None, *, dim: int, device: torch.device
) -> Rows:
    """Applies ``function`` to ``n`` samples, batch by batch, and joins the results in the samples' order.

    A sample's result must not depend on the rest of its batch. Under :func:`torchcdm.runtime.processes.sharing` each
    process does its share of the samples; a failure of one process is a failure of all.

    Args:
        function: Takes the slice of a batch among the samples; gives a tensor or a tuple of them, (B, ...).
        n: Number of samples.
        size: Samples in a batch. None for :func:`rows_at_a_time`, halved with a warning whenever memory runs out.
        dim: Values of a sample.
        device: Where ``function`` works, and leaves the results (n, ...) in every process.

    Raises:
        UserError: No samples, a size below 1, or a UserError of another process.
        RuntimeError: Another process failed otherwise.
    """
    if n < 1:
        raise UserError("there is nothing to score: the data are empty")
    if size is not None and size < 1:
        raise UserError(f"batch_size is {size}; it must be at least 1")
    processes, rows = sharers(), share(n)
    at_most = rows_at_a_time(dim, device)
    if processes is None or len(rows) == n:
        return _in_batches(function, rows, size, at_most)
    mine = failure = None
    try:
        with alone():
            mine = _in_batches(function, rows, size, at_most)
    except Exception as error:  # whatever it is, the others wait for this process
        failure = error
    # As text: not every exception can be sent.
    reason = UserError(str(failure)) if isinstance(failure, UserError) else repr(failure)
    shares = processes.gather((None, reason) if mine is None else (_each(lambda one: one[0].cpu(), [mine]), None))
    if failure is not None:
        raise failure
    for rank, (_, reason) in enumerate(shares):
        if isinstance(reason, UserError):
            raise reason
        if reason is not None:
            raise RuntimeError(f"process {rank} failed: {reason}")
    return _each(torch.cat, [_each(lambda pair: pair[0].to(pair[1].device), (theirs, mine)) for theirs, _ in shares])


def _in_batches(function: Callable[[slice], Rows], rows: range, size: int | None, at_first: int) -> Rows:
    """``function`` of ``size`` rows at a time; None: of ``at_first``, and of fewer where memory runs out."""
    asked = at_most = min(at_first if size is None else size, len(rows))
    parts: list[Rows] = []
    while not parts:
        try:
            starts = range(rows.start, rows.stop, at_most)
            parts = [function(slice(start, min(start + at_most, rows.stop))) for start in starts]
        except RuntimeError as error:
            if size is not None or at_most == 1 or not _out_of_memory(error):
                raise
            at_most //= 2
        if not parts:  # after the handler: until then the error holds the frames, and these what is to be freed
            gc.collect()
            torch.cuda.empty_cache()
    if at_most < asked:
        warnings.warn(f"out of memory: went on with {at_most} samples at a time", stacklevel=2)
    return _each(torch.cat, parts)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether fewer samples at a time may mend it."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _each(function: Callable[[Sequence[Tensor]], Tensor], parts: Sequence[Rows]) -> Rows:
    """``function`` of the parts, or of the first tensors of all of them, of the second ones, and so on."""
    if isinstance(parts[0], Tensor):
        return function(parts)
    return tuple(function(column) for column in zip(*parts, strict=True))


def labels_of(y: Tensor | None, rows: slice, device: torch.device) -> Tensor | None:
    """The classes of a batch, where there are any."""
    return None if y is None else y[rows].to(device)
