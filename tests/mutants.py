"""Mutation testing: how many small faults, put into the code at random, do the tests find?

mutmut, set up in pyproject.toml, makes the faults and runs the tests that reach each. This draws a
sample of them by a seed, so many of each module as it has of all, runs those that are not known to
be found, and prints the counts of each module as CSV, and below them the ones that no test finds.
"""

import argparse
import collections
import csv
import math
import random
import re
import subprocess
import sys
from pathlib import Path

from scipy.stats import binomtest

# Faults that change no result, and why: by a regular expression for the lines that change, as
# mutmut shows them.
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.csv")
# The one that is run first, to have mutmut make all of them and find out what each test reaches.
FIRST = "sklearn_rails.neighbors.products.x_add_split_product__mutmut_1"
FOUND = {"killed", "timeout", "segfault"}


def mutmut(*arguments, **kwargs):
    command = [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", *arguments]
    return subprocess.run(command, check=True, text=True, **kwargs).stdout


def read_states():
    """The state of every mutant, by name."""
    lines = mutmut("results", "--all", "True", stdout=subprocess.PIPE).splitlines()
    return dict(line.strip().rsplit(": ", 1) for line in lines)


def module_of(name):
    return name.rpartition(".")[0].removeprefix("sklearn_rails.")


def draw(names, size, seed):
    """The same share of every module's mutants, rounded up."""
    modules = collections.defaultdict(list)
    for name in sorted(names):
        modules[module_of(name)].append(name)
    rng = random.Random(seed)
    return [
        name
        for of_module in modules.values()
        for name in rng.sample(of_module, math.ceil(size * len(of_module) / len(names)))
    ]


def changes_of(name):
    """What mutmut shows of a mutant: the changed lines."""
    lines = mutmut("show", name, stdout=subprocess.PIPE).splitlines()
    return [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=400, help="number of mutants in the sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    options = parser.parse_args()

    mutmut("run", "--max-children", "1", FIRST, stdout=sys.stderr)
    sample = draw(read_states(), options.size, options.seed)
    states = read_states()
    left = [name for name in sample if states[name] not in FOUND]
    if left:
        mutmut("run", "--max-children", "1", *left, stdout=sys.stderr)
    states = read_states()

    with EQUIVALENT.open(newline="") as file:
        known = [re.compile(row["changes"], re.MULTILINE) for row in csv.DictReader(file)]
    counts = collections.defaultdict(lambda: [0, 0, 0, 0])
    survivors = []
    for name in sample:
        module, place = module_of(name), 1
        if states[name] not in FOUND:
            changes = "\n".join(changes_of(name))
            place = 2 if any(pattern.search(changes) for pattern in known) else 3
            if place == 3:
                survivors.append(f"{name}: {states[name]}\n{changes}")
        for count in (counts[module], counts["all"]):
            count[0] += 1
            count[place] += 1
    table = csv.writer(sys.stdout)
    table.writerow(["module", "mutants", "killed", "equivalent", "survived"])
    table.writerows([module, *count] for module, count in sorted(counts.items()))
    mutated, killed, equivalent, _ = counts["all"]
    for kind, n in (("all", mutated), ("those that change a result", mutated - equivalent)):
        interval = binomtest(killed, n).proportion_ci(0.95, "wilson")
        print(f"killed of {kind}: {killed / n:.1%} ({interval.low:.1%} to {interval.high:.1%})")
    print("", *survivors, sep="\n\n")


if __name__ == "__main__":
    main()
