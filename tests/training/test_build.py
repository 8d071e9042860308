"""From settings and data to objects."""

import torch

from torchcdm.data import DataOptions, MemorySplit, from_object
from torchcdm.training import build


def test_images_are_counted_in_parts_that_memory_holds(monkeypatch):
    x = torch.randint(0, 17, (60, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    source, sizes, batch = from_object(x), [], MemorySplit.batch
    whole = build.in_units(source, DataOptions(gaussianize=True)).transform
    monkeypatch.setattr(build, "HISTOGRAM_NUMBERS", 64)
    monkeypatch.setattr(MemorySplit, "batch", lambda self, rows: sizes.append(len(rows)) or batch(self, rows))
    assert torch.equal(build.in_units(source, DataOptions(gaussianize=True)).transform.cumulative, whole.cumulative)
    assert max(sizes) == 4 and sum(sizes) == len(source.train)
