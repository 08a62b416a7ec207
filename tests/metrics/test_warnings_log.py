"""What libraries warn of is in the run's folder, and not on the terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parents[2]
TINY = "recipes/tiny/tiny-cpu.toml"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def test_a_runs_terminal_is_free_of_warnings_and_its_folder_has_those_of_every_rank(tmp_path: Path) -> None:
    small = ["parallel.ranks_per_node=2", "parallel.tensor=2", "rollout.prompts=8", "train.mini_batch_prompts=8"]
    small += ["train.steps=1", "rollout.max_response_tokens=8", "log.trackers=[]", "name=run", f"log.dir={tmp_path}"]
    done = run("-m", "tools.train", TINY, *small)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count(str(tmp_path / "run" / "warnings")) == 1
    for rank in (0, 1):
        text = (tmp_path / "run" / "warnings" / f"rank_{rank}.log").read_text()
        assert "Transformer Engine and Apex are not installed" in text  # Megatron's, when it is imported


def test_errors_and_our_own_messages_stay_on_the_terminal(tmp_path: Path) -> None:
    code = """
import logging, sys, warnings
from pathlib import Path
from megatron_ext.metrics import warnings_log
warnings_log.hold()
warnings.warn("early warning")
warnings_log.write_to(Path(sys.argv[1]))
from transformers.utils import logging as transformers_logging
transformers_logging.get_logger("transformers.models").warning("a model's warning")
logging.getLogger("megatron.core").warning("late warning")
logging.getLogger("megatron.core").error("an error")
logging.getLogger("megatron_ext.rollout.vllm_server.fleet").warning("server 1 is replaced")
"""
    done = run("-W", "ignore", "-c", code, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["an error", "server 1 is replaced"]
    text = (tmp_path / "warnings" / "rank_0.log").read_text()
    assert text.index("early warning") < text.index("a model's warning") < text.index("late warning")
    assert "an error" in text and "server 1 is replaced" in text


def test_a_run_that_is_refused_leaves_no_file(tmp_path: Path) -> None:
    wrong = ["parallel.ranks_per_node=1", "parallel.tensor=1", f"log.dir={tmp_path}", "data.max_prompt_tokens=1"]
    done = warm.run([sys.executable, "-m", "tools.train", TINY, *wrong], cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert list(tmp_path.rglob("*.log")) == []
