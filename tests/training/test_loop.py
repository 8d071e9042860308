"""Training: resume, selection, skipped steps, and what is left in the folder."""

import csv
import json
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from small_runs import run_training, small_config, small_flags

from torchcdm.cli import main
from torchcdm.data import DataOptions, from_object
from torchcdm.errors import UserError
from torchcdm.losses import Loss
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.runtime.artefact import read_json
from torchcdm.runtime.files import write_json
from torchcdm.runtime.processes import Processes
from torchcdm.runtime.validation import encode
from torchcdm.training import loop as training
from torchcdm.training.build import in_units
from torchcdm.training.checkpoint import load, load_state, read_info, state_folders
from torchcdm.training.config_files import file_fields, make_config
from torchcdm.training.loop import Interrupted, train
from torchcdm.training.run_folder import RunFolder, read_metrics
from torchcdm.units import ColumnTransform

SAME = ("model.safetensors", "state/step-12/model.safetensors", "state/step-12/ema.safetensors",
        "state/step-12/optimizer.safetensors", "samples/manifest.csv", "samples/final.png")  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_training(folder)
    return folder


def assert_same(run, other):
    for name in SAME:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def timeless(run):
    """The lines of the log, without the time."""
    return [line | {"seconds": None} for line in read_metrics(run / "metrics.jsonl")]


class StopAfter:
    """Sends a signal, or raises, in the update of one step."""

    def __init__(self, monkeypatch, step, action):
        update = training.Trainer._update

        def wrapped(this, *arguments):
            result = update(this, *arguments)
            if this.step + 1 == step:
                action()
            return result

        monkeypatch.setattr(training.Trainer, "_update", wrapped)


def crash():
    raise RuntimeError("killed")


# --- resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 5, 11])
def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, step):
    with monkeypatch.context() as patch:
        StopAfter(patch, step, crash)
        with pytest.raises(RuntimeError, match="killed"):
            run_training(tmp_path / "run")
    result = run_training(tmp_path / "run", resume=True)
    assert result.step == 12
    assert_same(tmp_path / "run", whole)
    # The log too, also where a state lies between two of its lines.
    assert timeless(tmp_path / "run") == timeless(whole)


def test_a_run_of_muon_goes_on_bit_for_bit(tmp_path, monkeypatch):
    run_training(tmp_path / "whole", train__optimizer="muon")
    with monkeypatch.context() as patch:
        StopAfter(patch, 5, crash)
        with pytest.raises(RuntimeError, match="killed"):
            run_training(tmp_path / "run", train__optimizer="muon")
    run_training(tmp_path / "run", resume=True, train__optimizer="muon")
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_save_and_leave(whole, tmp_path, monkeypatch, request, number):
    # A shell that starts the tests in the background has them ignore some.
    inherited = signal.signal(number, before := lambda *_: pytest.fail("not watched"))
    request.addfinalizer(lambda: signal.signal(number, inherited))
    with monkeypatch.context() as patch:
        StopAfter(patch, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match="after step 5; the state is saved, go on with --resume") as caught:
            run_training(tmp_path / "run")
    assert caught.value.number == number and signal.getsignal(number) == before
    assert state_folders(RunFolder(tmp_path / "run"))[-1].name == "step-5"
    run_training(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_what_follows_the_steps_can_be_stopped_at_once(whole, tmp_path, monkeypatch, request, capsys):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGINT)

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    run, sampled = tmp_path / "run", training.save_samples
    monkeypatch.setattr(training, "save_samples", lambda *given: interrupt() or sampled(*given))
    assert main(["train", "digits", "--out", str(run), "--device", "cpu", "--quiet", *small_flags()]) == 130
    said = capsys.readouterr().err.strip()
    assert said == f"cdm: interrupted; {run} holds the model; --resume goes on with what is missing"
    assert not (run / "samples").exists()
    monkeypatch.setattr(training, "save_samples", sampled)
    run_training(run, resume=True)
    assert_same(run, whole)

    # During the last validation it is as after any other step.
    compared = training.Selection.compare
    monkeypatch.setattr(
        training.Selection, "compare", lambda *given: (given[2] == 12 and interrupt()) or compared(*given)
    )
    with pytest.raises(Interrupted, match="after step 12; the state is saved, go on with --resume"):
        run_training(tmp_path / "last")


