"""What public calls of models and samplers take: inputs, labels and levels, checked before they reach a network."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchcdm.diffusion.schedules import readable
from torchcdm.errors import UserError, nearest, reason
from torchcdm.units import DataTransform
from torchcdm.units.frames import as_frame, is_frame

if TYPE_CHECKING:
    from torchcdm.models.denoiser import Denoiser

LARGEST = 1e15  # size of a context, or of a number in model units, beyond which sums of squares overflow in float32


def as_numbers(x: Any, device: torch.device, transform: DataTransform | None = None) -> Tensor:
    """Inputs (B, *shape) as a tensor of a float type, float32 at least; its gradient is kept.

    Of a data frame the codes for a model of a table, by its columns, or the columns in their order. UserError where
    inputs are masked, empty, not finite or no array of real numbers, or columns missing, or cells not known.
    """
    if is_frame(x):
        table = None if transform is None else transform.table
        x = as_frame(x).to_numpy() if table is None else table.encode(as_frame(x)).x
    values = as_tensor(x, "inputs", device)
    if values.is_complex() or values.dtype == torch.bool:
        raise UserError(f"inputs are {values.dtype}; give real numbers")
    if values.ndim < 2 or not values.numel():
        raise UserError(f"inputs have shape {tuple(values.shape)}; give at least one sample, (B, *shape)")
    if not values.is_floating_point():
        values = values.double()
    elif values.dtype.itemsize < 4:
        values = values.float()
    if readable(values) and not values.isfinite().all():
        raise UserError("inputs are not finite; remove NaN and infinite values")
    return values


def as_labels(y: Any, model: "Denoiser", n: int, one_for_all: bool = False, training: bool = False) -> Tensor | None:
    """``y`` of ``n`` samples on the model's device: long classes (n,), or contexts (n, context); None for no labels.

    Classes may be named, where the model knows their names. ``one_for_all`` lets a single label, or context, stand for
    all samples. In ``training`` the null label ``classes`` is one too, and labels on a GPU are not looked at: it would
    wait. UserError for all other labels.
    """
    if y is None or torch.compiler.is_compiling():
        return y
    if not model.conditional:
        raise UserError("labels y are given, but the model was trained without classes; leave y out")
    y = _numbers(y, getattr(model.info, "class_names", None) or ())
    labels = as_tensor(y, "y", model.schedule.alpha.device)
    shape = (n,) if model.context is None else (n, model.context)
    if one_for_all and labels.ndim == len(shape) - 1:
        labels = labels.expand(n, *[-1] * labels.ndim)
    if tuple(labels.shape) != shape:
        raise UserError(f"y has shape {tuple(labels.shape)}; this model takes {shape}, one for each sample")
    look = readable(labels) and not (training and labels.device.type != "cpu")
    if model.context is not None:
        if labels.is_complex() or (look and not (labels.double().abs() <= LARGEST).all()):
            raise UserError(f"y is not finite, not real or beyond {LARGEST:g}; contexts are real numbers")
        return labels
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(f"y holds {labels.dtype}; classes are integers")
    labels = labels.long()  # unsigned ones do not compare
    wrong = labels[(labels < 0) | (labels >= model.classes + training)] if look else ()
    if len(wrong):
        raise UserError(f"label {int(wrong[0])} is out of range; this model has classes 0 to {model.classes - 1}")
    return labels


def _numbers(y: Any, names: Sequence[str]) -> Any:
    """Classes by their names, one or an array or column of them, as numbers; what holds no text as it is."""
    cells = np.empty(0)
    with suppress(ValueError):  # lists of other lengths, which are no labels
        cells = cells if isinstance(y, Tensor) else np.asarray(y)
    if cells.dtype.kind not in "OU" or not any(isinstance(name, str) for name in cells.flat):
        return y
    for name in cells.flat:
        if name not in names:
            what = nearest(str(name), names) if names else "the model knows no names of classes; give numbers"
            raise UserError(f"y: no class '{name}'; {what}")
    return np.array([names.index(name) for name in cells.flat]).reshape(cells.shape)


def check_tensor(x: Any, dtype: torch.dtype | None, data: bool) -> None:
    """Refuses what is no tensor (B, *shape) of a network in ``dtype``; None: of any real one, as ``data`` are."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested or x.ndim < 2:
        raise UserError("inputs are no dense tensor (B, *shape); give one")
    if x.is_inference() and not (data or torch.is_inference_mode_enabled()):
        raise UserError("inputs were made under torch.inference_mode(), which allows no gradient: use torch.no_grad()")
    if not x.is_floating_point() or (dtype not in (None, x.dtype) and not torch.is_autocast_enabled(x.device.type)):
        raise UserError(f"inputs are {x.dtype}; the network takes {dtype or 'real numbers'}: convert one of them")


def as_tensor(values: Any, name: str, device: torch.device) -> Tensor:
    """Values as a dense tensor; UserError, by their ``name``, for what cannot be one."""
    if isinstance(values, np.ma.MaskedArray):
        raise UserError(f"{name}: a masked array; fill or drop the masked values first")
    try:
        if not isinstance(values, Tensor) and hasattr(values, "__array__"):
            values = np.asarray(values)  # a column of a data frame by its order, not by its index
            values = np.require(values, values.dtype.newbyteorder("="), ["C", "W"])  # as torch takes them
        found = torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError, LookupError) as error:
        raise UserError(f"{name}: not an array of numbers ({reason(error)})") from None
    if found.layout != torch.strided or found.is_nested or found.is_quantized or found.is_meta:
        raise UserError(f"{name}: a tensor that is sparse, nested, quantised or without values; make it dense first")
    return found
