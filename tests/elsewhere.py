"""Models on another device than the data, without a second device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def elsewhere(model: nn.Module, *data: Tensor) -> Iterator[list[Tensor]]:
    """``model`` moved to another device, in place, and fakes of ``data`` on the CPU.

    Fake tensors know their shapes and where they are; operations on two devices raise, as do those that read values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                fake = None if value is None else mode.from_tensor(value.detach())
                with mode:
                    tensors[name] = None if fake is None else fake.to("meta")
    fakes = [mode.from_tensor(part) for part in data]
    with mode:
        yield fakes
