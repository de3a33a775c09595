import json

import matplotlib as mpl
import numpy as np
import pytest
from sklearn.dummy import DummyClassifier

from sklearn_rails import demo
from sklearn_rails.datasets import load_digit_images

mpl.use("Agg")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "results"
    demo.main(["--output", str(output), "--max-train", "300", "--max-test", "20"])
    yield output
    mpl.pyplot.close("all")


def test_the_demo_writes_its_table(small_run):
    summary = json.loads((small_run / "summary.json").read_text())
    assert set(summary) == {"rows", "n_test", "eps"}
    assert summary["n_test"] == 20
    assert summary["eps"] == pytest.approx(60 / 255)
    assert [row["name"] for row in summary["rows"]] == ["network", "pixel k-NN", "DkNN", "RAILS"]
    for row in summary["rows"]:
        assert set(row) == {"name", "clean_accuracy", "robust_accuracy", "seconds_per_1000"}
        assert 0 <= row["robust_accuracy"] <= row["clean_accuracy"] <= 1
        assert row["seconds_per_1000"] > 0
    network, *defences = summary["rows"]
    assert network["clean_accuracy"] > 0.6
    assert all(row["robust_accuracy"] > network["robust_accuracy"] for row in defences)


def test_the_demo_writes_its_figure(small_run):
    image = mpl.image.imread(small_run / "response.png")
    assert min(image.shape[:2]) > 300
    assert image.std() > 0.05


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
        for name, seconds in (("network", 0.004), ("RAILS", 12.5))
    ]
    lines = demo.format_table(rows).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells == ["RAILS", "100.0%", "1.2%", "12.50"]
