"""Quality of samples against evaluations of the denoiser: Fréchet distance, its standard error, grain and the rest.

    python -m studies.benchmarks.quality_curves --seconds 600 --size 16x16 --out runs/curves --json quality_curves.json
    python -m studies.benchmarks.quality_curves --runs plain=runs/a gaussianised=runs/b --out runs/curves

The first trains a CDM and a DDM of the preset for the same processor time, in grey levels or Gaussianised; the second
takes models that are there. Every cell is a model, a sampler, a placement of the steps and a number of evaluations.
A sampler with two evaluations a step makes half as many steps; so do a DDM that is guided; ``ddpm+1``, with a move
that is accepted or rejected after each step; and ``ddpm~1``, with one that is always taken, as a model without a
density can make it (the corrector of arXiv 2011.13456). ``sa2@4,2`` is ``sa2`` with eta 4 for data of variance 2. All
cells of a model start from the same noise.

``--out`` keeps models and cells; what is there is not made again, and refused where its settings are others.
``--budget`` ends the command when so much processor time has passed; the next call goes on. The JSON holds what is
in ``--out``. ``--budget 0`` only collects it.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from studies import cache
from studies.benchmarks.equal_time import RESULT, ddm, measured, on_plain_grey_levels
from studies.quality.frechet import Reference
from studies.quality.measure import Ruler
from torchcdm.compose import sample
from torchcdm.compose.sampling import sample_noise, trajectories
from torchcdm.data import DataOptions, parse_size, save_grid
from torchcdm.diffusion.prediction import Prediction
from torchcdm.likelihood.log_z import weights_of
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import LevelReader
from torchcdm.random import derive, evenly_spaced
from torchcdm.runtime.artefact import read_artefact
from torchcdm.runtime.files import write_json
from torchcdm.samplers import Curvature, Sampler, SASolver, make_sampler
from torchcdm.training.build import load_source
from torchcdm.training.checkpoint import load, read_info
from torchcdm.training.finish import balanced_labels
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.settings import Config

SHOWN = 40
"""Samples of each cell in its picture."""

SIGNAL_TO_NOISE = 0.16
"""Of moves that are always taken: length of a move's drift over that of its noise, as published for CIFAR-10."""


def contenders(config: Config, data: DataOptions, classes: bool) -> dict[str, Config]:
    """The CDM and the DDM of ``data``; with classes a joint head, and an embedding in the U-Net."""
    models = {"cdm": config, "ddm": ddm(config, config.model.backbone.width)}
    labels = {"cdm": "joint", "ddm": "input"} if classes else dict.fromkeys(models, "none")
    return {
        name: replace(own, model=replace(own.model, labels=labels[name]), data=data) for name, own in models.items()
    }


def trained(options: argparse.Namespace) -> dict[str, Path]:
    """The folders of a CDM and a DDM of every seed, trained for the same time where they are not there."""
    size = None if options.size is None else parse_size(options.size)
    config = on_plain_grey_levels(options.preset, options.gaussianize)
    data = replace(config.data, size=size, spec=options.data or config.data.spec, clusters=options.clusters)
    batch = options.batch or config.train.batch_size
    config = replace(config, train=replace(config.train, batch_size=batch))
    if options.hidden is not None:
        backbone = replace(config.model.backbone, hidden=options.hidden)
        config = replace(config, model=replace(config.model, backbone=backbone))
    source = load_source(data)
    folders = {}
    for seed in options.seeds:
        both = contenders(config, data, options.classes or options.clusters is not None)
        for name in options.contenders:
            folder = options.out / "models" / f"{name}-{seed}"
            measured(both[name], source, options.seconds, seed, folder, options.images)
            folders[f"{name}-{seed}"] = folder
    return folders


