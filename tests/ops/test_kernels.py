"""The Triton kernels equal the portable path in Triton's interpreter, for every output and gradient."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_ext.ops import backend, rows


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_the_portable_path_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.kernel_cases"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    worst = json.loads(done.stdout.splitlines()[-1])
    assert len(worst) == 2 * 4 * 2 * 5
    assert max(worst.values()) <= 1, {case: ratio for case, ratio in worst.items() if ratio > 1}


def test_a_cpu_takes_the_portable_path():
    assert backend.row_work(torch.zeros(1)) is rows
    assert backend.row_work(torch.zeros(1, dtype=torch.float64)) is rows
