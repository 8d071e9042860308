"""Data: named data sets, folders, arrays, tables and Python objects, all as :class:`DataSource`.

Values are in data units everywhere: as stored, 0 ... 255 for 8-bit images. ``source.transform`` takes them to
model units.
"""

from torchcdm.data.inputs import Inputs, read_inputs
from torchcdm.data.objects import from_object
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.outputs import save_array, save_grid, save_images, save_table, to_bytes
from torchcdm.data.pixels import flip_horizontally
from torchcdm.data.source import DataSource, LazySplit, MemorySplit, Split, fingerprint, renumbered
from torchcdm.data.specs import check_spec, load_data, parse_size, spec_of

__all__ = [
    "DataOptions",
    "DataSource",
    "Inputs",
    "Layout",
    "LazySplit",
    "MemorySplit",
    "Split",
    "check_spec",
    "fingerprint",
    "flip_horizontally",
    "from_object",
    "load_data",
    "parse_size",
    "read_inputs",
    "renumbered",
    "save_array",
    "save_grid",
    "save_images",
    "save_table",
    "spec_of",
    "to_bytes",
]