def taken(model: Denoiser, moves: int, seed: int, x: Tensor, t: int, rows: slice, y: Tensor | None) -> Prediction:
    """Langevin moves that are always taken: where they end, and what the denoiser says there.

    Their size is 2 (:data:`SIGNAL_TO_NOISE` |noise| / |score|)², with the means of the norms over the batch.
    """
    draws = sample_noise(derive(seed, "corrector", t), range(rows.start, rows.stop), x.shape[1:], moves, x.dtype)
    now = model.denoise(x, t, y)
    for noise in draws:
        lengths = [part.flatten(1).norm(dim=1).mean() for part in (noise, now.score)]
        size = 2 * (SIGNAL_TO_NOISE * lengths[0] / lengths[1]) ** 2
        now = model.denoise(now.x_t + size * now.score + (2 * size).sqrt() * noise, t, y)
    return now


class Clipped(Denoiser):
    """A ``model`` of grey levels whose estimates of the data are clipped to their range, as published samplers do.

    A deterministic ``sampler`` has the level read off x, as :func:`torchcdm.sample` gives it to placed steps.
    """

    def __init__(self, model: Denoiser, sampler: Sampler) -> None:
        super().__init__(model.schedule, model.transform, base=model.base)
        reads = model.density is not None and not sampler.stochastic
        self.model, self.coarse, self.own = LevelReader(model.density) if reads else model, model.coarse, model.classes
        half = model.transform.bin / 2
        self.low, self.high = model.transform.low - half, model.transform.high + half

    @property
    def classes(self) -> int | None:
        return self.own

    def denoise(self, x_t: Tensor, t: Any, y: Tensor | None = None) -> Prediction:
        found = self.model.denoise(x_t, t, y)
        x0 = self.transform(self.transform.inverse(found.x0).clamp(self.low, self.high))
        return Prediction.of_x0(x_t, *self.schedule.at(t, x_t), x0)


