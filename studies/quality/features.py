"""Features of images in which distances are taken: Inception's where its weights are, else those of a fixed network.

The fixed networks lie beside this file (:mod:`studies.quality.extractor`), so that every run measures with the same
ruler. Numbers of different features do not compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from studies.quality.extractor import load_network
from torchcdm.data import DataSource, to_bytes
from torchcdm.data.source import Split
from torchcdm.errors import UserError

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The file that torch-fidelity downloads into torch's cache of checkpoints."""

SMALL = 12
"""Images of at most so many pixels an edge are seen by the network of digits, others by that of Fashion-MNIST."""

BATCH = 256


@dataclass(frozen=True)
class Extractor:
    """Features of images and their name.

    Attributes:
        name: For headers: which network.
        features: Images in data units (N, C, H, W) to float64 (N, F).
        key: For names of files: differs where features do.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    key: str


def extractor_for(source: DataSource, device: str | torch.device = "cpu") -> Extractor:
    """Inception for RGB data where torch-fidelity and its weights are at hand, else a fixed network.

    Colour images pass the fixed network one channel at a time, and their features are put side by side.

    Args:
        source: The data: images. The features see them over their range of grey levels.
        device: Where to.

    Raises:
        UserError: No images.
    """
    check_images(source)
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if source.shape[0] == 3 and find_spec("torch_fidelity") and weights.exists():
        return _inception(source, device)
    return _fixed(source, device)


def check_images(source: DataSource) -> None:
    """Refuses data that have no features.

    Raises:
        UserError: No images.
    """
    if len(source.shape) != 3:
        raise UserError(f"{source.name}: Fréchet distances need images; these data are vectors")


def in_batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a split's samples, :data:`BATCH` at a time: their rows, long (B,), and they, (B, *shape)."""
    return ((rows, split.batch(rows)[0]) for rows in torch.arange(len(split)).split(BATCH))


def grey_range(source: DataSource) -> tuple[float, float]:
    """Black and white: the range of grey levels, or that of the training images where they have none.

    One range for data and samples, or the distance would not see that they differ in it.
    """
    if source.transform.low is not None:
        return source.transform.low, source.transform.high
    ends = torch.tensor([x.aminmax() for _, x in in_batches(source.train)])
    return float(ends[:, 0].min()), float(ends[:, 1].max())


def _inception(source: DataSource, device: str | torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    limits = grey_range(source)

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        bytes_ = to_bytes(x.float(), source.transform, limits)
        return torch.cat([network(part.to(device))[0].double().cpu() for part in bytes_.split(BATCH)])

    key = INCEPTION_WEIGHTS.removeprefix("weights-").removesuffix(".pth")
    return Extractor("Inception (torch-fidelity, 2048 features)", features, key)


def _fixed(source: DataSource, device: str | torch.device) -> Extractor:
    name = "digits" if max(source.shape[1:]) <= SMALL else "fashion-mnist"
    network, facts = load_network(name)
    network.to(device)
    low, high = grey_range(source)

    def features(x: Tensor) -> Tensor:
        parts = []
        for part in x.split(BATCH):
            grey = ((source.transform.quantize(part.float().to(device)) - low) / (high - low)).clamp(0, 1)
            parts.append(network.features(grey.flatten(0, 1)[:, None]).reshape(len(part), -1).double().cpu())
        return torch.cat(parts)

    width = network.head.in_features * source.shape[0]
    text = f"{width} features of the fixed {name} network (test accuracy {100 * facts['accuracy']:.1f} %)"
    return Extractor(text, features, f"{name}-{facts['key']}")
