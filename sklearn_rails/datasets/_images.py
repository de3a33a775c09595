"""Small images in scikit-learn itself, and three benchmarks from files or OpenML."""

import io
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from sklearn.datasets import fetch_openml, get_data_home, load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch


@dataclass(frozen=True)
class _Benchmark:
    """Where a benchmark comes from.

    Attributes
    ----------
    title : str
    files : dict of str to str
        Names of files in ``data_home``, the preferred first, and what their content is called.
    openml_name : str
    image_shape : tuple of int
        Channels, height and width.
    n_train : int
        The official training set is the first rows on OpenML, the test set all others.
    """

    title: str
    files: dict
    openml_name: str
    image_shape: tuple
    n_train: int


BENCHMARKS = {
    "mnist": _Benchmark("MNIST", {"mnist.npz": "MNIST"}, "mnist_784", (1, 28, 28), 60_000),
    "svhn": _Benchmark(
        "SVHN",
        {"svhn.npz": "SVHN", "svhn_subset.npz": "SVHN subset"},
        "SVHN",
        (3, 32, 32),
        73_257,
    ),
    "cifar10": _Benchmark(
        "CIFAR-10",
        {"cifar10.npz": "CIFAR-10", "cifar10_jpeg.npz": "CIFAR-10 as JPEG"},
        "CIFAR_10",
        (3, 32, 32),
        50_000,
    ),
}

FORMAT = (
    "x_train and x_test, uint8 of shape (n, height, width) or (n, height, width, 3), with y_train "
    "and y_test; or JPEG files one after another in train_bytes and test_bytes, with train_offsets "
    "and test_offsets"
)


def load_digit_images(*, test_size=0.25, random_state=0):
    """Load scikit-learn's 8 x 8 digits as images, split into training and test rows.

    Parameters
    ----------
    test_size : float or int, default=0.25
        Share or number of the 1,797 images that are for testing. The split is stratified.
    random_state : int, RandomState or None, default=0
        Decides on the split.

    Returns
    -------
    :class:`~sklearn.utils.Bunch`
        ``X_train`` and ``X_test``, float32 of shape (n, 1, 8, 8) in [0, 1]; ``y_train`` and
        ``y_test``, int64 of shape (n,); ``name``, a str with the numbers of rows; and ``DESCR``.

    Raises
    ------
    ValueError
        If ``test_size`` leaves no row of a class on one of the sides.

    See Also
    --------
    fetch_image_benchmark : MNIST, SVHN and CIFAR-10.
    sklearn.datasets.load_digits : The same images as rows of 64 values from 0 to 16.

    Examples
    --------
    >>> from sklearn_rails.datasets import load_digit_images
    >>> digits = load_digit_images()
    >>> digits.X_train.shape, digits.X_test.shape
    ((1347, 1, 8, 8), (450, 1, 8, 8))
    """
    digits = load_digits()
    X = (digits.images[:, None] / digits.images.max()).astype(np.float32)
    y = digits.target.astype(np.int64)
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=test_size, stratify=y, random_state=random_state
    )
    return _bunch("Digits", X_train, X_test, y_train, y_test, digits.DESCR)


