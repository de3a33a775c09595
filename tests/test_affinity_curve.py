import sys

import matplotlib as mpl
import numpy as np
import pytest
from torch import nn

from sklearn_rails import RAILSClassifier
from sklearn_rails.inspection import AffinityCurveDisplay

mpl.use("Agg")

NAN = np.nan


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    mpl.pyplot.close("all")


@pytest.fixture
def response():
    """Responses in the layers "0" and "2", 3 generations in each."""
    rng = np.random.RandomState(0)
    X, y = rng.rand(30, 1, 6, 6).astype(np.float32), np.arange(30) % 3
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    rails = RAILSClassifier(
        network,
        layers=["0", "2"],
        population_size=20,
        generations=3,
        early_stopping=False,
        random_state=0,
    )
    return rails.fit(X, y).respond(1 - X[:6])


def band_edges(band):
    """Return the lower and upper edge of a band at each generation."""
    vertices = band.get_paths()[0].vertices
    by_generation = [vertices[vertices[:, 0] == x, 1] for x in np.unique(vertices[:, 0])]
    return np.array([(heights.min(), heights.max()) for heights in by_generation]).T


def legend_texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_samples_of_a_classifier_are_compared_by_name():
    rng = np.random.RandomState(0)
    X, y = rng.rand(30, 8).astype(np.float32), np.arange(30) % 3
    rails = RAILSClassifier(population_size=20, generations=2, random_state=0).fit(X, y)
    display = AffinityCurveDisplay.from_estimator(rails, {"own": X[:6], "other": 1 - X[:4]})
    expected = AffinityCurveDisplay.from_response({"own": rails.respond(X[:6])})
    np.testing.assert_array_equal(display.lines_[0].get_ydata(), expected.lines_[0].get_ydata())
    assert legend_texts(display.ax_) == ["own", "other"]
    own, other = display.lines_
    assert own.get_marker() != other.get_marker()
    assert repr(display) == "AffinityCurveDisplay(6 own, 4 other, layer='input')"
    alone = AffinityCurveDisplay.from_estimator(rails, X[:6])
    assert repr(alone) == "AffinityCurveDisplay(6 samples, layer='input')"
    assert alone.ax_.get_legend() is None


def test_mean_and_band_agree_with_a_calculation_by_hand():
    # The standard deviations are 1 and 2; the half-widths are these times 1.959964 / sqrt(3).
    display = AffinityCurveDisplay({"own": [[1, 2], [2, 4], [3, 6]]}, layer="input").plot()
    (line,), (band,) = display.lines_, display.bands_
    np.testing.assert_array_equal(line.get_xdata(), [0, 1])
    np.testing.assert_allclose(line.get_ydata(), [2, 4])
    edges = [[2 - 1.131586, 4 - 2.263171], [2 + 1.131586, 4 + 2.263171]]
    np.testing.assert_allclose(band_edges(band), edges, rtol=1e-6)


def test_confidence_sets_the_width():
    curves = {"own": [[1, 2], [3, 6]]}
    display = AffinityCurveDisplay(curves, layer="input", confidence=0.6826895).plot()
    # 68 % are one standard error, which for two samples is half their difference.
    np.testing.assert_allclose(band_edges(display.bands_[0]), [[1, 2], [3, 6]], rtol=1e-6)


def test_a_sample_that_stopped_keeps_its_last_affinity():
    stopped = [[-4, -2, NAN, NAN], [-6, -4, -3, NAN], [-8, -6, -4, -1]]
    carried = [[-4, -2, -2, -2], [-6, -4, -3, -3], [-8, -6, -4, -1]]
    display = AffinityCurveDisplay({"own": stopped}, layer="input").plot()
    np.testing.assert_allclose(display.lines_[0].get_ydata(), [-6, -4, -3, -2])
    whole = AffinityCurveDisplay({"own": carried}, layer="input").plot()
    np.testing.assert_array_equal(band_edges(display.bands_[0]), band_edges(whole.bands_[0]))
    assert np.isnan(stopped[0][3])


@pytest.mark.filterwarnings("error")
def test_the_band_of_one_sample_has_no_width():
    display = AffinityCurveDisplay({"own": [[1, 2, 4]]}, layer="input").plot()
    np.testing.assert_array_equal(band_edges(display.bands_[0]), [[1, 2, 4]] * 2)


