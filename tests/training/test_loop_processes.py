"""Two processes are one process with the joint batch."""

from pathlib import Path

import pytest
import torch
import two_processes
from small_runs import small_config
from two_ranks import run_two

from torchcdm.training.checkpoint import load_state, state_folders
from torchcdm.training.loop import train
from torchcdm.training.run_folder import RunFolder, read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes over gloo leave."""
    path = tmp_path_factory.mktemp("two")
    run_two(two_processes.__file__, path)
    return path


@pytest.mark.parametrize("kind", two_processes.KINDS)
def test_gradients_are_those_of_the_joint_batch(folder, kind):
    _, joint = two_processes.gradients(kind)
    shares = [torch.load(folder / f"gradients-{kind}-{rank}.pt") for rank in range(2)]
    largest = max(float(gradient.abs().max()) for gradient in joint.values())
    assert largest > 1e-3
    for name, gradient in joint.items():
        assert torch.equal(shares[0][name], shares[1][name]), name
        assert (shares[0][name] - gradient).abs().max() < 1e-6 * largest, name


def test_the_group_ends_with_the_training(folder):
    """Its threads have aborted processes that ended."""
    threads = [(folder / f"threads-{rank}.txt").read_text() for rank in range(2)]
    assert all(line and "gloo" not in line for line in threads) or not Path("/proc/self/task").exists()


def test_training_is_that_of_one_process(folder, tmp_path):
    train(small_config(train__steps="4", model__backbone__dropout="0"), tmp_path, device="cpu", progress=False)
    one, two = (load_state(state_folders(RunFolder(path))[-1]) for path in (tmp_path, folder / "run"))
    for name, value in one.model.items():
        half = 2e-3 * (value.dtype == torch.float16)  # one step of its rounding
        assert torch.allclose(value, two.model[name], atol=1e-4, rtol=1e-5 + half), name
    lines = [read_metrics(path / "metrics.jsonl") for path in (tmp_path, folder / "run")]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for mine, theirs in zip(*lines, strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-3 and abs(mine["ce"] - theirs["ce"]) < 1e-3
