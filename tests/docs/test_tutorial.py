"""Every bash block of docs/tutorial.md, in its order, in a folder that looks like a checkout.

A comment above a block says how the test differs from what the page shows: ``<!-- in the test: train.steps=2 -->``.
Words in capitals are environment variables of the block, ``exit code N`` is what it ends with, all others are added to
its last line. There is no cluster: ``sbatch`` stands for ``DRY_RUN=1 bash``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm
from tests.docs.pages import ROOT, blocks

PAGE = ROOT / "docs" / "tutorial.md"
BLOCKS = blocks(PAGE.read_text(), "bash")
PRELUDE = 'set -euo pipefail\nsbatch() { DRY_RUN=1 bash "$@"; }\n'
SHOWN = {  # part of a command -> what its output must hold
    "megatron-entropy quickstart": "held-out problems, 8 responses each",
    "megatron-entropy methods": "| `siren` |",
    "--print-config": "tau",
    "name=aer\n": "aer 2/2",
    "ls runs/quickstart": "report.html",
    "metrics.jsonl": '"entropy/full"',
    "megatron-entropy compare": "method.name",
    "--gpu a100": "does not fit",
    "2n8g.toml --dry-run": "7,615,616,512",
    "DRY_RUN=1": "srun --nodes=2",
    "sbatch slurm/siren_tiny.sh": "recipes/siren/siren-tiny-cpu.toml",
    "RECIPE=": "recipes/dr_grpo/dr_grpo-qwen2.5-math-7b-2n8g.toml train.steps=50",
}


def as_tested(above: str, code: str) -> tuple[str, int]:
    """The block with the settings of the comment above it, and the exit code it should have."""
    match = re.fullmatch(r"<!-- in the test: (.*) -->", above)
    settings, expected = match[1] if match else "", 0
    if code_named := re.fullmatch(r"exit code (\d+)", settings):
        settings, expected = "", int(code_named[1])
    words = settings.split()
    exports = "".join(f"export {word}\n" for word in words if re.match(r"[A-Z_]+=", word))
    added = "".join(f" {word}" for word in words if not re.match(r"[A-Z_]+=", word))
    return f"{exports}{code}{added}\n", expected


def checkout(folder: Path) -> Path:
    """Links to what the tutorial's commands read; what they write stays in ``folder``."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "recipes", "requirements", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.mark.timeout(1200)  # beside other tests
def test_every_block_runs(tmp_path: Path) -> None:
    folder = checkout(tmp_path)
    inherited = {name: value for name, value in os.environ.items() if name not in ("RECIPE", "ENV_FILE", "MAKEFLAGS")}
    path = f"{warm.console(tmp_path / 'bin')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = inherited | {"PYTHONPATH": str(ROOT), "PATH": path}
    for line, above, code in BLOCKS:
        script, expected = as_tested(above, code)
        done = subprocess.run(
            ["bash", "-c", PRELUDE + script], cwd=folder, env=environment, capture_output=True, text=True
        )
        shown = f"docs/tutorial.md, line {line}:\n{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == expected, shown
        for part, expected_text in SHOWN.items():
            if part in f"{code}\n":
                assert expected_text in done.stdout, shown


def test_no_block_is_left_out() -> None:
    fences = [line for line in PAGE.read_text().splitlines() if line.startswith("```") and line != "```"]
    assert fences == ["```bash"] * len(BLOCKS)
    assert all(any(part in f"{code}\n" for _, _, code in BLOCKS) for part in SHOWN)


def test_settings_are_added_to_the_last_line() -> None:
    assert as_tested("", "a\nb") == ("a\nb\n", 0)
    assert as_tested("<!-- in the test: train.steps=2 name=x -->", "a\nb") == ("a\nb train.steps=2 name=x\n", 0)
    assert as_tested("<!-- in the test: MAKEFLAGS=--dry-run -->", "make x") == (
        "export MAKEFLAGS=--dry-run\nmake x\n",
        0,
    )
    assert as_tested("<!-- in the test: exit code 1 -->", "a") == ("a\n", 1)
