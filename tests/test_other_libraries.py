"""The package beside the real libraries that its users have, each where it is installed."""

import functools
import sys

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn import config_context
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import StackingClassifier
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.inspection import permutation_importance
from sklearn.model_selection import HalvingGridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from torch import nn

from sklearn_rails import (
    DkNNClassifier,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
    load,
    save,
)
from sklearn_rails.demo import train_network

IMAGE = (1, 8, 8)
RAILS = functools.partial(
    RAILSClassifier, layers="conv1", population_size=50, input_shape=IMAGE, random_state=0
)


@pytest.fixture(scope="module")
def task(digits):
    X, y = digits
    X = X.reshape(-1, *IMAGE).astype(np.float32)
    torch.manual_seed(0)
    net = train_network(X[:500], y[:500], max_epochs=3, verbose=0)
    return net, X[:500], y[:500], X[500:540], y[500:540]


def flat(X):
    return X.reshape(len(X), -1)


# scikit-learn


def test_estimators_inside_of_scikit_learns(task):
    net, X, y, X_new, y_new = task
    rails = RAILS(net)
    for estimator in (
        CalibratedClassifierCV(rails, cv=2),
        StackingClassifier([("rails", rails), ("dknn", DkNNClassifier(net))], cv=2),
        HalvingGridSearchCV(rails, {"tau": ["scale", 1.0]}, cv=2, random_state=0),
    ):
        is_stack = isinstance(estimator, StackingClassifier)
        if is_stack:
            estimator.estimators[1][1].set_params(layers="conv1", input_shape=IMAGE)
        assert estimator.fit(flat(X), y).score(flat(X_new), y_new) > 0.8


def test_importance_of_pixels(task):
    net, X, y, X_new, y_new = task
    dknn = DkNNClassifier(net, layers="conv1", n_neighbors=5, random_state=0).fit(X, y)
    dknn = make_pipeline(MinMaxScaler(), dknn.set_params(input_shape=IMAGE)).fit(flat(X), y)
    found = permutation_importance(dknn, flat(X_new), y_new, n_repeats=1, random_state=0)
    assert found.importances_mean.shape == (64,)


def test_metadata_routing(task):
    net, X, y, _, _ = task
    with config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(MinMaxScaler(), RAILS(net))
        scores = cross_validate(pipeline, flat(X), y, cv=2)["test_score"]
    assert scores.mean() > 0.8


def test_pandas_output_of_images(task):
    pandas = pytest.importorskip("pandas")
    net, X, y, _, _ = task
    names = [f"pixel{i}" for i in range(64)]
    frame = pandas.DataFrame(flat(X), columns=names)
    extractor = TorchFeatureExtractor(net, layers="output", input_shape=IMAGE)
    for transformer in (extractor, ThreatScorer(net, method="distance", input_shape=IMAGE)):
        transformer.set_output(transform="pandas").fit(frame, y)
        found = transformer.transform(frame)
        assert list(found.columns) == list(transformer.get_feature_names_out())
        assert_allclose(found, transformer.set_output(transform="default").transform(X), rtol=1e-4)


# Networks of other libraries, with random weights


def check_network(net, X, layer):
    y = np.arange(len(X)) % 3
    rails = RAILSClassifier(net, layers=layer, n_neighbors=2, generations=1, random_state=0)
    dknn = DkNNClassifier(net, layers=layer, n_neighbors=1, calibration="leave-one-out")
    assert_array_equal(dknn.fit(X, y).predict(X), y)
    assert rails.fit(X, y).predict(X[:2]).shape == (2,)


def test_timm():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model("resnet10t", num_classes=3).eval()
    X = np.random.default_rng(0).random((9, 3, 32, 32), dtype=np.float32)
    check_network(net, X, "layer1")


