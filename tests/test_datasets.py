import io
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.utils import Bunch

from sklearn_rails.datasets import _images, fetch_image_benchmark, load_digit_images


def gradient_images(n, shape, random_state=0):
    """Smooth uint8 images, as photographs are, no two alike."""
    height, width, n_channels = shape
    down, right = np.mgrid[:height, :width]
    slopes = np.random.RandomState(random_state).uniform(0, 3, (2, n, 1, 1, n_channels))
    images = 255 * np.arange(n_channels) / n_channels / 4 + (
        slopes[0] * down[None, :, :, None] + slopes[1] * right[None, :, :, None]
    )
    return images.astype(np.uint8)


@pytest.fixture
def offline(monkeypatch):
    def no_connection(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(_images, "fetch_openml", no_connection)


def save(path, images_train, images_test):
    y_train = np.arange(len(images_train), dtype=np.uint8) % 10
    y_test = np.arange(len(images_test), dtype=np.uint8) % 10
    np.savez(path, x_train=images_train, y_train=y_train, x_test=images_test, y_test=y_test)


def encode(images):
    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=95)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0, *(len(file) for file in files)])
    return np.frombuffer(b"".join(files), dtype=np.uint8), offsets


def check_fields(data, image_shape, n_train, n_test):
    assert data.X_train.shape == (n_train, *image_shape)
    assert data.X_test.shape == (n_test, *image_shape)
    for X in (data.X_train, data.X_test):
        assert X.dtype == np.float32
        assert X.flags.c_contiguous
        assert X.min() >= 0
        assert X.max() <= 1
    assert data.y_train.shape == (n_train,)
    assert data.y_test.shape == (n_test,)
    assert data.y_train.dtype == data.y_test.dtype == np.int64
    assert set(data.y_train) | set(data.y_test) <= set(range(10))
    assert data.name in data.DESCR


def test_digits_are_images_in_a_stratified_split():
    digits = load_digit_images()
    check_fields(digits, (1, 8, 8), 1347, 450)
    assert digits.X_train.max() == 1
    assert np.bincount(digits.y_test).min() >= 43
    assert digits.name == "Digits (1,347 / 450)"


def test_digits_split_as_told():
    first = load_digit_images(test_size=100, random_state=1)
    again = load_digit_images(test_size=100, random_state=1)
    other = load_digit_images(test_size=100, random_state=2)
    check_fields(first, (1, 8, 8), 1697, 100)
    np.testing.assert_array_equal(first.X_test, again.X_test)
    assert not np.array_equal(first.X_test, other.X_test)


def test_grey_images_are_read_from_a_file(tmp_path, offline):
    images = gradient_images(16, (28, 28, 1))[..., 0]
    save(tmp_path / "mnist.npz", images[:12], images[12:])
    data = fetch_image_benchmark("mnist", data_home=tmp_path)
    check_fields(data, (1, 28, 28), 12, 4)
    assert data.name == "MNIST (12 / 4)"
    np.testing.assert_allclose(data.X_test[1, 0], images[13] / 255, rtol=1e-6)


def test_colour_images_get_their_channels_first(tmp_path, offline):
    images = gradient_images(16, (32, 32, 3))
    save(tmp_path / "cifar10.npz", images[:12], images[12:])
    data = fetch_image_benchmark("cifar10", data_home=str(tmp_path))
    check_fields(data, (3, 32, 32), 12, 4)
    np.testing.assert_allclose(data.X_train[2, 1], images[2, :, :, 1] / 255, rtol=1e-6)


def test_a_subset_is_called_one(tmp_path, offline):
    images = gradient_images(16, (32, 32, 3))
    save(tmp_path / "svhn_subset.npz", images[:12], images[12:])
    assert fetch_image_benchmark("svhn", tmp_path).name == "SVHN subset (12 / 4)"


def test_the_file_of_the_benchmarks_own_name_comes_first(tmp_path, offline):
    images = gradient_images(16, (32, 32, 3))
    save(tmp_path / "svhn_subset.npz", images[:12], images[12:])
    save(tmp_path / "svhn.npz", images[:10], images[10:])
    assert fetch_image_benchmark("svhn", tmp_path).name == "SVHN (10 / 6)"


