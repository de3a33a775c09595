"""Small tables for the documentation, from the files in benchmarks/results.

Run as a script, it prints the table of README.md.
"""

import csv
from pathlib import Path

# A name in the files, and its name on the page.
NETWORKS = {
    "mnist": "MNIST",
    "svhn": "SVHN",
    "cifar10": "CIFAR-10",
    "mnist_adversarial": "MNIST, adv.",
    "svhn_adversarial": "SVHN, adv.",
    "cifar10_adversarial": "CIFAR-10, adv.",
}
CHANGES = {
    '{"generations": 0}': "no genetic algorithm",
    '{"selection": "class_balanced"}': "class-balanced selection",
    '{"crossover": "uniform"}': "uniform cross-over",
    '{"rho": 0.05}': "a third of the mutations",
    '{"n_neighbors": 30}': "30 neighbours instead of 10",
    '{"population_size": 500}': "500 cells instead of 150",
    '{"layers": "conv1"}': "first convolution",
    '{"layers": "conv3"}': "third convolution",
    '{"layers": "conv1", "affinity": "cosine"}': "first convolution, cosine",
}
# Detectors on the page.
COMBINATIONS = ("our combination", "our combination, least behind")
INPUTS = ("PGD", "FGSM", "Square", "HopSkipJump", "adaptive, on RAILS", "noise", "SVHN subset")
# A line on the page, and its task and alternative in the file.
ALTERNATIVES = {
    "authors' loop, the same passes": ("RAILS, one image, same passes", "authors' loop"),
    "authors' loop, our defaults": ("RAILS, one image, our defaults", "authors' loop"),
    "faiss, 784 features": ("(d = 784), 1 queries", "faiss IndexFlatL2"),
    "faiss, 12,544 features": ("(d = 12,544), 1 queries", "faiss IndexFlatL2"),
    "scikit-learn, 12,544 features": ("(d = 12,544), 1 queries", "scikit-learn brute"),
    "pynndescent, 12,544 features": ("(d = 12,544), 1 queries", "pynndescent (approximate)"),
    "PyOD KNN": ("ThreatScorer(method='distance')", "PyOD KNN"),
    "pytorch-ood Mahalanobis": ("ThreatScorer(method='mahalanobis')", "pytorch-ood Mahalanobis"),
    "ART SubsetScanningDetector": ("ThreatScorer(method='auto')", "ART SubsetScanningDetector"),
}


def write_tables(results, target):
    """Write the tables of the pages, and the complete files to download.

    Parameters
    ----------
    results : Path
        The folder benchmarks/results.
    target : Path
        A folder, made if it does not exist.
    """
    target.mkdir(exist_ok=True)
    for path in results.glob("*.csv"):
        (target / path.name).write_bytes(path.read_bytes())
    files = read_results(results)
    tables = {
        "accuracy": accuracy_table(files),
        "gain": gain_table(files["table1"]),
        "adaptive": adaptive_table(files["attacks"]),
        "abstaining": abstaining_table(files["attacks"]),
        "saturation": saturation_table(files["saturation"]),
        "parts": parts_table(files["study"]),
        "detection": detection_table(files["detect"]),
        "passes": passes_table(files),
        "layers": layers_table(files["layers"]),
        "sensing_defaults": sensing_table(files["sensing_defaults"]),
        "serving": serving_table(files["serving"]),
        "alternatives": alternatives_table(files["alternatives"]),
        "distributed": distributed_table(files["distributed"]),
        "certified": certified_table(files["certify"]),
    }
    (target / "small").mkdir(exist_ok=True)
    for name, rows in tables.items():
        path = Path(target, "small", f"{name}.csv")
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def read_results(results):
    """Return the rows of each file in benchmarks/results, by the name of the file."""
    files = {}
    for path in results.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            files[path.stem] = list(csv.DictReader(file))
    return files


