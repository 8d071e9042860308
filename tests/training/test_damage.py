"""Damaged and foreign runs and states: refused in one line that names the file, never scored, never gone on from."""

import json
import os
import random
import shutil

import pytest
import torch
from damage import resealed
from safetensors.torch import load_file, save_file
from small_runs import small_config, small_flags

from torchcdm.cli import main
from torchcdm.errors import UserError
from torchcdm.runtime.artefact import seal
from torchcdm.runtime.validation import encode
from torchcdm.training.checkpoint import load, load_state, read_info, state_folders
from torchcdm.training.loop import train
from torchcdm.training.run_folder import RunFolder, read_metrics

MODEL = ("config.json", "model.safetensors")
STATE = ("progress.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors")
WRONG = (None, -1, 0, 1e30, "x", [], {}, True, [[1.0]], 10**30)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage") / "run"
    train(small_config(train__steps="4", sampling__n="0"), folder, device="cpu", progress=False)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def state_of(run):
    return state_folders(RunFolder(run))[-1]


def refused(read, *named):
    with pytest.raises(UserError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in named), message


def leaves(value, path=()):
    """Paths of all values in nested dicts and lists, those in between too."""
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from leaves(item, (*path, key))


def put(content, path, value):
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = value


@pytest.mark.parametrize("name", MODEL)
def test_a_flipped_bit_in_a_run_is_refused(run, name):
    whole = encode(read_info(run))
    flip(run / name, 40, lambda: load(run), lambda: encode(read_info(run)) == whole)


@pytest.mark.parametrize("name", STATE)
def test_a_flipped_bit_in_a_state_is_refused(run, name):
    folder = state_of(run)
    whole = load_state(folder).progress
    flip(folder / name, 40, lambda: load_state(folder), lambda: load_state(folder).progress == whole)


