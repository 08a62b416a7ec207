"""Ranges as rectangles, their cover, and what each rank writes, reads, sends and hashes of a checkpoint."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_ext.checkpoint import checkpoint, manifest
from megatron_ext.checkpoint.local_shards import groups_state, rectangles, saved_steps, set_steps, steps_taken
from megatron_ext.checkpoint.manifest import CheckpointError
from megatron_ext.checkpoint.storage import Chunk, extents_of, read_index, tiled, write_chunks, write_index
from megatron_ext.model.host_memory import HostMemory
from tests import gloo
from tests.checkpoint import faults
from tests.train.tiny_run import STATE, TIED, TINY, Trainer

SHAPES = [(), (7,), (5, 6), (6, 1), (1, 9), (3, 4, 5), (2, 3, 1, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_range_is_few_rectangles_in_its_own_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for stop in range(start, numbers.numel() + 1):
            found = list(rectangles(shape, start, stop))
            assert len(found) <= max(1, 2 * len(shape) - 1)
            boxes = [numbers[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))].reshape(-1) for box in found]
            assert torch.cat([torch.empty(0, dtype=torch.int64), *boxes]).tolist() == list(range(start, stop))


def partition(draw: random.Random, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of a tensor sharded as Megatron does: divided along an axis over ranks, each part's range over others."""
    axis, ranks, data = draw.randrange(len(shape)), draw.choice([1, 2, 3]), draw.choice([1, 2, 5])
    shape = tuple(n * ranks if i == axis else n for i, n in enumerate(shape))
    boxes = []
    for rank in range(ranks):
        local = tuple(n // ranks if i == axis else n for i, n in enumerate(shape))
        ends = sorted(draw.randrange(math.prod(local) + 1) for _ in range(data - 1))
        for start, stop in zip([0, *ends], [*ends, math.prod(local)], strict=True):
            for offsets, sizes in rectangles(local, start, stop):
                first = rank * local[axis]
                boxes.append((tuple(a + first * (i == axis) for i, a in enumerate(offsets)), sizes))
    draw.shuffle(boxes)
    return [(shape, shape), *boxes]


def test_boxes_cover_a_shape_exactly_once_or_it_is_seen() -> None:
    draw = random.Random(0)
    for _ in range(300):
        (shape, _), *boxes = partition(draw, draw.choice([(4,), (5, 6), (3, 4, 5)]))
        count = torch.zeros(shape, dtype=torch.int64)
        for offsets, sizes in boxes:
            count[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))] += 1
        assert bool((count == 1).all()) and tiled(shape, boxes)
        victim = draw.randrange(len(boxes))
        offsets, sizes = boxes[victim]
        others = boxes[:victim] + boxes[victim + 1 :]
        assert not tiled(shape, others) and not tiled(shape, [*boxes, boxes[victim]])
        moved = (tuple((a + 1) % n for a, n in zip(offsets, shape, strict=True)), sizes)
        if moved not in boxes:
            assert not tiled(shape, [*others, moved])
        assert not tiled(tuple(n + 1 for n in shape), boxes)
    assert not tiled((4,), [((-1,), (5,))]) and not tiled((2, 2), [])


def test_an_index_with_a_gap_or_two_opinions_is_refused(tmp_path: Path) -> None:
    chunks = [Chunk("a.weight", (4, 3), (start, 0), (2, 3), torch.float32) for start in (0, 2)]
    (tmp_path / "good").mkdir()
    _, extents = write_chunks(tmp_path / "good" / "__0_0.distcp", ((chunk, torch.ones(6)) for chunk in chunks))
    write_index(tmp_path / "good", chunks, extents)
    assert read_index(tmp_path / "good").state_dict_metadata.keys() == {"a.weight"}
    (tmp_path / "gap").mkdir()
    write_index(tmp_path / "gap", chunks[:1], extents)
    with pytest.raises(CheckpointError, match=r"gap: a.weight: its chunks do not cover \[4, 3\] exactly once"):
        read_index(tmp_path / "gap")
    with pytest.raises(CheckpointError, match="a.weight"):
        write_index(tmp_path / "gap", [chunks[0], Chunk("a.weight", (4, 3), (2, 0), (2, 3), torch.bfloat16)], extents)


