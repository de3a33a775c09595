"""Run the main tests with old and new versions of the dependencies: ``make test-matrix``.

    python tests/matrix.py                    # all environments
    python tests/matrix.py minimum newest     # these
    python tests/matrix.py --cuda             # also where torch comes with CUDA libraries
    python tests/matrix.py --csv docs/develop/matrix.csv

Each environment is made once, in ``.venv-matrix/NAME``, and again when the requirements change.
What pytest prints goes to ``.venv-matrix/NAME.log``.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# A CPU build.
DEFAULT_TORCH = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()[-1]
# What the extra test installs: it names demo and attacks, and demo names plot.
EXTRAS = [
    PYPROJECT["optional-dependencies"][name] for name in ("test", "demo", "plot", "attacks", "dask")
]
DECLARED = sum(EXTRAS, PYPROJECT["dependencies"])
# pip takes no extras, such as dask[array], in a constraint.
MINIMUM = [re.sub(r"(\[.*\])?>=", "==", line) for line in DECLARED if ">=" in line]

# Versions that an environment fixes; all others are the newest that go with them.
ENVIRONMENTS = {
    "scikit-learn-1.6": ["scikit-learn==1.6.1", DEFAULT_TORCH],
    "scikit-learn-1.7": ["scikit-learn==1.7.*", DEFAULT_TORCH],
    "scikit-learn-1.8": ["scikit-learn==1.8.*", DEFAULT_TORCH],
    "newest": [DEFAULT_TORCH],
    "numpy-1.26": ["numpy==1.26.*", DEFAULT_TORCH],
    "torch-2.4": ["torch==2.4.0"],
    "torch-newest": [],
    "minimum": MINIMUM,
    # The minimum where no CPU build of the oldest torch can be had.
    "minimum-but-torch": [v for v in MINIMUM if not v.startswith("torch=")] + [DEFAULT_TORCH],
}

TESTS = [
    "tests/test_common.py",
    "tests/test_rails.py",
    "tests/test_dknn.py",
    "tests/test_threat.py",
    "tests/test_extractor.py",
    "tests/test_persistence.py",
    "tests/test_saving.py",
    "tests/test_packaging.py",
    "tests/features",
    "tests/immune",
    "tests/neighbors",
    "tests/reference",
    "tests/sensing",
]

VERSIONS = ["scikit-learn", "torch", "numpy", "scipy"]
COUNTS = ["passed", "failed", "error", "skipped", "deselected"]


def call(*command, **kwargs):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def install(name, fixed, cuda):
    """Return the environment's python, or a sentence that says why there is none."""
    folder = ROOT / ".venv-matrix" / name
    python = folder / "bin" / "python"
    done = folder / ".installed"
    sources = [ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(__file__)]
    if done.exists() and done.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return python, None
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(fixed) + "\n", encoding="utf-8")
    pip = [python, "-m", "pip", "install", "--constraint", constraints]
    if not cuda:
        plan = call(*pip, "--dry-run", "--quiet", "--report", "-", "torch")
        if plan.returncode:
            return None, plan.stderr.strip().splitlines()[-1]
        packages = [item["metadata"]["name"] for item in json.loads(plan.stdout)["install"]]
        if any(package.startswith(("nvidia-", "cuda-")) for package in packages):
            return None, "no CPU build of torch found (--cuda installs CUDA builds)"
    run = call(*pip, "--quiet", "--editable", ".[test]")
    if run.returncode:
        return None, run.stderr.strip().splitlines()[-1]
    done.touch()
    return python, None


def versions(python):
    installed = json.loads(call(python, "-m", "pip", "list", "--format", "json").stdout)
    found = {package["name"].lower(): package["version"] for package in installed}
    return [found[name] for name in VERSIONS]


def counts(python, log):
    # One thread: threads that compete for cores slow these small networks down.
    run = call(
        *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *("-m", "not slow and not browser", *TESTS),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log.write_text(run.stdout + run.stderr, encoding="utf-8")
    summary = run.stdout.strip().splitlines()[-1]
    found = {word: number for number, word in re.findall(r"(\d+) (\w+?)s?\b", summary)}
    return [found.get(word, "0") for word in COUNTS], run.returncode == 0


def print_table(rows):
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(*map(str.ljust, row, widths), sep="  ")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--cuda", action="store_true", help="install torch with CUDA (gigabytes)")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    args = parser.parse_args()
    if unknown := set(args.names) - set(ENVIRONMENTS):
        parser.error(f"no such environment: {', '.join(sorted(unknown))}")
    rows, passed = [["environment", *VERSIONS, *COUNTS]], True
    for name in args.names or ENVIRONMENTS:
        python, reason = install(name, ENVIRONMENTS[name], args.cuda)
        if reason:
            print(f"{name}: not run: {reason}", flush=True)
            rows.append([name, "not run", *[""] * (len(rows[0]) - 2)])
            continue
        row, ok = counts(python, ROOT / ".venv-matrix" / f"{name}.log")
        passed &= ok
        rows.append([name, *versions(python), *row])
        print(*rows[-1], flush=True)
    print()
    print_table(rows)
    if args.csv:
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
    return not passed


if __name__ == "__main__":
    sys.exit(main())
