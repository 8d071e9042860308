"""Run by ``two_ranks``: two processes share what one measures of a run, in Python and by commands."""

import io
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch

from torchcdm import load
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import ModelTarget
from torchcdm.apps.anomaly import level_profile
from torchcdm.cli import main
from torchcdm.compose import sample
from torchcdm.data import load_data
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, elbo, log_normalizer, report
from torchcdm.runtime.processes import map_rows, sharing
from torchcdm.training.evaluation import evaluate
from torchcdm.training.loop import NotFinite


def measured(run: Path) -> dict:
    """Samples, likelihoods, a profile, and errors by level, in float64."""
    model, split = load(run).double(), load_data("digits").split("test")
    x = split.tensors(11)[0]
    kernels = Kernels.of_target(ModelTarget(model), n=5)
    z = log_normalizer(model, scoring=Scoring(level=15), sweeps=4, replicas=2, kernels=kernels)
    return {
        "samples": [sample(model, 9, name, 3, batch_size=size) for name, size in (("ddpm", None), ("dpm2", 2))],
        "report": report(model, x, None, Scoring(draws=2, steps=2), ("single", "flow")).to_json(),
        "elbo": elbo(model, x, kernels=kernels, evaluations=4).nats,
        "log Z": [z.value, z.check.value],
        "profile": level_profile(model, x),
        "levels": evaluate(model, split, 40)["per_level"],
    }


def commands(run: Path, out: Path) -> list[str]:
    """The commands that share their work."""
    return [
        f"sample {run} --n 9 --steps 3 --format all --out {out / 'samples'}",
        f"nll {run} --limit 9 --methods single --json {out / 'nll.json'} --quiet",
        f"evaluate {run} --limit 9 --draws 1 --json {out / 'levels.json'}",
        f"score {run} {out / 'new.npy'} --limit 60 --json {out / 'scores.json'}",
    ]


def failing(error: Exception, rows: slice) -> torch.Tensor:
    """Fails for the last of four rows, which is the second process's."""
    if rows.stop == 4:
        raise error
    return torch.zeros(rows.stop - rows.start)


def shared(run: Path, out: Path) -> None:
    """Leaves what this process measured and said, and how the other's failure ended its work."""
    with sharing() as (device, first):
        rank = 0 if first else 1
        torch.save(measured(run), out / f"measured-{rank}.pt")
        for error in (ArithmeticError("too much"), NotFinite("no numbers")):
            try:
                map_rows(partial(failing, error), 4, dim=1, device=device)
            except (RuntimeError, ArithmeticError, UserError) as caught:
                with (out / f"failures-{rank}.txt").open("a") as file:
                    print(repr(caught), file=file)
        for command in commands(run, out):
            with redirect_stdout(io.StringIO()) as said:
                assert main(command.split()) == 0
            (out / f"{command.split()[0]}-{rank}.txt").write_text(said.getvalue())


if __name__ == "__main__":
    shared(Path(sys.argv[1]), Path(sys.argv[2]))
