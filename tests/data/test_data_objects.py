"""Arrays, frames and torch data sets as data: what they become, how often they are read, and messages."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import Dataset

from torchcdm.data import MemorySplit, from_object
from torchcdm.errors import UserError


def test_dataset_of_pairs_equals_its_tensors():
    x, y = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8), torch.arange(40) % 4
    ours = from_object(torch.utils.data.TensorDataset(x, y))
    direct = from_object((x, y))
    assert torch.equal(ours.train.x, direct.train.x) and torch.equal(ours.train.labels, direct.train.labels)
    assert from_object(direct) is direct


def test_a_small_dataset_is_read_once():
    class Counted(_Images):
        read = []

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    from_object(Counted(np.random.default_rng(0).integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)))
    assert sorted(Counted.read) == [0, *range(12)]  # the first one tells how large they are


def test_arrays_that_are_read_only_are_data_like_others(recwarn, request):
    torch.set_warn_always(True)  # else once in a process
    request.addfinalizer(lambda: torch.set_warn_always(False))
    x = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    for values in (x, x.astype(np.float32)):
        values.flags.writeable = False
        from_object(values)
    assert not [warning for warning in recwarn if "not writable" in str(warning.message)]


def test_large_labels_that_are_floats_stay_apart():
    x, y = np.random.RandomState(0).normal(size=60), np.repeat([1_000_001.0, 1_000_002.0], 30)
    assert from_object(pd.DataFrame({"x": x, "y": y}), "y").class_names == ("1000001", "1000002")


def test_large_dataset_stays_lazy(monkeypatch):
    x = torch.randn(40, 3, 4, 4)
    dataset = torch.utils.data.TensorDataset(x, torch.arange(40) % 4)
    direct = from_object(dataset)
    monkeypatch.setattr("torchcdm.data.source.MEMORY_LIMIT", 0)
    lazy = from_object(dataset)
    assert not isinstance(lazy.train, MemorySplit)
    assert torch.equal(lazy.train.tensors()[0], direct.train.x)
    assert torch.equal(lazy.test.labels, direct.test.labels)
    assert torch.allclose(lazy.transform.scale, direct.transform.scale)


def test_dataset_of_pillow_images():
    pixels = np.random.default_rng(0).integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)
    source = from_object(_Images(pixels))
    assert source.shape == (3, 5, 6) and source.classes == 2
    x = np.moveaxis(pixels, 3, 1).reshape(12, -1)
    found = torch.cat([split.tensors()[0].flatten(1) for split in source.splits.values()])
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, x.tolist()))


class _Images(torch.utils.data.Dataset):
    def __init__(self, pixels):
        self.pixels = pixels

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        from PIL import Image

        return Image.fromarray(self.pixels[index]), index % 2


def test_dataset_with_mixed_shapes_names_the_sample():
    class Mixed(_Images):
        def __getitem__(self, index):
            return torch.zeros(1, 4, 4 + (index == 7))

    with pytest.raises(UserError, match="the Dataset: sample 7: has shape"):
        from_object(Mixed(np.zeros(20)))


def test_objects_that_are_not_understood():
    with pytest.raises(UserError, match="data of type int"):
        from_object(3)
    with pytest.raises(UserError, match="not an array of numbers"):
        from_object([[1.0, 2.0], [3.0]])


def test_half_precision_tensors():
    x = torch.arange(40.0).reshape(20, 2)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(from_object(x.to(dtype)).train.x, from_object(x).train.x)


@pytest.mark.parametrize(
    "change", [lambda x: x[..., ::-1], lambda x: x.astype(">f4"), lambda x: x.astype(np.longdouble)]
)
def test_samples_of_a_dataset_may_be_views_of_any_type(change):
    images = np.random.RandomState(0).uniform(size=(20, 1, 4, 4)).astype(np.float32)
    found = from_object(Pairs(change(images)))
    whole = from_object(np.ascontiguousarray(change(images), np.float32))
    assert torch.equal(found.train.tensors()[0].float(), whole.train.tensors()[0].float())


class Pairs(Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index]
