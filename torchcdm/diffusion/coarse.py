"""The data along a few main directions, from which samplers start below level T.

Noise hides the rest of an image first: a draw along these directions, with noise, replaces the steps above its level.
A Gaussian in their place (arXiv 2311.10892) gives pictures a brightness and contrasts that data do not have together.
"""

from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from torchcdm.diffusion.schedules import NoiseSchedule

RANK = 8  # directions that are kept of each class
POINTS = 256  # training samples whose positions along them are kept


@final
class CoarseData(nn.Module):
    """Means (classes + 1, d) of each class, and last of all data, orthonormal principal ``directions`` of each
    (classes + 1, ``RANK``, d), and ``positions`` (classes + 1, ``POINTS``, ``RANK``) of samples along them.

    In model units.
    """

    def __init__(self, means: Tensor, directions: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.means = nn.Buffer(means.half())  # enough for a start, and small in a file
        self.directions = nn.Buffer(directions.half())
        self.positions = nn.Buffer(positions.half())

    @classmethod
    def blank(cls, dim: int, classes: int = 0) -> "CoarseData":
        """Zeros of the right shapes, to load a saved state into."""
        kinds = classes + 1
        return cls(torch.zeros(kinds, dim), torch.zeros(kinds, RANK, dim), torch.zeros(kinds, POINTS, RANK))

    @classmethod
    def fit(cls, samples: Tensor, labels: Tensor, classes: int = 0) -> "CoarseData":
        """Of ``samples`` (N, *shape) with ``labels``, long (N,); a class of fewer than two has those of all data."""
        x = samples.flatten(1).float()
        parts = [leading(part if len(part) > 1 else x) for part in [*(x[labels == y] for y in range(classes)), x]]
        return cls(*map(torch.stack, zip(*parts, strict=True)))

    def start(self, noise: Tensor, choice: Tensor, t: int, schedule: NoiseSchedule, y: Tensor | None = None) -> Tensor:
        """Positions of the data with noise of level ``t``, x_t (B, *shape).

        From standard normal ``noise`` (B, *shape) and ``choice`` (B,), which takes one of the samples that are kept;
        of classes ``y`` (B,) or, None, of all data.
        """
        rows, points = self._rows(len(noise), y), (torch.special.ndtr(choice) * POINTS).long().clamp_max(POINTS - 1)
        positions, directions = self.positions[rows, points].to(noise), self.directions[rows].to(noise)
        x = self.means[rows].to(noise) + (positions[:, None] @ directions)[:, 0]
        return schedule.alpha[t].to(noise) * x.view_as(noise) + schedule.sigma[t].to(noise) * noise

    def across(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The part across the directions, (B, d), of ``x`` (B, *shape) less the mean of classes ``y`` (B,) or all."""
        rows = self._rows(len(x), y)
        rest, directions = x.flatten(1) - self.means[rows].to(x), self.directions[rows].to(x)
        return rest - ((rest[:, None] @ directions.mT) @ directions)[:, 0]

    def information(self, ratio: float, y: Tensor | None = None) -> float:
        """What x_t tells of Gaussian data along the directions, under noise of ``ratio`` r_t: nats a value.

        A Gaussian channel's capacity, mean of ½ sum log(1 + variance / r²) over classes ``y`` (B,), or of all data.
        """
        variances = self.positions[self._rows(1, y)].float().var(1, correction=0)
        return float(torch.log1p(variances / ratio**2).sum(1).mean()) / 2 / self.means.shape[1]

    def _rows(self, n: int, y: Tensor | None) -> Tensor:
        """Classes ``y`` (B,), or ``n`` times what stands for all data."""
        last = len(self.means) - 1
        return torch.full((n,), last, device=self.means.device) if y is None or last == 0 else y


def leading(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows (N, d): mean (d,), principal directions (``RANK``, d), and positions (``POINTS``, ``RANK``) of some."""
    from sklearn.decomposition import PCA

    found = PCA(min(RANK, *x.shape), svd_solver="randomized", random_state=0).fit(x.cpu().numpy())
    some = x[torch.arange(POINTS) * len(x) // POINTS].cpu().numpy()  # repeated where there are fewer
    directions, positions = torch.from_numpy(found.components_), torch.from_numpy(found.transform(some))
    missing = RANK - len(directions)
    return torch.from_numpy(found.mean_), pad(directions, (0, 0, 0, missing)), pad(positions, (0, missing))