def flip(path, times, read, same):
    """Flips bits all over a file, one at a time; each is refused, unless JSON says the same by it (1e-05, 1E-05)."""
    chance, right = random.Random(0), path.read_bytes()
    for part in range(times):
        at = chance.randrange(part * 8 * len(right) // times, (part + 1) * 8 * len(right) // times)
        wrong = bytearray(right)
        wrong[at // 8] ^= 1 << at % 8
        path.write_bytes(wrong)
        if not (path.suffix == ".json" and reads_the_same(wrong, right)):
            refused(read, path.name)
        else:
            assert same()


def reads_the_same(one, other):
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_and_missing_files_are_refused(run, share):
    folder = state_of(run)
    files = [(run / name, load, run) for name in MODEL] + [(folder / name, load_state, folder) for name in STATE]
    for path, read, where in files:
        right = path.read_bytes()
        path.write_bytes(right[: int(share * len(right))])
        refused(lambda read=read, where=where: read(where), path.name)
        path.unlink()
        refused(lambda read=read, where=where: read(where), path.name)
        path.mkdir()
        refused(lambda read=read, where=where: read(where), path.name)
        path.rmdir()
        path.write_bytes(right)
    assert load(run) and load_state(folder)


def test_every_value_of_a_foreign_configuration_is_refused_or_read(run):
    """Written by a program that knows the checksum: wrong types, absurd sizes, numbers below 0."""
    path = run / "config.json"
    right = json.loads(path.read_text())
    outcomes = {"refused": 0, "read": 0}
    parts = right.keys() - {"format", "kind", "torchcdm", "files", "sha256", "preset", "estimator"}
    for leaf in leaves({key: right[key] for key in parts}):
        for wrong in random.Random(str(leaf)).sample(WRONG, 3):
            content = json.loads(json.dumps(right))
            put(content, leaf, wrong)
            path.write_text(json.dumps(content | {"sha256": seal(content)}))
            try:
                load(run)
                outcomes["read"] += 1
            except UserError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["read"] / 2, outcomes


def test_keys_that_are_missing_or_foreign(run):
    folder = state_of(run)
    for path, read, where in ((run / "config.json", load, run), (folder / "progress.json", load_state, folder)):
        text = path.read_text()
        optional = {"sha256", "torchcdm", "class_names", "columns", "constants", "estimator", "fingerprint"}
        for key in json.loads(text).keys() - optional:
            resealed(path, lambda content, key=key: content.pop(key))
            refused(lambda read=read, where=where: read(where), path.name)
            path.write_text(text)
        resealed(path, lambda content: content.update(colour=1))
        refused(lambda read=read, where=where: read(where), "colour")


def test_every_counter_of_a_foreign_state_is_refused_or_read(run):
    path = state_of(run) / "progress.json"
    right = json.loads(path.read_text())
    for key in right.keys() - {"sha256", "torchcdm", "config", "data"}:
        for wrong in (None, -1, "x", [], {}, [1], 2.5):
            resealed(path, lambda content, key=key, wrong=wrong: content.update({key: wrong}))
            try:
                load_state(path.parent)
            except UserError as error:
                assert "progress.json" in str(error) and "remove" in str(error)
            else:
                assert (key, wrong) in [("seconds", 2.5), ("best", None), ("window", {})]
            path.write_text(json.dumps(right))


@pytest.mark.parametrize("kind", ["nan", "inf", "shape", "fewer", "more"])
def test_foreign_weights_are_refused(run, kind):
    """With a right checksum: not finite, of another shape, too few or too many."""
    path, key = run / "model.safetensors", "backbone.conv_in.weight"
    tensors = load_file(path)
    if kind in ("nan", "inf"):
        tensors[key].view(-1)[3] = float(kind)
    elif kind == "shape":
        tensors[key] = tensors[key][:-1].contiguous()
    elif kind == "fewer":
        del tensors[key]
    else:
        tensors["backbone.other"] = torch.zeros(1)
    save_file(tensors, path)
    seal_again(run / "config.json", path)
    refused(lambda: load(run), "model.safetensors", "other" if kind == "more" else key)


def test_a_network_that_the_file_does_not_hold_is_refused_before_it_takes_memory(run):
    resealed(run / "config.json", lambda content: content["model"]["backbone"].update(width=2**14))  # 10 GB a layer
    refused(lambda: load(run), "model.safetensors", "conv_in.weight")


def seal_again(path, *files):
    import hashlib

    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    resealed(path, lambda content: content["files"].update(digests))


def test_a_moment_that_float32_does_not_hold_is_no_damage(run):
    folder = state_of(run)
    path = folder / "optimizer.safetensors"
    right = load_file(path)
    first = next(key for key in right if key.endswith(".exp_avg"))
    # A gradient without bound: the run saved its square, and goes on with it.
    save_file(right | {f"{first}_sq": torch.full_like(right[first], torch.inf)}, path)
    seal_again(folder / "progress.json", path)
    again(run)


def again(run, **changes):
    return train(
        small_config(**{"train__steps": "6", "sampling__n": "0"} | changes), run, resume=True, device="cpu",
        progress=False,
    )  # fmt: skip


def test_other_settings_are_refused_whatever_the_configuration_says(run):
    """Those of the state count: the file is the user's to edit, and may be lost."""
    text = (run / "config.yaml").read_text()
    for content in (None, "a: [", text.replace("batch_size: 32", "batch_size: 16")):
        (run / "config.yaml").unlink(missing_ok=True)
        if content is not None:
            (run / "config.yaml").write_text(content)
        refused(lambda: again(run, train__batch_size="16"), "was trained with train.batch_size = 32, not 16")
    assert again(run).step == 6


def test_a_state_under_another_name_is_refused(run):
    state_of(run).rename(run / "state" / "step-9")
    refused(lambda: again(run), "progress.json", "it is of step 4", "remove")


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\n",
        b"[]\n3\nnull\n",
        b'{"loss": 1}\n{"step": "x"}\n',
        b'{"step": 1, "mse": "x"}\n',
        b"[" * 10**5 + b"\n",
        None,
    ],
)
def test_the_log_of_steps_never_blocks_a_run(run, damage, capsys):
    path = run / "metrics.jsonl"
    kept = len(read_metrics(path))
    path.unlink() if damage is None else path.write_bytes(damage + path.read_bytes())
    assert len(read_metrics(path)) in (0, kept)
    assert main(["info", str(run)]) == 0 and again(run).step == 6


def test_on_the_command_line_it_is_one_line_and_exit_code_2(run, capsys):
    for name, content in (("model.safetensors", b"x"), ("config.json", b"[" * 10**5)):
        right = (run / name).read_bytes()
        (run / name).write_bytes(content)
        for words in (["info"], ["nll"], ["sample", "--out", str(run / "out")]):
            assert main([words[0], str(run), *words[1:]]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and name in error and "damaged" in error
        (run / name).write_bytes(right)
    (state_of(run) / "ema.safetensors").write_bytes(b"")
    flags = small_flags(train__steps="6", sampling__n="0")
    assert main(["train", "digits", "--out", str(run), "--resume", "--quiet", "--device", "cpu", *flags]) == 2
    assert "ema.safetensors: damaged" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_that_may_not_be_read(run):
    for name in MODEL:
        (run / name).chmod(0)
        refused(lambda: load(run), name, "cannot be read as a file")
        (run / name).chmod(0o600)
