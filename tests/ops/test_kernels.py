"""The Triton kernels equal the portable path in Triton's interpreter, for every output and gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_ext.ops import backend, portable


@pytest.mark.parametrize(
    ("case", "results"),
    [
        *(("tokens", 3 * 2 * 4), ("ranks", 2 * 2 * 4), ("edges", 0), ("support", 6 + 4)),
        *(("min_p", 2 * 2), ("min_p on ranks", 1)),
    ],
)
def test_kernels_equal_the_portable_path_in_the_interpreter(case, results):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.ops.kernel_cases", case],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    worst = json.loads(done.stdout.splitlines()[-1])
    assert len(worst) == results
    assert all(ratio <= 1 for ratio in worst.values()), {case: ratio for case, ratio in worst.items() if ratio > 1}


def test_a_cpu_takes_the_portable_path():
    assert backend.implementation(torch.zeros(1)) is portable
    assert backend.implementation(torch.zeros(1, dtype=torch.float64)) is portable
