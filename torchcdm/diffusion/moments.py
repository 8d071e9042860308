"""Mean and main directions of the data, from which samplers start below level T.

At much noise the data are all but Gaussian: a draw at level t replaces the steps above it (arXiv 2311.10892).
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torchcdm.diffusion.schedules import NoiseSchedule

RANK = 8  # directions that are kept of each class


@final
class Moments(nn.Module):
    """Means (classes + 1, d) of each class, and last of all data, and ``RANK`` principal directions of each,
    (classes + 1, ``RANK``, d), orthogonal and as long as the data's deviation along them; model units."""

    means: Tensor
    directions: Tensor

    def __init__(self, means: Tensor, directions: Tensor) -> None:
        super().__init__()
        self.register_buffer("means", means.half())  # enough for a start, and small in a file
        self.register_buffer("directions", directions.half())

    @classmethod
    def blank(cls, dim: int, classes: int = 0) -> Moments:
        """Zeros of the right shapes, to load a saved state into."""
        return cls(torch.zeros(classes + 1, dim), torch.zeros(classes + 1, RANK, dim))

    @classmethod
    def fit(cls, samples: Tensor, labels: Tensor, classes: int = 0) -> Moments:
        """Of ``samples`` (N, *shape) with ``labels``, long (N,); a class of fewer than two has those of all data."""
        x = samples.flatten(1).float()
        parts = [leading(part if len(part) > 1 else x) for part in [*(x[labels == y] for y in range(classes)), x]]
        return cls(*map(torch.stack, zip(*parts, strict=True)))

    def start(self, noise: Tensor, t: int, schedule: NoiseSchedule, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A draw x_t of the Gaussian at level ``t``, and its E[x_0 | x_t] under it.

        From standard normal ``noise`` (B, *shape), of classes ``y`` (B,) or, None, of all data.
        """
        rows = self._rows(len(noise), y)
        mean, directions = self.means[rows].to(noise), self.directions[rows].to(noise)
        (alpha, sigma), z = (float(scale[t]) for scale in (schedule.alpha, schedule.sigma)), noise.flatten(1)
        lengths = directions.square().sum(2).sqrt().clamp_min(1e-12)
        axes = directions / lengths[..., None]
        along, deviation = (axes @ z[..., None])[..., 0], (alpha**2 * lengths**2 + sigma**2).sqrt()
        # The noise gets the deviation of noisy data along the axes, and its own across them.
        parts = torch.stack([(deviation - sigma) * along, alpha * lengths**2 / deviation * along], 1) @ axes
        x_t, x_0 = alpha * mean + sigma * z + parts[:, 0], mean + parts[:, 1]
        return x_t.view_as(noise), x_0.view_as(noise)

    def information(self, ratio: float, y: Tensor | None = None) -> float:
        """What x_t tells of Gaussian data along the directions, under noise of ``ratio`` r_t: nats a value.

        A Gaussian channel's capacity, mean of ½ sum log(1 + variance / r²) over classes ``y`` (B,), or of all data.
        """
        variances = self.directions[self._rows(1, y)].float().square().sum(2)
        return float(torch.log1p(variances / ratio**2).sum(1).mean()) / 2 / self.means.shape[1]

    def _rows(self, n: int, y: Tensor | None) -> Tensor:
        """Classes ``y`` (B,), or ``n`` times what stands for all data."""
        return torch.full((n,), len(self.means) - 1) if y is None or len(self.means) == 1 else y


def leading(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and principal directions (``RANK``, d) of rows (N, d)."""
    from sklearn.decomposition import PCA

    found = PCA(min(RANK, *x.shape), svd_solver="randomized", random_state=0).fit(x.cpu().numpy())
    directions = torch.from_numpy(found.components_ * found.singular_values_[:, None] / len(x) ** 0.5)
    return torch.from_numpy(found.mean_), nn.functional.pad(directions, (0, 0, 0, RANK - len(directions)))
