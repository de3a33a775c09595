"""What users have at hand: lists, tensors, array-likes, scalars of numpy, other layouts."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from sklearn_rails import DkNNClassifier, RAILSClassifier, ThreatScorer, TorchFeatureExtractor
from sklearn_rails.immune import Triage
from sklearn_rails.neighbors import ExactNeighbors

SHAPE = (1, 5, 6)


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(24, 3))


@pytest.fixture
def task():
    X = np.random.default_rng(0).random((60, *SHAPE)).astype(np.float32)
    return X, np.arange(60) % 3


class ArrayLike:
    """What h5py, zarr, xarray and jax give."""

    def __init__(self, array):
        self.array, self.shape, self.ndim, self.dtype = array, array.shape, array.ndim, array.dtype

    def __len__(self):
        return len(self.array)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype=dtype)


FORMS = {
    "nested lists": lambda X: X.tolist(),
    "list of arrays": list,
    "tuple of arrays": tuple,
    "list of tensors": lambda X: [torch.from_numpy(x) for x in X],
    "array-like": ArrayLike,
    "float64": lambda X: X.astype(np.float64),
    "big-endian": lambda X: X.astype(">f4"),
    "Fortran order": np.asfortranarray,
    "negative strides": lambda X: X[::-1].copy()[::-1],
    "read-only": lambda X: (lambda Z: (Z.setflags(write=False), Z)[1])(X.copy()),
    "tensor with a gradient": lambda X: torch.tensor(X, requires_grad=True),
    "parameter": lambda X: nn.Parameter(torch.tensor(X)),
    "negated tensor": lambda X: torch.complex(torch.tensor(X), -torch.tensor(X)).conj().imag,
    "masked without a mask": lambda X: np.ma.masked_array(X),
    "object array": lambda X: X.astype(object),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_are_accepted_in_every_form(network, task, form):
    X, y = task
    given = FORMS[form](X)
    for estimator, ask in (
        (DkNNClassifier(network, layers="0", n_neighbors=3, random_state=0), "predict_proba"),
        (ThreatScorer(network, layers="0", method="distance", random_state=0), "transform"),
    ):
        expected = getattr(estimator.fit(X, y), ask)(X)
        assert_array_equal(getattr(estimator.fit(given, y), ask)(given), expected)
        assert estimator.input_shape_ == SHAPE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_tensors_are_accepted_in_every_dtype(network, task, dtype):
    X, y = task
    X = torch.from_numpy(X * 10).to(dtype)
    expected = DkNNClassifier(network, layers="0", random_state=0).fit(X.float(), y)
    found = DkNNClassifier(network, layers="0", random_state=0).fit(X, torch.from_numpy(y))
    assert_array_equal(found.predict_proba(X), expected.predict_proba(X.float()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda X: torch.tensor(X, device="meta"), "meta device"),
        (lambda X: torch.tensor(X) + 1j, "Complex data not supported"),
        (lambda X: torch.nested.nested_tensor(list(torch.tensor(X))), "dense tensor"),
        (lambda X: torch.tensor(X.reshape(60, -1)).to_sparse(), "dense tensor"),
        (lambda X: torch.quantize_per_tensor(torch.tensor(X), 0.1, 0, torch.quint8), "dense tens"),
        (lambda X: np.ma.masked_greater(X, 0.5), "masked values"),
        (lambda X: [*X.tolist()[:-1], [[[1.0]]]], "array of samples of one shape"),
        (lambda X: np.full(X.shape, "a").astype(object), "could not convert string to float"),
        (lambda X: X + 1j, "Complex data not supported"),
        (lambda X: X[0], r"shape of a single sample: pass X\[None\]"),
        (lambda X: X[:, 0], r"axis of the channels is missing: pass X\[:, None\]"),
        (lambda X: X[0, 0], r"single image without channels: pass X\[None, None\]"),
        (lambda X: X.transpose(0, 2, 3, 1), r"channels stand last: pass X.transpose\(0, 3, 1, 2\)"),
        (lambda X: X[0].transpose(1, 2, 0), r"pass X.transpose\(2, 0, 1\)\[None\]"),
    ],
)
def test_unsupported_input_raises_with_a_hint(network, task, make, message):
    X, y = task
    fitted = DkNNClassifier(network, layers="0", random_state=0).fit(X, y)
    with pytest.raises(ValueError, match=message):
        fitted.predict(make(X))


def test_training_images_with_the_channels_last_get_a_hint(network, task):
    X, y = task
    with pytest.raises(ValueError, match=r"channels seem to stand last.*X.transpose\(0, 3, 1, 2\)"):
        DkNNClassifier(network).fit(X.transpose(0, 2, 3, 1), y)
    with pytest.raises(ValueError, match=r"channels stand last: pass X.transpose\(0, 3, 1, 2\)"):
        DkNNClassifier(network, input_shape=SHAPE).fit(X.transpose(0, 2, 3, 1), y)


@pytest.mark.parametrize("y", [torch.zeros(60, device="meta"), torch.zeros(60).to_sparse()])
def test_labels_without_values_raise(task, y):
    with pytest.raises(ValueError, match="y must be a dense tensor that holds values"):
        DkNNClassifier().fit(task[0], y)


@pytest.mark.parametrize(
    "shape", [(-3, -4), (0, 30), (3.9, 4.2), ("a",), (), (True, 20, 1.5), (np.float32(2.5), 8)]
)
def test_invalid_input_shapes_raise(task, shape):
    X, y = task
    with pytest.raises(ValueError, match="input_shape=.* must hold positive integers"):
        DkNNClassifier(input_shape=shape).fit(X.reshape(60, -1), y)


def test_numpy_scalars_are_accepted_as_parameters(network, task):
    X, y = task
    plain = {"population_size": 200, "n_neighbors": 3, "generations": 2, "plasma_fraction": 0.125}
    of_numpy = {
        "population_size": np.uint8(200),
        "n_neighbors": np.int8(3),
        "generations": np.int64(2),
        "plasma_fraction": np.float16(0.125),
        "batch_size": np.uint8(16),
        "n_jobs": np.int8(2),
        "random_state": np.int64(0),
        "input_shape": np.array(SHAPE),
        "early_stopping": np.bool_(True),
        "device": torch.device("cpu"),
    }
    expected = RAILSClassifier(network, layers="0", random_state=0, batch_size=16, **plain).fit(
        X, y
    )
    found = RAILSClassifier(network, layers="0", **of_numpy).fit(X, y)
    assert_array_equal(found.predict_proba(X[:9]), expected.predict_proba(X[:9]))
    assert type(found.population_size) is np.uint8
    assert found.input_shape_ == SHAPE
    pickle.loads(pickle.dumps(found))


def test_samples_far_outside_the_range_of_fit_warn_once(network, task):
    X, y = task
    for classifier in (
        RAILSClassifier(network, layers="0", population_size=9, random_state=0),
        DkNNClassifier(network, layers="0", random_state=0),
    ):
        classifier.fit(X, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            classifier.predict(X + 1)
        with pytest.warns(UserWarning, match="far outside the range of fit") as told:
            classifier.predict(255 * X)
        assert told[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            classifier.predict(255 * X)
        classifier.fit(255 * X, y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            classifier.predict(5 * X)
            classifier.predict(np.zeros_like(X))
        with pytest.warns(UserWarning, match="to 0.9.*, a small part of the range of fit"):
            classifier.predict(X)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(50, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.embed(x % 50))


@pytest.fixture
def text():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Beyond 2**24 not every integer is a number in float32.
        X = 2**25 + np.random.default_rng(0).integers(0, 50, size=(60, 7))
        return Text(), X, np.arange(60) % 3


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint32])
def test_token_ids_reach_the_network_as_integers(text, dtype):
    network, X, y = text
    X = X.astype(dtype)
    with torch.no_grad():
        expected = network(torch.from_numpy(X.astype(np.int64))).numpy()
    extractor = TorchFeatureExtractor(network).fit(X)
    assert_allclose(extractor.transform(X), expected, rtol=0, atol=1e-6)
    assert_allclose(extractor.transform(X.astype(np.float64)), expected, rtol=0, atol=1e-6)
    for estimator in (
        DkNNClassifier(network, layers="head", random_state=0),
        ThreatScorer(network, layers="head", method="distance", random_state=0),
        RAILSClassifier(network, layers="head", start_layer="embed", population_size=9),
    ):
        estimator.fit(X, y).predict(torch.from_numpy(X.astype(np.int64)))
        with pytest.raises(ValueError, match="X must hold integers"):
            estimator.predict(X + 0.5)


def test_token_ids_that_come_as_floats_get_a_hint(text):
    _, X, y = text
    with pytest.raises(ValueError, match="pass X as an array of integers"):
        DkNNClassifier(nn.Sequential(nn.Embedding(50, 4), nn.Flatten())).fit(X % 50 / 1.0, y)


def test_token_ids_cannot_be_squeezed_or_mutated(text):
    network, X, y = text
    with pytest.raises(ValueError, match="feature_squeezing.*integers"):
        ThreatScorer(network, layers="head", method="feature_squeezing").fit(X, y)
    with pytest.raises(ValueError, match=r"start_layer=None .* integers"):
        RAILSClassifier(network, layers="head").fit(X, y)


def test_integers_are_numbers_for_a_network_that_takes_floats(network, task):
    X, y = task
    X = (255 * X).astype(np.uint8)
    expected = TorchFeatureExtractor(network).fit_transform(X.astype(np.float32))
    assert_array_equal(TorchFeatureExtractor(network).fit_transform(X), expected)
    rails = RAILSClassifier(network, layers="0", population_size=9, random_state=0)
    assert rails.fit(X, y).respond(X[:2]).plasma["0"].dtype == np.float32


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (RAILSClassifier(clip=(0, 1e40)), r"clip=\(0, 1e\+40\) is beyond what float32 holds"),
        (RAILSClassifier(clip=("a", "b")), "clip="),
        (RAILSClassifier(clip=(1, 0)), "clip="),
        (RAILSClassifier(clip=(0, np.nan)), "clip="),
        (RAILSClassifier(generations=10**30), "'generations' parameter"),
        (RAILSClassifier(population_size=10**30), "'population_size' parameter"),
        (RAILSClassifier(n_jobs=10**30), "'n_jobs' parameter"),
        (RAILSClassifier(threat_scorer=ThreatScorer), "threat_scorer must be an estimator"),
        (RAILSClassifier(algorithm=ExactNeighbors("")), "storage=''"),
        (RAILSClassifier(layers={"input"}), "layers=.* has no order"),
        (RAILSClassifier(affinity=lambda a, b: (a - b).norm(dim=1) * 1j), "real numbers"),
        (DkNNClassifier(batch_size=10**30), "'batch_size' parameter"),
        (DkNNClassifier(random_state="a"), "'random_state' parameter"),
        (DkNNClassifier(random_state=-1), "'random_state' parameter"),
        (DkNNClassifier(random_state=np.random.default_rng(0)), "'random_state' parameter"),
        (ThreatScorer(alpha=0), "'alpha' parameter"),
        (ThreatScorer(random_state=2**32), "'random_state' parameter"),
    ],
)
def test_invalid_parameters_raise_with_their_name(task, estimator, message):
    X, y = task
    with pytest.raises((TypeError, ValueError), match=message):
        estimator.fit(X.reshape(60, -1), y)
    assert not hasattr(estimator, "layers_")


def test_parameters_at_their_bounds_are_accepted(task):
    X, y = task
    X = X.reshape(60, -1)
    smallest = np.nextafter(0, 1)
    with pytest.warns(UserWarning, match=r"alpha=5e-324 needs 2\.0\d*e\+323 calibration samples"):
        ThreatScorer(alpha=smallest).fit(X)
    RAILSClassifier(n_neighbors=10**30, clip=(-np.inf, np.inf), tau=1e300).fit(X, y).predict(X)
    learned = nn.Parameter(torch.ones(30))
    metric = RAILSClassifier(affinity=lambda a, b: -((a - b) * learned).norm(dim=1))
    expected = RAILSClassifier(random_state=0).fit(X, y).predict(X)
    assert_array_equal(metric.set_params(random_state=0).fit(X, y).predict(X), expected)


@pytest.mark.parametrize("labels", [lambda y: y.astype(object), lambda y: list(map(int, y))])
def test_integers_among_objects_are_labels(task, labels):
    X, y = task
    X = X.reshape(60, -1)
    dknn = DkNNClassifier(random_state=0).fit(X, labels(y))
    assert_array_equal(dknn.predict(X), DkNNClassifier(random_state=0).fit(X, y).predict(X))
    rails = RAILSClassifier(random_state=0).fit(X, y)
    rails.partial_fit(X, labels(y)).remember(rails.respond(X[:5]), labels(y[:5]))


class Pairs(IterableDataset):
    def __iter__(self):
        return zip(torch.from_numpy(IMAGES), NAMES, strict=True)


IMAGES = np.random.default_rng(0).random((30, 1, 4, 4), dtype=np.float32)
NUMBERS = np.arange(30) % 3
NAMES = np.array(["a", "b", "c"])[NUMBERS].tolist()
TENSORS = TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(NUMBERS))


@pytest.mark.parametrize(
    ("data", "labels"),
    [
        (TENSORS, NUMBERS),
        (DataLoader(TENSORS, batch_size=7), NUMBERS),
        (Subset(TENSORS, range(30)), NUMBERS),
        (Pairs(), NAMES),
        (DataLoader(Pairs(), batch_size=4), NAMES),
    ],
    ids=["data set", "loader", "subset", "iterable", "loader of iterable"],
)
@pytest.mark.parametrize(
    "estimator",
    [
        RAILSClassifier(population_size=20, threat_scorer=ThreatScorer(alpha=0.2), random_state=0),
        DkNNClassifier(random_state=0),
        ThreatScorer(random_state=0),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_data_sets_and_loaders_are_read(estimator, data, labels):
    expected = clone(estimator).fit(IMAGES, labels).predict(IMAGES + 0.1)
    fitted = clone(estimator).fit(data)
    assert fitted.input_shape_ == (1, 4, 4)
    assert_array_equal(fitted.predict(IMAGES + 0.1), expected)
    assert_array_equal(fitted.predict(data), fitted.predict(IMAGES))
    other = clone(estimator).fit(data, np.roll(labels, 1))  # which counts
    again = clone(estimator).fit(IMAGES, np.roll(labels, 1))
    assert_array_equal(other.predict(IMAGES + 0.1), again.predict(IMAGES + 0.1))


def test_parts_of_a_data_set_are_added():
    rails = RAILSClassifier(population_size=20, random_state=0)
    rails.partial_fit(Subset(TENSORS, range(20))).partial_fit(Subset(TENSORS, range(20, 30)))
    assert_array_equal(rails.training_data()[0], IMAGES)
    extractor = TorchFeatureExtractor().fit(TENSORS)
    assert_array_equal(extractor.transform(TENSORS), IMAGES.reshape(30, -1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda dknn: dknn.fit(TensorDataset(TENSORS.tensors[0])), ValueError, "requires y"),
        (lambda dknn: dknn.fit(Subset(TENSORS, [])), ValueError, "Subset without any sample"),
        (
            lambda dknn: dknn.fit(TensorDataset(*TENSORS.tensors, *TENSORS.tensors)),
            TypeError,
            r"pairs of a sample and its label; it gives \['Tensor', 'Tensor', 'Tensor', 'Tensor'\]",
        ),
        (
            lambda dknn: dknn.fit(DataLoader([{"x": 1.0}])),
            TypeError,
            r"must give samples as tensors, .* it gives \['dict'\]",
        ),
        (
            lambda dknn: dknn.fit(DataLoader([torch.zeros(3), torch.zeros(4)], batch_size=2)),
            ValueError,
            "samples that make no batch",
        ),
        (
            lambda dknn: dknn.fit(TENSORS).predict(DataLoader(TENSORS, shuffle=True)),
            ValueError,
            "shuffles its samples",
        ),
    ],
)
def test_data_sets_that_cannot_be_read(call, error, message):
    with pytest.raises(error, match=message):
        call(DkNNClassifier())


def test_a_loader_that_shuffles_may_be_fitted():
    torch.manual_seed(0)
    dknn = DkNNClassifier(n_neighbors=1, calibration="leave-one-out")
    loader = DataLoader(TENSORS, batch_size=8, shuffle=True)
    assert_array_equal(dknn.fit(loader).predict(IMAGES), NUMBERS)


class Counted(Dataset):
    """A data set that counts what is read of it, as one with random changes would show."""

    def __init__(self):
        self.n_read = 0

    def __len__(self):
        return len(TENSORS)

    def __getitem__(self, i):
        self.n_read += 1
        return TENSORS[i]


@pytest.mark.parametrize("ask", ["predict", "predict_with_alarm", "respond"])
def test_a_data_set_is_read_once_for_the_classifier_and_its_scorer(ask):
    rails = RAILSClassifier(
        population_size=20, threat_scorer=ThreatScorer(alpha=0.2), gate=Triage(), random_state=0
    ).fit(TENSORS)
    data = Counted()
    getattr(rails, ask)(data)
    assert data.n_read == 30
    with pytest.raises(ValueError, match="shuffles its samples"):
        getattr(rails, ask)(DataLoader(TENSORS, shuffle=True))


def test_reading_a_data_set_moves_no_random_state(task):
    X, y = map(torch.tensor, task)
    before = torch.get_rng_state()
    DkNNClassifier(random_state=0).fit(TensorDataset(X, y)).predict(DataLoader(X))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("y", "weights", "message"),
    [
        (np.arange(60) % 3 + 0.5, None, "y: Unknown label type"),
        (np.array(["a", "b", "c"] * 20), None, "y has labels of <U1, but those of fit are of int"),
        (np.arange(59) % 3, None, "y must have a label for each sample of X: found 59"),
        (np.ma.masked_equal(np.arange(60) % 3, 0), None, "y must not have masked values"),
        (np.arange(60) % 3, np.ones(59), "sample_weight has 59 weights for 60 samples"),
        (np.arange(60) % 3, np.full(60, np.nan), "sample_weight must be finite and 0 or more"),
        (np.arange(60) % 3, np.zeros(60), "sample_weight must .* with a weight above 0"),
        (np.arange(60) % 3, ["a"] * 60, "sample_weight must be a one-dimensional array of numbers"),
    ],
)
def test_score_names_what_is_bad(task, y, weights, message):
    dknn = DkNNClassifier(random_state=0).fit(*task)
    with pytest.raises(ValueError, match=message):
        dknn.score(task[0], y, weights)


def test_score_is_the_weighted_accuracy(task):
    dknn = DkNNClassifier(n_neighbors=5, random_state=0).fit(*task)
    weights = np.arange(60)
    expected = accuracy_score(task[1], dknn.predict(task[0]), sample_weight=weights)
    for y in (task[1], torch.tensor(task[1]), task[1].tolist()):
        assert dknn.score(task[0], y, torch.tensor(weights)) == pytest.approx(expected)
