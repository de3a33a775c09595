"""The scripts of benchmarks/reproduce run from end to end on few rows."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "reproduce"
ROWS = "n_train = 300\nn_validation = 20\nn_calibration = 20\nn_test = 15\n"
SETTINGS = {
    "table1": ROWS
    + """
baselines = ["DkNN", "k-NN vote"]
[data.digits]
paper = { RAILS = "97.95 / 76.67" }
[[data.digits.classifier]]
name = "DkNN"
kind = "DkNN"
grid = { layers = ["input", ["conv1", "conv2"]], n_neighbors = [1, 5] }
[[data.digits.classifier]]
name = "RAILS"
kind = "RAILS"
n_test = 10
parameters = { layers = "conv1", population_size = 30 }
[[data.digits.classifier]]
name = "RAILS, arbitrating"
kind = "RAILS"
base = "RAILS"
grid = { gate__alpha = [0.2, 0.5] }
""",
    "attacks": ROWS
    + """
eps_factors = [0.5]
threat_weights = [1, "selective"]
[adaptive]
max_iter = 10
n_restarts = 1
n_targets = 2
[data.digits]
n_adaptive = 5
n_square = 3
n_hop_skip_jump = 2
n_curve = 3
[[data.digits.classifier]]
name = "RAILS"
kind = "RAILS"
parameters = { layers = "input", population_size = 30 }
threat = { layers = "conv1", n_neighbors = 10 }
""",
    "study": ROWS
    + """
[[variation]]
tau_factor = 2.0
[[variation]]
over_generations = "clearest"
[data.digits]
base = { layers = "conv1", population_size = 30 }
[[data.digits.variation]]
affinity = "cosine"
""",
    "detect": ROWS.replace("n_validation = 20", "n_validation = 300")
    + """
libraries = ["scikit-learn LocalOutlierFactor", "PyOD KNN"]
attacks = ["PGD", "FGSM"]
n_search = 20
n_hop_skip_jump = 2
n_adaptive = 3
n_neighbors = [5]
max_combined = 2
[data.digits]
layers = ["conv1", "conv2"]
defence = { layers = "input", population_size = 30 }
other_data = ["digits"]
""",
    "memory": ROWS
    + """
n_curve = 4
generations = 3
[data.digits]
parameters = { layers = "conv1", population_size = 30 }
""",
    "triage": ROWS.replace("n_validation = 20", "n_validation = 60")
    + """
n_adaptive = 8
n_restarts = 1
n_targets = 1
threat_weights = [0.1, 1.0]
[data.digits]
parameters = { layers = "conv1", population_size = 30 }
threat = { layers = "conv2", method = "disagreement" }
""",
    "layers": ROWS
    + """
parameters = { population_size = 30, generations = 1 }
[data.digits]
""",
    "sensing_defaults": ROWS.replace("n_validation = 20", "n_validation = 300")
    + """
[data.digits]
""",
    "certify": ROWS
    + """
radii = [0, 0.25, 3]
[data.digits]
[[data.digits.classifier]]
name = "nearest neighbour"
kind = "DkNN"
parameters = { layers = "input", n_neighbors = 1 }
[[data.digits.classifier]]
name = "smoothed network"
kind = "network"
sigma = 0.25
n_test = 5
""",
    "saturation": ROWS
    + """
factors = [1, 1000]
paper = { network = "87.26 / 32.57" }
[data.digits]
[[data.digits.classifier]]
name = "RAILS"
kind = "RAILS"
parameters = { layers = "conv1", population_size = 30 }
""",
    "figure2": ROWS
    + """