def test_a_response_of_several_layers(response):
    display = AffinityCurveDisplay.from_response(response)
    assert display.layer == "0"
    assert display.ax_.get_ylabel() == "mean affinity (layer: 0)"
    assert display.ax_.get_xlabel() == "generation"
    assert display.ax_.get_legend() is None
    second = AffinityCurveDisplay.from_response(response, layer="2", confidence=0.5)
    assert second.ax_.get_ylabel() == "mean affinity (layer: 2)"
    assert second.confidence == 0.5
    for shown in (display, second):
        mean = response.affinity_curve[shown.layer].mean(axis=0)
        np.testing.assert_allclose(shown.lines_[0].get_ydata(), mean, rtol=1e-5)


@pytest.mark.parametrize("generations", [0, 1, 2, 10])
def test_ticks_are_whole_generations(generations):
    curves = {"own": np.zeros((2, generations + 1))}
    ticks = AffinityCurveDisplay(curves, layer="input").plot().ax_.get_xticks()
    np.testing.assert_array_equal(ticks, ticks.round())


def test_several_responses_have_a_line_and_a_label_each(response):
    display = AffinityCurveDisplay.from_response({"own": response, "mismatched": response})
    assert legend_texts(display.ax_) == ["own", "mismatched"]
    assert len(display.lines_) == len(display.bands_) == 2
    colors = [line.get_color() for line in display.lines_]
    assert colors[0] != colors[1]
    for color, band in zip(colors, display.bands_, strict=True):
        np.testing.assert_array_equal(band.get_facecolor()[0], mpl.colors.to_rgba(color, 0.2))


def test_lines_may_differ_in_length():
    display = AffinityCurveDisplay({"short": [[1, 2]], "long": [[1, 2, 3]]}, layer="input").plot()
    assert [len(line.get_ydata()) for line in display.lines_] == [2, 3]


def test_plot_on_given_axes(response):
    _, (_, ax) = mpl.pyplot.subplots(1, 2)
    display = AffinityCurveDisplay.from_response(
        response, ax=ax, color="k", marker="x", label="all"
    )
    assert display.ax_ is ax
    assert display.figure_ is ax.figure
    assert ax.lines[:] == display.lines_
    assert display.lines_[0].get_color() == "k"
    assert display.lines_[0].get_marker() == "x"
    assert legend_texts(ax) == ["all"]


def test_plot_again(response):
    display = AffinityCurveDisplay.from_response(response)
    figure, lines = display.figure_, display.lines_
    assert display.plot(linestyle="--") is display
    assert display.figure_ is not figure
    assert display.lines_[0].get_linestyle() == "--"
    np.testing.assert_array_equal(display.lines_[0].get_ydata(), lines[0].get_ydata())


def test_a_layer_that_a_response_lacks_is_refused(response):
    message = r"layer='1' is none of the layers \['0', '2'\] of response"
    with pytest.raises(ValueError, match=message + r"\."):
        AffinityCurveDisplay.from_response(response, layer="1")
    with pytest.raises(ValueError, match=message + r"\['own'\]"):
        AffinityCurveDisplay.from_response({"own": response}, layer="1")


def test_empty_input_is_refused():
    with pytest.raises(ValueError, match=r"response=\{\} must have one response"):
        AffinityCurveDisplay.from_response({})
    with pytest.raises(ValueError, match=r"curves=\{\} must have the curves of one line"):
        AffinityCurveDisplay({}, layer="input").plot()


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 95, NAN])
def test_confidence_outside_0_and_1_is_refused(response, confidence):
    with pytest.raises(ValueError, match=rf"confidence={confidence} must be between 0 and 1"):
        AffinityCurveDisplay.from_response(response, confidence=confidence)
    assert mpl.pyplot.get_fignums() == []


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4), (0, 3), (3, 0)])
def test_curves_of_another_shape_are_refused(shape):
    display = AffinityCurveDisplay({"own": np.zeros(shape)}, layer="input")
    with pytest.raises(ValueError, match=r"curves\['own'\] has shape .*; it must be \(n, gen"):
        display.plot()


@pytest.mark.parametrize("start", [NAN, np.inf])
def test_curves_that_begin_without_an_affinity_are_refused(start):
    display = AffinityCurveDisplay({"own": [[1, 2], [start, 2]]}, layer="input")
    with pytest.raises(
        ValueError, match=rf"curves\['own'\] must begin .* got {start} for sample 1"
    ):
        display.plot()


def test_without_matplotlib_the_error_says_what_to_install(response, monkeypatch):
    display = AffinityCurveDisplay.from_response(response)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"Display\.from_response requires matplotlib"):
        AffinityCurveDisplay.from_response(response)
    with pytest.raises(ImportError, match=r"Display\.plot requires matplotlib"):
        display.plot()
