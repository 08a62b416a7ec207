"""Layers of Transformer Engine on one GPU, at full size as one rank of sixteen. See tests/gpu/README.md.

    python -m tests.gpu.transformer_engine [--rehearse] [--out FILE] [--minutes 9] [--only CHECK ...]

Needs Transformer Engine besides what training needs; a rehearsal does without.
"""

from __future__ import annotations

import sys

from tests.gpu.harness import Check, main

_CHECKS = "tests.gpu.transformer_engine_checks:"

CHECKS = (
    Check("machine", "tests.gpu.operator_checks:machine", seconds=20),
    Check("layers and their names", f"{_CHECKS}layers", seconds=20),
    Check("precision", f"{_CHECKS}precision", seconds=40),
    Check("full-size step", f"{_CHECKS}full_size", seconds=100),
    Check("fusions on and off", f"{_CHECKS}fusions", seconds=90),
    Check("recomputation", f"{_CHECKS}recompute", seconds=50),
    Check("mixture of experts: save, resume, convert", f"{_CHECKS}experts_run", seconds=70),
    Check("dry run without the GPU", f"{_CHECKS}dry_run", seconds=40),
)

if __name__ == "__main__":
    sys.exit(main("transformer_engine", CHECKS))
