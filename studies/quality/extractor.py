"""The fixed networks whose features distances are taken in, and the command that made them.

    python -m studies.quality.extractor fashion-mnist
    python -m studies.quality.extractor digits

writes ``fashion-mnist.safetensors`` or ``digits.safetensors`` beside this file: a classifier, its weights in half
precision, its test accuracy in the file's metadata. Nine minutes of a core for the first, seconds for the second. The
files are in the repository; the commands are needed for other networks only. The second cycle of the first was a call
of its own, ``--start 1``, with the weights of the first in half precision.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchcdm.data import DataSource, load_data
from torchcdm.random import derive, stream

FOLDER = Path(__file__).parent
BATCH = 256


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained.

    Attributes:
        side: Pixels of an edge, to which images are resized.
        stem: Stride of the first convolution.
        widths: Channels of the three resolutions; the last is the number of features.
        cycles: Epochs over the training and the validation split, and peak learning rate, of each cycle.
        mirror: Mirror half of the images.
        shift: Pixels by which images are moved at most.
        smallest: Half of the batches are made smaller first, to an edge of at least so many pixels, so that the
            network is at home with small images.
    """

    side: int
    stem: int
    widths: tuple[int, int, int]
    cycles: tuple[tuple[int, float], ...]
    mirror: bool
    shift: int
    smallest: int


RECIPES = {
    "fashion-mnist": Recipe(28, 2, (32, 64, 128), ((14, 5e-3), (6, 2e-3)), mirror=True, shift=2, smallest=14),
    "digits": Recipe(8, 1, (24, 48, 96), ((80, 5e-3),), mirror=False, shift=1, smallest=7),
}


class _Block(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(width, width, 3), nn.ReLU(), *_convolution(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


@final
class Network(nn.Module):
    """Residual convolutions over three resolutions; the means of the last are the features.

    Args:
        recipe: Its sizes.
        classes: Number of classes.
    """

    def __init__(self, recipe: Recipe, classes: int) -> None:
        super().__init__()
        a, b, c = recipe.widths
        self.side = recipe.side
        self.body = nn.Sequential(
            *_convolution(1, a, 5, recipe.stem), nn.ReLU(), _Block(a), *_convolution(a, b, 3, 2), nn.ReLU(), _Block(b),
            *_convolution(b, c, 3, 2), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(c, classes)

    def features(self, x: Tensor) -> Tensor:
        """(N, 1, H, W), black 0 and white 1, to (N, F); other sizes than the network's are resized."""
        return self.body(resized(x, self.side)).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def resized(x: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) as squares of ``side`` pixels, bilinear with antialiasing."""
    if x.shape[2:] == (side, side):
        return x
    return nn.functional.interpolate(x, size=(side, side), mode="bilinear", antialias=True)


def load_network(name: str) -> tuple[Network, dict[str, Any]]:
    """A network of :data:`RECIPES` in eval mode, and what its file says: ``recipe``, ``accuracy``, ``key`` ..."""
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"]) | {"key": hashlib.sha256(path.read_bytes()).hexdigest()[:8]}
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118, as it is no dict
    network = Network(Recipe(**facts["recipe"]), facts["classes"])
    network.load_state_dict(weights, strict=False)  # the counts of batches are not kept
    return network.eval().requires_grad_(False), facts


def new_network(recipe: Recipe, classes: int, seed: int = 0) -> Network:
    """A network with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "extractor"))
        return Network(recipe, classes)


def train(network: Network, source: DataSource, recipe: Recipe, seed: int = 0, start: int = 0) -> Network:
    """Trains by AdamW, its rate in cycles, in bfloat16 where a product allows; from the cycle ``start`` on."""
    pairs = [split.tensors() for split in (source.train, source.validation)]
    x, y = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    x, network = _unit(source, x), network.train().requires_grad_().to(memory_format=torch.channels_last)
    for cycle, (epochs, rate) in list(enumerate(recipe.cycles))[start:]:
        optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=-(-len(x) // BATCH) * epochs)
        generator = stream(seed, "extractor batches", cycle)
        for epoch in range(epochs):
            losses = []
            for rows in torch.randperm(len(x), generator=generator).split(BATCH):
                with torch.autocast("cpu", torch.bfloat16):
                    logits = network(_augmented(x[rows], recipe, generator))
                loss = nn.functional.cross_entropy(logits.float(), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                rates.step()
                losses.append(loss.detach())
            print(f"epoch {epoch + 1} of {epochs}: cross-entropy {torch.stack(losses).mean():.4f}", flush=True)
    return network.eval().requires_grad_(False)


def accuracy(network: Network, source: DataSource, side: int | None = None) -> float:
    """Share of test images that are classified right; of images made smaller first, to ``side`` pixels, if given."""
    x, y = source.split("test").tensors()
    x = _unit(source, x) if side is None else resized(_unit(source, x), side)
    with torch.no_grad():
        found = torch.cat([network(part).argmax(1) for part in x.split(BATCH)])
    return float((found == y).double().mean())


def _augmented(x: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Half of the batches smaller; images mirrored and moved, an eighth of the batch alike."""
    if torch.rand((), generator=generator) < 0.5:
        side = int(torch.randint(recipe.smallest, recipe.side, (), generator=generator))
        x = resized(resized(x, side), recipe.side)
    parts = []
    for part in x.chunk(8):
        part = part.flip(3) if recipe.mirror and torch.rand((), generator=generator) < 0.5 else part
        moved = torch.randint(0, 2 * recipe.shift + 1, (2,), generator=generator).tolist()
        padded = nn.functional.pad(part, [recipe.shift] * 4)
        parts.append(padded[:, :, moved[0] : moved[0] + x.shape[2], moved[1] : moved[1] + x.shape[3]])
    return torch.cat(parts).contiguous(memory_format=torch.channels_last)


def _convolution(before: int, after: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(after)


def _unit(source: DataSource, x: Tensor) -> Tensor:
    low, high = source.transform.low, source.transform.high
    return (x.float() - low) / (high - low)


def main() -> int:
    """Trains one network and writes its file."""
    parser = argparse.ArgumentParser(description="Train a fixed feature extractor.")
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the file")
    parser.add_argument("--start", type=int, default=0, help="first cycle; a later one goes on from the file")
    options = parser.parse_args()
    source, recipe = load_data(options.name), RECIPES[options.name]
    network = load_network(options.name)[0] if options.start else new_network(recipe, source.classes, options.seed)
    network = train(network, source, recipe, options.seed, options.start)
    weights = {key: value.half().contiguous() for key, value in network.state_dict().items() if value.ndim}
    network.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    sides = {str(side): accuracy(network, source, side) for side in (recipe.side, 16) if side <= recipe.side}
    facts = {"data": options.name, "recipe": asdict(recipe), "classes": source.classes, "seed": options.seed,
             "accuracy": accuracy(network, source), "accuracy by side": sides}  # fmt: skip
    path = options.out / f"{options.name}.safetensors"
    save_file(weights, path, {"facts": json.dumps(facts)})
    print(f"{path}: {path.stat().st_size} bytes, test accuracy by side {sides}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
