"""Where a training was made: the code's commit and the machine, beside its results."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

PROVENANCE = "provenance.json"
CODE = Path(__file__).resolve().parents[2]


@cache
def here() -> dict[str, str]:
    """The commit ("" outside a checkout, with "+" where files differ from it), the machine and PyTorch's version."""
    commit, changed = _git("rev-parse", "--short=10", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    return {"commit": commit + ("+" if changed else ""), "machine": machine, "torch": torch.__version__}


def leave(folder: Path) -> None:
    """Write it into a job's folder; where an earlier start of the job was another, both: ``a; b``."""
    made = dict(read(folder))
    for key, value in here().items():
        if value not in (known := made.get(key, "").split("; ")):
            made[key] = "; ".join(filter(None, [*known, value]))
    (folder / PROVENANCE).write_text(json.dumps(made))


def read(folder: Path) -> Mapping[str, str]:
    """What ``leave`` wrote; nothing for a job of before."""
    path = folder / PROVENANCE
    return json.loads(path.read_text()) if path.exists() else {}


def processor() -> str:
    """The processor's name: Linux tells it in /proc/cpuinfo."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", "-C", str(CODE), *arguments], capture_output=True, text=True, check=False)
    return found.stdout.strip()