def fetch_image_benchmark(name, data_home=None):
    """Load a benchmark of images from a file, or else from OpenML.

    Parameters
    ----------
    name : {"mnist", "svhn", "cifar10"}
        The benchmark.
    data_home : str or path-like, default=None
        Folder of the files, ``~/scikit_learn_data`` if None. ``<name>.npz`` is read if it is
        there, else ``svhn_subset.npz`` or ``cifar10_jpeg.npz``, else
        :func:`~sklearn.datasets.fetch_openml` loads the benchmark, and keeps it in this folder.

    Returns
    -------
    :class:`~sklearn.utils.Bunch`
        ``X_train`` and ``X_test``, float32 of shape (n, channels, height, width) in [0, 1];
        ``y_train`` and ``y_test``, int64 of shape (n,) from 0 to 9; ``name``, a str with the
        numbers of rows, such as ``"SVHN subset (5,694 / 721)"``; and ``DESCR``.

    Raises
    ------
    ValueError
        If the name is unknown, or a file does not hold what it should.
    OSError
        If there is no file and OpenML cannot be reached.
    ImportError
        If a file holds JPEG images and Pillow is not installed, or OpenML is asked without pandas.

    See Also
    --------
    load_digit_images : Small images that need neither a file nor a connection.

    Notes
    -----
    A file holds the arrays ``x_train`` and ``x_test``, uint8 of shape (n, height, width) or
    (n, height, width, 3), with ``y_train`` and ``y_test``; or the JPEG files one after another in
    ``train_bytes`` and ``test_bytes``, of which image i is ``bytes[offsets[i]:offsets[i + 1]]``
    with ``train_offsets`` and ``test_offsets``.

    The data are by LeCun, Cortes and Burges (MNIST), Netzer et al. 2011 (SVHN, cropped digits,
    for non-commercial use only), and Krizhevsky 2009 (CIFAR-10).

    Examples
    --------
    >>> from sklearn_rails.datasets import fetch_image_benchmark
    >>> mnist = fetch_image_benchmark("mnist")  # doctest: +SKIP
    >>> mnist.X_train.shape  # doctest: +SKIP
    (60000, 1, 28, 28)
    """
    if name not in BENCHMARKS:
        raise ValueError(f"name={name!r} is not a benchmark; choose one of {list(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    folder = Path(get_data_home(data_home))
    for file, title in benchmark.files.items():
        if (folder / file).is_file():
            return _read(folder / file, title)
    return _fetch(benchmark, folder)


def _bunch(title, X_train, X_test, y_train, y_test, description):
    name = f"{title} ({len(X_train):,} / {len(X_test):,})"
    return Bunch(
        X_train=X_train,
        X_test=X_test,
        y_train=y_train,
        y_test=y_test,
        name=name,
        DESCR=f"{name}\n\n{description}",
    )


def _read(path, title):
    """Read a benchmark from a file."""
    with np.load(path) as file:
        try:
            parts = {part: _read_part(file, part) for part in ("train", "test")}
        except KeyError as error:
            raise ValueError(f"{path} lacks an array: {error}. It must hold {FORMAT}.") from error
    for part, (X, y) in parts.items():
        if X.dtype != np.uint8 or X.ndim not in (3, 4) or len(X) != len(y):
            raise ValueError(
                f"{path} has {part} images of type {X.dtype} and shape {X.shape} for {len(y)} "
                f"labels. It must hold {FORMAT}."
            )
    (X_train, y_train), (X_test, y_test) = parts.values()
    return _bunch(
        title,
        _scale_images(X_train),
        _scale_images(X_test),
        y_train.astype(np.int64),
        y_test.astype(np.int64),
        f"Read from {path.name}.",
    )


def _read_part(file, part):
    if f"{part}_bytes" in file:
        return _decode(file[f"{part}_bytes"], file[f"{part}_offsets"]), file[f"y_{part}"]
    return file[f"x_{part}"], file[f"y_{part}"]


def _decode(data, offsets):
    """Decode JPEG files that stand one after another."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Reading JPEG images requires Pillow. You can install it with `pip install pillow`."
        ) from error
    data = data.tobytes()
    return np.stack(
        [
            np.asarray(Image.open(io.BytesIO(data[start:stop])).convert("RGB"))
            for start, stop in pairwise(offsets)
        ]
    )


def _scale_images(images):
    """Turn uint8 images with the channels last, or without, into what torch takes."""
    if images.ndim == 3:
        images = images[..., None]
    return np.divide(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), 255, dtype=np.float32)


def _fetch(benchmark, folder):
    """Load a benchmark from OpenML, in the official split."""
    try:
        data = fetch_openml(
            benchmark.openml_name, version=1, as_frame=False, data_home=folder, parser="auto"
        )
    except OSError as error:
        raise OSError(
            f"{benchmark.title} is neither in a file nor could it be loaded: there is no "
            f"{' or '.join(benchmark.files)} in {folder}, and asking OpenML for "
            f"{benchmark.openml_name!r} failed with: {error}. Connect to the internet, or put the "
            f"file there, or pass its folder as data_home. It must hold {FORMAT}."
        ) from error
    X = _find_planes(np.asarray(data.data), benchmark.image_shape)
    # SVHN calls the digit 0 10.
    y = np.asarray(data.target).astype(np.float64).astype(np.int64) % 10
    n_train = benchmark.n_train
    return _bunch(
        benchmark.title, X[:n_train], X[n_train:], y[:n_train], y[n_train:], data.DESCR or ""
    )


def _find_planes(rows, image_shape):
    """Shape rows of pixels from 0 to 255 into images in [0, 1] with the channels first.

    OpenML does not say whether a row holds one channel after the other or all channels of one
    pixel after the other. In the wrong order a pixel is not like the one below it.
    """
    n_channels, height, width = image_shape
    rows = np.divide(rows, 255, dtype=np.float32)
    by_channel = rows.reshape(-1, n_channels, height, width)
    by_pixel = rows.reshape(-1, height, width, n_channels).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(min((by_channel, by_pixel), key=_roughness))


def _roughness(images):
    return np.abs(np.diff(images[:1000], axis=2)).mean()