[data.digits]
parameters = { layers = "conv1", population_size = 30, generations = 2 }
""",
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    return tmp_path_factory.mktemp("networks")


def run(script, *arguments, networks):
    return subprocess.run(
        [sys.executable, SCRIPTS / f"{script}.py", *map(str, arguments)],
        env=os.environ | {"SKLEARN_RAILS_CACHE": str(networks), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def results_of(script, networks, tmp_path, folder="results"):
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS[script])
    results = tmp_path / folder
    done = run(script, "digits", "--settings", settings, "--results", results, networks=networks)
    assert done.returncode == 0, done.stderr
    with (results / f"{script}.csv").open(newline="") as file:
        return results, list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("script", SETTINGS)
def test_two_runs_differ_in_times_alone(script, networks, tmp_path):
    first, second = (results_of(script, networks, tmp_path, folder)[1] for folder in "ab")
    columns = [name for name in first[0] if not any(w in name for w in ("time", "second"))]
    assert len(columns) > 5
    for name in columns:
        assert [row[name] for row in first] == [row[name] for row in second], name


@pytest.mark.parametrize("script", SETTINGS)
def test_a_script_writes_its_results(script, networks, tmp_path):
    results, rows = results_of(script, networks, tmp_path)
    assert {row["data"] for row in rows} == {"Digits (1,347 / 450)"}
    assert all("torch" in row["versions"] for row in rows)
    if script == "table1":
        names = ["network", "DkNN", "RAILS", "RAILS, arbitrating"]
        assert [row["classifier"] for row in rows] == names
        assert [row["test rows"] for row in rows] == ["15", "15", "10", "15"]
        assert "population_size" in rows[3]["parameters"]
        assert "gate__alpha" in rows[3]["parameters"]
        assert "n_neighbors" in rows[1]["parameters"]
        assert rows[1]["robust against DkNN"] == ""
        assert "±" in rows[2]["robust against DkNN"]
        assert rows[2]["robust against k-NN vote"] == ""
    elif script == "attacks":
        shares = {(r["classifier"], r["attack"], r["eps"]): r["right"] for r in rows}
        # The network, the same with its margin, RAILS, at another radius, and with a scorer.
        assert len(shares) == len(rows) == 6 + 10 + 9 + 1 + 10
        evading = "adaptive, threat weight selective; right or flagged"
        assert 0 <= float(shares["RAILS", evading, "60/255"].split()[0]) <= 100
        assert (results / "attacks_digits.png").stat().st_size > 5_000
        worst = float(shares["RAILS", "worst", "60/255"].split()[0])
        alone = float(shares["RAILS", "adaptive", "60/255"].split()[0])
        assert worst <= alone
        (steps,) = (r["left after steps"] for r in rows if r["left after steps"])
        steps = dict(json.loads(steps))
        assert max(steps) == 10 * (2 * 2 + 1)
        assert steps[0] >= steps[max(steps)] == alone
        for name in ("network, by its margin", "RAILS"):
            held = [
                float(r["right"].split()[0])
                for r in rows
                if r["classifier"] == name and r["attack"].endswith("right or flagged")
            ]
            assert held[-1] <= min(held[:-1])
    elif script == "detect":
        names = {row["detector"] for row in rows}
        assert len(names) == 9 + 2 + 2  # methods, combinations, libraries
        assert {"PGD", "noise", "Digits"} <= {row["inputs"] for row in rows}
        assert all(0 <= float(row["auroc"]) <= 1 for row in rows)
        combined = [row for row in rows if row["detector"].startswith("our combination")]
        for layers in (json.loads(row["layers"]) for row in rows):
            used = layers.values() if isinstance(layers, dict) else [layers]
            assert set(used) <= {"conv1", "conv2"}
        for row in combined:
            assert row["methods"].count(" + ") == 1
            low, high = re.fullmatch(
                r"[\d.]+ \(([\d.]+) to ([\d.]+) expected\)", row["clean test rows flagged at 5 %"]
            ).groups()
            assert float(low) < 5 < float(high)
        noise = {r["detector"]: float(r["auroc"]) for r in rows if r["inputs"] == "noise"}
        assert noise["distance"] > 0.9
        assert noise["PyOD KNN"] > 0.9
        same = {r["detector"]: float(r["auroc"]) for r in rows if r["inputs"] == "Digits"}
        assert same["distance"] < 0.8
    elif script == "triage":
        assert [row["bred"] for row in rows] == ["all", "alarms", "none"]
        cells = [float(row["cells for a clean row"]) for row in rows]
        assert cells[0] > cells[1] >= cells[2] == 0
        assert rows[0]["robust against all"].startswith("+0.0")
        assert rows[2]["right or alarmed, worst"] == ""
        for row in rows[:2]:
            held = {k: float(v.split()[0]) for k, v in row.items() if k.startswith("right or")}
            worst = held.pop("right or alarmed, worst")
            assert worst <= min(held.values())
            assert len(held) == 4
            assert len(set(held.values())) > 1
    elif script == "memory":
        modes = ["none", "confident", "labelled", "all", "poisoned"]
        assert [row["remembered"] for row in rows] == modes
        assert rows[0]["cells"] == "0"
        assert int(rows[1]["cells"]) <= int(rows[3]["cells"])
        assert rows[0]["clean rows: against none"].startswith("+0.0")
        assert (results / "memory_digits.png").stat().st_size > 5_000
    elif script == "layers":
        assert [row["layer"] for row in rows][:2] == ["input", "conv1"]
        (chosen,) = (row for row in rows if row["chosen"] == "True")
        assert chosen["mean against the chosen"].startswith("+0.0")
        last = rows[-1]
        assert last["layer"] == "output"
        assert float(last["attacked"].split()[0]) < float(rows[0]["attacked"].split()[0])
        for row in rows:
            clean, attacked = (float(row[kind].split()[0]) for kind in ("clean", "attacked"))
            assert abs(float(row["mean"]) - (clean + attacked) / 2) < 0.11
            assert float(row["mean against the chosen"].split()[0]) == pytest.approx(
                float(row["mean"]) - float(chosen["mean"]), abs=0.11
            )
    elif script == "sensing_defaults":
        assert [row["fitted on"] for row in rows] == ["training", "validation"]
        assert [row["rows of fit"] for row in rows] == ["300", "300"]
        for row in rows:
            assert float(row["fooled rows flagged"].split()[0]) > 50
            assert float(row["clean rows flagged"].split()[0]) < 25
            assert row["clean rows"] == "450"
            assert 5 < int(row["fooled rows"]) <= 15
    elif script == "study":
        changed = ["nothing ", '{"tau_fa', '{"over_g', '{"affini']
        assert [row["changed"][:8] for row in rows] == changed
        assert rows[0]["clean against defaults"].startswith("+0.0")
    elif script == "certify":
        shares = [[float(r[f"radius {k}"].split()[0]) for k in ("0", "0.25", "3")] for r in rows]
        assert [row["test rows"] for row in rows] == ["15", "5"]
        for first, second, last in shares:
            assert 80 <= first <= 100
            assert 50 < second <= first
            assert last == 0
        assert (results / "certify_digits.png").stat().st_size > 5_000
    elif script == "saturation":
        lines = {(r["factor"], r["attack"], r["classifier"]): r for r in rows}
        assert len(lines) == len(rows) == 2 * (2 + 2)
        stuck, moved = (
            float(lines[factor, "PGD, cross-entropy", "network"]["moved"].split()[0])
            for factor in ("1000", "1")
        )
        assert stuck < moved == 100
        assert lines["1000", "PGD, cross-entropy", "network"]["robust, images not moved"]
        by_margin = lines["1", "PGD, margin", "network"]
        assert float(by_margin["robust"].split()[0]) < 10
        assert by_margin["clean / robust in the paper"] == "87.26 / 32.57"
        assert (results / "saturation_digits.png").stat().st_size > 5_000
    else:
        affinity = {(r["curve"], r["generation"]): float(r["mean affinity"]) for r in rows}
        assert affinity["antigen", "2"] > affinity["antigen", "clones"]
        assert affinity["antigen", "2"] > affinity["antigen", "0"]
        assert affinity["antigen", "2"] > affinity["mismatched antigen", "2"]
        assert (results / "figure2_digits.png").stat().st_size > 5_000


@pytest.mark.slow
def test_results_of_other_data_stay_and_unknown_data_are_named(networks, tmp_path):
    settings = tmp_path / "settings.toml"
    settings.write_text(SETTINGS["study"])
    (tmp_path / "study.csv").write_text(
        "data,network,layer,renamed\nMNIST,mnist,conv1,7\nDigits,digits,old,7\n"
    )
    done = run("study", "--settings", settings, "--results", tmp_path, networks=networks)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "study.csv").read_text().splitlines()
    assert lines[0].endswith(",renamed")
    (kept,) = (line for line in lines if line.startswith("MNIST"))
    assert kept.endswith(",7")
    assert not any(",old" in line for line in lines)
    failed = run("study", "mnist", "--settings", settings, networks=networks)
    assert failed.returncode != 0
    assert "names must be of ['digits'], got ['mnist']" in failed.stderr
