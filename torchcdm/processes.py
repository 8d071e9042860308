"""Where training runs: the device, the processes that share a step, and the trackers; on accelerate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError, nearest


@final
class Processes:
    """One process of one or several that train together, started by ``accelerate launch`` or ``torchrun``.

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
        UserError: A device that is not there, a tracker that is not installed.
    """

    def __init__(self, device: str | None, trackers: Sequence[str], folder: Path) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        several = int(os.environ.get("WORLD_SIZE", "1")) > 1
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
            self.device = best_device() if device is None else checked_device(device)

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
