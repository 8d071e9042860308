"""Run by ``two_ranks``: the gradients of a joint batch from every process's share, and a short training."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
from small_runs import small_config

from torchcdm.runtime.processes import Processes
from torchcdm.training.batches import Batches
from torchcdm.training.build import build_loss, build_model, fit_gaussian, load_source
from torchcdm.training.loop import train

KINDS = {
    "both": {"loss__ce_weight": "3", "model__backbone__dropout": "0"},
    "mse": {"loss__ce_weight": "0", "model__backbone__dropout": "0"},
}  # fmt: skip
"""What is trained."""


def gradients(kind: str) -> tuple[int, dict[str, torch.Tensor]]:
    """The rank of this process, and its gradients after one backward pass of step 3."""
    config = small_config(**KINDS[kind])
    source = load_source(config.data)
    torch.manual_seed(0)
    gaussian = fit_gaussian(config.model, source, flip=False) if config.model.gaussian else None
    model = build_model(config.model, source.transform, None, gaussian).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    processes = Processes("cpu")
    if processes.world > 1:  # the first validates alone, for longer than the ten minutes that NCCL would wait
        waits = torch.distributed.group.WORLD._get_backend(processes.device).options._timeout
        assert waits > timedelta(hours=12)
    loss = build_loss(config.loss, model)
    batches = Batches(source, 32, 0, labels=False, rank=processes.rank, world=processes.world)
    (batch,) = batches(3, 4, loss, processes.device)
    wrapped = processes.accelerator.prepare_model(loss, device_placement=False)
    value = wrapped(batch.x_0.double(), None, batch.t, batch.eps.double())["loss"].mean()
    processes.accelerator.backward(value + 0 * sum(parameter.sum() for parameter in model.parameters()))
    return processes.rank, {name: parameter.grad for name, parameter in model.named_parameters()}


def main(folder: Path) -> None:
    """Leaves ``gradients-KIND-RANK.pt``, a run that all processes trained, and what threads are left after it."""
    for kind in KINDS:
        rank, found = gradients(kind)
        torch.save(found, folder / f"gradients-{kind}-{rank}.pt")
    train(small_config(train__steps="4", model__backbone__dropout="0"), folder / "run", device="cpu", progress=False)
    (folder / f"threads-{rank}.txt").write_text(threads())


def threads() -> str:
    """Names of the threads of this process, a line each, where the system tells them."""
    return "".join((task / "comm").read_text() for task in Path("/proc/self/task").glob("*"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
