"""What one training step sees, samples and noise, as functions of (seed, step) alone: a resumed run needs no state,
and several processes draw what one would draw for the joint batch, of which each takes its slice."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from torchcdm.data import DataSource, LazySplit, flip_horizontally
from torchcdm.errors import UserError
from torchcdm.losses import Loss
from torchcdm.models.denoiser import working_dtype
from torchcdm.random import stream


def shown_at(step: int, count: int, batch_size: int, seed: int) -> Tensor:
    """Indices (batch_size,) of the samples of a step, from 0 on: the orders of all epochs, none left out."""
    first, last = step * batch_size, (step + 1) * batch_size
    epochs = range(first // count, (last - 1) // count + 1)
    return torch.cat([_order(count, seed, k)[max(0, first - k * count) : last - k * count] for k in epochs])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=stream(seed, "order", epoch))


class Batch(NamedTuple):
    """One process's share of a step, on its device: dequantised data in model units, labels, levels and noise."""

    x_0: Tensor
    y: Tensor | None
    t: Tensor
    eps: Tensor


@final
@dataclass(eq=False, repr=False)
class Batches:
    """The batches of a training, from any step on; ``batch_size`` counts all processes together, ``labels`` says if
    the model sees classes. UserError for a batch that does not divide over the processes, samples without a
    class, or vectors to mirror."""

    source: DataSource
    batch_size: int
    seed: int
    labels: bool
    flip: bool = False
    workers: int = 0
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world:
            raise UserError(f"train.batch_size is {self.batch_size}; give a multiple of the {self.world} processes")
        if self.flip and len(self.source.shape) != 3:
            raise UserError("data.flip mirrors images; these data are vectors")
        self.split, share = self.source.split("train"), self.batch_size // self.world
        if self.labels and self.split.labels.ndim == 1 and (without := int((self.split.labels < 0).sum())):
            message = f"{without} of {len(self.split)} training samples have no class"
            raise UserError(f"{self.source.name}: {message}; give them one, or use --model.labels none")
        self.mine = slice(self.rank * share, (self.rank + 1) * share)

    def __call__(self, first: int, last: int, loss: Loss, device: torch.device) -> Iterator[Batch]:
        """Of the steps ``first`` ... ``last`` - 1, on ``device`` in the network's precision; ``loss`` draws levels."""
        shape, transform = (self.batch_size, *self.source.shape), self.source.transform
        dtype = working_dtype(loss.model, torch.float32)
        for step, (x, y) in zip(range(first, last), self._samples(first, last), strict=True):
            if self.flip:
                coins = stream(self.seed, "flip", step)
                torch.rand(self.mine.start, generator=coins)  # those of the processes before this one
                x = flip_horizontally(x, coins)
            places = torch.rand(shape, generator=stream(self.seed, "dequantise", step), dtype=torch.float32)[self.mine]
            x_0 = transform(transform.spread(x, places))
            t = loss.draw_levels(self.batch_size, stream(self.seed, "level", step))[self.mine]
            eps = torch.randn(shape, generator=stream(self.seed, "noise", step), dtype=torch.float32)[self.mine]
            y = y.to(device) if self.labels else None
            yield Batch(x_0.to(device, dtype), y, t.to(device), eps.to(device, dtype))

    def _samples(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples and labels of this process; read ahead by workers where the split is lazy."""
        workers = self.workers if isinstance(self.split, LazySplit) else 0
        # An item of this loader is a step, which a worker turns into its whole batch.
        for batch in DataLoader(range(first, last), batch_size=None, collate_fn=self._read, num_workers=workers):
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _read(self, step: int) -> tuple[Tensor, Tensor] | UserError:
        """Samples of this process in a step, crops at random places of their images; or an error, which would leave a
        worker with its traceback as text if it were raised."""
        indices = shown_at(step, len(self.split), self.batch_size, self.seed)
        places = torch.rand(self.batch_size, 2, generator=stream(self.seed, "crop", step))
        try:
            return self.split.batch(indices[self.mine], places[self.mine])
        except UserError as error:
            return error
