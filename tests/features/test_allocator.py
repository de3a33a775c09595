"""The C library's memory."""

import os
import subprocess
import sys

import pytest

from sklearn_rails.features import device

CODE = """
import resource, torch
from sklearn_rails.features.device import keep_freed_memory
keep_freed_memory()
def touch():
    torch.ones(2**21)  # 8 MiB
for _ in range(4):
    touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc alone has these thresholds")
@pytest.mark.parametrize("variables", [{}, {"MALLOC_TRIM_THRESHOLD_": "65536"}])
def test_freed_blocks_are_used_again_whatever_the_environment_says(variables):
    run = subprocess.run(
        [sys.executable, "-c", CODE],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | variables,
    )
    # Else each block takes a page fault for 4 KiB, or for 2 MiB with huge pages.
    assert int(run.stdout) < 40


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    device.keep_freed_memory()
