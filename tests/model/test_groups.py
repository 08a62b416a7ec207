"""What crosses which process groups in a whole run, as on GPUs, where a group is NCCL's unless it asks for gloo.

NCCL serialises a Python object through the GPU, and a wait on it ends the run after ten minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext import cpu_compat
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model import parallel
from megatron_ext.train import loop
from tests import gloo
from tests.train import whole_run

OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list")
WAITS = ("barrier", "all_reduce")  # of the loop: at its end, and whether to stop
LAYOUTS = [
    ("siren", ("parallel.pipeline=2",), 2),
    ("clip_cov", (), 2),
    ("ppo", ("parallel.tensor=2", "method.critic_only_steps=0"), 2),
    ("clip_higher", ("rollout.dynamic_sampling=true", "parallel.tensor=2"), 4),
]


def watched(rank: int, world: int, folder: Path, recipe: str, overrides: tuple[str, ...]) -> tuple[set, set, int]:
    """Of a run on these ranks: our object collectives over gloo, those over anything else, tokens decoded for logs."""
    made: list[Any] = []
    right: set[str] = set()
    wrong: set[str] = set()
    distributed: Any = dist
    new_group, get_backend, texts = dist.new_group, dist.get_backend, loop.token_texts
    decoded = 0

    def make(*args: Any, backend: str | None = None, **options: Any) -> Any:
        group = new_group(*args, backend=backend, **options)
        if backend == "gloo":
            made.append(group)
        return group

    def backend_of(group: Any = None) -> Any:
        return get_backend(group) if any(group is each for each in made) else "nccl"

    def watch(name: str, real: Any) -> Any:
        def spy(*args: Any, group: Any = None, **options: Any) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]  # Megatron's own objects are its business
            if caller.startswith("megatron_ext.train.loop" if name == "all_reduce" else "megatron_ext."):
                (right if any(group is each for each in made) else wrong).add(name)
            return real(*args, group=group, **options)

        return spy

    def token_texts(decode: Any, ids: Any) -> list[str]:
        nonlocal decoded
        decoded += len(ids)
        return texts(decode, ids)

    distributed.new_group, distributed.get_backend = make, backend_of
    for name in OBJECTS + WAITS:
        setattr(distributed, name, watch(name, getattr(dist, name)))
    module: Any = loop
    module.token_texts = token_texts
    assert whole_run._rank(rank, world, folder, recipe, overrides, None) == 0
    return right, wrong, decoded


@pytest.mark.parametrize(("method", "layout", "world"), LAYOUTS, ids=str)
def test_objects_and_long_waits_are_on_gloo_and_only_rank_0_decodes(
    method: str, layout: tuple[str, ...], world: int, tmp_path: Path
) -> None:
    whole_run.data()
    recipe, options = f"{method}/{method}-tiny-cpu.toml", ("log.samples=2", "train.steps=1", *layout)
    found = gloo.run(watched, world, tmp_path, recipe, options)
    for rank, (right, wrong, decoded) in enumerate(found):
        assert not wrong and {"all_gather_object", "broadcast_object_list", *WAITS} <= right
        assert (decoded > 0) == (rank == 0)


def patience(rank: int, world: int) -> list[float]:
    """Hours that the twins of all ranks and of the pipeline's wait."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, pipeline=world), hang_minutes=0.1)
    twins: list[Any] = [parallel.gloo(), parallel.gloo(parallel.groups.pipeline())]
    return [twin._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 3600 for twin in twins]


def test_rank_0_may_verify_and_write_for_hours() -> None:
    assert gloo.run(patience, 2) == [[24.0, 24.0]] * 2


def twins_match(rank: int, world: int, layout: dict[str, Any]) -> bool:
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    for group in (parallel.groups.data(), parallel.groups.pipeline(), parallel.groups.model(), None):
        ranks = dist.get_process_group_ranks(group)
        if len(ranks) > 1:
            own: list[int] = [0] * len(ranks)
            dist.all_gather_object(own, rank, group=parallel.gloo(group))
            assert own == ranks, (own, ranks)
    return True


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_a_twin_has_the_ranks_of_its_group(layout: dict[str, Any]) -> None:
    assert all(gloo.run(twins_match, 4, layout))


def gathered(rank: int, world: int) -> list[tuple]:
    """Vectors of different lengths and types, some of them empty, through the reducer."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world))
    reduce, results = parallel.DataReducer(), []
    for dtype in (torch.bool, torch.int64, torch.float32, torch.float64):
        for lengths in ((3, 0, 5), (0, 0, 0), (1, 2, 1)):
            own = (torch.arange(lengths[rank]) + 10 * rank).to(dtype)
            expected = torch.cat([torch.arange(n) + 10 * r for r, n in enumerate(lengths)]).to(dtype)
            found = reduce.concat(own)
            results.append((found.dtype == dtype, torch.equal(found, expected)))
    return results


def test_vectors_of_any_length_are_joined_in_rank_order() -> None:
    for results in gloo.run(gathered, 3):
        assert all(all(each) for each in results) and len(results) == 12