def test_hugging_face():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    net = transformers.ViTForImageClassification(config).eval()
    X = np.random.default_rng(0).random((9, 3, 16, 16), dtype=np.float32)
    layer = next(name for name, _ in net.named_modules() if name.endswith("0"))
    check_network(net, X, layer)


def test_lightning():
    lightning = pytest.importorskip("pytorch_lightning")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    torch.manual_seed(0)
    check_network(Classifier(), np.random.default_rng(0).random((9, 6), dtype=np.float32), "first")


# Attacks: by scores and by labels, which need no gradient


@pytest.fixture(scope="module")
def defended(task):
    net, X, y, X_new, y_new = task
    return RAILS(net).fit(X, y), X_new[:4], y_new[:4]


class Scores(nn.Module):
    """A classifier as a module of torch that has no gradient, for attacks by its answers."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x):
        return torch.as_tensor(self.classifier.predict_proba(x.numpy(force=True)))


def test_attacks_of_art(defended):
    pytest.importorskip("art")
    from art.attacks.evasion import HopSkipJump, SquareAttack
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    rails, X, y = defended
    wrapped = BlackBoxClassifierNeuralNetwork(
        rails.predict_proba, IMAGE, len(rails.classes_), clip_values=(0, 1), channels_first=True
    )
    for attack in (
        SquareAttack(wrapped, eps=0.3, max_iter=20, verbose=False),
        HopSkipJump(wrapped, max_iter=1, max_eval=20, init_eval=5, verbose=False),
    ):
        attacked = attack.generate(X, y)
        assert attacked.shape == X.shape
        assert np.isfinite(attacked).all()


def test_attacks_of_foolbox(defended):
    foolbox = pytest.importorskip("foolbox")
    rails, X, y = defended
    model = foolbox.PyTorchModel(Scores(rails).eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.SaltAndPepperNoiseAttack(steps=5)
    _, attacked, fooled = attack(model, torch.from_numpy(X), torch.from_numpy(y), epsilons=None)
    assert_array_equal(rails.predict(attacked.numpy()) != y, fooled.numpy())


def test_attacks_of_torchattacks(defended):
    torchattacks = pytest.importorskip("torchattacks")
    rails, X, y = defended
    attack = torchattacks.Square(Scores(rails).eval(), eps=0.3, n_queries=20, n_restarts=1)
    attack.set_device("cpu")
    attacked = attack(torch.from_numpy(X), torch.from_numpy(y))
    assert (attacked - torch.from_numpy(X)).abs().max() <= 0.3 + 1e-6


# Clusters and servers


def test_dask_ml(task):
    wrappers = pytest.importorskip("dask_ml.wrappers")
    da = pytest.importorskip("dask.array")
    net, X, y, X_new, _ = task
    rails = RAILS(net)
    wrapped = wrappers.ParallelPostFit(rails).fit(flat(X), y)
    found = wrapped.predict(da.from_array(flat(X_new), chunks=(10, 64))).compute()
    assert_array_equal(found, RAILS(net).fit(flat(X), y).predict(X_new))


def test_fastapi(task, tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi import FastAPI, Request
    from fastapi.testclient import TestClient

    net, X, y, X_new, _ = task
    rails = RAILS(net, threat_scorer=ThreatScorer(method="distance")).fit(X, y)
    save(rails, tmp_path / "rails")
    served = load(tmp_path / "rails", net)
    app = FastAPI()

    @app.post("/predict")
    async def predict(request: Request):
        images = np.frombuffer(await request.body(), dtype=np.float32).reshape(-1, *IMAGE)
        labels, alarms = served.predict_with_alarm(images.copy())
        return {"labels": labels.tolist(), "alarms": alarms.tolist()}

    sys.modules[__name__].Request = Request  # which FastAPI looks up by its name
    answer = TestClient(app).post("/predict", content=X_new.tobytes()).json()
    labels, alarms = rails.predict_with_alarm(X_new)
    assert answer == {"labels": labels.tolist(), "alarms": alarms.tolist()}
