"""What a step sees: a function of (seed, step), the same for one process and for several."""

import dataclasses

import pytest
import torch

from torchcdm.data import DataSource, LazySplit, MemorySplit
from torchcdm.errors import UserError
from torchcdm.random import derive
from torchcdm.training.batches import Batches, shown_at
from torchcdm.training.build import build_loss, build_model
from torchcdm.training.config_files import make_config
from torchcdm.training.settings import LossConfig
from torchcdm.units import DataTransform

CPU = torch.device("cpu")
FIELDS = ("x_0", "y", "t", "eps")


def source(count=10, lazy=False, shape=(1, 4, 4)):
    x = torch.arange(count * 16).reshape(count, *shape).to(torch.uint8)
    y = torch.arange(count) % 3
    split = LazySplit(lambda i: x[i], list(range(count)), y) if lazy else MemorySplit(x, y)
    empty = MemorySplit(x[:0], y[:0])
    return DataSource("test", split, empty, empty, DataTransform.images(shape), ("a", "b", "c"))


def loss(kind="cdm"):
    net = {"name": "unet", "channels": 8, "multipliers": [1], "blocks": 1, "groups": 4}
    config = make_config({"model": {"kind": kind, "gaussian": False, "backbone": net}}).model
    return build_loss(LossConfig(), build_model(config, DataTransform.images((1, 4, 4))))


LOSS = loss()


def steps(batches, first=0, last=5):
    return list(batches(first, last, LOSS, CPU))


def test_an_epoch_shows_every_sample_once_whatever_the_batch():
    shown = torch.cat([shown_at(step, 10, batch_size=4, seed=0) for step in range(5)])
    first, second = shown[:10], shown[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()
    small = shown_at(0, 3, batch_size=7, seed=0)
    assert sorted(small[:3].tolist()) == sorted(small[3:6].tolist()) == [0, 1, 2]
    assert shown_at(0, 10, 4, seed=1).tolist() != shown[:4].tolist()


def test_a_step_is_the_same_whichever_step_came_first():
    whole = steps(Batches(source(), 4, seed=3, labels=True, flip=True))
    late = steps(Batches(source(), 4, seed=3, labels=True, flip=True), 3, 5)
    for mine, theirs in zip(late, whole[3:], strict=True):
        assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in FIELDS)
    assert not torch.equal(whole[0].eps, whole[1].eps)


@pytest.mark.parametrize("workers", [0, 1])
def test_lazy_splits_give_the_same_batches(workers):
    eager = steps(Batches(source(), 4, seed=3, labels=True), 1, 3)
    lazy = steps(Batches(source(lazy=True), 4, seed=3, labels=True, workers=workers), 1, 3)
    for mine, theirs in zip(lazy, eager, strict=True):
        assert all(torch.equal(getattr(mine, name), getattr(theirs, name)) for name in FIELDS)


def test_processes_share_the_joint_batch():
    options = {"batch_size": 6, "seed": 5, "labels": True, "flip": True}
    joint = steps(Batches(source(), **options))
    shares = [steps(Batches(source(), **options, rank=rank, world=3)) for rank in range(3)]
    for step, whole in enumerate(joint):
        for name in FIELDS:
            together = torch.cat([getattr(share[step], name) for share in shares])
            assert torch.equal(together, getattr(whole, name)), name


def test_samples_stay_in_their_cells_and_half_are_mirrored():
    data = source(count=16)
    batches = Batches(data, 16, seed=0, labels=True, flip=True)
    mirrored = 0
    for step in range(20):
        (batch,) = steps(batches, step, step + 1)
        grey = data.transform.quantize(data.transform.inverse(batch.x_0.double())).long()
        stored = data.train.values(shown_at(step, 16, 16, seed=0)).long()
        flipped = (grey != stored).flatten(1).any(1)
        assert torch.equal(grey, torch.where(flipped[:, None, None, None], stored.flip(-1), stored))
        mirrored += int(flipped.sum())
    assert 120 < mirrored < 200  # of 320, standard deviation 9


def test_levels_of_a_denoising_model_leave_out_the_ends():
    draws = torch.cat([LOSS.draw_levels(64) for _ in range(50)])
    assert int(draws.min()) == 0 and int(draws.max()) == 201
    ends = torch.cat([loss("ddm").draw_levels(64) for _ in range(50)])
    assert int(ends.min()) == 1 and int(ends.max()) == 200


def test_undithered_data_get_no_noise():
    data = source()
    plain = dataclasses.replace(data, transform=DataTransform.images((1, 4, 4), dequantize=False))
    (batch,) = steps(Batches(plain, 4, seed=0, labels=False), 0, 1)
    grey = plain.transform.inverse(batch.x_0.double())
    assert (grey - grey.round()).abs().max() < 1e-4 and batch.y is None


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(UserError, match="train.batch_size is 7; give a multiple of the 2 processes"):
        Batches(source(), 7, seed=0, labels=True, world=2)
    vectors = MemorySplit(torch.zeros(8, 3))
    table = DataSource("table", vectors, vectors, vectors, DataTransform((3,)))
    with pytest.raises(UserError, match="data.flip mirrors images"):
        Batches(table, 4, seed=0, labels=False, flip=True)
    partly = MemorySplit(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 0, 1, 0, -1]))
    with pytest.raises(UserError, match="1 of 8 training samples have no class; give them one, or use --model.labels"):
        Batches(dataclasses.replace(source(), train=partly), 4, seed=0, labels=True)


def test_seeds_of_different_purposes_do_not_collide():
    keys = [(seed, purpose, step) for seed in range(20) for purpose in ("noise", "level") for step in range(200)]
    seeds = {derive(seed, purpose, step) for seed, purpose, step in keys}
    assert len(seeds) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)


def test_a_training_split_without_samples_is_refused():
    with pytest.raises(UserError, match="test: the train split is empty"):
        Batches(source(count=0), 4, 0, labels=False)
