"""A second device without one: tensors that are said to lie on a GPU are on the CPU, and a mix of both is refused.

What a GPU would compute cannot be tested so; that everything which meets lies in one place can, down to the
backward passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cuda", 0)

INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""What lies on the GPU takes an index that lies on the CPU."""


class MixedDevices(RuntimeError):
    """What a GPU would refuse."""


class _Places:
    """Where storages are said to lie: on the GPU, anywhere, or, as those that are not known, on the CPU.

    Anywhere lies what operations make without a word of what it meets: zeros of derivatives, masks of dropout.
    """

    def __init__(self) -> None:
        # The weak reference keeps the address of a storage from being used again.
        self.storages: dict[int, tuple[StorageWeakRef, bool]] = {}

    def on_gpu(self, x: Tensor) -> bool:
        return self.storages.get(_storage(x)._cdata, (None, False))[1]

    def on_cpu(self, x: Tensor) -> bool:
        return _storage(x)._cdata not in self.storages

    def put(self, x: Tensor, on_gpu: bool = True) -> None:
        storage = _storage(x)
        self.storages[storage._cdata] = (StorageWeakRef(storage), on_gpu)

    def take(self, x: Tensor) -> None:
        self.storages.pop(_storage(x)._cdata, None)


def _storage(x: Tensor) -> torch.UntypedStorage:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):  # inside torch.func
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage()


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class _Operations(TorchDispatchMode):
    """Every operation, those of backward passes included: results lie where the inputs do."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        places, inputs, name = self.places, _tensors(args, kwargs), func.overloadpacket.__name__
        here = any(map(places.on_gpu, inputs))
        # Single numbers come from anywhere onto the GPU, and an index from the CPU.
        strange = [x for x in inputs if places.on_cpu(x) and x.ndim]
        if name in INDEXING and not places.on_cpu(inputs[0]):
            strange = []
        if here and strange and name != "copy_":
            where = ", ".join(f"{tuple(x.shape)} on the {'GPU' if places.on_gpu(x) else 'CPU'}" for x in inputs)
            raise MixedDevices(f"{name} of {where}")
        result = func(*args, **(kwargs or {}))
        # What is copied into stays where it is, and a view of a storage is where that was.
        if name not in ("copy_", "set_") and (here or not any(map(places.on_cpu, inputs))):
            for x in _tensors(result):
                places.put(x, on_gpu=here)
        return result


class _Calls(TorchFunctionMode):
    """What is said of devices: moves, tensors that are made on one, and the question where a tensor lies."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return DEVICE if self.places.on_gpu(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return self.places.on_gpu(args[0])
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and self.places.on_gpu(args[0]):
            raise MixedDevices("numpy reads no GPU")
        if func in (torch.Tensor.cpu, torch.Tensor.cuda):
            return self._moved(args[0].clone(), func is torch.Tensor.cuda)
        if func in (torch.Tensor.__deepcopy__, torch.Tensor.new_tensor):  # made by no operation on the first
            return self._moved(func(*args, **kwargs), self.places.on_gpu(args[0]))
        if func is torch.Tensor.to:
            return self._to(args[0], args[1:], kwargs)
        device = kwargs.pop("device", None)
        result = func(*args, **kwargs)
        if device is not None or not _tensors(args, kwargs):
            for x in _tensors(result):
                self._moved(x, device is not None and torch.device(device).type == DEVICE.type)
        return result

    def _to(self, x: Tensor, args: tuple, kwargs: dict) -> Tensor:
        device = kwargs.pop("device", None)
        rest = []
        for argument in args:
            if isinstance(argument, Tensor):
                device = DEVICE if self.places.on_gpu(argument) else torch.device("cpu")
                rest.append(argument.dtype)
            elif isinstance(argument, (str, torch.device)):
                device = argument
            elif isinstance(argument, torch.dtype):  # the others are non_blocking and copy
                rest.append(argument)
        there = self.places.on_gpu(x) if device is None else torch.device(device).type == DEVICE.type
        if there == self.places.on_gpu(x):
            return x.to(*rest, **kwargs) if rest or kwargs else x
        moved = x.to(*rest, **kwargs) if rest or kwargs else x
        return self._moved(moved.clone() if moved is x else moved, there)

    def _moved(self, x: Tensor, there: bool) -> Tensor:
        (self.places.put if there else self.places.take)(x)
        return x


@contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Gives the device; inside, ``.to(device)`` and ``device=device`` work, and a mix raises :class:`MixedDevices`."""
    places = _Places()
    with _Operations(places), _Calls(places):
        yield DEVICE
