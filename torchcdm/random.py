"""The one rule for seeds: what is drawn is a function of a seed, a purpose and an index.

It never depends on batches, devices, other draws or how far a run has come, so that nothing random needs a state.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STRIDE = 0x9E3779B1  # odd: the seeds of one purpose differ for all indices below 2**32


def derive(seed: int, purpose: str, *index: int) -> int:
    """A seed of 32 bits, all that PyTorch's CPU generator reads of one, for a ``purpose`` such as ``"dequantise"``.

    The ``index`` is a step, level, sample ..., the fastest last: it counts on from the hash of all others. Two of
    50 000 hashes of 32 bits would agree in one run out of four, and with them two samples.
    """
    *before, last = index or (0,)
    digest = hashlib.blake2b(repr((int(seed), purpose, *map(int, before))).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") + int(last) * STRIDE) % 2**32


def stream(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A CPU generator; arguments as in :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, purpose, *index))


def normal(shape: Sequence[int], generator: torch.Generator, device: torch.device) -> Tensor:
    """Standard normal numbers, float64, by a CPU ``generator``, whatever the ``device``."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(device)


def evenly_spaced(count: int, limit: int | None) -> Tensor:
    """``limit`` indices spread over ``range(count)``, so that data sorted by class keep their balance."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.linspace(0, count - 1, limit, dtype=torch.float64).round().long()


def permutation(count: int, seed: int) -> Tensor:
    """A random order of ``count`` samples, long (count,), by which data are split. By numpy, as the permutations of a
    two-sample test are: its RandomState is frozen, so that a split is the same under every version of torch."""
    return torch.from_numpy(np.random.RandomState(seed % 2**32).permutation(count))
