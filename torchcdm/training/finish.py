"""What happens at the end of a training: the constants of the levels, and samples of the model that was kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchcdm.data import DataSource
from torchcdm.models.denoiser import Denoiser
from torchcdm.training.checkpoint import load_weights
from torchcdm.training.evaluation import labels_for
from torchcdm.training.level_constants import calibrate_levels
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.samples import balanced_labels, draw, save_manifest, save_sheet
from torchcdm.training.settings import Config


def finish(
    model: Denoiser,
    run: RunFolder,
    config: Config,
    source: DataSource,
    save: Callable[[], None],
    say: Callable[[str], None],
) -> Path:
    """Calibrates the kept model of a run and draws samples of it, where its configuration asks for them.

    Args:
        model: In eval mode; gets the weights of the kept one.
        run: Where it was kept.
        config: The run's.
        source: The run's data.
        save: Writes ``model`` into the run.
        say: Shows a message.

    Returns:
        The sheet of samples; the folder for samples where none were asked for.
    """
    copies = config.train.calibration if config.model.kind == "cdm" and len(source.validation) >= 2 else 0
    if copies or config.sampling.n:
        kept = load_weights(model, run.root)
    # Values that were calibrated on paths, of a finished run that is resumed, have no such constants.
    if copies and kept is model:
        x, labels = source.validation.tensors()
        found = calibrate_levels(model, x, labels_for(model, labels), copies, config.train.seed)
        if found.change:
            save()
        change = f"log p_0 {found.change:+.3f} nats" if found.change else "left as they were"
        entropies = f"cross-entropy of held-out halves {found.before:.4f} -> {found.after:.4f}"
        say(f"constants of the levels: {entropies}, {change}")
    return save_samples(kept, run, config, source, "final") if config.sampling.n else run.samples


def save_samples(model: Denoiser, run: RunFolder, config: Config, source: DataSource, name: str) -> Path:
    """Draws samples; gives the path of their sheet, called ``name``, and writes the manifest beside it."""
    sampling = config.sampling
    y = None if model.classes is None else balanced_labels(sampling.n, model.classes)
    steps, guidance = min(sampling.steps, model.schedule.T), 0.0 if y is None else sampling.guidance
    drawn = draw(
        model, sampling.n, y, config.train.seed, sampler=sampling.sampler, steps=steps, guidance=guidance
    )
    save_manifest(drawn, run.samples / "manifest.csv", class_names=source.class_names)
    return save_sheet(drawn, model, run.samples / name, source.columns)
