"""What a worker of a pool of rewards imports and builds, in the environment that it has."""

from __future__ import annotations

import os

from megatron_ext.rollout.rewards import verify, worker

os.environ.update(worker.WORKER_ENVIRONMENT)  # SymPy, which is not imported yet, reads it
assert verify.score(r"\boxed{x^2+2x+1}", "(x+1)^2").correct