@pytest.mark.parametrize("numel", [50, 60_000])  # through a buffer, and past it
def test_a_full_disk_is_said_in_the_systems_words(numel: int, tmp_path: Path) -> None:
    """torch.save alone says "unexpected pos 704 vs 598"."""

    piece = torch.zeros(numel)  # before the fork, which torch's threads do not survive

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        chunks = ((Chunk(str(i), (numel,), (0,), (numel,), torch.float32), piece) for i in range(500))
        with pytest.raises(OSError, match="File too large"):
            write_chunks(tmp_path / "file", chunks)

    assert faults.child(write) == 0


def test_copies_stay_what_they_were_in_storages_of_their_own() -> None:
    memory = HostMemory()
    sources = [torch.arange(5.0), torch.arange(7).to(torch.bfloat16), torch.arange(12.0).view(3, 4).t()]
    copies = memory.copies(sources)
    expected = [each.reshape(-1).clone() for each in sources]
    for each in sources:
        each.zero_()
    for copy, value in zip(copies, expected, strict=True):
        assert torch.equal(copy, value) and copy.dtype == value.dtype
        assert copy.untyped_storage().nbytes() == copy.nbytes, "torch.save would store all of the block"
    again = memory.copies(sources)
    assert [each.data_ptr() for each in again] == [each.data_ptr() for each in copies]
    assert memory.copies([]) == [] and HostMemory().copies([]) == []


def test_the_fused_adam_counts_its_steps_in_its_groups() -> None:
    """As Transformer Engine's does: no count before the first step, none in the state of a parameter."""
    fused = SimpleNamespace(state={"parameter": {"exp_avg": 0}}, param_groups=[{"params": []}, {"params": []}])
    part = SimpleNamespace(is_stub_optimizer=False, optimizer=fused)
    each: Any = SimpleNamespace(optimizer=SimpleNamespace(chained_optimizers=[part, part]))
    assert steps_taken(each) == 0 == saved_steps(groups_state(each, 0))
    set_steps(each, 0)
    assert fused.param_groups == [{"params": []}, {"params": []}]
    set_steps(each, 7)
    assert [group["step"] for group in fused.param_groups] == [7, 7] and fused.state == {"parameter": {"exp_avg": 0}}
    assert steps_taken(each) == 7 == saved_steps(groups_state(each, 7))


# A save on real ranks


def counted_save(rank: int, world: int, root: Path, tensor: int, pipeline: int, asynchronous: bool) -> Any:
    """Two saves; the floating-point tensors that collectives carried and the payload files opened for reading."""
    run = Trainer(world, tensor, pipeline, TIED, torch.bfloat16).fill(1)
    torch.manual_seed(5)
    run.train(1)
    carried, opened = Counter(), []
    for name in ("all_gather", "gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter", "send"):
        setattr(dist, name, counting(getattr(dist, name), carried))
        if name in vars(dist.distributed_c10d):
            setattr(dist.distributed_c10d, name, getattr(dist, name))
    sys.addaudithook(
        lambda event, args: (
            opened.append(str(args[0]))
            if event == "open" and str(args[0]).endswith(".distcp") and not (args[2] or 0) & os.O_WRONLY
            else None
        )
    )
    checkpoints = run.checkpoints(root, keep=9, asynchronous=asynchronous)
    for step in (1, 2):
        checkpoints.save(step, STATE)
        assert checkpoints.publish(wait=True) is not None
    return dict(carried), opened


def counting(original: Any, carried: Counter) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        for each in [*args, *options.values()]:
            for tensor in each if isinstance(each, list) else [each]:
                if isinstance(tensor, torch.Tensor):
                    carried[str(tensor.dtype)] += tensor.numel()
        return original(*args, **options)

    return call


@pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "waiting"])
@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(4, 1, 1), (4, 2, 1), (4, 1, 2)])
def test_every_rank_writes_its_share_and_sends_and_reads_nothing(
    world: int, tensor: int, pipeline: int, asynchronous: bool, tmp_path: Path
) -> None:
    for carried, opened in gloo.run(counted_save, world, tmp_path, tensor, pipeline, asynchronous):
        assert not [dtype for dtype in carried if "float" in dtype], carried
        assert opened == []
    index = read_index(tmp_path / "step_000002")
    own = Counter()
    for key, entry in index.state_dict_metadata.items():
        for chunk in entry.chunks:  # pyright: ignore[reportAttributeAccessIssue]
            extent = extents_of(index)[MetadataIndex(key, chunk.offsets)]
            own[extent.relative_path] += math.prod(chunk.sizes) * entry.properties.dtype.itemsize  # pyright: ignore
    assert len(own) == world
    if pipeline == 1:  # stages differ: the embedding
        assert max(own.values()) <= 1.1 * sum(own.values()) / world, own


