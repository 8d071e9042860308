"""Data: named data sets, folders, arrays, tables and Python objects, all as :class:`DataSource`."""

from torchcdm.data.objects import from_object
from torchcdm.data.pixels import flip_horizontally
from torchcdm.data.source import DataSource, LazySplit, MemorySplit, Split
from torchcdm.data.specs import load_data, parse_size

__all__ = [
    "DataSource",
    "LazySplit",
    "MemorySplit",
    "Split",
    "flip_horizontally",
    "from_object",
    "load_data",
    "parse_size",
]
