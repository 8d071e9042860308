"""Where a reproduction keeps what is costly, so that nothing finished is made twice: models, numbers, sample sets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn

from studies import cache
from torchcdm.data import DataSource
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.processes import chosen_device
from torchcdm.runtime.validation import encode
from torchcdm.training.checkpoint import load
from torchcdm.training.loop import train
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.settings import Config

SCALES = ("smoke", "small", "paper")
"""``smoke`` proves in minutes that the code runs; ``small`` is for two cores; ``paper`` is the published setting."""

FINISHED = "finished.json"
"""In the folder of a run whose training has ended."""

Part = TypeVar("Part")


class Unfinished(UserError):
    """A part that is not finished, where only finished ones are asked for."""


@final
class Workspace:
    """The folder of reproductions at one scale. Several of them share its models.

    Whatever is kept carries the settings it was made with, and is refused for others.

    Args:
        root: The folder.
        scale: Of :data:`SCALES`.
        device: As in :func:`torchcdm.training.loop.train`.
        progress: Shows progress bars and messages.
        steps: Of every training; the scale's when None.
        sample_count: Of every sample set; the scale's when None.
        finished_only: Trains and samples nothing: what is missing raises :class:`Unfinished`.
        seed: Of trainings and samples; data sets and the noise of measurements are the same for all seeds.

    Attributes:
        device: Where everything is computed.
        left_out: What :meth:`finished` has not found.
    """

    def __init__(
        self,
        root: Path,
        scale: str,
        device: str | None = None,
        progress: bool = False,
        steps: int | None = None,
        sample_count: int | None = None,
        finished_only: bool = False,
        seed: int = 0,
    ) -> None:
        self.root, self.scale, self.progress = root, scale, progress
        self.steps, self.sample_count, self.finished_only = steps, sample_count, finished_only
        self.seed = seed
        self.left_out: list[str] = []
        self.device = str(chosen_device(device))

    @property
    def figures(self) -> Path:
        """Folder of the figures."""
        return self.root / "figures"

    @property
    def features(self) -> Path:
        """Folder of what Fréchet distances need of training images: the same for all reproductions."""
        return self.root / "features"

    def figure(self, name: str) -> Path:
        """Path of a figure."""
        return self.figures / f"{name}-{self.scale}.png"

    def adjusted(self, config: Config) -> Config:
        """The configuration with this workspace's seed and steps; what is counted in steps shrinks with them."""
        config = replace(config, train=replace(config.train, seed=self.seed))
        if self.steps is None:
            return config
        share = self.steps / config.train.steps
        counts = {name: max(1, round(share * getattr(config.train, name)))
                  for name in ("warmup", "validate_every", "save_every")}  # fmt: skip
        return replace(config, train=replace(config.train, steps=self.steps, **counts))

    def model(
        self,
        name: str,
        config: Config,
        source: DataSource,
        loss: Callable[[Any], nn.Module] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> tuple[Denoiser, dict[str, Any]]:
        """A trained model, from an earlier call where it was finished, and ``steps`` and ``seconds`` of its training.

        Args:
            name: Of the run, without the scale.
            config: What and how.
            source: The data; its name stands for them in the comparison of settings.
            loss: Makes the loss of a model; the kind's own when None.
            clock: What ``seconds`` counts.

        Raises:
            UserError: The folder holds a run with other settings.
            Interrupted: As in :func:`torchcdm.training.loop.train`; the next call goes on.
        """
        config = replace(config, data=replace(config.data, spec=source.name))
        folder = RunFolder(self.root / "runs" / f"{name}-{self.scale}")

        def make() -> dict[str, Any]:
            self.say(f"training {folder.root.name}")
            result = train(
                config, folder.root, source, resume=True, device=self.device, progress=self.progress, clock=clock,
                loss=loss,
            )  # fmt: skip
            return {"steps": result.step, "seconds": result.seconds, "selected": result.selected}

        path = folder.root / FINISHED
        facts = cache.numbers(path, encode(config), self._allowed(path, make))
        return load(folder.root, self.device), facts

    def numbers(self, name: str, settings: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Numbers (JSON) that ``make`` gives, from an earlier call where there was one with the same settings."""
        path = self.root / "numbers" / f"{name}-{self.scale}.json"
        return cache.numbers(path, settings, self._allowed(path, make))

    def samples(
        self, name: str, settings: Mapping[str, Any], chunks: int, make: Callable[[int], Tensor]
    ) -> Tensor:
        """A sample set, kept chunk by chunk; a set of more chunks begins with those of a smaller one.

        Args:
            name: Of the set, without the scale.
            settings: What a chunk depends on.
            chunks: Number of chunks.
            make: Gives the samples (n, *shape) of chunk 0, 1, ...
        """
        folder = self.root / "samples" / f"{name}-{self.scale}"
        parts = []
        for chunk in range(chunks):
            path = folder / f"{chunk:04d}.json"
            kept = cache.kept(path, settings, self._allowed(path, lambda chunk=chunk: ({}, {"x": make(chunk)})))
            parts.append(kept[1]["x"])
        return torch.cat(parts)

    def finished(self, name: str, make: Callable[[], Part]) -> Part | None:
        """What ``make`` gives; None where only finished parts are asked for and one that it needs is missing."""
        try:
            return make()
        except Unfinished:
            self.left_out.append(name)
            return None

    def say(self, text: str) -> None:
        """A message to whoever waits."""
        if self.progress:
            print(text, flush=True)

    def _allowed(self, path: Path, make: Callable[[], Part]) -> Callable[[], Part]:
        """The same, which refuses to make a part where only finished ones are asked for."""

        def checked() -> Part:
            if self.finished_only:
                raise Unfinished(f"{path}: is not finished; leave out --finished to make it")
            return make()

        return checked
