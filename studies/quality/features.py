"""Features of images: those of Inception where its weights are, else of a small classifier trained on the spot.

Numbers of different features do not compare, and two trainings need not end alike: where there is a folder to keep the
classifier in, it is trained once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from studies.cache import Made, kept
from torchcdm.data import DataSource, fingerprint, to_bytes
from torchcdm.data.source import Split
from torchcdm.errors import UserError
from torchcdm.training.checkpoint import load_tensors

INCEPTION_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The file that torch-fidelity downloads into torch's cache of checkpoints."""

BATCH = 256

@dataclass(frozen=True)
class Extractor:
    """Features of images and their name.

    Attributes:
        name: For headers: which network, and how it was obtained.
        features: Images in data units (N, C, H, W) to float64 (N, F).
        key: For names of files: differs where features do.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    key: str


def extractor_for(
    source: DataSource,
    seed: int = 0,
    device: str | torch.device = "cpu",
    steps: int = 600,
    folder: Path | None = None,
) -> Extractor:
    """Inception for RGB data where torch-fidelity and its weights are at hand, else a classifier trained on the spot.

    Args:
        source: The data: images, with classes where Inception is not at hand.
        seed: Of the classifier's training.
        device: Where to.
        steps: Of the classifier's training.
        folder: Keeps the classifier, which is loaded from there where it is; nothing is kept when None.

    Raises:
        UserError: No Inception, and no classes to train a classifier on; or the folder has a classifier of the same
            data that was trained otherwise.
    """
    if inception_features(source):
        return _inception(source, device)
    return _classifier(source, seed, device, steps, folder)


def inception_features(source: DataSource) -> bool:
    """Whether features are Inception's; else a classifier of the source's classes has to give them.

    Raises:
        UserError: Neither can be had.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_WEIGHTS
    if find_spec("torch_fidelity") and weights.exists():
        return True
    if source.classes is None or len(source.shape) != 3:
        raise UserError(
            f"{source.name}: Fréchet distances need images with classes, or torch-fidelity with {weights}"
        )
    return False


def in_batches(split: Split) -> Iterator[tuple[Tensor, Tensor]]:
    """All of a split's samples, :data:`BATCH` at a time: their rows, long (B,), and they, (B, *shape)."""
    return ((rows, split.batch(rows)[0]) for rows in torch.arange(len(split)).split(BATCH))


def _inception(source: DataSource, device: str | torch.device) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
    limits = None
    if source.transform.low is None:
        # One range for data and samples, or the distance would not see that they differ in it.
        ends = torch.tensor([x.aminmax() for _, x in in_batches(source.train)])
        limits = float(ends[:, 0].min()), float(ends[:, 1].max())

    @torch.no_grad()
    def features(x: Tensor) -> Tensor:
        bytes_ = to_bytes(x.float(), source.transform, limits)
        bytes_ = bytes_.expand(-1, 3, -1, -1) if bytes_.shape[1] == 1 else bytes_
        return torch.cat([network(part.to(device))[0].double().cpu() for part in bytes_.split(BATCH)])

    key = INCEPTION_WEIGHTS.removeprefix("weights-").removesuffix(".pth")
    return Extractor("Inception (torch-fidelity, 2048 features)", features, key)


class _Classifier(nn.Module):
    """Three convolutions and a layer of 64 features."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(256, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def _classifier(
    source: DataSource, seed: int, device: str | torch.device, steps: int, folder: Path | None
) -> Extractor:
    data = fingerprint(source)
    settings = {"data": source.name, "fingerprint": data, "seed": seed, "steps": steps}
    path = None if folder is None else folder / f"classifier-{data}.json"
    facts, weights = kept(path, settings, partial(_train_classifier, source, seed, device, steps))
    network = _Classifier(source.shape[0], source.classes or 0)
    load_tensors(network, weights, path or Path("classifier"))
    network.to(device).eval().requires_grad_(False)

    def features(x: Tensor) -> Tensor:
        z = source.transform(source.transform.quantize(x.float()))
        return torch.cat([network.body(part.to(device)).double().cpu() for part in z.split(BATCH)])

    accuracy = f"accuracy {100 * facts['accuracy']:.1f} %"
    name = f"64 features of a classifier trained here on {source.name}, {accuracy}"
    return Extractor(name, features, hashlib.sha256(save(dict(weights))).hexdigest()[:16])


def _train_classifier(source: DataSource, seed: int, device: str | torch.device, steps: int) -> Made:
    """Accuracy and weights; trained with Adam on batches of 128, a few seconds to a minute on one core."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Classifier(source.shape[0], source.classes or 0).to(device)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(steps):
        x, y = source.train.batch(torch.randint(len(source.train), (128,), generator=generator))
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        loss = nn.functional.cross_entropy(network(source.transform(x).to(device)), y.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    network.eval().requires_grad_(False)
    x, y = (source.test or source.train).tensors(2000)
    predicted = torch.cat([network(source.transform(part).to(device)).argmax(1).cpu() for part in x.split(BATCH)])
    weights = {name: tensor.cpu() for name, tensor in network.state_dict().items()}
    return {"accuracy": float((predicted == y).double().mean())}, weights
