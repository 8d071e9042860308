"""Training: a loop over steps on accelerate, that can be killed at any moment and goes on bit for bit."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
import yaml
from torch import Tensor, nn

from torchcdm.data import DataSource, fingerprint
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.random import derive
from torchcdm.runtime.files import write_file
from torchcdm.runtime.processes import Processes
from torchcdm.training.batches import Batch, Batches
from torchcdm.training.build import build_loss, build_model, fit_gaussian, load_source, resolve
from torchcdm.training.checkpoint import (
    ModelInfo,
    TrainingState,
    load_matching,
    load_model_tensors,
    load_state,
    load_tensors,
    read_tensors,
    save_model,
    save_state,
    state_folders,
)
from torchcdm.training.codec import differences, encode
from torchcdm.training.config_files import file_fields, make_config
from torchcdm.training.ema import EMA
from torchcdm.training.evaluation import labels_for, validate
from torchcdm.training.interrupt import Interrupted, SignalWatch
from torchcdm.training.level_constants import calibrate_levels
from torchcdm.training.optimizers import build_optimizer
from torchcdm.training.run_folder import RunFolder, append_metrics, cut_metrics
from torchcdm.training.samples import balanced_labels, draw, save_manifest, save_sheet
from torchcdm.training.settings import Config, TrainConfig

DDM_VALUES = {"simple": "mse", "bound": "loss"}
"""The validation value that names the best plain diffusion model, by the weighting of its loss."""

MAX_BAD_STEPS = 10
"""So many steps in a row without a finite gradient end the training."""

FREE_ON_RESUME = (
    "preset", "description", "reaches", "sampling", "report", "data.workers", "train.steps", "train.validate_every",
    "train.validation_samples", "train.patience", "train.calibration", "train.log_every", "train.save_every",
    "train.sample_every", "train.trackers", "train.init",
)  # fmt: skip
"""What may differ from the run that is resumed; all else would make it another run."""


class NotFinite(UserError):
    """A training that gave up, step after step without a finite gradient."""


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Attributes:
        step: Steps done.
        seconds: Wall-clock of the training, over all resumes.
        skipped: Steps without a finite gradient.
        selected: Validation value, its best, and the step of the saved model.
        samples: The last sheet of samples.
        main: Whether this process is the one that writes files.
    """

    step: int
    seconds: float
    skipped: int
    selected: dict[str, Any]
    samples: Path
    main: bool


