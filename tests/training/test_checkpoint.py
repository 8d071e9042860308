"""Saved models and states: exact, atomic, and refused in one line when damaged."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from damage import resealed
from small_runs import small_config

from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.runtime.artefact import read_artefact, write_artefact
from torchcdm.runtime.files import TEMPORARY, write_json
from torchcdm.runtime.validation import encode
from torchcdm.training.build import load_source, new_model, resolve
from torchcdm.training.checkpoint import (
    ModelInfo,
    Progress,
    TrainingState,
    load,
    load_matching,
    load_state,
    read_info,
    save,
    save_model,
    save_state,
    state_folders,
)
from torchcdm.training.run_folder import RunFolder, append_metrics, cut_metrics, read_metrics


def randomised(model):
    """Away from the zero initialisation of the head."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@pytest.fixture(scope="module")
def source():
    return load_source(small_config().data)


def saved(tmp_path, source, **changes):
    torch.manual_seed(0)
    config = small_config(**changes)
    model_config = resolve(config.model, source.transform)
    model = randomised(new_model(model_config, source, flip=False))
    run = RunFolder(tmp_path / "run")
    info = ModelInfo(
        preset="digits", model=model_config, transform=source.transform, data=config.data,
        class_names=source.class_names, selected={"value": "last"},
    )  # fmt: skip
    save_model(run, model, info)
    return run, model


@pytest.mark.parametrize("labels", ["none", "input", "joint"])
def test_a_loaded_model_gives_the_same_bits(tmp_path, source, labels):
    run, model = saved(tmp_path, source, model__labels=labels)
    again = load(run.root)
    assert isinstance(again, ClassificationDiffusion) and not again.training
    assert not any(p.requires_grad for p in again.parameters())
    x, y = source.test.tensors(5)
    y = None if labels == "none" else y
    assert torch.equal(again.log_prob(x, y=y), model.log_prob(x, y=y))
    z = source.transform(x.float())
    assert torch.equal(again.denoise(z, 7, y).eps, model.denoise(z, 7, y).eps)
    assert read_info(run.root).class_names == source.class_names


def test_placed_steps_lie_beside_the_model(tmp_path, source):
    """A loaded model needs no trajectories, unless the file is of other weights or does not fit."""
    model, seen, run = load(saved(tmp_path, source)[0].root), [], RunFolder(tmp_path / "copy")
    x = model.sample(2, steps=3)
    model.save(run.root)

    def passes(change=lambda model: None):
        loaded = load(run.root)
        change(loaded)
        loaded.backbone.register_forward_hook(lambda *_: seen.append(1))
        seen.clear()
        assert loaded.sample(2, steps=3).shape == x.shape
        return len(seen)

    assert torch.equal(load(run.root).sample(2, steps=3), x) and passes() == 3
    assert passes(lambda model: next(model.backbone.parameters()).add_(0.01)) > 3
    content, (tensors,) = read_artefact(run.curvatures, "curvatures", None)
    for damage in ({"first": dict.fromkeys(tensors, 1e9)}, {"first": {}}, {"first": dict.fromkeys(tensors, "x")}):
        write_artefact(run.curvatures, "curvatures", content | damage, {"curvatures.safetensors": tensors})
        assert passes() > 3
    part = {key: value[1:] for key, value in tensors.items()}
    write_artefact(run.curvatures, "curvatures", content, {"curvatures.safetensors": part})
    assert passes() > 3
    run.curvatures.write_text("{")
    assert passes() > 3


