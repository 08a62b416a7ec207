"""The operator benchmark at a small size: it writes its files, and prints no speed when a result is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parents[3]


def bench(folder: Path, *arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command, whose every process runs ``code`` before."""
    hook = folder.with_name(f"{folder.name}-hook")
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(code)
    options = ["ops", "--tokens", "16", "--vocab", "512", "--dtype", "float32", "--repeat", "1", "--out", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{hook}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "tools.bench", *options, *arguments]
    return warm.run(command, cwd=ROOT, env=environment, timeout=300)


def test_the_table_is_written_with_its_plot(tmp_path):
    done = bench(tmp_path, "--deterministic")
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = json.loads((tmp_path / "ops-cpu-tp1.json").read_text())["tables"]
    lines = {line["name"]: line for line in table["lines"]}
    assert lines["log-prob + entropy + nucleus"]["milliseconds"] > 0
    assert lines["log-prob + nucleus"]["resolved"] == 1.0
    assert lines["log-prob + nucleus, deterministic"]["error"] < 1e-5
    assert lines["gather + sort"]["error"] < 1e-4
    assert "<svg" in (tmp_path / "ops-cpu-tp1.svg").read_text()


def test_without_entropy_nothing_more_is_saved_and_exchanged(tmp_path):
    done = bench(tmp_path, "--tp", "2")
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = json.loads((tmp_path / "ops-cpu-tp2.json").read_text())["tables"]
    lines = {line["name"]: line for line in table["lines"]}
    assert lines["log-prob"]["collectives"] == lines["log-prob + entropy"]["collectives"] == 1
    assert lines["log-prob"]["exchanged_bytes_per_token"] == 16
    assert lines["log-prob + nucleus"]["collectives"] == 2


def test_replay_is_compared_with_gather_and_sort(tmp_path):
    done = bench(tmp_path, "--replay", "--tp", "2", "--top-k", "20")
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = json.loads((tmp_path / "replay-cpu-tp2.json").read_text())["tables"]
    lines = {line["name"]: line for line in table["lines"]}
    assert lines["replayed log-prob"]["exchanged_bytes_per_token"] == 16
    assert lines["replayed log-prob + entropy"]["exchanged_bytes_per_token"] == 32
    assert lines["gather + sort"]["exchanged_bytes_per_token"] == 4 * 256
    assert 1 <= table["ids_per_token"] <= 20


def test_a_wrong_replay_prints_no_speed(tmp_path):
    broken = "import megatron_ext.ops.support_stats as stats\nstats._gradient = lambda entries, *_: 0 * entries.logit"
    done = bench(tmp_path, "--replay", code=broken)
    assert done.returncode == 1
    assert "nothing is timed" in done.stdout and " ms" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_prints_no_speed(tmp_path):
    broken = (
        "import megatron_ext.ops.logit_passes as logit_passes\n"
        "right = logit_passes.gradient\n"
        "def wrong(logits, column, scale, real, token, out):\n"
        "    right(logits, column, scale, real, token, out); out.mul_(1.001)\n"
        "logit_passes.gradient = wrong"
    )
    done = bench(tmp_path, code=broken)
    assert done.returncode == 1
    assert "nothing is timed" in done.stdout and " ms" not in done.stdout
    assert not list(tmp_path.iterdir())
