"""What happens at the end of a training: constants of the levels, the comparison with the start, and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from torchcdm.data import DataSource
from torchcdm.models.denoiser import Denoiser
from torchcdm.training.checkpoint import load_weights
from torchcdm.training.evaluation import labels_for
from torchcdm.training.level_constants import calibrate_levels
from torchcdm.training.outcome import Outcome, compare
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.samples import balanced_labels, draw, sampling_options, save_manifest, save_sheet
from torchcdm.training.settings import Config


def finish(
    model: Denoiser,
    run: RunFolder,
    config: Config,
    source: DataSource,
    start: Mapping[str, Tensor],
    save: Callable[[float | None], None],
    say: Callable[[str], None],
) -> tuple[Path, Outcome | None]:
    """Calibrates the kept model of a run, compares it with its start, keeps the better one and draws samples.

    ``model``, in eval mode, gets the weights of the kept one; ``start`` are those that the training began with.
    ``save`` writes it into the run, as the start where that one's validation value is given, and ``say`` shows a
    message.

    Returns:
        The sheet of samples, or their folder; and the comparison, of a cdm with validation data.
    """
    cdm = config.model.kind == "cdm" and len(source.validation) >= 2
    copies = config.train.calibration if cdm else 0
    kept = load_weights(model, run.root)
    outcome = None
    # Values that were calibrated on paths, of a finished run that is resumed, stay.
    if copies and kept is model:
        x, labels = source.validation.tensors()
        found = calibrate_levels(model, x, labels_for(model, labels), copies, config.train.seed)
        if found.change:
            save(None)
        change = f"log p_0 {found.change:+.3f} nats" if found.change else "left as they were"
        entropies = f"cross-entropy of held-out halves {found.before:.4f} -> {found.after:.4f}"
        say(f"constants of the levels: {entropies}, {change}")
    if cdm and kept is model:
        outcome = compare(model, config, source, start)
        if outcome.kept == "start":
            model.load_state_dict(start)
            save(outcome.values["start"])
        say(outcome.text())
    samples = save_samples(kept, run, config, source, "final") if config.sampling.n else run.samples
    return samples, outcome


def save_samples(model: Denoiser, run: RunFolder, config: Config, source: DataSource, name: str) -> Path:
    """Draws samples; gives the path of their sheet, called ``name``, and writes the manifest beside it."""
    sampling = config.sampling
    y = None if model.classes is None else balanced_labels(sampling.n, model.classes)
    guidance = 0.0 if y is None else sampling.guidance
    drawn = draw(model, sampling.n, y, config.train.seed, guidance=guidance, **sampling_options(model, sampling))
    save_manifest(drawn, run.samples / "manifest.csv", class_names=source.class_names)
    return save_sheet(drawn, model, run.samples / name)