def readme_table(results):
    """Return accuracy, clean and under attack, and under the worst attack, as Markdown."""
    files = read_results(results)
    header, *rows = accuracy_table(files)
    worst = {
        row[0]: [cell.split(" / ")[1] for cell in row[1:]]
        for row in adaptive_table(files["attacks"])[1:]
    }
    table = [
        [*header, "worst: network, DkNN, RAILS"],
        [":--", *["--:"] * len(header)],
        *([*row, ", ".join(worst.get(row[0], []))] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def select(rows, **values):
    """Return the only row with these values."""
    found = [row for row in rows if all(row[name] == value for name, value in values.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows with {values}")
    return found[0]


def percent(text):
    """Return the number of "98.0 (96.9 to 98.7)", as text."""
    return text.split(" ")[0]


def accuracy_table(files):
    """Return clean and attacked accuracy of each classifier on each network."""
    classifiers = ["network", "k-NN vote", "DkNN", "RAILS"]
    table = [["", *classifiers]]
    for network, name in NETWORKS.items():
        cells = []
        for classifier in classifiers:
            if not network.endswith("adversarial"):
                row = select(files["table1"], network=network, classifier=classifier)
                shares = [row["clean"], row["robust"]]
            elif classifier == "k-NN vote":
                shares = []
            else:
                known = {"network": network, "classifier": classifier}
                found = [select(files["attacks"], **known, attack=a) for a in ("none", "PGD")]
                shares = [row["right"] for row in found]
            cells.append(" / ".join(map(percent, shares)))
        table.append([name, *cells])
    return table


def gain_table(rows):
    """Return how many points RAILS is better under attack than other classifiers."""
    table = [["", "authors' layers", "the same, paper", "our layers", "against tuned DkNN"]]
    column = "clean / robust in the paper"
    for network in ("mnist", "svhn", "cifar10"):
        theirs, rails, dknn = (
            select(rows, network=network, classifier=name)
            for name in ("RAILS, the authors' layers", "RAILS", "DkNN")
        )
        rails_paper, dknn_paper = (float(row[column].split(" / ")[1]) for row in (rails, dknn))
        table.append(
            [
                f"{NETWORKS[network]}, {int(theirs['test rows']):,} images",
                theirs["robust against k-NN vote"],
                f"{rails_paper - dknn_paper:+.1f}",
                rails["robust against k-NN vote"],
                rails["robust against DkNN"],
            ]
        )
    return table


def adaptive_table(rows):
    """Return accuracy under PGD on the network, and the worst under all attacks."""
    table = [["", "network", "DkNN", "RAILS"]]
    for network in by_network(rows):
        cells = []
        for classifier in ("network", "DkNN", "RAILS"):
            pgd, worst = (
                select(rows, network=network, classifier=classifier, attack=attack)
                for attack in ("PGD", "worst")
            )
            cells.append(f"{percent(pgd['right'])} / {percent(worst['right'])}")
        table.append([NETWORKS[network], *cells])
    return table


def abstaining_table(rows):
    """Return the shares of images that are classified correctly or flagged, under all attacks."""
    table = [["", "best without flags", "clean flagged", "scorer unknown", "worst"]]
    for network, found in by_network(rows).items():
        best = max(
            float(percent(row["right"]))
            for row in found
            if row["attack"] == "worst" and row["classifier"] in ("network", "DkNN", "RAILS")
        )
        for flagged in (row for row in found if row["attack"] == "none; flagged"):
            keys = ("classifier", "parameters")
            held = {
                row["attack"].removesuffix("; right or flagged"): float(percent(row["right"]))
                for row in found
                if row["attack"].endswith("; right or flagged")
                and all(row[key] == flagged[key] for key in keys)
            }
            worst = held.pop("worst")
            unknown = min(v for k, v in held.items() if "margin" not in k and "weight" not in k)
            name = f"{NETWORKS[network]}: {flagged['classifier']}"
            table.append([name, best, percent(flagged["right"]), unknown, worst])
    return table


def saturation_table(rows):
    """Return accuracy where gradients vanish, and under attacks whose gradients do not."""
    columns = ("network", "k-NN vote", "RAILS, the authors' layers")
    table = [["clean / attacked", "images moved", *columns]]
    for factor, attack, name in (
        ("10", "PGD, cross-entropy", "PGD, logits times 10"),
        ("80", "PGD, cross-entropy", "PGD, logits times 80"),
        ("1", "PGD, cross-entropy", "PGD"),
        ("1", "PGD, margin", "PGD on the margin"),
        ("1", "AutoAttack", "AutoAttack"),
    ):
        found = [select(rows, factor=factor, attack=attack, classifier=c) for c in columns]
        if len(table) == 1:
            table.append(["the paper", "", *(row["clean / robust in the paper"] for row in found)])
        cells = [f"{percent(row['clean'])} / {percent(row['robust'])}" for row in found]
        table.append([name, percent(found[0]["moved"]), *cells])
    return table


def parts_table(rows):
    """Return what changes of the defaults change in points, on MNIST."""
    table = [["change", "clean", "attacked"]]
    for change, name in CHANGES.items():
        row = select(rows, network="mnist", layer="conv2", changed=change)
        table.append([name, row["clean against defaults"], row["robust against defaults"]])
    return table


def detection_table(rows):
    """Return the AUROC for each kind of inputs, of two combinations and of the best library."""
    networks = {"mnist": "MNIST", "cifar10": "CIFAR-10"}
    table = [["", *(n for name in networks.values() for n in (name, f"{name}, best library"))]]
    for inputs in INPUTS:
        line = [inputs]
        for network in networks:
            found = [r for r in rows if r["network"] == network and r["inputs"] == inputs]
            ours = (select(found, detector=name)["auroc"] for name in COMBINATIONS)
            # Other libraries' detectors are no methods of ours.
            libraries = [float(row["auroc"]) for row in found if not row["methods"]]
            line += [" / ".join(ours), f"{max(libraries):.3f}"]
        table.append(line)
    return table


def passes_table(files):
    """Return accuracy and forward passes of the authors' schedule and of shorter ones."""
    schedules = {
        "T 1,000, G 10": ("1000", "10", "False"),
        "T 150, G 10, stopped": ("150", "10", "True"),
        "T 150, G 3, stopped": ("150", "3", "True"),
    }
    table = [["", *schedules]]
    for network in ("mnist", "svhn", "cifar10", "digits"):
        cells = []
        for size, generations, stopping in schedules.values():
            row = select(
                files[f"passes_{network}"],
                population_size=size,
                generations=generations,
                early_stopping=stopping,
            )
            clean, robust = (100 * float(row[f"{kind}_accuracy"]) for kind in ("clean", "robust"))
            cells.append(f"{clean:.1f} / {robust:.1f}, {float(row['forward_passes']):,.0f}")
        table.append([NETWORKS.get(network, network), *cells])
    return table


def layers_table(rows):
    """Return the layer that layers="auto" chooses, and the best one by a search."""
    table = [["", "chosen", "clean / attacked", "best by search", "clean / attacked"]]
    for network, tried in by_network(rows).items():
        pair = select(tried, chosen="True"), max(tried, key=lambda row: float(row["mean"]))
        cells = [
            (row["layer"], f"{percent(row['clean'])} / {percent(row['attacked'])}") for row in pair
        ]
        table.append([NETWORKS[network], *cells[0], *cells[1]])
    return table


def sensing_table(rows):
    """Return the shares of images that ThreatScorer() flags, and the layer that it chooses."""
    table = [["", "fitted on", "layer", "attacked", "clean"]]
    for network, found in by_network(rows).items():
        for row in found:
            flagged = [percent(row[f"{kind} rows flagged"]) for kind in ("fooled", "clean")]
            fitted_on = f"{int(row['rows of fit']):,} {row['fitted on']}"
            table.append([NETWORKS[network], fitted_on, row["layers"], *flagged])
    return table


def serving_table(rows):
    """Return what a request of one image takes, and how many images a second are answered."""
    table = [["", "p50 / p99, ms", "CPU time, ms", "images a second", "in batches of 64"]]
    for row in rows:
        table.append(
            [
                row["estimator"],
                f"{float(row['p50_ms']):.1f} / {float(row['p99_ms']):.1f}",
                f"{float(row['cpu_ms']):.1f}",
                f"{int(row['images_per_s_1']):,}",
                f"{int(row['images_per_s_64']):,}",
            ]
        )
    return table


def alternatives_table(rows):
    """Return the times of what a user would pick instead."""
    table = [["instead of it", "theirs, ms", "ours, ms", "times as fast"]]
    for name, (task, alternative) in ALTERNATIVES.items():
        (row,) = (r for r in rows if task in r["task"] and r["alternative"] == alternative)
        times = (f"{float(row[key]):.3g}" for key in ("theirs_ms", "ours_ms", "times_as_fast"))
        table.append([name, *times])
    return table


def distributed_table(rows):
    """Return the time on workers, as measured and by the model."""
    table = [["", "images", "measured", "model"]]
    for row in rows:
        where = f"{row['workers']} worker(s)" if int(row["workers"]) else "this process alone"
        times = (f"{float(t):.0f} s" if t else "" for t in (row["seconds"], row["model_seconds"]))
        table.append([where, f"{int(row['samples']):,}", *times])
    return table


def certified_table(rows):
    """Return the share of images that are certainly classified correctly within a radius."""
    radii = ("0", "0.25", "0.5", "1")
    table = [["", *(f"radius {radius}" for radius in radii)]]
    for row in rows:
        if "block2" in row["classifier"]:
            continue  # only to download
        noise = f", sigma {row['sigma']}" if row["sigma"] else ""
        name = f"{row['data'].split(' (')[0]}: {row['classifier']}{noise}"
        shares = (percent(row[f"radius {radius}"]) for radius in radii)
        table.append([name, *shares])
    return table


def by_network(rows):
    """Return the rows of each network, in the order of the other tables."""
    names = sorted({row["network"] for row in rows}, key=list(NETWORKS).index)
    return {name: [row for row in rows if row["network"] == name] for name in names}


if __name__ == "__main__":
    print(readme_table(Path(__file__).parents[1] / "benchmarks" / "results"))