def cell(
    model: Denoiser, name: str, sampler: str, spacing: str, evaluations: int, ruler: Ruler, groups: Tensor | None,
    options: argparse.Namespace,
) -> dict[str, Any] | None:
    """One row; None where there are more steps than levels, or moves and no density.

    Of models of clusters, ``groups`` are those of the training samples; samples are drawn of each as often.
    """
    pattern = r"^(.*?)(?:@([\d.]+),([\d.]+))?(?:([+~])(\d+))?$"  # dpm++ has no moves
    rule_name, eta, variance, kind, count = re.findall(pattern, sampler)[0]
    rule, moves = make_sampler(rule_name), int(count or 0)
    if eta:
        rule = SASolver(eta=float(eta), variance=float(variance))
    # A joint model has all classes and none from one pass.
    passes = 2 if options.guidance and model.density is None else 1
    steps = 1 + (evaluations - 1) // (passes * (rule.evaluations + moves))
    if kind == "+" and model.density is None:
        return None
    if steps > model.schedule.T:
        return None
    stem = options.out / "cells" / f"{name}-{sampler.replace('.', '_')}-{spacing}-{evaluations}"
    # Each training draws other noise: of the same noise distances would differ by less than samples do.
    seed = options.seed + int((re.search(r"\d+$", name) or "0")[0])
    settings = {"model": weights_of(RunFolder(options.folders[name]).root), "samples": options.samples,
                "features": ruler.reference.extractor.key, "seed": seed,
                "guidance": options.guidance} | ({"clip": True} if options.clip else {})  # fmt: skip

    def make() -> dict[str, Any]:
        y = None if model.classes is None else balanced_labels(options.samples, model.classes)
        if groups is not None:
            y = groups[evenly_spaced(len(groups), options.samples)]
        began, cost = time.process_time(), passes * (rule.cost(steps) + moves * (steps - 1))
        made = cost
        if kind == "~":
            even, shape = [*model.schedule.time_grid(steps), 0], ruler.reference.source.shape
            path = even
            if spacing == "adaptive":
                path = Curvature.of(model, shape, y).levels(steps, model.schedule, rule.weight)
            moved = partial(taken, model, moves, seed)
            x = trajectories(model, options.samples, rule, path, shape, y, seed, moved=moved)
        else:
            one = Clipped(model, rule) if options.clip else model
            draws = sample(one, options.samples, rule, steps, y, options.guidance, seed, corrector=moves,
                           spacing="adaptive" if spacing == "adaptive" else "even", details=True)  # fmt: skip
            x, made = draws.x, passes * draws.evaluations  # fewer than asked for, of few levels below a start
        seconds = time.process_time() - began
        save_grid(x[:SHOWN], stem.with_suffix(".png"), model.transform, 10)
        return {"model": name, "sampler": sampler, "spacing": spacing, "evaluations": cost, "steps": steps,
                "made": made, "seed": seed, "seconds": seconds, **asdict(ruler.quality(x))}  # fmt: skip

    return cache.numbers(stem.with_suffix(".json"), settings, make)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=FOLDER", help="models that are there")
    parser.add_argument("--preset", default="fashion-mnist")
    parser.add_argument("--seconds", type=float, default=600, help="processor time of each training")
    parser.add_argument("--contenders", nargs="+", choices=("cdm", "ddm"), default=("cdm", "ddm"), help="to train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of trainings")
    parser.add_argument("--data", help="SPEC of other images than the preset's")
    parser.add_argument("--size", help="HxW of the images; the preset's when left out")
    parser.add_argument("--gaussianize", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--classes", action="store_true", help="models of the data with their classes")
    parser.add_argument("--clusters", type=int, help="models of the data with so many groups that are found")
    parser.add_argument("--batch", type=int, help="samples a step of training; the preset's when left out")
    parser.add_argument("--hidden", type=int, help="hidden units of the CDM's head; none when left out")
    parser.add_argument("--images", type=int, default=1000, help="test images of the denoising error")
    parser.add_argument("--samplers", nargs="+", default=["ddpm", "ddim", "dpm2", "unipc3"])
    parser.add_argument("--spacings", nargs="+", default=["even", "adaptive"])
    parser.add_argument("--evaluations", type=int, nargs="+", default=[6, 10, 25, 50, 100, 200])
    parser.add_argument("--samples", type=int, default=5000, help="of each cell")
    parser.add_argument("--seed", type=int, default=0, help="of samples; that of a training NAME-K is K more")
    parser.add_argument("--guidance", type=float, default=0.0, help="weight of the class, of models with classes")
    parser.add_argument("--clip", action="store_true", help="estimates of the data to the range of grey levels")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds of processor time")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--out", type=Path, required=True, help="models and cells")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.folders = dict(run.split("=", 1) for run in options.runs) or trained(options)
    rulers: dict[Any, tuple[Ruler, Tensor | None]] = {}
    contenders = {}
    for name, folder in options.folders.items():
        data = read_info(folder).data
        key = (data.spec, data.size, data.channels, data.clusters)
        if key not in rulers:
            source = load_source(data)
            ruler = Ruler(Reference(source, folder=options.out / "features"), options.seed)
            rulers[key] = ruler, None if data.clusters is None else source.train.labels
        contenders[name] = load(folder), *rulers[key]
    floors = [asdict(ruler.floor(options.samples)) for ruler, _ in rulers.values()]
    print(f"floor: Fréchet {floors[0]['frechet']:.2f} ± {floors[0]['frechet_se']:.2f}")
    cells = product(options.evaluations, contenders, options.samplers, options.spacings)  # the cheapest first
    for evaluations, name, sampler, spacing in cells:
        if time.process_time() > options.budget:
            break
        model, ruler, groups = contenders[name]
        row = cell(model, name, sampler, spacing, evaluations, ruler, groups, options)
        if row is not None:
            print(f"{name:16}{sampler:8}{spacing:10}{evaluations:5}  Fréchet {row['frechet']:.2f} "
                  f"± {row['frechet_se']:.2f}, grain {row['grain']:.3f}", flush=True)  # fmt: skip
    rows = [read_artefact(path, cache.KIND)[0]["values"] for path in sorted((options.out / "cells").glob("*.json"))]
    if options.json is not None:
        errors = [json.loads(path.read_text())["values"] | {"model": path.parent.name}
                  for path in sorted((options.out / "models").glob(f"*/{RESULT}"))]  # fmt: skip
        features = next(iter(rulers.values()))[0].reference.extractor.name
        content = {"features": features, "floors": floors, "models": errors, "rows": rows}
        write_json(options.json, content)


if __name__ == "__main__":
    main()
