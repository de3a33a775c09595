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
def samples(digits):
    X, y = digits
    rng = np.random.default_rng(0)
    return X[:600], y[:600], X[600:700], rng.uniform(size=(50, 64)).astype(np.float32)


@pytest.mark.parametrize("detector", [ThreatScorer(method="distance"), IsolationForest()])
def test_scores_of_a_detector_are_shown_with_its_threshold(samples, detector):
    X, y, new, noise = samples
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
    # The same samples, given as scores.
    scores = ThreatDisplay.from_predictions(display.threat, display.attacked["noise"])
    assert scores.roc_auc_["attacked"] == pytest.approx(expected)
    assert not scores.axes_[0].lines


def test_histograms_share_bins_and_have_the_colours_of_their_curves():
    _, axes = mpl.pyplot.subplots(1, 2)
    display = ThreatDisplay.from_predictions([0, 1, 2], {"a": [1, 3], "b": [9]}, axes=axes)
    assert display.axes_[0] is axes[0]
    assert display.figure_ is axes[0].figure
    (clean,) = axes[0].containers
    edges = np.unique([(bar.get_x(), bar.get_x() + bar.get_width()) for bar in clean])
    assert edges[0] == pytest.approx(0)
    outlines = [p for p in axes[0].patches if isinstance(p, mpl.patches.Polygon)]
    for outline, line in zip(outlines, axes[1].lines, strict=True):
        assert np.isclose(outline.get_xy()[:, :1], edges).any(axis=1).all()
        assert mpl.colors.same_color(outline.get_edgecolor()[:3], line.get_color())
    for drawn in (outlines, axes[1].lines):
        assert len({str(one.get_linestyle()) for one in drawn}) == 2
    assert repr(display) == "ThreatDisplay(3 clean, 2 a (AUC 0.750), 1 b (AUC 1.000))"


def test_an_infinite_threshold_is_not_drawn():
    display = ThreatDisplay([0.0, 1.0], {"a": [2.0]}, threshold=np.inf).plot()
    assert not display.axes_[0].lines


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (([], {"a": [1.0]}), "threat must have the score"),
        (([1.0], {"a": []}), r"attacked\['a'\] must have the score"),
        (([1.0], {}), "attacked={} must have the scores of one attack"),
        (([1.0, np.nan], {"a": [1.0]}), "contains NaN"),
        (([[1.0, 2.0]], {"a": [1.0]}), "one-dimensional"),
    ],
)
def test_invalid_scores_are_refused_before_a_figure_is_created(scores, message):
    with pytest.raises(ValueError, match=message):
        ThreatDisplay.from_predictions(*scores)
    assert not mpl.pyplot.get_fignums()


def test_axes_must_be_two():
    _, ax = mpl.pyplot.subplots()
    with pytest.raises(ValueError, match="axes must be two"):
        ThreatDisplay.from_predictions([1.0], [2.0], axes=ax)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"ThreatDisplay\.from_predictions requires matplotlib"):
        ThreatDisplay.from_predictions([1.0], [2.0])
