"""On a machine with GPUs: ``pytest tests/gpu/runs.py``. Short runs of the tiny recipe with NCCL, and with vLLM.

The first compares a GPU with this machine's CPU; the second has training and vLLM take turns on one GPU (sleep, wake,
weights in between); the third, for two GPUs, sends the weights to a server over NCCL.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext.rollout.vllm_version import vllm_fault

RECIPE = "recipes/siren/siren-tiny-cpu.toml"
ONE_RANK = ("parallel.ranks_per_node=1", "parallel.tensor=1", "log.tensorboard=false", "checkpoint.every=0")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
needs_vllm = pytest.mark.skipif(vllm_fault() is not None, reason=str(vllm_fault()))


def train(folder: Path, *overrides: str, devices: str, steps: int = 3) -> list[dict[str, float]]:
    """The steps' metrics of a run that sees ``devices`` alone."""
    command = [sys.executable, "-m", "tools.train", RECIPE, "name=run", f"log.dir={folder}", f"train.steps={steps}"]
    done = subprocess.run(
        [*command, *ONE_RANK, *overrides],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": devices},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


@needs_gpu
def test_a_step_on_the_gpu_is_the_cpus(tmp_path: Path) -> None:
    """Float32 everywhere; the draws follow from seeds, so nearly all responses are the same ones."""
    gpu, cpu = (train(tmp_path / name, devices=seen, steps=1)[0] for name, seen in (("gpu", "0"), ("cpu", "")))
    print({name: (gpu[name], cpu[name]) for name in ("entropy/full", "reward/mean", "loss/total", "grad/norm")})
    assert gpu["mismatch/mean"] < 1e-4
    for name in ("entropy/full", "entropy/nucleus", "response/length", "siren/anchor"):
        assert gpu[name] == pytest.approx(cpu[name], rel=1e-2)


@needs_gpu
@needs_vllm
def test_training_and_vllm_take_turns_on_one_gpu(tmp_path: Path) -> None:
    options = ("rollout.engine=vllm", "rollout.memory_share=0.3", "model.offload_optimizer=true")
    steps = train(tmp_path, *options, devices="0")
    assert all(step["mismatch/mean"] < 1e-2 for step in steps)


@needs_two
@needs_vllm
def test_a_server_takes_weights_over_nccl(tmp_path: Path) -> None:
    options = ("rollout.engine=vllm_server", 'rollout.servers.devices=["1"]', "rollout.memory_share=0.3")
    steps = train(tmp_path, *options, devices="0")
    assert all(step["mismatch/mean"] < 1e-2 for step in steps)
