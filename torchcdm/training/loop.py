"""Training: a loop over steps on accelerate, that can be killed at any moment and goes on bit for bit."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from torchcdm.data import DataSource, fingerprint
from torchcdm.data.folders import check_apart
from torchcdm.diffusion.start import FIELDS
from torchcdm.errors import UserError, reason, warn
from torchcdm.losses import Loss
from torchcdm.models.denoiser import Denoiser
from torchcdm.random import derive
from torchcdm.runtime.artefact import read_json
from torchcdm.runtime.files import without_nan, write_file, write_json
from torchcdm.runtime.processes import Processes, is_first, memory_kept, progress_bar
from torchcdm.runtime.validation import encode
from torchcdm.training import checkpoint
from torchcdm.training.batches import Batch, Batches
from torchcdm.training.build import base_in_words, build_loss, choose_base, hint, load_source, new_model
from torchcdm.training.config_files import to_yaml
from torchcdm.training.evaluation import Best, Selection, labels_for
from torchcdm.training.finish import calibrate_levels, compare, samples_to_draw, save_samples
from torchcdm.training.optimizers import EMA, build_optimizer, learning_rate, share_done
from torchcdm.training.run_folder import RunFolder, append_metrics, cut_metrics, read_report
from torchcdm.training.settings import Config

MAX_BAD_STEPS = 10  # in a row without a finite gradient: they end the training


class Interrupted(KeyboardInterrupt):
    """The signal ``number`` asked the training to stop; its state is saved. A process then exits with 128 + number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class NotFinite(UserError):
    """A training that gave up, step after step without a finite gradient."""


class TrainResult(NamedTuple):
    """A training over all resumes: what ``config.json`` says of its model, the sheet of its samples, if any."""

    step: int
    seconds: float
    selected: dict[str, Any]
    samples: Path | None
    source: DataSource
    outcome: dict[str, Any] | None


def train(
    config: Config, out: str | Path, source: DataSource | None = None, resume: bool = False, device: str | None = None,
    progress: bool = True, clock: Callable[[], float] = time.monotonic, loss: Callable[[Denoiser], Loss] | None = None,
    backbone: nn.Module | None = None, model: Denoiser | None = None,
) -> TrainResult:  # fmt: skip
    """Trains a model and leaves a run folder ``out``.

    ``source`` has the units that the configuration asks for (:func:`torchcdm.training.build.in_units`), if None it is
    loaded, once the folder is locked. ``resume`` goes on from the last saved state; an empty folder starts anew.
    ``device`` is ``cpu``, ``cuda`` or ``cuda:1``, the best there is when None. ``clock`` gives the seconds that
    ``train.max_seconds`` counts; ``time.process_time`` those of the processor. A ``loss`` of a model, a ``backbone``
    or a ``model`` before its training stand for those of the configuration. UserError for a folder that holds a run or
    that another training writes to, a configuration other than that of the run to resume, data that do not suit the
    model, or a file that cannot be written; :class:`NotFinite` and :class:`Interrupted` end a training, too.
    """
    run, speaks = RunFolder(out), progress and is_first()
    if run.holds_run() and not resume:
        raise UserError(f"{out}: already holds a run; go on with --resume (resume=True), or choose another folder")
    if not run.holds_run():
        check_apart(run.root, str(config.data.spec))
    with ExitStack() as held:
        if is_first():
            held.enter_context(run.locked())
        if config.data.clusters is not None and config.model.labels == "none":
            raise UserError("data.clusters makes classes, but this model takes none; add --model.labels joint")
        if source is None:
            source = load_source(config.data, speaks)
        if config.data.label is not None and config.model.labels == "none":
            what = f"label '{config.data.label}' names a column of classes, but this model takes none"
            raise UserError(f"{what}; add --model.labels joint to learn them, or leave the column out by --drop")
        # The state of torch's own generator is the caller's: steps seed it anew. Those of GPUs are left out, because
        # reading one opens a context on its GPU.
        held.enter_context(torch.random.fork_rng(devices=[]))
        held.enter_context(torch.inference_mode(False))
        held.enter_context(torch.enable_grad())
        states = checkpoint.state_folders(run) if resume else []
        if resume and not states and run.model.exists():
            mend = f"choose another folder, with --init {out}"
            raise UserError(f"{out}: holds a model, but no training to go on with; {mend}")
        state = checkpoint.load_state(states[-1]) if states else None
        # What was chosen before the first step stays.
        kept = state.progress.config["model"] if state else {}
        known = {name: kept.get(name) for name in FIELDS if getattr(config.model, name) is None}
        config = replace(config, model=choose_base(replace(config.model, **known), source, config.data.flip))
        if speaks:
            print(*filter(None, [f"starts from {base_in_words(config.model)}", hint(config.model, source)]), sep="\n")
        if state is not None:
            checkpoint.check_same(config, state.progress.config, run)
        processes = Processes(device)
        torch.manual_seed(derive(config.train.seed, "weights"))
        if model is None:
            model = new_model(config.model, source, config.data.flip, backbone)
        if config.train.init is not None:
            left = checkpoint.load_matching(model, config.train.init)
            if speaks:
                print(f"weights from {config.train.init}; {len(left)} of {len([*model.parameters()])} are new")
        model = model.to(processes.device)
        built = build_loss(config.loss, model) if loss is None else loss(model)
        return Trainer(config, run, source, built, processes, speaks, clock).run_to_end(state)


