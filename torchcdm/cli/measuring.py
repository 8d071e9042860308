"""``cdm nll`` and ``cdm evaluate``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, add_data, add_device, add_json, count, tell
from torchcdm.errors import UserError

if TYPE_CHECKING:
    from torchcdm.data import DataSource
    from torchcdm.models.denoiser import Denoiser
    from torchcdm.training.checkpoint import ModelInfo


def add_commands(commands: Any) -> None:
    """Adds both commands."""
    parser = add_command(commands, "nll", "likelihood of held-out data", "cdm nll runs/digits --json nll.json")
    parser.add_argument("model", metavar="RUN")
    add_data(parser)
    parser.add_argument("--methods", help="of single, elbo, flow, logz (all but logz; elbo and flow of a ddm)")
    parser.add_argument("--draws", type=int, metavar="K", help="noise draws of the one-pass rows (1)")
    parser.add_argument("--level", type=int, metavar="T", help="level of the bounds and the flow; chosen by default")
    parser.add_argument("--conditional", action="store_true", help="given the class, for models that saw classes")
    parser.add_argument("--flow-steps", type=int, metavar="N", help="Heun steps of the flow (40)")
    parser.add_argument("--flow-probes", type=int, metavar="P", help="probes of its divergence, even (2)")
    parser.add_argument("--particles", type=int, metavar="N", help="for log Z (1024); its second estimate takes a "
                        "quarter as many draws of the flow")  # fmt: skip
    parser.add_argument("--moves", type=int, metavar="M", help="Langevin steps of the particles at each level (1), an "
                        "evaluation each: they find density that the sampler does not propose")  # fmt: skip
    parser.add_argument("--seed", type=int)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_json(parser)
    add_device(parser)
    parser.set_defaults(run=run_nll)

    parser = add_command(
        commands, "evaluate", "level accuracy, cross-entropy and denoising error per level",
        "cdm evaluate runs/digits --json levels.json",
    )  # fmt: skip
    parser.add_argument("model", metavar="RUN")
    add_data(parser)
    parser.add_argument("--draws", type=count, default=4, help="noisy copies of each sample (4)")
    add_json(parser)
    add_device(parser)
    parser.set_defaults(run=run_evaluate)


def run_nll(options: argparse.Namespace) -> int:
    """Likelihood of a split."""
    from torchcdm.likelihood import Scoring, methods_of, report
    from torchcdm.runtime.processes import sharing
    from torchcdm.training.checkpoint import load, read_info
    from torchcdm.training.evaluation import labels_for

    scoring = Scoring(**_given(
        level=options.level, draws=options.draws, seed=options.seed, steps=options.flow_steps,
        probes=options.flow_probes,
    ))  # fmt: skip
    log_z, info = _given(particles=options.particles, moves=options.moves), read_info(options.model)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        # log Z takes longer than all others.
        methods = [method for method in methods_of(model) if method != "logz"]
        if options.methods is not None:
            methods = [method for method in map(str.strip, options.methods.split(",")) if method]
        source = _source(options, info, model, labelled=options.conditional)
        x, labels = source.split(options.split).tensors(options.limit)
        y = labels_for(model, labels) if options.conditional else None
        if options.conditional and y is None:
            raise UserError("--conditional: the model or the data have no classes")
        bar = main and not options.quiet
        result = report(model, x, y, scoring, methods, name=source.name, split=options.split, progress=bar, **log_z)
    if main:
        tell(options.json, result.table(), result.to_json())
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """Classifier and denoiser by level."""
    from torchcdm.runtime.processes import sharing
    from torchcdm.training.checkpoint import load, read_info
    from torchcdm.training.evaluation import evaluate

    if options.draws < 1:
        raise UserError(f"--draws is {options.draws}; at least 1 is needed")
    info = read_info(options.model)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        source = _source(options, info, model, labelled=True)
        values = evaluate(model, source.split(options.split), options.limit, options.draws)
    if main:
        text = "\n".join(f"{name:10} {value:.4f}" for name, value in values["mean"].items())
        tell(options.json, text, {"data": {"name": source.name, "split": options.split}} | values)
    return 0


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None: the defaults of the others are where they are used."""
    return {name: value for name, value in values.items() if value is not None}


def _source(options: argparse.Namespace, info: ModelInfo, model: Denoiser, labelled: bool) -> DataSource:
    """The data of the run, or others."""
    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit is {options.limit}; at least 1 is needed")
    return info.read_source(model, options.data, labelled)