def hashed(rank: int, world: int, root: Path) -> list[str]:
    """The files that this rank hashes at a resume and at the save after it."""
    names: list[str] = []
    real: Any = manifest.record_files

    def recorded(folder: Path, files: list[str]) -> Any:
        names.extend(f"{folder.name}/{name}" for name in files)
        return real(folder, files)

    manifest.record_files = recorded
    run = Trainer(world).fill(2)
    checkpoints = run.checkpoints(root, keep=3)
    assert checkpoints.load() is not None
    at_resume = list(names)
    checkpoints.save(20, STATE)
    assert checkpoints.publish(wait=True) is not None
    assert names == at_resume, "what this run verified or wrote is not hashed again"
    if rank == 0:
        os.utime(root / "step_000010" / "state.pt")
    checkpoints.save(30, STATE)
    assert checkpoints.publish(wait=True) is not None
    assert len(names) > len(at_resume), "but what was touched is"
    return names


def test_ranks_share_the_hashing_and_never_repeat_it(tmp_path: Path) -> None:
    gloo.run(save_once, 2, tmp_path)
    found = gloo.run(hashed, 2, tmp_path)
    files = json.loads((tmp_path / "step_000010" / "MANIFEST.json").read_text())["files"]
    assert Counter(sum(found, [])) == {f"step_000010/{name}": 2 for name in files}
    assert min(len(own) for own in found) >= 2 * (len(files) // 2)


def save_once(rank: int, world: int, root: Path) -> None:
    Trainer(world).fill(1).save(root, 10)


def unreadable(rank: int, world: int, root: Path, how: str) -> str:
    """The refusal of a save in which one rank's pieces are not what they should be."""
    run = Trainer(world).fill(1)
    run.save(root, 10)
    module: Any = checkpoint
    real = module.trained_pieces

    def pieces(*args: Any) -> list:
        found = real(*args)
        if rank == 1:
            found = {"one less": found[1:], "one twice": found + found[:1]}[how]
        return found

    module.trained_pieces = pieces
    with pytest.raises(CheckpointError) as caught:
        run.save(root, 20)
    return str(caught.value)


@pytest.mark.parametrize("how", ["one less", "one twice"])
def test_what_cannot_be_read_is_never_published(how: str, tmp_path: Path) -> None:
    messages = gloo.run(unreadable, 2, tmp_path, how)
    assert all("publishing the checkpoint" in text and "exactly once" in text for text in messages), messages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000010"]


def read_by_megatron(rank: int, world: int, root: Path, tensor: int) -> None:
    """Megatron's own loader gives, for every parameter, the weights and states that the run has."""
    run = Trainer(world, tensor, 1, TINY, torch.bfloat16).fill(1)
    torch.manual_seed(5)
    path = run.train(2).save(root, 3)
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    [module], [optimizer] = run.policy.modules, run.optimizer.chained_optimizers
    names = {parameter: name for name, parameter in module.named_parameters()}
    weights = module.sharded_state_dict(metadata=metadata)
    tree: dict[str, Any] = {"model0": {name: each for name, each in weights.items() if "_extra_state" not in name}}
    tree["optimizer"] = optimizer.sharded_state_dict(dict(tree), is_loading=True, metadata=metadata)
    result: Any = dist_checkpointing.load({"policy": tree}, str(path), validate_access_integrity=False)
    loaded = result["policy"]
    states = iter(loaded["optimizer"]["param_state"].values())
    for buffer in optimizer.buffers:
        for parameter in buffer.param_index_map:
            found = next(states)
            assert torch.equal(loaded["model0"][names[parameter]], parameter), names[parameter]
            for kind, value in found.items():
                assert torch.equal(value, run._state(parameter, kind)), (kind, names[parameter])
    assert loaded["optimizer"]["optimizer"]["param_groups"][0]["step"] == 2


@pytest.mark.parametrize("tensor", [1, 2])
def test_megatron_reads_what_is_written(tensor: int, tmp_path: Path) -> None:
    gloo.run(read_by_megatron, 2, tmp_path, tensor)