@final
@dataclass(eq=False, repr=False)
class Trainer:
    """One training: model, optimiser and counters, and what happens at each step."""

    config: Config
    run: RunFolder
    source: DataSource
    loss: Loss
    processes: Processes
    progress: bool
    clock: Callable[[], float]

    def __post_init__(self) -> None:
        self.model, self.options = self.loss.model, self.config.train
        self.device, self.main = self.processes.device, self.processes.main
        self.start = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.ema = EMA(self.model, self.options.ema_decay)
        self.parameters = list(self.model.parameters())
        self.optimizer = build_optimizer(self.options, self.model)
        size, seed, labels = self.options.batch_size, self.options.seed, self.model.conditional
        data, share = self.config.data, (self.processes.rank, self.processes.world)
        self.batches = Batches(self.source, size, seed, labels, data.flip, data.workers, *share)
        self.selection = Selection(self.config, self.source, self.model)
        self.fingerprint = fingerprint(self.source)
        self.step, self.skipped, self.bad_in_a_row, self.seconds = 0, 0, 0, 0.0
        self.window = Window(self.model.schedule.T)
        self.ended: dict[str, Any] | None = None

    def run_to_end(self, state: checkpoint.TrainingState | None) -> TrainResult:
        """The steps that are left after those of a saved state, or all, then the end."""
        self.processes.accelerator.wait_for_everyone()
        if state is not None:
            self._restore(state)
        if self.main:
            write_file(self.run.config, to_yaml(self.config))
            cut_metrics(self.run.metrics, self.step)
        self._loop()
        samples, outcome = None, None
        if self.main:
            if not self.run.model.exists():
                raise NotFinite(f"training: no validation had a finite {self.selection.value}; lower --train.lr")
            outcome = self._finish()
            if n := samples_to_draw(self.config, self.step):
                samples = save_samples(self.ema.model, self.run, self.config, self.source, "final", n, self.progress)
            self._report(outcome)
        self.processes.accelerator.wait_for_everyone()
        self.processes.end()
        selected = self.selection.selected(self.step)
        return TrainResult(self.step, self.seconds, selected, samples, self.source, outcome)

    def say(self, text: str) -> None:
        """A message beside the progress bar."""
        if self.progress:
            print(text)

    def _loop(self) -> None:
        options = self.options
        if self._over():
            if self.step < options.steps and self._share() >= 1:
                spent = f"its {options.max_seconds:g} s, counted from the first step, are used up"
                self.say(f"no step is left to take: {spent}; give more by --budget or --train.max_seconds")
            return
        self.model.train()  # what is compiled, too: a model that was loaded is in eval mode
        self.ended, loss = None, self._wrapped()
        began = self.clock() - self.seconds
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        look = {"bar_format": form, "smoothing": 0.05, "dynamic_ncols": True, "leave": True}
        bar = progress_bar(None, "training", self.progress, total=1.0, initial=self._share(), **look)
        # Signals wait during the steps alone: what follows can be stopped at once, as the steps are saved.
        with bar, memory_kept(), signals() as received:
            for batch in self.batches(self.step, options.steps, self.loss, self.device):
                terms, finite = self._update(loss, batch)
                self.step += 1
                # Time decides about rates and the end: all processes take that of the slowest, in milliseconds.
                elapsed = round(1000 * (self.clock() - began))
                bad, stop, elapsed = self.processes.largest(not finite, sum(received), elapsed)
                self.seconds = elapsed / 1000
                self._count(terms, bool(bad))
                self._after_step(bar)
                bar.update(self._share() - bar.n)
                if self._over() and not stop:  # during the last validation, which may take long
                    (stop,) = self.processes.largest(sum(received))
                if stop:
                    left = "the state is saved" if self._save_state() else self._last_state()
                    raise Interrupted(stop, f"stopped by a signal after step {self.step}; {left}, go on with --resume")
                if self._over():
                    break
        if self.selection.out_of_patience:
            self.say(f"{self.selection.stale} validations without a better {self.selection.value}: the training ends")

    def _wrapped(self) -> nn.Module:
        """The loss, compiled where asked and possible, and wrapped for several processes."""
        loss: nn.Module = self.loss
        if self.options.compile:
            batch = next(self.batches(self.step, self.step + 1, self.loss, self.device))
            try:
                with self._precision():  # as the steps have it: what is compiled for another is compiled anew
                    compiled = torch.compile(loss, fullgraph=True)
                    compiled(batch.x_0, batch.y, batch.t, batch.eps)["loss"].mean().backward()
                loss = compiled
            except Exception as error:  # the compiler's failures have no common type
                warn(f"torch.compile failed ({reason(error)}); training goes on without it")
            self.optimizer.zero_grad(set_to_none=True)
        return self.processes.accelerator.prepare_model(loss, device_placement=False)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, self.options.precision == "bf16", cache_enabled=False)

    def _update(self, loss: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], bool]:
        """One optimiser step; weights and average stay as they are where it is not finite."""
        options = self.options
        torch.manual_seed(derive(options.seed, "network", self.step, self.processes.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.step, self.seconds)
        self.loss.advance(self._share())
        with self._precision():
            terms = loss(batch.x_0, batch.y, batch.t, batch.eps)
        value = terms["loss"].mean()
        if self.processes.world > 1:
            # The reducer waits for every parameter; some have no influence, such as the last bias without CE.
            value = value + 0 * sum(parameter.sum() for parameter in self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        self.processes.accelerator.backward(value)
        limit = math.inf if options.grad_clip is None else options.grad_clip
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        # Gradients, and so their norm, are the same in all processes: all skip or none.
        finite = bool(norm.isfinite()) and (self.processes.world > 1 or bool(value.isfinite()))
        if finite:
            self.optimizer.step()
            self.ema.update(self.model)
        return {key: term.detach() for key, term in terms.items()}, finite

    def _count(self, terms: dict[str, Tensor], bad: bool) -> None:
        """Counts a step among those that were taken, or among those that were skipped."""
        if not bad:
            self.bad_in_a_row = 0
            self.window.add(terms)
            return
        self.bad_in_a_row, self.skipped = self.bad_in_a_row + 1, self.skipped + 1
        if self.bad_in_a_row == MAX_BAD_STEPS:
            if self.main:
                self._log({"not_finite": True})
            # A state right before the first of these steps may hold weights that are finite, and yet the cause.
            what = f"training: {MAX_BAD_STEPS} steps in a row up to step {self.step} had no finite gradient"
            mend = "a smaller --train.lr, a smaller --train.grad_clip, or --train.precision fp32"
            mend = f"go on with --resume and {mend}; where that fails too, remove the last state"
            raise NotFinite(f"{what}; {self._last_state()}: {mend}")

    def _after_step(self, bar: Any) -> None:
        """Log, validate, save and sample, where the step asks for it."""
        options, step, last = self.options, self.step, self._share() >= 1
        logged, validated = step % options.log_every == 0 or last, step % options.validate_every == 0 or last
        line, keep = dict[str, Any](), False
        if logged:
            line |= self.window.means(self.processes) | {"lr": self.optimizer.param_groups[0]["lr"]}
            values, best = {key: line[key] for key in ("mse", "ce") if key in line}, self.selection.best
            values |= {} if best is None else {f"best val {best.value}": best.best}
            told = "".join(f", {key} {value:.3f}" for key, value in values.items())
            bar.set_postfix_str(f"step {step}{told}", refresh=False)
        if validated:
            if self.main:
                # Terms of the loss that do not count yet make no best model.
                values, keep = self.selection.compare(self.ema.model, step, self.loss.settled)
                line |= values
            (self.selection.stale,) = self.processes.largest(self.selection.stale)
        if line and self.main:
            self._log(line)
        if step % options.save_every == 0 or validated:
            self._save_state()
        # After the state, so that a run that is killed in between can go on.
        if keep and _finite(self.ema.model):
            self.save_model()
        n, sampled = samples_to_draw(self.config, step), options.sample_every and step % options.sample_every == 0
        if n and sampled and self.main and not last:
            save_samples(self.ema.model, self.run, self.config, self.source, f"step-{step:07d}", n)

    def _finish(self) -> dict[str, Any] | None:
        """Calibrates the best model, compares it with its start and keeps the better one of these; gives what
        :func:`torchcdm.training.finish.compare` says, of a cdm with validation data, or said where it ended before."""
        model, config, source = self.ema.model, self.config, self.source
        checkpoint.load_weights(model, self.run.root)
        if self.ended is not None:
            return self.ended
        if config.model.kind != "cdm" or len(source.validation) < 2:
            return None
        if config.train.calibration:
            x, labels = source.validation.tensors()
            y, copies = labels_for(model, labels), config.train.calibration
            before, after, change = calibrate_levels(model, x, y, copies, config.train.seed)
            if change:
                self.save_model()
            said = f"log p_0 {change:+.3f} nats" if change else "left as they were"
            self.say(f"constants of the levels: cross-entropy of held-out halves {before:.4f} -> {after:.4f}, {said}")
        outcome = compare(model, config, source, self.start, self.progress)
        if outcome["kept"] == "start":
            self._report(outcome)  # before the weights are gone that it is about
            model.load_state_dict(self.start)
            self.selection.best = Best("nll", outcome["unit"], outcome["values"]["start"], 0)
            self.save_model()
        values = ", ".join(f"{name} {value:.4g}" for name, value in outcome["values"].items())
        self.say(f"validation, {outcome['unit']}, lower is better: {values}")
        for problem in outcome["problems"]:
            self.say(f"{problem['name']}: {problem['says']}; {problem['mend']}")
        return outcome

    def _report(self, outcome: dict[str, Any] | None) -> None:
        known = read_report(self.run.report)
        measured = known if known.get("steps") == self.step else {}  # of these weights: a resume without a step
        content = {"preset": self.config.preset, "steps": self.step, "seconds": self.seconds, "outcome": outcome}
        write_json(self.run.report, measured | content)

    def _share(self) -> float:
        return share_done(self.options, self.step, self.seconds)

    def _over(self) -> bool:
        return self._share() >= 1 or self.selection.out_of_patience

    def _log(self, line: dict[str, Any]) -> None:
        counters = {"step": self.step, "seconds": round(self.seconds, 2), "skipped": self.skipped}
        append_metrics(self.run.metrics, counters | line)

    def _save_state(self) -> bool:
        """Saves what a resumed run starts from, and says whether it did: nothing of a training that is going wrong."""
        if self.bad_in_a_row or not _finite(self.model):
            return False
        counters = {"step": self.step, "seconds": self.seconds, "skipped": self.skipped}
        counters |= {"ema_updates": self.ema.updates, "best": self.selection.best, "stale": self.selection.stale}
        window, known = self.window.totals(self.processes), {"data": self.fingerprint, "config": encode(self.config)}
        progress = checkpoint.Progress(window=without_nan(window), **counters, **known)
        if self.main:
            weights, average, optimizer = (of.state_dict() for of in (self.model, self.ema.model, self.optimizer))
            moments = {f"{k}.{name}": value for k, of in optimizer["state"].items() for name, value in of.items()}
            checkpoint.save_state(self.run, checkpoint.TrainingState(weights, average, moments, progress))
        return True

    def _restore(self, state: checkpoint.TrainingState) -> None:
        progress = state.progress
        if progress.data != self.fingerprint:
            raise UserError(f"{self.run.root}: its data have changed; start a new run, with --init for its weights")
        checkpoint.restore(state, self.run, self.model, self.ema.model, self.optimizer)
        self.step, self.seconds, self.skipped = progress.step, progress.seconds, progress.skipped
        self.selection.best, self.selection.stale = progress.best, progress.stale
        self.ema.updates = progress.ema_updates
        # The sums are those of all processes: the first goes on from them, the others from zero. None was not finite.
        sums = {key: math.nan if value is None else value for key, value in progress.window.items()}
        self.window.sums = sums if self.main else dict.fromkeys(sums, 0.0)
        best = self.selection.best
        self.loss.advance(share_done(self.options, self.step - 1, self.seconds))  # as in the step that was saved
        unjudged = self.selection.data is None or not self.loss.settled  # weights are kept for want of better
        keep = unjudged if best is None else best.step == self.step
        if self.main and keep and _finite(self.ema.model):
            self.save_model()
        elif self.main and best is not None and checkpoint.read_info(self.run.root).selected["step"] != best.step:
            # The training ended with its start in the place of these weights, which cannot be compared any more.
            self.selection.best = None
            self.ended = read_json(self.run.report).get("outcome") if self.run.report.exists() else None
        if self.main and self.run.model.exists():
            checkpoint.say_where(self.run, self.config.data)
        self.say(f"going on from step {self.step} of {self.options.steps}")

    def _last_state(self) -> str:
        states = checkpoint.state_folders(self.run)
        return f"the last good state is kept ({states[-1]})" if states else "no state was saved"

    def save_model(self) -> None:
        """Writes the averaged weights, and what was selected."""
        config, source, selected = self.config, self.source, self.selection.selected(self.step)
        units, names = source.transform, source.class_names
        info = checkpoint.ModelInfo(config.preset, config.model, units, config.data, selected, names, self.fingerprint)
        checkpoint.save_model(self.run, self.ema.model, info)


def _finite(model: nn.Module) -> bool:
    return all(bool(weights.isfinite().all()) for weights in model.parameters())


@contextmanager
def signals() -> Iterator[list[int]]:
    """The first signal meanwhile that would end the process: SIGTERM, SIGINT or SIGHUP; a second has its usual effect.
    Ignored ones, as SIGHUP under nohup, stay so; outside the main thread, where Python takes no handlers, all do."""
    received: list[int] = []
    with ExitStack() as before:

        def remember(number: int, _: Any) -> None:
            received.append(number)
            before.close()

        for name in ("SIGTERM", "SIGINT", "SIGHUP") if threading.current_thread() is threading.main_thread() else ():
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                before.callback(signal.signal, number, signal.signal(number, remember))
        yield received


@final
class Window:
    """Means of the loss terms over the steps since the last line of the log, of ``mse`` over the levels 1 ... T, as in
    validation: that of level 0 is a constant and that of T+1 is zero. The ``sums`` are those of this process."""

    def __init__(self, T: int) -> None:
        self.T, self.sums = T, dict[str, float]()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Terms (B,) of one step, with their levels ``t``."""
        values = {key: term.double() for key, term in terms.items() if key != "t"}
        noisy = ((terms["t"] >= 1) & (terms["t"] <= self.T)).double()
        values |= {"samples": torch.ones_like(noisy), "noisy": noisy, "mse": values["mse"] * noisy}
        sums = torch.stack([term.sum() for term in values.values()]).tolist()
        self.sums |= {key: self.sums.get(key, 0.0) + value for key, value in zip(values, sums, strict=True)}

    def totals(self, processes: Processes) -> dict[str, float]:
        """The sums over all processes."""
        sums = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=processes.device)
        return dict(zip(self.sums, processes.accelerator.reduce(sums, "sum").tolist(), strict=True))

    def means(self, processes: Processes) -> dict[str, float]:
        """Means over all processes; starts a new window. Empty where every step was skipped."""
        sums, self.sums = self.totals(processes), {}
        if not sums:
            return {}
        samples, noisy = sums.pop("samples"), sums.pop("noisy")
        means = {key: value / samples for key, value in sums.items()} | {"mse": sums["mse"] / max(noisy, 1)}
        return {"accuracy" if key == "correct" else key: value for key, value in means.items()}
