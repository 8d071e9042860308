"""The options of data, one object that is handed whole from the settings to the readers."""

from typing import Annotated

from annotated_types import Ge, Le, Lt

from torchcdm.runtime.validation import Count, CountOrZero, Rate, Seed, Width, WidthPair, validated


@validated
class DataOptions:
    """Which data, and how they are read."""

    #: ``digits``, ``fashion-mnist[:PATH]``, ``cifar10[:PATH]``, ``celeba:PATH``, ``folder:PATH``, ``array:FILE.npz``
    #: or ``.npy``, ``table:FILE.csv``, ``.csv.gz`` or ``.parquet``, ``hf:NAME``, ``toy:NAME``; None where a preset
    #: leaves it open.
    spec: str | None = None
    size: WidthPair | None = None  #: Height and width that images are resized to; None leaves them.
    #: Height and width of the crops of images of any size in a folder that training sees, at random places.
    crop: WidthPair | None = None
    channels: Width | None = None  #: Number of channels that images are converted to; None leaves them.
    validation_fraction: Rate | None = None  #: Share of validation. None: the data set's own split, or 0.1; 0: none.
    test_fraction: Rate | None = None  #: Share of test where the data have no test split of their own. None: 0.1.
    #: Seed of random splits and of toy samples. Named data sets have fixed splits.
    seed: Annotated[Seed, Lt(2**32)] = 0
    limit: Count | None = None  #: Most samples in each split.
    #: Leave out images, folders and rows that cannot be read, and say how many; reads every file once.
    skip_bad: bool = False
    label: str | None = None  #: Column of a table that holds the class.
    columns: tuple[str, ...] | None = None  #: Columns of a table to use; all when None.
    drop: tuple[str, ...] = ()  #: Columns of a table to leave out.
    #: Train and score with uniform noise on grey levels and columns of few values; False as in the paper.
    dequantize: bool = True
    #: Map each pixel's grey levels to a standard normal by their histogram, and bend each column of a table towards a
    #: normal: a better density where dimensions have distributions of their own, but noise is then no additive noise
    #: on the data.
    gaussianize: bool = False
    #: So many groups of similar training samples, found by spectral clustering, stand for classes, in the place of any
    #: that there are: models of images without labels draw better pictures for it.
    clusters: Annotated[Width, Ge(2)] | None = None
    flip: bool = False  #: Mirror half of the training images, at random.
    workers: Annotated[CountOrZero, Le(1024)] = 0  #: Processes that read samples from files during training.
