import re

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from skorch import NeuralNetClassifier
from torch import nn

from sklearn_rails import (
    DkNNClassifier,
    FrozenModule,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
)
from sklearn_rails.immune import Triage

X = np.random.default_rng(0).random((60, 4), dtype=np.float32)
Y = np.arange(60) % 3


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def shown(estimator):
    """Return the labels of the blocks, each with its caption, and all the text."""
    html = re.sub(r"<(style|script).*?</\1>", "", estimator._repr_html_(), flags=re.DOTALL)
    labels = re.findall(r"<label[^>]*>(.*?)</label>", html, flags=re.DOTALL)
    texts = [re.sub(r"<span.*", "", label, flags=re.DOTALL) for label in labels]
    return [" ".join(re.sub(r"<[^>]*>", " ", text).split()) for text in texts], html


@pytest.mark.parametrize(
    "form", [lambda n: n, FrozenModule, lambda n: TorchFeatureExtractor(n, layers="1")]
)
@pytest.mark.parametrize("make", [RAILSClassifier, DkNNClassifier, ThreatScorer])
def test_the_network_is_one_leaf_with_the_layers_in_use(make, form):
    estimator = make(form(Network()), layers=["1", "2"])
    name = type(estimator).__name__
    labels, html = shown(estimator)
    assert labels == [name, "feature_extractor", "Network layers: 1, 2"]
    assert "Network, 43 parameters" in html
    assert "in_features" not in html
    estimator.set_params(layers="0", **({"method": "distance"} if make is ThreatScorer else {}))
    estimator.fit(X, Y).set_params(layers="2")
    assert shown(estimator)[0] == [name, "feature_extractor", "Network layers: 0"]


def test_layers_of_each_method_are_shown():
    scorer = ThreatScorer(
        Network(), layers={"distance": "1", "lid": "2"}, method=["distance", "lid"]
    )
    assert shown(scorer)[0][-1] == "Network layers: 1 of distance, 2 of lid"
    assert shown(scorer.fit(X, Y))[0][-1] == "Network layers: 1, 2"


def test_layers_that_fit_chooses_are_shown():
    rails = RAILSClassifier(Network(), random_state=0)
    assert shown(rails)[0][-1] == "Network layers: auto"
    (layer,) = rails.fit(X, Y).layers_
    assert shown(rails)[0][-1] == f"Network layers: {layer} (chosen in fit)"


def test_estimators_among_the_parameters_are_shown_beside_it():
    network = Network()
    rails = RAILSClassifier(
        network, layers="0", gate=Triage(), threat_scorer=ThreatScorer(network, layers="1")
    )
    expected = [
        "RAILSClassifier",
        "feature_extractor",
        "Network layers: 0",
        "gate: Triage",
        "Triage",
        "threat_scorer: ThreatScorer",
        "feature_extractor",
        "Network layers: 1",
    ]
    assert shown(rails)[0] == expected
    piped = shown(make_pipeline(FunctionTransformer(), rails))[0]
    assert piped[-7:] == expected[1:]
    assert "Linear" not in repr(rails)
    extractor = TorchFeatureExtractor(network)
    assert shown(extractor)[0] == ["TorchFeatureExtractor", "module", "Network layers: output"]


def test_without_a_network_that_can_be_shown_there_is_one_block():
    assert shown(RAILSClassifier())[0] == ["RAILSClassifier"]
    unfitted = RAILSClassifier(NeuralNetClassifier(Network))
    assert shown(clone(unfitted))[0] == ["RAILSClassifier"]
