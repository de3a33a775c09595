"""Files of other tools."""

import contextlib
import os

import numpy as np
import pytest
import skops.io as sio
from numpy.testing import assert_array_equal
from torch import nn

from sklearn_rails import (
    DkNNClassifier,
    FrozenModule,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
)
from sklearn_rails.neighbors import ExactNeighbors


@pytest.mark.parametrize(
    "estimator",
    [
        RAILSClassifier(population_size=30, threat_scorer=ThreatScorer(alpha=0.2), random_state=0),
        RAILSClassifier(algorithm=ExactNeighbors("float16"), affinity="cosine", random_state=0),
        DkNNClassifier(random_state=0),
        ThreatScorer(method=["distance", "mahalanobis", "lid", "kernel_density"], alpha=0.2),
        TorchFeatureExtractor(),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_skops_round_trip_of_estimators_without_a_network(estimator):
    rng = np.random.default_rng(0)
    X, y = rng.random((60, 6), dtype=np.float32), np.arange(60) % 3
    saved = sio.dumps(estimator.fit(X, y))
    loaded = sio.loads(saved, trusted=sio.get_untrusted_types(data=saved))
    ask = "predict_proba" if hasattr(estimator, "predict_proba") else "transform"
    assert_array_equal(getattr(loaded, ask)(X), getattr(estimator, ask)(X))


def test_trusting_the_types_in_a_skops_file_runs_no_code_of_a_network(tmp_path):
    class Evil(nn.Module):
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    saved = sio.dumps(TorchFeatureExtractor(FrozenModule(Evil())))
    with contextlib.suppress(Exception):  # it may as well be refused
        sio.loads(saved, trusted=sio.get_untrusted_types(data=saved))
    assert list(tmp_path.iterdir()) == []
