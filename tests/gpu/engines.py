"""vLLM beside training on GPUs: taking turns on one, and fed over NCCL on another. See tests/gpu/README.md.

    python -m tests.gpu.engines [--rehearse] [--out FILE] [--minutes 9] [--only CHECK ...]

Beyond the three runs: it needs vLLM, and its second check two GPUs. What a machine lacks is told, and no failure.
"""

from __future__ import annotations

import sys

from tests.gpu.harness import Check, main

_CHECKS = "tests.gpu.engines_checks:"

CHECKS = (
    Check("training and vLLM take turns", f"{_CHECKS}taking_turns", seconds=180),
    Check("a server takes weights over NCCL", f"{_CHECKS}server_over_nccl", seconds=240),
)

if __name__ == "__main__":
    sys.exit(main("engines", CHECKS))
