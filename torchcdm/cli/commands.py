"""The commands and their arguments. What a command does is imported when it runs: help is to come at once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torchcdm.cli.arguments import Parser, add, add_command, count, files, output

SHORT = {
    "data": ("data.spec", "SPEC", "digits, folder:PATH, array:FILE, table:FILE, toy:NAME ..."),
    "size": ("data.size", "HxW", "resize images"),
    "crop": ("data.crop", "HxW", "train on random crops of images of any size in a folder"),
    "channels": ("data.channels", "N", "convert images to 1, 3 or 4 channels"),
    "label": ("data.label", "COLUMN", "column of a table that holds the class"),
    "columns": ("data.columns", "A,B", "columns of a table to use"),
    "drop": ("data.drop", "A,B", "columns of a table to leave out"),
    "model": ("model.kind", "cdm|ddm", "ddm: the plain denoising baseline; for an encoder the U-Net of its width"),
    "steps": ("train.steps", "N", "optimiser steps"),
    "seed": ("train.seed", "S", "seed of everything random"),
    "precision": ("train.precision", "fp32|bf16", "of the network in training (fp32)"),
    "init": ("train.init", "RUN", "start from the weights of another run, where they fit"),
}
"""Flags of ``cdm train`` that stand for a field: the field, and what the help says of them."""


def add_commands(commands: Any) -> None:
    """Adds all commands."""
    for add_some in (_models, _sampling, _measuring, _scoring, _comparing):
        add_some(partial(add_command, commands, "torchcdm.cli"))


def _models(command: Callable[..., Parser]) -> None:
    example = "cdm train digits --out runs/digits"
    parser = command("training:train", "train a model from a preset or a YAML file", example, "skip-bad device")
    add(parser, "preset PRESET", "see cdm presets", nargs="?")
    add(parser, "--config FILE", "YAML file instead of, or on top of, a preset")
    add(parser, "--out RUN", "folder of the run", output, required=True)
    for name, (_, metavar, text) in SHORT.items():
        add(parser, f"--{name} {metavar}", text)
    add(parser, "--compile", "torch.compile", bool)
    add(parser, "--resume", "go on from a state in RUN, if any; steps, time, report, samples, --data may be new", bool)
    add(parser, "--budget TIME", "of training, resumed or not: 90s, 10m, 2h; encoder fits size and report to it (30m)")
    add(parser, "--no-report", "measure nothing on the test split", bool)
    add(parser, "--dry-run", "take some steps, print what all would cost, and write nothing", bool)
    add(parser, "--quiet", "no progress bar, no report on the terminal", bool)
    add(parser, "--section.field VALUE", "any field, such as --train.lr 1e-3; RUN/config.yaml lists them", dest="_")
    parser.set_defaults(takes_fields=True)

    example = "cdm convert cifar10.pt runs/published --preset cifar10"
    parser = command("training:convert", "a checkpoint of the published CDM code as a run", example)
    add(parser, "checkpoint OFFICIAL.pt", None, Path)
    add(parser, "out RUN", None, output)
    what = parser.add_mutually_exclusive_group(required=True)
    add(what, "--config FILE", "YAML file with the model and the data of the training")
    add(what, "--preset PRESET", "cifar10, cifar10-uniform, celeba64 ...")
    add(parser, "--classes N", "number of classes, for a conditional checkpoint", count)

    command("about:presets", "list the presets", "cdm presets")
    command("about:info", "what a run holds", "cdm info runs/digits", "model json")
    command("about:zoo", "the models that ship with the package", "cdm zoo", "json")

    example = "cdm push runs/photos me/photos"
    parser = command("about:push", "a model to the Hugging Face Hub, with a card", example, "model")
    add(parser, "repository OWNER/NAME", "on the Hub; made where it does not exist")
    add(parser, "--private", "make a new repository private", bool)


def _sampling(command: Callable[..., Parser]) -> None:
    examples = (
        "cdm sample runs/digits --n 64 --out samples",
        "cdm sample zoo:digits-conditional --all-of 3,8 --particles 512 --n 64 --out both",
        "accelerate launch -m torchcdm sample runs/digits --n 50000 --format array --out many",
    )
    parser = command("sampling:sample", "draw samples", "\n  ".join(examples), "model seed quiet device")
    add(parser, "--n", "number of samples", count, default=64)
    names = "sa2, ddpm, ddim, dpm2, dpm++, ipndm3, ipndm4, deis3, deis4, unipc2, unipc3"
    add(parser, "--sampler", f"{names}: one evaluation a step; heun: two (sa2; dpm++ of tables; ddpm with moves)")
    add(parser, "--steps N", "sampling steps, up to T (25)", count)
    add(parser, "--spacing", "even, or adaptive: steps where trajectories bend, as 16 pilots find (sa2: adaptive)")
    add(parser, "--label K|balanced", "class by number or name, or all in turn")
    add(parser, "--guidance W", "classifier-free guidance", float, default="0")
    add(parser, "--all-of A,B", "what is all of these classes at once: a product")
    add(parser, "--any-of A,B", "what is one of these classes: a mixture")
    add(parser, "--none-of A,B", "what is none of these classes")
    add(parser, "--beta B", "density to the power B: above 1 more typical samples", float)
    add(parser, "--corrector N", "accepted Langevin moves after each step (0; 1 of particles and compositions)", int)
    add(parser, "--particles N", "weighted particles, at least --n: exact for composed densities", int, default=0)
    add(parser, "--format", "what to write", default="grid", choices=("grid", "images", "array", "all"))
    add(parser, "--out DIR", None, output, required=True)

    what = "images from a part of them, a blurred or a smaller one: posterior samples"
    example = "cdm restore zoo:digits half.png --mask upper.png --noise-std 2 --out restored"
    parser = command("sampling:restore", what, example, "model paths seed skip-bad quiet device")
    what = parser.add_mutually_exclusive_group(required=True)
    add(what, "--mask FILE", "black and white image, or .npy, of the model's size: not 0 where PATH is known", Path)
    add(what, "--blur S", "PATH is blurred by a Gaussian of S pixels", float)
    add(what, "--scale K", "PATH is K times smaller, each pixel a mean", count)
    add(parser, "--noise-std S", "deviation of the noise of PATH, data units; not known by default", float)
    add(parser, "--n", "draws of each", count, default=64)
    add(parser, "--particles N", "weighted particles that they are drawn from, at least --n", count, default=512)
    what = "for means, widths of 90 %% credible intervals, draws, restored.csv"
    add(parser, "--out DIR", what, output, required=True)


def _measuring(command: Callable[..., Parser]) -> None:
    example, shared = "cdm nll runs/digits --json nll.json", "model data skip-bad split limit quiet json device"
    parser = command("measuring:nll", "likelihood of held-out or other data", example, shared)
    add(parser, "--methods", "of single, elbo, flow, logz (all but logz; elbo and flow of a ddm)")
    add(parser, "--draws K", "noise draws of the one-pass rows (1)", int)
    add(parser, "--level T", "level of the bounds and the flow; chosen by default", int)
    add(parser, "--conditional", "given the class, for models that saw classes", bool)
    add(parser, "--flow-steps N", "Heun steps of the flow (40)", int)
    add(parser, "--flow-probes P", "probes of its divergence, even (2)", int)
    add(parser, "--sweeps N", "sweeps of the replica exchange for log Z (200)", int)
    add(parser, "--seed S", "seed of the noise (0)", int)

    what, example = "level accuracy, cross-entropy and denoising error per level", "cdm evaluate runs/digits"
    parser = command("measuring:evaluate", what, example, shared)
    add(parser, "--draws K", "noisy copies of each sample (4)", count)


def _scoring(command: Callable[..., Parser]) -> None:
    example = "cdm score runs/sensors new.csv --fpr 0.01 --reference good.csv --csv scores.csv"
    shared = "model paths skip-bad quiet json device"
    parser = command("scoring:score", "how anomalous images, arrays or rows of tables are", example, shared)
    add(parser, "--score NAME", "levels, coarse, complexity, typicality, log_prob or ratio", default="levels")
    add(parser, "--background RUN", "model of broader data, for the score 'ratio'")
    add(parser, "--fpr P", "share of normal inputs to flag (0.05, or what the reference is enough for)", float)
    add(parser, "--reference PATH", "normal data that RUN was not trained on (its validation split)", files, nargs="+")
    add(parser, "--limit N", "at most N reference samples, evenly spaced (5000)", count)
    add(parser, "--csv FILE", "score, percentile, flag, and where it is odd: columns, or the file of a map", output)
    add(parser, "--plot FILE", "histogram of the scores, a PNG", output)
    add(parser, "--maps DIR", "a PNG for each image, beside it in red the pixels that are odd; not for tables", output)
    add(parser, "--engine", "ray: workers, for data that no memory holds", choices=("local", "ray"), default="local")
    add(parser, "--workers N", "workers on Ray; one for each GPU or core", count)

    parser = command("scoring:explore", "a page in the browser on a model", "cdm explore zoo:digits", "model device")
    add(parser, "--port P", "the first free one from 7860 on by default", int)
    add(parser, "--reference PATH", "normal data to compare with and choose from (MODEL's own)", files, nargs="+")

    example, shared = "cdm denoise runs/pixels in.npy --noise-std 4 --out clean", "model paths skip-bad quiet device"
    parser = command("scoring:denoise", "remove white noise from images, arrays or tables", example, shared)
    strength = parser.add_mutually_exclusive_group()
    add(strength, "--level T", "noise of this level", int)
    add(strength, "--noise-std S", "noise of this deviation, data units, where all values share a scale", float)
    noise = "level and noise_std of each input, for tables the share of each column's own deviation, noise_ratio"
    add(parser, "--out DIR", f"for the clean data, and noise.csv: {noise}", output, required=True)


def _comparing(command: Callable[..., Parser]) -> None:
    what = "density ratio of two data sets: numerator over denominator, at the query"
    example = "cdm ratio customers-2026.csv customers-2020.csv customers-2020.csv --csv weights.csv"
    parser = command("measuring:ratio", what, example, "skip-bad seed quiet json device")
    for name, what in (("numerator", "samples of p"), ("denominator", "samples of q"), ("query", "where to take p/q")):
        add(parser, f"{name} {name.upper()}", f"{what}: a table, an array, a folder of images, or a SPEC")
    add(parser, "--clip P", "set weights above this quantile to it, such as 0.999 (none)", float)
    add(parser, "--balance", "the weights give the query the numerator's means, column by column", bool)
    add(parser, "--discrete", "columns of few values: dequantize or error", default="dequantize")
    add(parser, "--size HxW", "images are resized to this")
    add(parser, "--channels N", "images are converted to so many channels", int)
    add(parser, "--steps N", "most training steps; of tables, also to train a network where it could be spared", int)
    add(parser, "--csv FILE", "log ratio, weight and flag of every sample", output)
    add(parser, "--save DIR", "keep the ratio, for torchcdm.DensityRatio.load", output)
    add(parser, "--test", "also test whether the two sets differ, by permutations", bool)

    what, example = "mutual information of two tables, row by row", "cdm mi weather.csv sales.csv"
    parser = command("measuring:mi", what, example, "seed quiet json")
    for name in ("x", "y"):
        add(parser, f"{name} {name.upper()}", "a table, an array, or a SPEC")
    add(parser, "--device D", "cpu, cuda, cuda:1; cpu by default, as the networks are small")
    add(parser, "--steps N", "most training steps", int)
