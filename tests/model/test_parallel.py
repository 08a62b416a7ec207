"""Megatron's random states are seeded before anything is built, and its own tracker works with them on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import groups, parallel
from megatron_ext.model.build import build_policy
from megatron_ext.model.forward import forward
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.train import packing
from tests import gloo
from tests.train.tiny_run import TINY, Trainer

STATES = {"data-parallel-rng", "model-parallel-rng", "expert-parallel-rng"}


def sequence_parallel(rank: int, world: int, seed: int | None, recompute: str = "none") -> int:
    cpu_compat.enter()
    if seed is None:  # Megatron's groups alone
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
    else:
        parallel.initialize(ParallelConfig(ranks_per_node=world, tensor=world, sequence=True), seed=seed)
    policy = build_policy(TINY, ModelLayout(tensor=world, sequence=True), ModelOptions(torch.float32, recompute))
    for parameter in policy.modules[0].parameters():
        torch.nn.init.constant_(parameter, 0.01)
    [stats] = forward(policy, [packing.pack([([1, 2, 3], [4, 5, 6])], multiple=world)], Needs(), 1.0) or []
    return len(stats.logprob)


def test_sequence_parallelism_runs_through_megatrons_own_fork() -> None:
    assert gloo.run(sequence_parallel, 2, 3) == [3, 3]


def test_without_a_seed_the_cpu_raises_what_a_gpu_raises() -> None:
    with pytest.raises(AssertionError, match="cuda rng state model-parallel-rng is not added"):
        gloo.run(sequence_parallel, 2, None)


def draws(rank: int, world: int, seed: int, layout: dict[str, Any]) -> dict[str, list[float]]:
    """What the first draws in each of Megatron's regions would be, and that they leave no trace outside."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout), seed=seed)
    tracker: Any = get_cuda_rng_tracker()
    assert tracker.get_states().keys() == STATES
    found, outside = {}, torch.get_rng_state()
    for name in sorted(STATES):
        with tracker.fork(name):
            first = torch.rand(2, device="cuda").tolist()
        with tracker.fork(name):
            assert torch.rand(2, device="cuda").tolist() != first  # it goes on where it stopped
        found[name] = first
    assert torch.equal(torch.get_rng_state(), outside)
    assert int(torch.default_generator.initial_seed()) == seed
    return found


def test_regions_draw_as_megatron_says() -> None:
    """Tensor-parallel ranks draw differently, data-parallel ones alike, and the seed matters."""
    first, second, third, fourth = gloo.run(draws, 4, 5, {"tensor": 2})
    assert first["model-parallel-rng"] != second["model-parallel-rng"]
    assert first["data-parallel-rng"] == second["data-parallel-rng"]
    assert (first, second) == (third, fourth)
    assert gloo.run(draws, 4, 6, {"tensor": 2})[0] != first


def test_experts_draw_apart() -> None:
    first, second = gloo.run(draws, 2, 5, {"expert": 2})
    assert first["expert-parallel-rng"] != second["expert-parallel-rng"]


def tracked_run(rank: int, world: int, root: Any, resumed: bool) -> tuple[dict[str, Tensor], float]:
    run = Trainer(world, tensor=2).fill(1)
    tracker: Any = get_cuda_rng_tracker()
    if resumed:
        assert run.load(root).refused == ()
    else:
        with tracker.fork():
            torch.rand(groups.tensor().rank() + 1)  # the saved states are not the seed's
        run.save(root, 1)
    states = {name: state.clone() for name, state in tracker.get_states().items()}
    with tracker.fork():
        return states, float(torch.rand(()))


def test_a_resumed_run_has_the_trackers_states(tmp_path: Any) -> None:
    saved = gloo.run(tracked_run, 2, tmp_path, False)
    for (states, draw), (loaded, again) in zip(saved, gloo.run(tracked_run, 2, tmp_path, True), strict=True):
        assert states.keys() == STATES == loaded.keys()
        assert all(torch.equal(states[name], loaded[name]) for name in STATES) and draw == again


@pytest.mark.parametrize("gpu", [False, True])
def test_the_default_group_is_not_bound_to_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def init_process_group(backend: str, **options: Any) -> None:
        seen.update(options, backend=backend)
        raise InterruptedError

    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with pytest.raises(InterruptedError):
        parallel.initialize(ParallelConfig(ranks_per_node=1))
    assert seen["backend"] == ("nccl" if gpu else "gloo")
    assert seen.get("device_id") is None  # torch splits NCCL's communicator for gloo groups otherwise, and hangs


LISTENING = """
import json, os, pathlib, sys
import psutil
from megatron_ext import cpu_compat
from megatron_ext.model import parallel
from megatron_ext.config.schema import ParallelConfig

cpu_compat.enter()
parallel.initialize(ParallelConfig(ranks_per_node=2))
found = [each.laddr for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
store = os.stat(int(os.environ["RANKS_STORE_FD"]))
assert store.st_nlink == 0 and store.st_mode & 0o077 == 0 and store.st_size > 0, store
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(json.dumps([found, int(os.environ["MASTER_PORT"])]))
"""


def test_ranks_of_one_machine_listen_on_loopback_alone(tmp_path: Path) -> None:
    """Those of the real launcher, for gloo's pairs. No store listens, to which any user might write: it is a file that
    has no name, and whose descriptor only this user's processes reach."""
    (tmp_path / "listening.py").write_text(LISTENING)
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(tmp_path)])
    command = [sys.executable, "-m", "tools.ranks", "--ranks-per-node", "2", "listening", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, check=True, timeout=120)
    for rank in range(2):
        listening, store = json.loads((tmp_path / str(rank)).read_text())
        assert listening and {address for address, _ in listening} == {"127.0.0.1"}
        assert store not in [port for _, port in listening]