def test_a_signal_that_another_process_got_in_the_last_validation_stops_all(tmp_path, monkeypatch):
    # At the end a signal alone is asked for, of all processes: else one would save while the others went on.
    of_steps = Processes.largest
    asked = lambda self, *values: (signal.SIGTERM,) if len(values) == 1 else of_steps(self, *values)  # noqa: E731
    monkeypatch.setattr(Processes, "largest", asked)
    with pytest.raises(Interrupted, match="stopped by a signal after step 12; the state is saved"):
        run_training(tmp_path / "run")


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with training.signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not received
    finally:
        signal.signal(signal.SIGHUP, before)


def test_resume_starts_anew_where_there_is_nothing(whole, tmp_path):
    (tmp_path / "run").mkdir()
    run_training(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_resume_never_replaces_a_model_by_a_new_start(whole, tmp_path, monkeypatch):
    run = RunFolder(shutil.copytree(whole, tmp_path / "run"))
    before = run.model.read_bytes()
    for state in state_folders(run):
        (state / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged, .*; remove \S*step-12 to go on from the state before it"):
        run_training(run.root, resume=True)
    shutil.rmtree(state_folders(run)[-1])
    with pytest.raises(UserError, match=f"damaged, .*; go on in another folder, with --init {run.root}$"):
        run_training(run.root, resume=True)
    shutil.rmtree(run.states)
    for _ in range(2):
        with pytest.raises(UserError, match=f"no training to go on with; .*, with --init {run.root}$"):
            run_training(run.root, resume=True, train__steps="2")
        run.config.unlink(missing_ok=True)
    assert run.model.read_bytes() == before


@pytest.mark.parametrize(("fraction", "saves"), [("0.1", 1), ("0", 3)])
def test_a_kill_between_a_state_and_its_model_ends_in_the_same_bits(tmp_path, monkeypatch, fraction, saves):
    changes = {"data__validation_fraction": fraction}
    run_training(tmp_path / "whole", **changes)
    save, calls = training.Trainer.save_model, iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "save_model", lambda this: crash() if next(calls) == saves else save(this))
        with pytest.raises(RuntimeError, match="killed"):
            run_training(tmp_path / "run", **changes)
    run_training(tmp_path / "run", resume=True, **changes)
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_resume_goes_on_from_the_state_before_a_damaged_one(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        StopAfter(patch, 10, crash)
        with pytest.raises(RuntimeError):
            run_training(tmp_path / "run")
    last = state_folders(RunFolder(tmp_path / "run"))[-1]
    (last / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="optimizer.safetensors: damaged, .*remove"):
        run_training(tmp_path / "run", resume=True)
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    run_training(tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", whole)


def test_more_steps_go_on_and_other_settings_do_not(tmp_path):
    run_training(tmp_path / "run", train__steps="3")
    assert run_training(tmp_path / "run", resume=True, train__steps="5").step == 5
    with pytest.raises(UserError, match="already holds a run; go on with --resume"):
        run_training(tmp_path / "run", train__steps="5")
    with pytest.raises(UserError, match="was trained with model.backbone.width = 8, not 16"):
        run_training(tmp_path / "run", resume=True, model__backbone__width="16")


def test_a_resume_without_a_step_leaves_what_was_measured(tmp_path):
    run = RunFolder(tmp_path / "run")
    run_training(run.root, train__steps="3")
    write_json(run.report, read_json(run.report) | {"nll": 1.5})
    run_training(run.root, resume=True, train__steps="3")
    assert read_json(run.report)["nll"] == 1.5
    run_training(run.root, resume=True, train__steps="5")
    assert "nll" not in read_json(run.report) and read_json(run.report)["steps"] == 5
    run.report.write_text("half of a repo")
    run_training(run.root, resume=True, train__steps="6")
    assert read_json(run.report)["steps"] == 6


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run_training(tmp_path / "run", train__steps="2")
    assert torch.equal(torch.rand(4), expected)


# --- the folder ------------------------------------------------------------------------------------------------


def test_folder_holds_what_was_promised(whole):
    run = RunFolder(whole)
    config = make_config(file_fields(run.config))
    assert yaml.safe_load(run.config.read_text()) == encode(config)
    assert config.train.steps == 12 and config.preset == "digits"
    lines = read_metrics(run.metrics)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "val_nll" in line] == [4, 8, 12]
    best = min((line for line in lines if "val_nll" in line), key=lambda line: line["val_nll"])
    selected = json.loads(run.model_info.read_text())["selected"]
    assert selected == {"value": "nll", "unit": "bits/dim", "best": best["val_nll"], "step": best["step"]}
    assert [path.name for path in state_folders(run)] == ["step-9", "step-12"]
    with (run.samples / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == ["0", "1", "2", "3"] and {row["seed"] for row in rows} == {"0"}
    assert all(abs(float(row["log_p"])) < 1000 for row in rows)


def test_the_configuration_of_a_run_runs_it_again(whole, tmp_path):
    train(make_config(file_fields(RunFolder(whole).config)), tmp_path / "run", device="cpu", progress=False)
    assert_same(tmp_path / "run", whole)


@pytest.mark.slow
def test_training_learns_and_the_best_average_is_kept(tmp_path):
    run_training(tmp_path, train__steps="200", train__warmup="5", train__lr="6e-3", train__validate_every="50",
                 train__save_every="50", model__backbone__dropout="0", model__backbone__width="16")  # fmt: skip
    first, *_, last = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "val_nll" in line]
    # The Gaussian copula that it starts from reads 2.14 bits/dim.
    assert last["val_nll"] < first["val_nll"] < 2.13
    assert last["val_mse"] < first["val_mse"] and last["val_ce"] < first["val_ce"]
    best = json.loads(RunFolder(tmp_path).model_info.read_text())["selected"]["step"]
    state, kept = load_state(tmp_path / "state" / f"step-{best}"), dict(load(tmp_path).named_parameters())
    assert all(torch.equal(kept[key], state.ema[key]) for key in kept)
    assert not torch.equal(kept["backbone.conv_in.weight"], state.model["backbone.conv_in.weight"])
    assert state.progress.ema_updates == best


# --- kinds -----------------------------------------------------------------------------------------------------


def test_ddm_baseline(tmp_path):
    backbone = "{name: unet, channels: 8, multipliers: [1], blocks: 1, groups: 4, attention: []}"
    run_training(tmp_path / "run", model__kind="ddm", model__backbone=backbone, train__steps="4")
    assert isinstance(load(tmp_path / "run"), DenoisingDiffusion)
    assert read_info(tmp_path / "run").selected["value"] == "mse"


def test_joint_labels_and_bfloat16(tmp_path):
    run_training(tmp_path / "run", model__labels="joint", train__precision="bf16", train__steps="4",
                 sampling__guidance="1.0")  # fmt: skip
    model = load(tmp_path / "run")
    assert model.joint and model.classes == 10
    assert next(model.parameters()).dtype == torch.float32
    prior = model.log_class_prior.exp()
    assert abs(float(prior.sum()) - 1) < 1e-6 and 0.08 < float(prior.min()) < float(prior.max()) < 0.12
    with (tmp_path / "run" / "samples" / "manifest.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("weights", [{"loss__ce_weight": "0"}, {"loss__mse_weight": "0"}])
def test_either_loss_alone(tmp_path, weights):
    run_training(tmp_path / "run", train__steps="2", loss__time_weight="0", **weights)
    assert load(tmp_path / "run").schedule.T == 20


@pytest.mark.parametrize(("shares", "same"), [("[1, 1]", True), ("[0.5, 1]", False)])
def test_the_cross_entropy_counts_from_its_share_of_the_training(tmp_path, shares, same):
    weights = []
    for weight in ("1", "50"):
        folder = tmp_path / weight
        run_training(folder, train__steps="4", loss__ce_weight=weight, loss__logits_from=shares)
        state = load_state(folder / "state" / "step-4").model
        weights.append(torch.cat([state[name].flatten() for name in sorted(state) if "backbone" in name]))
    assert torch.equal(*weights) == same


def test_init_takes_the_weights_that_fit(whole, tmp_path, capsys):
    # No step changes anything at this rate: what was taken over is what is saved.
    run_training(tmp_path / "run", train__init=str(whole), train__steps="1", train__lr="1e-30",
                 model__schedule="{name: uniform-sigma, T: 10}")  # fmt: skip
    old, new = dict(load(whole).named_parameters()), dict(load(tmp_path / "run").named_parameters())
    for key, value in new.items():
        if "head" not in key:
            assert torch.allclose(value, old[key], atol=1e-7), key
    config = small_config(train__init=str(whole), train__steps="1", model__schedule="{name: uniform-sigma, T: 10}")
    train(config, tmp_path / "told", device="cpu")
    assert re.search(rf"weights from {whole}; [1-9]\d* of \d+ are new\n", capsys.readouterr().out)
    with pytest.raises(UserError, match="nowhere: holds no trained model"):
        run_training(tmp_path / "other", train__init=str(tmp_path / "nowhere"))


def test_data_without_validation_keep_the_last_model(tmp_path):
    run_training(tmp_path / "run", data__validation_fraction="0", train__steps="5")
    assert read_info(tmp_path / "run").selected == {"value": "last", "step": 5}


def test_vectors_leave_a_table_of_samples(tmp_path):
    torch.manual_seed(0)
    source = from_object(torch.randn(200, 3) * torch.tensor([1.0, 10.0, 0.1]) + 5)
    backbone = "{name: mlp, width: 16, depth: 1}"
    config = small_config("mlp", model__backbone=backbone, train__patience="null")
    train(config, tmp_path / "run", source, device="cpu", progress=False)
    text = (tmp_path / "run" / "samples" / "final.csv").read_text().splitlines()
    assert text[0] == "c0,c1,c2" and len(text) == 5


def test_a_source_is_taken_in_the_units_that_it_comes_in(tmp_path, monkeypatch):
    source = in_units(from_object(torch.randn(200, 3).exp()), DataOptions(gaussianize=True))
    monkeypatch.setattr(ColumnTransform, "fit", lambda *_, **__: pytest.fail("its curves are fitted twice"))
    config = small_config("mlp", model__backbone="{name: mlp, width: 16, depth: 1}", data__gaussianize="true")
    train(config, tmp_path / "run", source, device="cpu", progress=False)
    assert load(tmp_path / "run").transform.to_config() == source.transform.to_config()


class Decay(Loss):
    """Sum of the squared weights."""

    def draw_levels(self, n, generator=None):
        return torch.zeros(n, dtype=torch.long)

    def terms(self, x_t, t, y, eps):
        squares = sum(p.square().sum() for p in self.model.parameters()).expand(len(x_t))
        return {"loss": squares, "mse": torch.zeros_like(squares), "t": t}


def test_another_loss_trains_and_resumes_under_the_same_checks(tmp_path):
    def run(**changes):
        config = small_config(train__validate_every="100", train__ema_decay="0", **changes)
        return train(config, tmp_path, resume=True, device="cpu", progress=False, loss=Decay)

    run(train__steps="6")
    losses = [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    with pytest.raises(UserError, match=r"was trained with train.lr = .*, not 0.123"):
        run(train__steps="8", train__lr="0.123")
    assert run(train__steps="8").step == 8


def test_a_training_ends_with_its_time_and_the_cosine_with_it(tmp_path):
    ticks = iter(range(1000))  # one second a step
    config = small_config(train__max_seconds="8", train__steps="500", train__warmup="0", train__log_every="1")
    result = train(config, tmp_path / "run", device="cpu", progress=False, clock=lambda: float(next(ticks)))
    assert result.step == 8 and result.seconds == 8
    rates = [line["lr"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert rates == pytest.approx([config.train.lr * (1 + np.cos(np.pi * step / 8)) / 2 for step in range(8)])
    # The end is validated, like any end.
    assert "val_nll" in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    # With more time in all a resumed run goes on, at the rates of the longer training.
    config = replace(config, train=replace(config.train, max_seconds=12))
    ticks = iter(range(1000))
    again = train(config, tmp_path / "run", resume=True, device="cpu", progress=False, clock=lambda: next(ticks))
    assert again.step == 12 and again.seconds == 12
    rates = [line["lr"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[8:]]
    assert rates == pytest.approx([config.train.lr * (1 + np.cos(np.pi * step / 12)) / 2 for step in range(8, 12)])
