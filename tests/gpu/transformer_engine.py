"""Layers of Transformer Engine on one GPU, at full size as one rank of sixteen. See tests/gpu/README.md.

    python -m tests.gpu.transformer_engine [--rehearse] [--out FILE] [--minutes 9] [--only CHECK ...]

Needs Transformer Engine besides what training needs; a rehearsal does without.
"""

from __future__ import annotations

import sys

from tests.gpu.harness import Check, main

_CHECKS = "tests.gpu.transformer_engine_checks:"

PRESENT = "Transformer Engine is used"

CHECKS = (
    Check("machine", "tests.gpu.operator_checks:machine", seconds=20),
    Check(PRESENT, f"{_CHECKS}present", seconds=10),
    Check("names of parameters", f"{_CHECKS}names", seconds=20, after=(PRESENT,)),
    Check("precision", f"{_CHECKS}precision", seconds=40, after=(PRESENT,)),
    Check("full-size step", f"{_CHECKS}full_size", seconds=100, after=(PRESENT,)),
    Check("fusions on and off", f"{_CHECKS}fusions", seconds=90, after=(PRESENT,)),
    Check("recomputation", f"{_CHECKS}recompute", seconds=50, after=(PRESENT,)),
    Check("mixture of experts: save, resume, convert", f"{_CHECKS}experts_run", seconds=70, after=(PRESENT,)),
    Check("dry run without the GPU", f"{_CHECKS}dry_run", seconds=40),
)

if __name__ == "__main__":
    sys.exit(main("transformer_engine", CHECKS))
