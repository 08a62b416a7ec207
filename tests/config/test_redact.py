"""Secrets that got into a configuration are in nothing that a run writes or says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.manifest import differing_keys, step_name
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.redact import redact, redact_text
from tests import warm
from tools import train

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "recipes" / "tiny" / "tiny-cpu.toml")
SECRET = "hunter2hunter2hunter2"
LEAKING = {
    "data.hub": f"https://user:{SECRET}@host/data?x=1&token={SECRET}",
    "model.hub": f"s3://bucket/model?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}",
    "prompt.suffix": f" hf_{SECRET}",
}


def run(*command: str) -> str:
    """What a command that must succeed says."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = warm.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_nothing_a_run_writes_or_says_holds_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["parallel.ranks_per_node=1", "parallel.tensor=1", "rollout.max_response_tokens=8", "rollout.prompts=8"]
    given = [f'{key}="{value}"' for key, value in LEAKING.items()]
    command = ["tools.train", TINY, f"log.dir={tmp_path}", "name=run", "data.max_prompt_tokens=128", *small, *given]
    assert train.main([*command[1:], "--print-config"]) == 0
    said = capsys.readouterr().out + run(*command, "train.steps=1")
    said += run("tools.convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf"))
    assert SECRET not in said
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "samples.jsonl", "report.html"} <= {path.name for path in files}
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []
    run_dir, exported = tmp_path / "run", tmp_path / "hf" / "README.md"
    for file in (run_dir / "config.json", run_dir / "checkpoints" / step_name(1) / "MANIFEST.json", exported):
        assert "https://***@host/data?x=1&token=***" in file.read_text()


@pytest.mark.parametrize(
    "override",
    [
        f"train.steps=https://user:{SECRET}@host",
        f"data=https://user:{SECRET}@host",
        f"data.train=https://user:{SECRET}@host/data.jsonl",
        f"model.weights=s3://bucket/model?token={SECRET}",
        f"model.dtype=hf_{SECRET}",
        f'optimizer=[{{api_key = "{SECRET}"}}]',
        f"hf_{SECRET}",
    ],
)
def test_a_message_holds_no_secret(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([TINY, override]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert "configuration error" in said.err


def test_a_manifest_without_secrets_resumes_the_run_that_has_them() -> None:
    config: dict[str, Any] = {"prompt": {"suffix": LEAKING["prompt.suffix"], "stages": (1, 2)}, "seed": 1}
    assert differing_keys(redact(config), config) == {}
    changed = differing_keys(redact(config), {**config, "prompt": {"suffix": f"x hf_{SECRET}", "stages": (1, 2)}})
    assert changed == {"prompt.suffix": (" ***", "x ***")}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://u:{SECRET}@host/p", "https://***@host/p"),
        (f"https://u:a@{SECRET}@host/p", "https://***@host/p"),  # an @ in the password
        (f"postgres://{SECRET}@db", "postgres://***@db"),
        (f"https://h/?api_key={SECRET}&y=2", "https://h/?api_key=***&y=2"),
        (f"hf_{SECRET}", "***"),
        (f"a sk-{SECRET} b", "a *** b"),
        (f"github_pat_{SECRET}", "***"),
        (f"ghp_{SECRET}", "***"),
        (f"glpat-{SECRET}", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        # what only looks like one
        ("https://host/a@b", "https://host/a@b"),
        ("/data/hf_weights/sk-1", "/data/hf_weights/sk-1"),
        ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
        ("task-1234567890123456789", "task-1234567890123456789"),
        ("https://host/x?page=2", "https://host/x?page=2"),
    ],
)
def test_what_is_hidden(text: str, shown: str) -> None:
    assert redact_text(text) == shown
    assert str(ConfigError(f"data.train: no such file: {text}")) == f"data.train: no such file: {shown}"
