import sys

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score

from sklearn_rails import ThreatScorer
from sklearn_rails.inspection import ThreatDisplay

mpl.use("Agg")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    mpl.pyplot.close("all")


@pytest.fixture
def rows(digits):
    X, y = digits
    rng = np.random.default_rng(0)
    return X[:600], y[:600], X[600:700], rng.uniform(size=(50, 64)).astype(np.float32)


@pytest.mark.parametrize("detector", [ThreatScorer(method="distance"), IsolationForest()])
def test_a_detector_is_shown_with_its_threshold(rows, detector):
    X, y, new, noise = rows
    detector.set_params(random_state=0).fit(X, y)
    display = ThreatDisplay.from_estimator(detector, new, {"noise": noise, "negatives": 1 - new})
    expected = roc_auc_score([0] * 100 + [1] * 50, -detector.score_samples(np.r_[new, noise]))
    assert display.roc_auc_["noise"] == pytest.approx(expected)
    distributions, curves = display.axes_
    texts = [text.get_text() for text in distributions.get_legend().get_texts()]
    assert texts == ["clean", "noise", "negatives", "threshold"]
    (threshold,) = distributions.lines
    assert threshold.get_xdata()[0] == pytest.approx(-detector.offset_)
    assert len(curves.lines) == 2
    # The same rows as scores.
    scores = ThreatDisplay.from_predictions(display.threat, display.attacked["noise"])
    assert scores.roc_auc_["attacked"] == pytest.approx(expected)
    assert not scores.axes_[0].lines


def test_histograms_share_their_bins_and_their_colours_with_the_curves():
    _, axes = mpl.pyplot.subplots(1, 2)
    display = ThreatDisplay.from_predictions([0, 1, 2], {"a": [1, 3], "b": [9]}, axes=axes)
    assert display.axes_[0] is axes[0]
    assert display.figure_ is axes[0].figure
    clean, a, b = axes[0].containers
    edges = [[bar.get_x() for bar in bars] for bars in (clean, a, b)]
    assert edges[0] == edges[1] == edges[2]
    assert edges[0][0] == pytest.approx(0)
    for bars, line in zip((a, b), axes[1].lines, strict=True):
        assert mpl.colors.same_color(bars[0].get_facecolor()[:3], line.get_color())


def test_a_threshold_that_nothing_reaches_is_not_drawn():
    display = ThreatDisplay([0.0, 1.0], {"a": [2.0]}, threshold=np.inf).plot()
    assert not display.axes_[0].lines


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (([], {"a": [1.0]}), "threat must have the score"),
        (([1.0], {"a": []}), r"attacked\['a'\] must have the score"),
        (([1.0], {}), "attacked={} must have the scores of one attack"),
        (([1.0, np.nan], {"a": [1.0]}), "contains NaN"),
        (([[1.0, 2.0]], {"a": [1.0]}), "1d array"),
    ],
)
def test_scores_that_cannot_be_shown_are_told_before_a_figure_is_made(scores, message):
    with pytest.raises(ValueError, match=message):
        ThreatDisplay.from_predictions(*scores)
    assert not mpl.pyplot.get_fignums()


def test_axes_must_be_two():
    _, ax = mpl.pyplot.subplots()
    with pytest.raises(ValueError, match="axes must be two"):
        ThreatDisplay.from_predictions([1.0], [2.0], axes=ax)


def test_matplotlib_is_asked_for(monkeypatch, rows):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"ThreatDisplay\.from_predictions requires matplotlib"):
        ThreatDisplay.from_predictions([1.0], [2.0])
