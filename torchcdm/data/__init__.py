"""Data: named data sets, folders, arrays, tables and Python objects, all as :class:`DataSource`.

Values are in data units: as stored, 0 ... 255 for 8-bit images. ``source.transform`` takes them to model units.
"""

from torchcdm.data.images import flip_horizontally
from torchcdm.data.inputs import Inputs, read_inputs
from torchcdm.data.loading import check_spec, from_object, load_data, parse_size, spec_of
from torchcdm.data.options import DataOptions
from torchcdm.data.outputs import save_array, save_grid, save_images, save_table, to_bytes
from torchcdm.data.source import CropSplit, DataSource, LazySplit, MemorySplit, Split, fingerprint, renumbered

__all__ = ["CropSplit", "DataOptions", "DataSource", "Inputs", "LazySplit", "MemorySplit", "Split"]
__all__ += ["check_spec", "from_object", "load_data", "parse_size", "read_inputs", "spec_of"]
__all__ += ["fingerprint", "flip_horizontally", "renumbered"]
__all__ += ["save_array", "save_grid", "save_images", "save_table", "to_bytes"]
