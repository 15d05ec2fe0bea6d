"""Tests of kernels run twice: compiled, as everywhere, and from here once more in plain Python (NUMBA_DISABLE_JIT=1), where each
access is checked against the memory that is registered. A folder whose tests run kernels is added to FOLDERS.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ["tests/memory", "tests/ring", "tests/dataplane", "tests/iommu", "tests/host", "tests/vm"]


@pytest.mark.skipif(bool(os.environ.get("NUMBA_DISABLE_JIT")), reason="this run is interpreted already")
def test_kernels_pass_the_same_tests_interpreted() -> None:
    command = [sys.executable, "-m", "pytest", *FOLDERS, "-x", "-vv", "--show-capture=no", "-p", "no:cacheprovider"]
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"interpreted:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    passed = set(re.findall(r"^(tests/\w+)/\S+ PASSED", done.stdout, re.MULTILINE))
    assert passed == set(FOLDERS), f"no test ran:\n{done.stdout[-2000:]}"
