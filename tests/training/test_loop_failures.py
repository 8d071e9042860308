"""Training where something goes wrong: steps that are not finite, patience, changed data, what is not installed."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import run_training, small_config

from torchcdm.data import from_object
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss
from torchcdm.training import loop as training
from torchcdm.training.build import load_source, new_model
from torchcdm.training.checkpoint import load, load_state, state_folders
from torchcdm.training.config_files import flag_fields, make_config, preset_fields
from torchcdm.training.evaluation import means
from torchcdm.training.loop import NotFinite, Window, train
from torchcdm.training.run_folder import RunFolder, read_metrics


def poisoned(monkeypatch, steps):
    """Makes the loss of some steps infinite."""
    forward = CDMLoss.forward
    calls = iter(range(1, 1000))

    def wrapped(this, *arguments, **options):
        terms = forward(this, *arguments, **options)
        return terms | {"loss": terms["loss"] * float("inf")} if next(calls) in steps else terms

    monkeypatch.setattr(CDMLoss, "forward", wrapped)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    poisoned(monkeypatch, {3, 5})
    run_training(tmp_path / "run", train__steps="6")
    state = load_state(state_folders(RunFolder(tmp_path / "run"))[-1])
    assert state.progress.skipped == 2 and state.progress.ema_updates == 4
    assert all(value.isfinite().all() for value in state.model.values())
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["skipped"] == 2


def test_ten_in_a_row_end_the_run_and_a_smaller_rate_goes_on_from_the_last_good_state(tmp_path, monkeypatch):
    steps = {"train__steps": "18", "train__save_every": "1", "train__validate_every": "3"}
    with monkeypatch.context() as patch:
        poisoned(patch, set(range(5, 15)))
        with pytest.raises(NotFinite, match="10 steps in a row up to step 14 .* smaller --train.lr") as caught:
            run_training(tmp_path / "run", **steps)
    states = state_folders(RunFolder(tmp_path / "run"))
    # Not the ten after them.
    assert [folder.name for folder in states] == ["step-3", "step-4"]
    assert f"the last good state is kept ({states[-1]})" in str(caught.value)
    assert str(caught.value).endswith("; where that fails too, remove the last state")
    with pytest.raises(UserError, match="was trained with train.seed = 0, not 1"):
        run_training(tmp_path / "run", resume=True, **steps, train__seed="1")
    assert run_training(tmp_path / "run", resume=True, **steps, train__lr="1e-4").step == 18
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert lines[-1]["lr"] < 1e-4 and not any("not_finite" in line for line in lines)
    with pytest.raises(UserError, match=r"was trained with train.lr = 0.0001, not 0.1"):
        run_training(tmp_path / "run", resume=True, **steps, train__lr="0.1")


def test_weights_that_are_not_finite_leave_no_state_and_no_model(tmp_path, monkeypatch):
    update = training.Trainer._update

    def overflow(this, *arguments):
        result = update(this, *arguments)
        torch.nn.init.constant_(this.parameters[0], float("inf"))
        this.ema.update(this.model)
        return result

    monkeypatch.setattr(training.Trainer, "_update", overflow)
    with pytest.raises(NotFinite, match="10 steps in a row up to step 11 had no finite gradient; no state was saved"):
        run_training(tmp_path / "run", train__save_every="1", train__validate_every="1", data__validation_fraction="0")
    assert not RunFolder(tmp_path / "run").holds_run()


def test_a_run_whose_validations_are_never_finite_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("torchcdm.training.evaluation.validate", lambda *_: {"nll": float("nan")})
    for resume in (False, True):
        with pytest.raises(NotFinite, match="no validation had a finite nll; lower --train.lr"):
            run_training(tmp_path / "run", resume)


def test_skipped_steps_are_left_out_of_the_log(tmp_path, monkeypatch):
    poisoned(monkeypatch, {3, 5, 6})
    run_training(tmp_path / "run", train__steps="6", train__validate_every="6")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # The second line is of step 4 alone, the third of no step.
    assert lines[1]["loss"] > 0 and "loss" not in lines[2] and [line["skipped"] for line in lines] == [0, 1, 3]


def test_the_logged_squared_error_is_of_the_levels_that_validation_counts():
    window, error = Window(3), torch.tensor([9.0, 1.0, 0.0, 2.0, 0.0])
    window.add({"mse": error, "loss": error, "t": torch.arange(5)})
    processes = SimpleNamespace(device="cpu", accelerator=SimpleNamespace(reduce=lambda values, _: values))
    validated = means({"count": torch.ones(5), "mse": error})["mse"]
    assert window.means(processes) == {"mse": validated, "loss": error.mean()} and validated == 1


@pytest.mark.parametrize("limit", ["null", "500"])
def test_the_bar_tells_what_is_left_of_steps_or_time(tmp_path, capsys, limit):
    config = small_config(train__max_seconds=limit, train__steps="6", sampling__n="0")
    train(config, tmp_path / "run", device="cpu", progress=True)
    last = [shown for shown in re.split(r"[\r\n]", capsys.readouterr().err) if shown.startswith("training:")][-1]
    assert re.search(r"training: 100%\|.*\| \d\d:\d\d<00:00, step 6, mse [\d.]+, ce [\d.]+, best val nll [\d.]+", last)


def test_nine_in_a_row_do_not(tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(5, 14)))
    run_training(tmp_path / "run", train__steps="15")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["skipped"] == 9


def test_validations_before_the_logits_count_choose_no_model_and_stop_nothing(tmp_path, monkeypatch):
    # Every validation is worse than the one before.
    values = iter(range(100))
    monkeypatch.setattr("torchcdm.training.evaluation.validate", lambda *_: {"nll": float(next(values))})
    result = run_training(tmp_path / "run", train__steps="20", train__validate_every="2", train__patience="2",
                          loss__logits_from="[0.3, 0.6]")  # fmt: skip
    # Thirteen steps are the first after which one has counted in full: validated at 14, and twice worse by 18.
    assert result.selected["step"] == 14 and result.step == 18


def test_patience_stops(tmp_path):
    result = run_training(tmp_path / "run", train__steps="40", train__validate_every="2", train__patience="3",
                          train__lr="1e-30", train__ema_decay="0.0", train__log_every="40")  # fmt: skip
    # The first validation is the best, as nothing is learned; three more and it is over.
    assert result.step < 12 and result.selected["step"] <= 4
    assert run_training(tmp_path / "run", resume=True, train__steps="40", train__validate_every="2",
                        train__patience="3", train__lr="1e-30", train__ema_decay="0.0",
                        train__log_every="40").step == result.step  # fmt: skip


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="no data: .*--data"):
        train(small_config("encoder"), tmp_path / "run", device="cpu", progress=False)
    with pytest.raises(UserError, match="device 'cuda:7' cannot be used: ") as caught:
        train(small_config(), tmp_path / "run", device="cuda:7", progress=False)
    assert "\n" not in str(caught.value)


def test_resume_refuses_data_that_have_changed(tmp_path):
    fields = {"model.backbone": "mlp", "train.steps": "2", "sampling.n": "0"}
    layers = preset_fields("mlp"), flag_fields(fields.items())
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    train(make_config(*layers), tmp_path, from_object(x), device="cpu", progress=False)
    more = make_config(*layers, flag_fields([("train.steps", "3")]))
    with pytest.raises(UserError, match="its data have changed; start a new run, with --init"):
        train(more, tmp_path, from_object(1000 * x + 5), resume=True, device="cpu", progress=False)
    assert train(more, tmp_path, from_object(x), resume=True, device="cpu", progress=False).step == 3


def test_resume_finds_data_that_have_moved(tmp_path):
    fields = {"model.backbone": "mlp", "train.steps": "6", "train.validate_every": "2", "sampling.n": "0"}
    fields |= {"train.lr": "0.2", "train.ema_decay": "0.0"}  # the best step is neither the first nor the last
    layers, places = (preset_fields("mlp"), flag_fields(fields.items())), [tmp_path / "a.npy", tmp_path / "b.npy"]
    np.save(places[0], torch.randn(60, 2, generator=torch.Generator().manual_seed(0)).numpy())
    first, moved = (make_config(*layers, flag_fields([("data.spec", f"array:{place}")])) for place in places)
    train(first, tmp_path / "run", device="cpu", progress=False)
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert 0 < load(tmp_path / "run").info.selected["step"] < 6
    for here, there, config in ((0, 1, moved), (1, 0, first)):  # and back
        places[here].rename(places[there])
        assert train(config, tmp_path / "run", resume=True, device="cpu", progress=False).step == 6
        model = load(tmp_path / "run")
        assert model.info.data == config.data and len(model.info.read_source(model).train) == 48
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    unknown = make_config(*layers, flag_fields([("train.steps", "7")]))
    with pytest.raises(UserError, match="was trained with data.spec = array:"):
        train(unknown, tmp_path / "run", load_source(first.data), resume=True, device="cpu", progress=False)


def test_what_is_compiled_is_in_training_mode(tmp_path, monkeypatch):
    config = small_config(train__compile="true", train__steps="1", sampling__n="0")
    model, modes = new_model(config.model, load_source(config.data), flip=False).eval(), []
    monkeypatch.setattr(torch, "compile", lambda loss, **_: modes.append(loss.model.training) or loss)
    train(config, tmp_path / "run", device="cpu", progress=False, model=model)
    assert modes == [True]


def test_a_run_without_samples_draws_none_meanwhile(tmp_path):
    assert run_training(tmp_path / "run", sampling__n="0", train__sample_every="5").step == 12
    assert not RunFolder(tmp_path / "run").samples.exists()


def test_a_compiler_that_fails_is_told_and_left_out(tmp_path, monkeypatch):
    def compile_in_vain(loss, **options):
        def refuse(*batch):
            raise RuntimeError(f"no compiler for {torch.get_autocast_dtype('cpu')}\nand more")

        assert torch.is_autocast_enabled("cpu")
        return refuse

    monkeypatch.setattr(torch, "compile", compile_in_vain)
    with pytest.warns(UserWarning, match=r"torch.compile failed \(no compiler for torch.bfloat16\); training goes on"):
        result = run_training(tmp_path / "run", train__compile="true", train__precision="bf16", train__steps="2")
    assert result.step == 2
