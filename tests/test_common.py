"""scikit-learn's own contract, with and without a network."""

import os
import subprocess
import sys

import pytest
from conftest import AnyWidth
from sklearn.ensemble import IsolationForest
from sklearn.neighbors import LocalOutlierFactor
from sklearn.utils.estimator_checks import parametrize_with_checks

from sklearn_rails import (
    DkNNClassifier,
    FrozenModule,
    RAILSClassifier,
    ThreatScorer,
    TorchFeatureExtractor,
)
from sklearn_rails.immune import Triage

NET = FrozenModule(AnyWidth())

ESTIMATORS = [
    RAILSClassifier(random_state=0),
    RAILSClassifier(NET, layers=["first", "second"], population_size=50, random_state=0),
    RAILSClassifier(NET, start_layer="first", early_stopping=False, random_state=0),
    RAILSClassifier(selection="class_balanced", crossover="uniform", threat_scorer=ThreatScorer()),
    RAILSClassifier(threat_scorer=ThreatScorer(method="distance"), gate=Triage(), random_state=0),
    RAILSClassifier(NET, layers="first", threat_scorer=ThreatScorer(), random_state=0),
    DkNNClassifier(),
    DkNNClassifier(NET, layers=["first", "second"], calibration="leave-one-out"),
    ThreatScorer(),
    ThreatScorer(
        NET, method=["credibility", "distance", "mahalanobis", "lid", "feature_squeezing"]
    ),
    ThreatScorer(method="kernel_density"),
    ThreatScorer(NET),
    ThreatScorer(method=IsolationForest(n_estimators=5), random_state=0),
    ThreatScorer(NET, method=[LocalOutlierFactor(n_neighbors=2, novelty=True), "distance"]),
    TorchFeatureExtractor(),
    TorchFeatureExtractor(NET, layers=["first", "output"]),
]


# scikit-learn 1.9 adds check_array_api_input, once for each of ESTIMATORS. It would skip itself
# without SCIPY_ARRAY_API=1, so conftest.py deselects it; the last test runs it with the switch on.
@parametrize_with_checks(ESTIMATORS)
def test_estimators_keep_scikit_learns_contract(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_contract_holds_with_the_array_api_switched_on():
    # SciPy reads the switch when it is imported.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-k", "keep_scikit", "-qrs", "--no-cov"],
        env={**os.environ, "SCIPY_ARRAY_API": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "skipped" not in run.stdout
