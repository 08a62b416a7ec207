"""The operator on one GPU: right first, then fast. See tests/gpu/README.md.

    python -m tests.gpu.operator [--rehearse] [--out FILE] [--minutes 9] [--only CHECK ...]

Needs torch and triton; Liger is timed where it is installed. Nothing is timed before the values are right.
"""

from __future__ import annotations

import sys

from tests.gpu.harness import Check, main

RIGHT = ("values and gradients", "edges", "offsets beyond 2^31", "fused head", "kernel cases")
_CHECKS, _SPEED = "tests.gpu.operator_checks:", "tests.gpu.operator_speed:"

CHECKS = (
    Check("machine", f"{_CHECKS}machine", seconds=15),
    Check("kernel cases", f"{_CHECKS}kernels", seconds=40),
    Check("values and gradients", f"{_CHECKS}values", seconds=40),
    Check("edges", f"{_CHECKS}edges", seconds=15),
    Check("offsets beyond 2^31", f"{_CHECKS}large_offsets", seconds=20),
    Check("fused head", f"{_CHECKS}fused_head", seconds=10),
    Check("launches", f"{_CHECKS}launches", seconds=20),
    Check("registers and spills", f"{_CHECKS}registers", seconds=15),
    Check("verl's arithmetic", f"{_SPEED}verl_arithmetic", seconds=5),
    Check("speed of the statistics", f"{_SPEED}statistics", seconds=60, after=(*RIGHT, "verl's arithmetic")),
    Check("speed of the exchange", f"{_SPEED}exchange", seconds=15, after=RIGHT),
    Check("speed with the fallback", f"{_SPEED}num_fallback", seconds=40, after=RIGHT),
    Check("speed of the fused head", f"{_SPEED}fused_head", seconds=30, after=RIGHT),
    Check("compute-sanitizer", f"{_CHECKS}sanitizer", seconds=90),
)

if __name__ == "__main__":
    sys.exit(main("operator", CHECKS))
