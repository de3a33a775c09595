#!/usr/bin/env bash
# Run the tests and benchmarks that need a GPU, and print a report.
#
# Needs a checkout and a Python with torch and CUDA; what else is missing is installed into it, unless
# it is there already. The report says which tests failed; the exit status is that of the tests.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"

"$python" -c 'import torch; assert torch.cuda.is_available(), "torch finds no GPU"' || exit 1
"$python" -c 'import pytest, xdist, hypothesis, sklearn, skorch, safetensors, tqdm' 2> /dev/null ||
    "$python" -m pip install --quiet --editable . pytest pytest-xdist hypothesis || exit 1

echo "# $("$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())')"
echo "# $(git log -1 --format=%h 2> /dev/null || echo no repository)"
PYTHONPATH=. "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py
status=$?
PYTHONPATH=. "$python" benchmarks/bench_limits.py --device cuda --only overhead device
exit $status