def test_a_ladder_and_the_absence_of_a_gaussian_survive(tmp_path):
    source = load_source(small_config(data__gaussianize="false").data)
    run, model = saved(tmp_path, source, model__schedule="log-snr", model__gaussian="false")
    assert torch.equal(load(run.root).schedule.sigma, model.schedule.sigma)
    assert read_info(run.root).model.schedule.r_min == 0.5 / 8.5


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: run.model.unlink(), "holds no trained model (model.safetensors is missing)"),
        (lambda run: run.model_info.unlink(), "holds no trained model (config.json is missing)"),
        (lambda run: run.model.write_bytes(run.model.read_bytes()[:5000]), "model.safetensors: damaged, it does"),
        (lambda run: run.model.write_bytes(b""), "model.safetensors: damaged, it does not match its checksum"),
        (lambda run: run.model_info.write_text("{"), "config.json: damaged, not JSON"),
        (lambda run: run.model_info.write_text("[]"), "config.json: damaged, not a JSON object"),
        (lambda run: resealed(run.model_info, lambda c: c.update(format=9)), "config.json: format version 9"),
        (lambda run: resealed(run.model_info, lambda c: c.pop("transform")), "damaged, transform is missing"),
        (
            lambda run: resealed(run.model_info, lambda c: c["model"]["backbone"].update(wdth=3)),
            "unknown field 'model.backbone.wdth'; did you mean 'width'",
        ),
        (
            lambda run: resealed(run.model_info, lambda c: c["model"]["backbone"].update(width=16)),
            "backbone.conv_in.weight is (8, 1, 3, 3) in the file, (16, 1, 3, 3) in the model",
        ),
    ],
)
def test_damage_is_told_in_one_line(tmp_path, source, break_it, message):
    run, _ = saved(tmp_path, source)
    break_it(run)
    with pytest.raises(UserError) as caught:
        load(run.root)
    assert message in str(caught.value) and str(run.root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_run(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: holds no trained model \(there is no such folder\)"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "file")
    (tmp_path / "stopped" / "state" / "step-3").mkdir(parents=True)
    with pytest.raises(UserError, match=r"stopped: holds no trained model .stopped before a validation."):
        load(tmp_path / "stopped")


def test_devices_that_are_none_and_swapped_arguments(tmp_path):
    for device in ("", "abc", "cuda:99", 10**6, True):
        with pytest.raises(UserError, match="cannot be used"):
            load("zoo:two-moons", device)
    with pytest.raises(UserError, match="give the model, then the folder"):
        save(tmp_path / "run", load("zoo:two-moons"))


# --- states ----------------------------------------------------------------------------------------------------


def progress(step):
    counters = {"step": step, "ema_updates": step, "seconds": 1.5, "skipped": 0, "best": None, "stale": 0}
    return counters | {"window": {"loss": None}, "data": "x", "config": {"train": {"lr": 1e-3}}}


def state(step, value=1.0):
    weights = {"w": torch.full((3,), value)}
    moments = {"0.step": torch.tensor(1.0)}
    return TrainingState(weights, {"w": 2 * weights["w"]}, moments, Progress(**progress(step)))


def test_states_keep_the_last_two_and_read_back(tmp_path):
    run = RunFolder(tmp_path)
    for step in (9, 10, 100):
        save_state(run, state(step, value=step))
    assert [path.name for path in state_folders(run)] == ["step-10", "step-100"]
    again = load_state(state_folders(run)[-1])
    assert encode(again.progress) == progress(100)
    assert torch.equal(again.model["w"], torch.full((3,), 100.0)) and torch.equal(again.ema["w"], 2 * again.model["w"])
    assert again.optimizer == {"0.step": torch.tensor(1.0)}


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("missing", [True, False])
def test_a_damaged_state_names_the_file_and_the_way_out(tmp_path, name, missing):
    run = RunFolder(tmp_path)
    path = save_state(run, state(5)) / name
    path.unlink() if missing else path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=f"{name}.*remove .*step-5 to go on from the state before it") as caught:
        load_state(run.states / "step-5")
    assert "\n" not in str(caught.value) and str(caught.value).count(name) == 1


def test_what_a_crash_left_half_written_is_not_read_and_goes(tmp_path):
    run = RunFolder(tmp_path)
    save_state(run, state(5))
    half = run.states / f"{TEMPORARY}step-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (run.root / f"{TEMPORARY}model.safetensors").write_bytes(b"half")
    assert [path.name for path in state_folders(run)] == ["step-5"]
    with run.locked():
        pass
    assert not half.exists() and not list(run.root.glob(f"{TEMPORARY}*"))
    assert load_state(run.states / "step-5").progress.step == 5


def test_tensors_of_every_artefact_that_a_crash_left_beside_their_place_are_kept(tmp_path):
    run = RunFolder(tmp_path)
    save_state(run, state(5))
    for name in ("config", "log_z", "detector"):
        write_artefact(tmp_path / f"{name}.json", name, {}, {f"{name}.safetensors": {"x": torch.ones(2)}})
        (tmp_path / f"{name}.safetensors").rename(tmp_path / f"{TEMPORARY}{name}.safetensors")
    with run.locked():
        for name in ("config", "log_z", "detector"):
            assert (tmp_path / f"{name}.safetensors").exists()


def test_a_full_disk_is_one_line_and_costs_nothing_that_was_there(tmp_path):
    # A file size limit fails the write itself, as a full disk does, wherever the test runs.
    script = textwrap.dedent(
        f"""
        import resource, sys
        from pathlib import Path
        import torch
        from torchcdm.training.checkpoint import Progress, TrainingState, load_state, save_state, state_folders
        from torchcdm.errors import UserError
        from torchcdm.runtime.files import write_file
        from torchcdm.training.run_folder import RunFolder

        run = RunFolder({str(tmp_path)!r})
        def state(step):
            progress = Progress(**{progress(0)!r} | {{"step": step}})
            return TrainingState({{"w": torch.ones(50000)}}, {{"w": torch.ones(3)}}, {{}}, progress)
        save_state(run, state(1))
        write_file(run.model, b"old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000))
        for save in (lambda: save_state(run, state(2)), lambda: write_file(run.model, bytes(200000))):
            try:
                save()
            except UserError as error:
                print(error)
        assert run.model.read_bytes() == b"old"
        assert [p.name for p in state_folders(run)] == ["step-1"]
        assert load_state(run.states / "step-1").progress.step == 1
        left = [p.name for p in run.root.rglob(".*")]
        assert not left, left
        """
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert "step-2/progress.json: cannot be written (File too large); nothing that was there" in lines[0]
    assert "model.safetensors: cannot be written" in lines[1]


def test_metrics_are_cut_at_the_resumed_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (2, 4, 6):
        append_metrics(path, {"step": step, "loss": 0.5})
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 6]
    cut_metrics(path, 4)
    assert path.read_text().count("\n") == 2 and [line["step"] for line in read_metrics(path)] == [2, 4]
    cut_metrics(tmp_path / "none.jsonl", 4)
    assert not (tmp_path / "none.jsonl").exists()


def test_lines_of_metrics_that_cannot_be_read_are_not_lost(tmp_path, monkeypatch):
    path, line = tmp_path / "metrics.jsonl", '{"step": %d, "loss": 0.50}\n'
    for strange in (b"\xff\xfe\xe9 mine\n", (line % 2).encode("utf-16"), b'{"note": "mine"}\n'):
        path.write_bytes(strange + b"".join(b"\n" + (line % step).encode() for step in (4, 8)))
        cut_metrics(path, 4)
        assert path.read_bytes() == strange + b"\n" + (line % 4).encode() + b"\n"
    path.write_bytes(b"mine")
    cut_metrics(path, 4)
    assert path.read_bytes() == b"mine\n"

    def refused(path):
        raise UserError(f"{path}: cannot be read as a file (Permission denied)")

    monkeypatch.setattr("torchcdm.training.run_folder.read_bytes", refused)
    with pytest.raises(UserError, match="metrics.jsonl: cannot be read as a file"):
        cut_metrics(path, 4)
    assert path.read_text() == "mine\n"


def test_numbers_that_json_does_not_know_are_null(tmp_path):
    append_metrics(tmp_path / "metrics.jsonl", {"step": 1, "loss": float("nan")})
    write_json(tmp_path / "report.json", {"values": [1.0, float("inf")]})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'
    assert json.loads((tmp_path / "report.json").read_text()) == {"values": [1.0, None]}


def test_matching_weights_are_copied_and_the_others_named(tmp_path, source):
    run, old = saved(tmp_path, source)
    _, new = saved(tmp_path / "other", source, model__schedule__T="30")
    left = load_matching(new, run.root)
    held, own = old.state_dict(), new.state_dict()
    assert left and all(held[key].shape != own[key].shape for key in left)
    assert all(torch.equal(held[key], own[key]) for key, _ in new.named_parameters() if key not in left)
