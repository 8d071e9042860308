"""The options of data, one object that is handed whole from the settings to the readers."""

from typing import Annotated

from annotated_types import Ge, Le, Lt

from torchcdm.runtime.validation import Count, CountOrZero, Rate, Seed, Width, WidthPair, validated


@validated
class DataOptions:
    """Which data, and how they are read.

    Attributes:
        spec: ``digits``, ``fashion-mnist[:PATH]``, ``cifar10[:PATH]``, ``celeba:PATH``, ``folder:PATH``,
            ``array:FILE.npz`` or ``.npy``, ``table:FILE.csv``, ``.csv.gz`` or ``.parquet``, ``hf:NAME``, ``toy:NAME``;
            None where a preset leaves it open.
        size: Height and width that images are resized to; None leaves them.
        crop: Height and width of the crops of images of any size in a folder that training sees, at random places.
        channels: Number of channels that images are converted to; None leaves them.
        validation_fraction: Share of validation. None: the data set's own split, or 0.1; 0: none.
        test_fraction: Share of test where the data have no test split of their own. None: 0.1.
        seed: Seed of random splits and of toy samples. Named data sets have fixed splits.
        limit: Most samples in each split.
        skip_bad: Leave out images, folders and rows that cannot be read, and say how many; reads every file once.
        label: Column of a table that holds the class.
        columns: Columns of a table to use; all when None.
        drop: Columns of a table to leave out.
        dequantize: Train and score with uniform noise on grey levels and columns of few values; False as in the paper.
        gaussianize: Map each pixel's grey levels to a standard normal by their histogram, and bend each column of a
            table towards a normal: a better density where dimensions have distributions of their own, but noise is
            then no additive noise on the data.
        clusters: So many groups of similar training samples, found by spectral clustering, stand for classes, in the
            place of any that there are: models of images without labels draw better pictures for it.
        flip: Mirror half of the training images, at random.
        workers: Processes that read samples from files during training.
    """

    spec: str | None = None
    size: WidthPair | None = None
    crop: WidthPair | None = None
    channels: Width | None = None
    validation_fraction: Rate | None = None
    test_fraction: Rate | None = None
    seed: Annotated[Seed, Lt(2**32)] = 0
    limit: Count | None = None
    skip_bad: bool = False
    label: str | None = None
    columns: tuple[str, ...] | None = None
    drop: tuple[str, ...] = ()
    dequantize: bool = True
    gaussianize: bool = False
    clusters: Annotated[Width, Ge(2)] | None = None
    flip: bool = False
    workers: Annotated[CountOrZero, Le(1024)] = 0
