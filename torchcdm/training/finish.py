"""What happens at the end of a training: constants of the levels, the comparison with the start, and samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.data import DataSource
from torchcdm.models.denoiser import Denoiser
from torchcdm.training.checkpoint import load_weights
from torchcdm.training.evaluation import labels_for
from torchcdm.training.level_constants import calibrate_levels
from torchcdm.training.outcome import compare, told
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.samples import balanced_labels, draw, sampling_options, save_manifest, save_sheet
from torchcdm.training.settings import Config
from torchcdm.training.states import Best

if TYPE_CHECKING:
    from torchcdm.training.loop import Trainer


def finish(trainer: Trainer) -> tuple[Path, dict[str, Any] | None]:
    """Calibrates the kept model of a training, compares it with its start, keeps the better one and draws samples.

    Returns:
        The sheet of samples, or their folder; and what :func:`torchcdm.training.outcome.compare` says, of a cdm with
        validation data.
    """
    model, run, config, source = trainer.ema.model, trainer.run, trainer.config, trainer.source
    kept, outcome = load_weights(model, run.root), None
    # Values that were calibrated on paths, of a finished run that is resumed, stay.
    cdm = config.model.kind == "cdm" and len(source.validation) >= 2 and kept is model
    if cdm and config.train.calibration:
        x, labels = source.validation.tensors()
        y = labels_for(model, labels)
        found = calibrate_levels(model, x, y, config.train.calibration, config.train.seed)
        if found.change:
            trainer.save_model()
        change = f"log p_0 {found.change:+.3f} nats" if found.change else "left as they were"
        entropies = f"cross-entropy of held-out halves {found.before:.4f} -> {found.after:.4f}"
        trainer.say(f"constants of the levels: {entropies}, {change}")
    if cdm:
        outcome = compare(model, config, source, trainer.start)
        if outcome["kept"] == "start":
            model.load_state_dict(trainer.start)
            unit, value = outcome["unit"], outcome["values"]["start"]
            trainer.selection.best = Best(value="nll", unit=unit, best=value, step=0)
            trainer.save_model()
        trainer.say(told(outcome))
    return save_samples(kept, run, config, source, "final") if config.sampling.n else run.samples, outcome


def save_samples(model: Denoiser, run: RunFolder, config: Config, source: DataSource, name: str) -> Path:
    """Draws samples; gives the path of their sheet, called ``name``, and writes the manifest beside it."""
    sampling = config.sampling
    y = None if model.classes is None else balanced_labels(sampling.n, model.classes)
    guidance = 0.0 if y is None else sampling.guidance
    drawn = draw(model, sampling.n, y, config.train.seed, guidance=guidance, **sampling_options(model, sampling))
    save_manifest(drawn, run.samples / "manifest.csv", class_names=source.class_names)
    return save_sheet(drawn, model, run.samples / name)