def train(
    config: Config,
    out: str | Path,
    source: DataSource | None = None,
    resume: bool = False,
    device: str | None = None,
    progress: bool = True,
    clock: Callable[[], float] = time.monotonic,
    loss: Callable[[Denoiser], nn.Module] | None = None,
) -> TrainResult:
    """Trains a model and leaves a run folder.

    Args:
        config: What and how.
        out: The run's folder.
        source: The data, in the units that the configuration asks for
            (:func:`torchcdm.training.build.in_units`); loaded from it when None.
        resume: Go on from the last saved state; a folder without one starts anew.
        device: ``cpu``, ``cuda``, ``cuda:1``; the best there is when None.
        progress: Shows a progress bar and messages.
        clock: What ``train.max_seconds`` counts, in seconds; ``time.process_time`` counts the processor's.
        loss: Makes the loss of a model, with :meth:`torchcdm.losses.CDMLoss.draw_levels` and ``forward`` alike; that
            of the configuration when None.

    Raises:
        UserError: The folder already holds a run, the configuration differs from that of the run to resume, the data
            do not suit the model, or a file cannot be written.
        NotFinite: Ten steps in a row were not finite.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    run = RunFolder(Path(out))
    if run.holds_run() and not resume:
        raise UserError(f"{out}: already holds a run; go on with --resume, or choose another folder")
    if resume and run.config.exists():
        _check_same(config, make_config(file_fields(run.config)), run)
    source = load_source(config.data) if source is None else source
    if config.data.spec is None:
        config = replace(config, data=replace(config.data, spec=source.name))
    config = replace(config, model=resolve(config.model, source.transform))
    # The state of torch's own generator is the caller's: steps seed it anew. Those of GPUs are left out, because
    # reading one opens a context on its GPU.
    with torch.random.fork_rng(devices=[]), SignalWatch() as watch:
        return Trainer(config, run, source, device, progress, watch, clock, loss).run_to_end(resume)


def share_done(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """Share of the training, 0 ... 1, that is done before a step: of its steps or its time, whichever is more."""
    share = step / config.steps
    if config.max_seconds is not None:
        share = max(share, seconds / config.max_seconds)
    return min(1.0, share)


def learning_rate(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """Learning rate of a step, counted from 0, after so many seconds of training."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    match config.decay:
        case "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * share_done(config, step, seconds)))
        case "step":
            factor = config.decay_factor ** (step // config.decay_every)
        case "constant":
            factor = 1.0
    return config.lr * warm * factor


@final
class Trainer:
    """One training: model, optimiser and counters, and what happens at each step.

    Args:
        config: Resolved.
        run: Where it is kept.
        source: The data.
        device: As in :func:`train`.
        progress: As in :func:`train`.
        watch: Tells of signals.
        clock: As in :func:`train`.
        loss: As in :func:`train`.
    """

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        source: DataSource,
        device: str | None,
        progress: bool,
        watch: SignalWatch,
        clock: Callable[[], float],
        loss: Callable[[Denoiser], nn.Module] | None,
    ) -> None:
        self.config, self.run, self.source, self.watch, self.clock = config, run, source, watch, clock
        self.options = config.train
        self.processes = Processes(device, self.options.trackers, run.root)
        self.device = self.processes.device
        self.main = self.processes.main
        self.progress = progress and self.main

        self.model = self._initial_model().to(self.device)
        self.ema = EMA(self.model, self.options.ema_decay)
        self.parameters = list(self.model.parameters())
        self.optimizer = build_optimizer(
            self.options.optimizer, self.model, self.options.lr, self.options.betas, self.options.weight_decay
        )
        self.loss = build_loss(config.loss, self.model) if loss is None else loss(self.model)
        self.batches = Batches(
            source,
            self.options.batch_size,
            self.options.seed,
            labels=self.model.conditional,
            flip=config.data.flip,
            workers=config.data.workers,
            rank=self.processes.rank,
            world=self.processes.world,
        )
        x, labels = source.validation.tensors(self.options.validation_samples) if source.validation else (None, None)
        self.validation = None if x is None else (x, labels_for(self.model, labels))
        self.value = self.options.select if config.model.kind == "cdm" else DDM_VALUES[config.loss.weighting]

        self.fingerprint = fingerprint(source)
        self.step, self.updates_lost, self.bad_in_a_row, self.seconds = 0, 0, 0, 0.0
        self.best: dict[str, Any] | None = None
        self.stale = 0
        self.window = _Window(self.device)

    # --- start and end -----------------------------------------------------------------------------------------

    def run_to_end(self, resume: bool) -> TrainResult:
        """All steps that are left, then the constants of the levels and samples of the best model."""
        if self.main:
            self.run.make()
            write_file(self.run.config, yaml.safe_dump(encode(self.config), sort_keys=False))
        self.processes.wait()
        states = state_folders(self.run) if resume else []
        if states:
            self._restore(load_state(states[-1]))
        if self.main:
            cut_metrics(self.run.metrics, self.step)
        if not self._spent() and not self._out_of_patience():
            self._loop()
        if self.main and self.options.calibration and self.validation is not None:
            self._calibrate()
        samples = self._final_samples() if self.main and self.config.sampling.n else self.run.samples
        self.processes.wait()
        self.processes.finish()
        return TrainResult(self.step, self.seconds, self.updates_lost, self._selected(), samples, self.main)

    def _initial_model(self) -> Denoiser:
        """The model before the first step: fitted Gaussian, weights from the seed or from another run."""
        config, source = self.config, self.source
        torch.manual_seed(derive(self.options.seed, "weights"))
        gaussian = fit_gaussian(config.model, source, config.data.flip) if config.model.gaussian else None
        prior = None
        if config.model.labels == "joint" and source.classes is not None:
            prior = torch.bincount(source.train.labels.clamp_min(0), minlength=source.classes).clamp_min(1)
        model = build_model(config.model, source.transform, source.classes, gaussian, prior)
        if self.options.init is not None:
            path = RunFolder(Path(self.options.init)).model
            copied, left = load_matching(model, read_tensors(path))
            if not copied:
                raise UserError(f"{path}: none of its weights fits this network")
            self.say(f"{copied} weights from {path}" + (f"; newly drawn: {', '.join(left)}" if left else ""))
        return model

    def _restore(self, state: TrainingState) -> None:
        for module, tensors in ((self.model, state.model), (self.ema.model, state.ema)):
            load_tensors(module, tensors, self.run.states / f"step-{state.step}")
        self.optimizer.load_state_dict(state.optimizer)
        progress = state.progress
        if progress["data"] != self.fingerprint:
            raise UserError(
                f"{self.run.root}: its data have changed since; start a new run, with --init for its weights"
            )
        self.step, self.ema.updates = state.step, progress["ema_updates"]
        self.seconds, self.updates_lost = progress["seconds"], progress["skipped"]
        self.best, self.stale = progress["best"], progress["stale"]
        self.say(f"going on from step {self.step} of {self.options.steps}")

    def _save_state(self) -> None:
        if not self.main:
            return
        progress = {
            "ema_updates": self.ema.updates,
            "seconds": self.seconds,
            "skipped": self.updates_lost,
            "best": self.best,
            "stale": self.stale,
            "data": self.fingerprint,
        }
        state = TrainingState(
            self.step, self.model.state_dict(), self.ema.model.state_dict(), self.optimizer.state_dict(), progress
        )
        save_state(self.run, state)

    def _save_model(self) -> None:
        info = ModelInfo(
            self.config.model,
            self.source.transform,
            self.config.data,
            self.config.preset,
            self.source.class_names,
            self.source.columns,
            self.source.constants,
            self._selected(),
        )
        save_model(self.run, self.ema.model, info)

    def _selected(self) -> dict[str, Any]:
        return {"value": "last", "step": self.step} if self.best is None else self.best

    # --- the loop ------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        from tqdm.auto import tqdm

        options = self.options
        wrapped = self._wrap(self.loss)
        bar = tqdm(
            total=options.steps if options.max_seconds is None else None,
            initial=self.step, desc="training", unit="step", disable=not self.progress,
            mininterval=0.5, smoothing=0.05, dynamic_ncols=True,
        )  # fmt: skip
        began = self.clock() - self.seconds
        self.model.train()
        with bar:
            for batch in self.batches(self.step, options.steps, self.loss, self.device):
                terms, finite = self._update(wrapped, batch)
                self.step += 1
                bar.update()
                # Time decides about rates and the end: all processes take that of the slowest, in milliseconds.
                elapsed = round(1000 * (self.clock() - began))
                *stop, elapsed = self.processes.largest(not finite, self.watch.received, elapsed)
                self.seconds = elapsed / 1000
                self._count_bad(stop[0] > 0)
                self.window.add(terms)
                self._after_step(bar)
                if stop[1]:
                    self._save_state()
                    raise Interrupted(
                        stop[1], f"stopped by a signal after step {self.step}; the state is saved, go on with --resume"
                    )
                if self._out_of_patience():
                    self.say(f"no better {self.value} for {self.stale} validations: stopped at step {self.step}")
                    break
                if self._spent():
                    break
        self._save_state()

    def _update(self, loss: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], bool]:
        """One optimiser step; weights and average stay as they are where it is not finite."""
        options = self.options
        torch.manual_seed(derive(options.seed, "network", self.step, self.processes.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.step, self.seconds)
        if isinstance(self.loss, CDMLoss):
            self.loss.advance(share_done(options, self.step, self.seconds))
        with self._precision():
            terms = loss(batch.x_0, batch.y, batch.t, batch.eps)
        value = terms["loss"].mean()
        if self.processes.world > 1:
            # The reducer waits for every parameter; some have no influence, such as the last bias without CE.
            value = value + 0 * sum(parameter.sum() for parameter in self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.processes.backward(value)
        limit = math.inf if options.grad_clip is None else options.grad_clip
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        # Gradients, and so their norm, are the same in all processes: all skip or none.
        finite = bool(norm.isfinite()) and (self.processes.world > 1 or bool(value.isfinite()))
        if finite:
            self.optimizer.step()
            self.ema.update(self.model)
        return {key: term.detach() for key, term in terms.items()}, finite

    def _after_step(self, bar: Any) -> None:
        """Log, validate, save and sample, where the step asks for it."""
        options, step = self.options, self.step
        last = self._spent()
        logged, validated = step % options.log_every == 0 or last, step % options.validate_every == 0 or last
        line: dict[str, Any] = {}
        if logged:
            line |= self.window.means(self.processes) | {"lr": self.optimizer.param_groups[0]["lr"]}
            bar.set_postfix({key: f"{line[key]:.3f}" for key in ("mse", "ce") if key in line} | self._best_text())
        if validated and self.main:
            line |= self._validate()
        if validated:
            (self.stale,) = self.processes.largest(self.stale)
        if line and self.main:
            line = {"step": step, "seconds": round(self.seconds, 2), "skipped": self.updates_lost} | line
            append_metrics(self.run.metrics, line)
            self.processes.track({key: value for key, value in line.items() if key != "step"}, step)
        if (step % options.save_every == 0 or validated) and not last:
            self._save_state()
        if options.sample_every and step % options.sample_every == 0 and self.main and not last:
            self._samples(f"step-{step:07d}")

    def _validate(self) -> dict[str, float]:
        """Validation values of the averaged weights; keeps the best model."""
        if self.validation is None:
            self._save_model()
            return {}
        loss = self.config.loss
        values = validate(self.ema.model, *self.validation, loss.ce_weight, loss.mse_weight, loss.weighting)
        value = values[self.value]
        if isinstance(self.loss, CDMLoss) and not self.loss.settled:
            # Logits that are not trained yet make no best model, and no reason to stop.
            self._save_model()
        elif math.isfinite(value) and (self.best is None or value < self.best["best"]):
            unit = {"nll": "nats" if self.source.transform.bin is None else "bits/dim"}.get(self.value, "")
            self.best = {"value": self.value, "unit": unit, "best": value, "step": self.step}
            self.stale = 0
            self._save_model()
        else:
            self.stale += 1
        return {f"val_{key}": item for key, item in values.items()}

    def _count_bad(self, bad: bool) -> None:
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        self.updates_lost += bad
        if self.bad_in_a_row == MAX_BAD_STEPS:
            raise NotFinite(
                f"training: {MAX_BAD_STEPS} steps in a row up to step {self.step} had no finite gradient; the last "
                "good state is kept: try a smaller --train.lr, a smaller --train.grad_clip, or --train.precision fp32"
            )

    def _spent(self) -> bool:
        """Whether all steps are done, or all of the time."""
        limit = self.options.max_seconds
        return self.step >= self.options.steps or (limit is not None and self.seconds >= limit)

    def _out_of_patience(self) -> bool:
        return self.options.patience is not None and self.stale >= self.options.patience

    def _best_text(self) -> dict[str, str]:
        return {} if self.best is None else {f"best val {self.value}": f"{self.best['best']:.3f}"}

    # --- samples -------------------------------------------------------------------------------------------------

    def _samples(self, name: str) -> Path:
        sampling, model = self.config.sampling, self.ema.model
        y = None if model.classes is None else balanced_labels(sampling.n, model.classes)
        steps = min(sampling.steps, model.schedule.T)
        guidance = 0.0 if y is None else sampling.guidance
        drawn = draw(model, sampling.n, sampling.sampler, steps, y, guidance, self.options.seed)
        names = self.source.class_names
        save_manifest(drawn, self.run.samples / "manifest.csv", class_names=names)
        return save_sheet(drawn, model, self.run.samples / name, self.source.columns)

    def _final_samples(self) -> Path:
        """Samples of the model that was kept."""
        self._take_kept()
        return self._samples("final")

    def _calibrate(self) -> None:
        """Sets the constants of the levels of the model that was kept, by the whole validation split."""
        model = self.ema.model
        if not isinstance(model, ClassificationDiffusion) or len(self.source.validation) < 2:
            return
        self._take_kept()
        if model.readout is not None:
            return  # of a finished run that was resumed: its values are set
        x, labels = self.source.validation.tensors()
        found = calibrate_levels(model, x, labels_for(model, labels), self.options.calibration, self.options.seed)
        if found.change:
            self._save_model()
        self.say(
            f"constants of the levels: cross-entropy of held-out halves {found.before:.4f} -> {found.after:.4f}, "
            + (f"log p_0 {found.change:+.3f} nats" if found.change else "left as they were")
        )

    def _take_kept(self) -> None:
        load_model_tensors(self.ema.model, read_tensors(self.run.model), self.run.model)

    # --- parts -----------------------------------------------------------------------------------------------

    def _wrap(self, loss: nn.Module) -> nn.Module:
        """The loss, compiled where asked and possible, and wrapped for several processes."""
        if self.options.compile:
            batch = next(self.batches(self.step, self.step + 1, self.loss, self.device))
            with self._precision():  # as the steps have it: what is compiled for another is compiled anew
                loss = _compiled(loss, batch)
            self.optimizer.zero_grad(set_to_none=True)
        return self.processes.wrap(loss)

    def _precision(self) -> torch.autocast:
        """Half precision where it is asked for."""
        half = self.options.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, half, cache_enabled=False)

    def say(self, text: str) -> None:
        """A message above the progress bar."""
        if self.progress:
            from tqdm.auto import tqdm

            tqdm.write(text)


@final
class _Window:
    """Means of the loss terms since the last line of the log."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        """Terms (B,) of one step. Levels whose error is a constant stay out of ``mse``."""
        values = {key: term.double() for key, term in terms.items() if key != "t"}
        values |= {"samples": torch.ones_like(values["loss"]), "noisy": (terms["mse"] != 0).double()}
        for key, term in values.items():
            self.sums[key] = self.sums.get(key, torch.zeros((), dtype=torch.float64, device=self.device)) + term.sum()

    def means(self, processes: Processes) -> dict[str, float]:
        """Means over all processes; starts a new window."""
        names = list(self.sums)
        totals = processes.total(torch.stack([self.sums[name] for name in names]).float())
        sums = dict(zip(names, totals.tolist(), strict=True))
        self.sums = {}
        samples, noisy = sums.pop("samples"), sums.pop("noisy")
        means = {key: value / samples for key, value in sums.items()}
        if "correct" in means:
            means["accuracy"] = means.pop("correct")
        return means | {"mse": sums["mse"] / max(noisy, 1)}


def _compiled(loss: nn.Module, batch: Batch) -> nn.Module:
    """The loss under torch.compile; the loss itself, with a warning, where that fails."""
    compiled = torch.compile(loss, fullgraph=True)
    try:
        compiled(batch.x_0, batch.y, batch.t, batch.eps)["loss"].mean().backward()
    except Exception as error:  # the compiler's failures have no common type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"torch.compile failed ({reason}); training goes on without it", UserWarning, stacklevel=2)
        return loss
    return compiled


def _check_same(new: Config, old: Config, run: RunFolder) -> None:
    """Refuses to resume another training than the one in the folder."""
    for path, mine, theirs in differences(encode(new), encode(old)):
        free = any(path == name or path.startswith(f"{name}.") for name in FREE_ON_RESUME)
        resolved_later = mine is None and path in ("model.schedule.r_min", "data.spec")
        if not free and not resolved_later:
            raise UserError(
                f"{run.root}: was trained with {path} = {theirs}, not {mine}; resume with the same, or choose "
                "another folder"
            )