@pytest.fixture
def jpeg_home(tmp_path):
    images = gradient_images(7, (32, 32, 3))
    arrays = {"y_train": np.arange(5), "y_test": np.arange(2)}
    arrays["train_bytes"], arrays["train_offsets"] = encode(images[:5])
    arrays["test_bytes"], arrays["test_offsets"] = encode(images[5:])
    np.savez(tmp_path / "cifar10_jpeg.npz", **arrays)
    return tmp_path, images


def test_jpeg_images_are_decoded(jpeg_home, offline):
    folder, images = jpeg_home
    data = fetch_image_benchmark("cifar10", folder)
    check_fields(data, (3, 32, 32), 5, 2)
    assert data.name == "CIFAR-10 as JPEG (5 / 2)"
    np.testing.assert_allclose(data.X_test[1], images[6].transpose(2, 0, 1) / 255, atol=0.05)


def test_jpeg_images_without_pillow_say_what_to_install(jpeg_home, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        fetch_image_benchmark("cifar10", jpeg_home[0])


def test_a_file_without_labels_says_what_it_must_hold(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"mnist\.npz lacks an array: .*y_train.* must hold"):
        fetch_image_benchmark("mnist", tmp_path)


@pytest.mark.parametrize(
    "images", [np.zeros((3, 28, 28)), np.zeros((3, 784), np.uint8), np.zeros((4, 28, 28), np.uint8)]
)
def test_a_file_with_other_arrays_says_what_it_must_hold(tmp_path, images):
    y = np.zeros(3, np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=y, x_test=images[:3], y_test=y)
    with pytest.raises(ValueError, match=r"train images of type .* must hold x_train"):
        fetch_image_benchmark("mnist", tmp_path)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("name", "openml_name", "shape", "n_train"),
    [
        ("mnist", "mnist_784", (28, 28, 1), 60),
        ("svhn", "SVHN", (32, 32, 3), 73),
        ("cifar10", "CIFAR_10", (32, 32, 3), 50),
    ],
)
def test_openml_gives_the_official_split(
    tmp_path, monkeypatch, name, openml_name, shape, n_train, channels_last
):
    images = gradient_images(n_train + 20, shape)
    labels = np.arange(len(images)) % 10
    asked = {}

    def fetch(dataset, **parameters):
        asked.update(parameters, name=dataset)
        rows = images if channels_last else images.transpose(0, 3, 1, 2)
        # SVHN's file calls the digit 0 by 10.
        target = np.where((labels == 0) & (name == "svhn"), 10, labels).astype(str)
        return Bunch(data=rows.reshape(len(images), -1), target=target, DESCR="From OpenML.")

    monkeypatch.setattr(_images, "fetch_openml", fetch)
    benchmark = _images.BENCHMARKS[name]
    assert benchmark.n_train in (60_000, 73_257, 50_000)
    monkeypatch.setitem(
        _images.BENCHMARKS, name, type(benchmark)(**vars(benchmark) | {"n_train": n_train})
    )
    data = fetch_image_benchmark(name, data_home=tmp_path)
    assert asked["name"] == openml_name
    assert asked["data_home"] == tmp_path
    check_fields(data, (shape[2], *shape[:2]), n_train, 20)
    np.testing.assert_allclose(data.X_test[0], images[n_train].transpose(2, 0, 1) / 255, rtol=1e-6)
    np.testing.assert_array_equal(data.y_test, labels[n_train:])
    assert data.DESCR.endswith("From OpenML.")


def test_without_file_and_connection_the_error_says_what_to_do(tmp_path, offline):
    with pytest.raises(OSError, match="no route to host") as error:
        fetch_image_benchmark("svhn", tmp_path)
    message = str(error.value)
    for part in ("svhn.npz or svhn_subset.npz", str(tmp_path), "OpenML", "data_home", "x_train"):
        assert part in message


def test_unknown_name_lists_the_benchmarks():
    with pytest.raises(ValueError, match=r"'imagenet'.*\['mnist', 'svhn', 'cifar10'\]"):
        fetch_image_benchmark("imagenet")
