"""Training on one GPU, with or without Transformer Engine: right, resumable, and as large as planned. See README.md.

    python -m tests.gpu.training [--rehearse] [--out FILE] [--minutes 9] [--only CHECK ...]

Needs what training needs (pyproject.toml) except vLLM and triton; writes to the run's scratch folder only.
"""

from __future__ import annotations

import os
import sys

from tests.gpu.harness import Check, main

_CHECKS = "tests.gpu.training_checks:"

CHECKS = (
    Check("machine", "tests.gpu.operator_checks:machine", seconds=15),
    Check("parity with transformers", f"{_CHECKS}parity", seconds=40),
    Check("tiny run beside the CPU's", f"{_CHECKS}tiny_run", seconds=60),
    Check("kill and resume", f"{_CHECKS}kill_and_resume", seconds=60, after=("tiny run beside the CPU's",)),
    Check("offloads", f"{_CHECKS}offloads", seconds=30, after=("tiny run beside the CPU's",)),
    Check("fused head", f"{_CHECKS}fused_head", seconds=20, after=("tiny run beside the CPU's",)),
    Check("memory by phase", f"{_CHECKS}memory", seconds=45),
)

if __name__ == "__main__":
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # Transformer Engine's fp32 products are TF32 otherwise
    sys.exit(main("training", CHECKS))
