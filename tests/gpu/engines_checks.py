"""Short runs of the tiny recipe whose responses vLLM draws on a GPU: its log-probs must be the trainer's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_ext.rollout.vllm.version import vllm_fault
from tests.gpu.harness import Absent, Here, Line, limit
from tests.gpu.training_checks import train

MISMATCH = 1e-2  # nats, mean: float32 here, vLLM's own kernels there


def taking_turns(here: Here) -> Iterator[Line]:
    """Sleep, wake and weights in between, with the optimizer in host memory while vLLM is awake."""
    _need(here, gpus=1)
    options = ("rollout.engine=vllm", "rollout.gpu_memory_utilization=0.3", "model.offload_optimizer=true")
    yield from _agreement(train(here, "turns", *options).metrics())


def server_over_nccl(here: Here) -> Iterator[Line]:
    """Training on the first GPU, a server on the second."""
    _need(here, gpus=2)
    options = ("rollout.engine=vllm_server", 'rollout.servers.devices=["1"]', "rollout.gpu_memory_utilization=0.3")
    yield from _agreement(train(here, "server", *options, seen="0").metrics())


def _need(here: Here, *, gpus: int) -> None:
    if here.rehearse:
        raise Absent("tests/vllm runs both on a CPU")
    if fault := vllm_fault():
        raise Absent(str(fault))
    if torch.cuda.device_count() < gpus:
        raise Absent(f"{torch.cuda.device_count()} GPUs here, {gpus} needed")


def _agreement(steps: list[dict[str, float]]) -> Iterator[Line]:
    for number, step in enumerate(steps, 1):
        yield limit(f"step {number}: mismatch", step["mismatch/mean"], MISMATCH, "nats")
