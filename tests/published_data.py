"""Published data sets in the files in which they are distributed: small files written here, byte by byte."""

import gzip
import struct

import numpy as np
from PIL import Image

rng = np.random.default_rng


def idx(array):
    """The idx format: two zero bytes, type 8 (unsigned byte), number of axes, big-endian sizes, bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_fashion(folder, train=60, test=10, pack=gzip.compress, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images = rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        (folder / f"{prefix}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
        parts[prefix] = images, labels
    return parts


def write_cifar(folder, count=20):
    """Five training batches and a test batch of records: label, then 1024 bytes each of red, green and blue."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = {}
    for number, name in enumerate([*(f"data_batch_{k}.bin" for k in range(1, 6)), "test_batch.bin"]):
        images = rng(number).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = rng(number).integers(0, 10, count, dtype=np.uint8)
        content = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
        (folder / name).write_bytes(content)
        batches[name] = images, labels
    return batches


def write_celeba(root, count=12, nested=False):
    """Images of 178 x 218 whose red channel is the column, green the row, blue the image's number times 20."""
    images = root / ("Img/img_align_celeba" if nested else "img_align_celeba")
    listing = root / ("Eval/list_eval_partition.txt" if nested else "list_eval_partition.txt")
    images.mkdir(parents=True)
    listing.parent.mkdir(exist_ok=True)
    row, column = np.mgrid[:218, :178]
    lines = []
    for k in range(count):
        pixels = np.stack([column, row, np.full_like(row, 20 * k)], 2).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{k + 1:06d}.jpg", quality=100, subsampling=0)
        lines.append(f"{k + 1:06d}.jpg {0 if k < 8 else 1 if k < 10 else 2}\n")
    listing.write_text("".join(lines))
    return images, listing
