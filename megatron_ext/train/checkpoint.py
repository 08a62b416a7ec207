"""Save and resume a whole run: weights, optimizer, schedule, random states and the caller's own state.

Every function here is collective: all ranks call it, and a fault of one rank is raised on all of them.
What a checkpoint directory is, and which one is trusted, is manifest.py's business; this file fills and
reads it. The payload is Megatron's ``torch_dist`` format with the optimizer in the ``fully_reshardable``
layout (a tensor of the parameter's shape for each state), so a run resumes under another TP, PP or DP.

Nothing is unpickled: ``state.pt`` and ``common.pt`` are read with ``weights_only``, tensors likewise, and the
pickled index ``.metadata`` only after its hash and every class it names were checked.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save_state_dict

from megatron_ext.train import manifest
from megatron_ext.train.manifest import CheckpointError, Manifest
from megatron_ext.train.trained import Trained

T = TypeVar("T")
_SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # gather the optimizer over gloo to the first data-parallel rank only: one copy in host memory, none on the GPU
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_STATE = "state.pt"


@dataclass(frozen=True)
class LoadedState:
    """What ``load`` restored, besides models, optimizers and schedules which it filled in place.

    ``refused`` has a line for everything passed over or not restored; ``manifest`` knows layout and config.
    """

    step: int
    state: dict[str, Any]
    path: Path
    manifest: Manifest
    refused: tuple[str, ...]


def save(
    root: Path,
    step: int,
    *,
    trained: Mapping[str, Trained],
    state: dict[str, Any],
    config: dict[str, Any],
    layout: dict[str, int],
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` below ``root``, commit it, and keep the ``keep`` newest valid ones.

    ``state`` holds plain Python values and tensors, the same on all ranks (rank 0's is stored); ``config``
    is JSON-like. Random states are added here, per rank. ``trained`` is the policy, under that name, and the
    other models that train; the names of their tensors start with theirs.
    Raises CheckpointError on all ranks when any of them fails; what was committed before stays.
    """
    partial = _on_first_rank("opening a checkpoint", lambda: manifest.open_partial(root, step))
    try:
        _fill(partial, trained, state)
        files = _record(partial)
        path = _on_first_rank(
            "publishing the checkpoint",
            lambda: manifest.publish(partial, step=step, files=files, layout=layout, config=config),
        )
    except CheckpointError:
        if dist.get_rank() == 0 and partial.exists():
            manifest.remove(partial)
        raise
    _on_first_rank("removing old checkpoints", lambda: manifest.retain(root, step=step, keep=keep))
    return path


def load(root: Path, *, trained: Mapping[str, Trained], layout: dict[str, int]) -> LoadedState | None:
    """Fill models, optimizers, schedules and random states from the newest valid checkpoint below ``root``.

    None if ``root`` never held a checkpoint. Random states are restored only under the layout that
    saved them; otherwise ``refused`` says so. Raises CheckpointError on all ranks if no checkpoint is
    valid or the newest valid one does not fit the model (it lists the differing tensors).
    """
    found = _on_first_rank("looking for a checkpoint", lambda: manifest.newest_valid(root))
    if found is None:
        return None
    path, refused = found.path, list(found.refused)
    with _together(f"reading {path.name}"):
        check_index(path / ".metadata")
        payload = torch.load(path / _STATE, map_location="cpu", weights_only=True)
        dist_checkpointing.load_common_state_dict(str(path))
        _check_schedule(payload["scheduler"], _schedules(trained))
    _restore(path, trained)
    with _together(f"restoring the schedule of {path.name}"):
        for name, each in trained.items():
            each.scheduler.num_steps = 0  # its load_state_dict adds the saved steps to those already made
            each.scheduler.load_state_dict(payload["scheduler"][name])
    if json.loads(json.dumps(layout)) == found.manifest.layout:  # which was read from JSON: tuples are lists there
        _set_rng(payload["rng"][dist.get_rank()])
    else:
        refused.append(
            f"{path.name}: saved under {found.manifest.layout}, resumed under {layout}: "
            "weights and optimizer are resharded, random states start from the seed"
        )
    return LoadedState(found.manifest.step, payload["state"], path, found.manifest, tuple(refused))


def verify(path: Path) -> Manifest:
    """The manifest of the checkpoint ``path``, whose files are hashed once. Raises CheckpointError on all ranks."""
    return _on_first_rank(f"verifying {path.name}", lambda: manifest.verify(path))


def load_model(path: Path, modules: list) -> None:
    """Fill modules alone from the checkpoint ``path``, which the caller has verified, of any layout.

    Raises CheckpointError naming every tensor of the model that the checkpoint does not hold in that shape.
    """
    with _together(f"reading {path.name}"):
        check_index(path / ".metadata")
    with _together(f"loading {path.name}"):
        result: Any = dist_checkpointing.load(
            _sharded_model(modules), str(path), validate_access_integrity=False, strict=StrictHandling.RETURN_ALL
        )
        loaded, _, absent = result
        if absent:
            raise CheckpointError("\n".join(f"{path.name} does not hold {name}" for name in sorted(absent)))
        _fill_modules(modules, loaded)


def _fill(partial: Path, trained: Mapping[str, Trained], state: dict[str, Any]) -> None:
    with _together("collecting model and optimizer"):
        tree = {name: _sharded(name, each, is_loading=False) for name, each in trained.items()}
    with _together("planning the shards"):
        shards, common = save_preprocess(tree)
    with _together("writing the shards"):
        _write_shards(partial, shards)
    rng: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rng, _rng(), group=_group())
    with _together("writing the state"):
        if dist.get_rank() == 0:
            content = _safe_bytes({"state": state, "scheduler": _schedules(trained), "rng": rng})
            (partial / _STATE).write_bytes(content)
            TorchCommonSaveStrategy("torch", 1).save_common(common, partial)
            save_config(CheckpointingConfig("torch_dist", 1), str(partial))


def _sharded(name: str, each: Trained, *, is_loading: bool) -> ShardedStateDict:
    """Model and optimizer as Megatron's sharded state: what this rank holds of each global tensor."""
    optimizer: Any = each.optimizer
    _allocate(optimizer)
    tree = _sharded_model(each.model.modules)
    if name != "policy":
        add_prefix_for_sharding(tree, f"{name}.")
    with _padding_counted(optimizer):
        tree["optimizer"] = optimizer.sharded_state_dict(dict(tree), is_loading=is_loading, metadata=_SHARDING)
    return tree


def _sharded_model(modules: list) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for index, module in enumerate(modules):
        tensors = module.sharded_state_dict(metadata=_SHARDING)
        tree[f"model{index}"] = {name: value for name, value in tensors.items() if not _is_extra(name)}
    return tree


def _fill_modules(modules: list, loaded: dict[str, Any]) -> None:
    for index, module in enumerate(modules):
        result = module.load_state_dict(loaded[f"model{index}"], strict=False)
        absent = [name for name in result.missing_keys if not _is_extra(name)]
        if absent or result.unexpected_keys:
            raise CheckpointError(f"model{index}: missing {absent}, unexpected {result.unexpected_keys}")


@contextmanager
def _padding_counted(optimizer: Any) -> Iterator[None]:
    """Megatron-core 0.16.1 drops the padding between buckets when it gathers the optimizer's buffer, then looks
    parameters up at their padded places: all behind the first padded bucket would be saved shifted.

    While the block runs, the unpadded sizes count the padding too, so both sides agree.
    """
    sized: list[tuple[Any, int]] = []
    for buffer in [buffer for each in _parts(optimizer) for buffer in each.buffers]:
        sized.append((buffer, buffer.numel))
        sized += [(bucket, bucket.grad_data.numel()) for bucket in buffer.buckets]
    unpadded = [owner.numel_unpadded for owner, _ in sized]
    try:
        for owner, padded in sized:
            owner.numel_unpadded = padded
        yield
    finally:
        for (owner, _), size in zip(sized, unpadded, strict=True):
            owner.numel_unpadded = size


def _is_extra(name: str) -> bool:
    """Transformer Engine's FP8 recipe state: pickled objects, and empty for the dtypes used here.

    A layer has one ``_extra_state``, a grouped layer one more for each further expert: ``_extra_state1`` and so on.
    """
    return re.search(r"(^|\.)_extra_state\d*$", name) is not None


def _allocate(optimizer: Any) -> None:
    """Give an optimizer that never stepped its zero state: Megatron neither saves nor loads it without."""
    for each in _parts(optimizer):
        each.init_state_fn(each.optimizer, each.config)
        if isinstance(each.optimizer, torch.optim.AdamW):
            for moments in each.optimizer.state.values():
                moments.setdefault("step", torch.zeros((), dtype=torch.float32))


def _write_shards(partial: Path, shards: Any) -> None:
    """Megatron's torch_dist format through torch's own synchronous writer, which raises a fault on every rank.

    Megatron's writer forks processes and keeps a spawned server. One thread: with more, torch's writer
    loses the exception of all but the first, and a full disk would pass for a good checkpoint.
    """
    by_key, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
    save_state_dict(
        torch_dist.mcore_to_pyt_state_dict(by_key, False),
        FileSystemWriter(partial, thread_count=1),
        process_group=_group(),
        planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )


def _record(partial: Path) -> dict[str, manifest.Record]:
    """Hash the files, each by the rank that wrote it and so has it in its page cache."""
    records: list[dict[str, manifest.Record]] = [{}] * dist.get_world_size()
    with _together("hashing the shards"):
        names, rank = manifest.payload_names(partial), dist.get_rank()
        mine = [name for name in names if name.startswith(f"__{rank}_")]
        if rank == 0:
            mine += [name for name in names if not name.endswith(".distcp")]
        own = manifest.record_files(partial, mine, sync=True)
    dist.all_gather_object(records, own, group=_group())
    return {name: record for part in records for name, record in part.items()}


def _restore(path: Path, trained: Mapping[str, Trained]) -> None:
    with _together("preparing model and optimizer"):
        tree = {name: _sharded(name, each, is_loading=True) for name, each in trained.items()}
    with _together(f"loading {path.name}"):
        result: Any = dist_checkpointing.load(
            tree, str(path), validate_access_integrity=False, strict=StrictHandling.RETURN_ALL
        )
        loaded, absent, unexpected = result
    with _together(f"fitting {path.name} to this model"):
        faults = [f"only in the checkpoint: {name}" for name in sorted(absent)]
        faults += [f"only in this model: {name}" for name in sorted(unexpected)]
        if faults:
            raise CheckpointError("\n".join(faults))
    with _together(f"restoring model and optimizer of {path.name}"):
        for name, each in trained.items():
            _fill_modules(each.model.modules, loaded[name])
            _load_optimizer(each.optimizer, loaded[name]["optimizer"])


def _load_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Two faults of megatron-core 0.16.1 with torch's AdamW, which keeps a ``step`` for each parameter:

    It looks for ``step`` among the loaded tensors, where it never put it: each parameter's loaded state is laid
    over the state it has. And all parameters get one and the same step tensor, which every one of them would
    count up at each update: they get their own.
    """

    def completed(each: Any, original: Callable) -> Callable:
        return lambda param, tensors: original(param, each._get_main_param_and_optimizer_states(param) | tensors)

    torch_adam = [each for each in _parts(optimizer) if isinstance(each.optimizer, torch.optim.AdamW)]
    for each in torch_adam:
        each._set_main_param_and_optimizer_states = completed(each, each._set_main_param_and_optimizer_states)
    try:
        optimizer.load_state_dict(saved)
    finally:
        for each in torch_adam:
            del each._set_main_param_and_optimizer_states
            for moments in each.optimizer.state.values():
                moments["step"] = moments["step"].clone()


def _parts(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


class _IndexReader(pickle.Unpickler):
    """Reads torch's checkpoint index and nothing that could run code."""

    _MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    _NAMES = frozenset(
        [("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")]
        + [("torch", str(dtype).removeprefix("torch.")) for dtype in vars(torch).values() if type(dtype) is torch.dtype]
    )

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in self._NAMES or (module in self._MODULES and "." not in name)
        found = super().find_class(module, name) if known else None
        if found is None or (module in self._MODULES and not isinstance(found, type)):
            raise CheckpointError(f".metadata names {module}.{name}: not a checkpoint index of this project")
        return found


def _schedules(trained: Mapping[str, Trained]) -> dict[str, Any]:
    return {name: each.scheduler.state_dict() for name, each in trained.items()}


def _check_schedule(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Megatron's scheduler would silently go on with the saved rates, whatever this run's recipe says."""
    differing = manifest.differing_keys(saved, current)
    differing = {key: values for key, values in differing.items() if not key.endswith(".num_steps")}
    if differing:
        lines = [f"schedule: {key}: saved with {old}, this run has {new}" for key, (old, new) in differing.items()]
        raise CheckpointError("\n".join(lines) + "\nresume with the saved values, or start a new run")


def check_index(path: Path) -> None:
    """Raises CheckpointError if a checkpoint's pickled ``.metadata`` names anything but an index of tensors."""
    with path.open("rb") as file:
        index = _IndexReader(file).load()
    pickled = [key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    if pickled:
        raise CheckpointError(f"{path.parent.name}: holds pickled objects, which are never loaded: {pickled[:5]}")


def _safe_bytes(content: dict[str, Any]) -> bytes:
    """``torch.save``, refusing now what ``weights_only`` would refuse at the resume."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"state: expected plain Python values and tensors only: {error}") from None
    return buffer.getvalue()


def _rng() -> dict[str, Any]:
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    name, keys, *position = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *position),  # pyright: ignore[reportAttributeAccessIssue]
        "torch": torch.get_rng_state(),
        "tracker": tracker.get_states(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_rng(states: dict[str, Any]) -> None:
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    name, keys, *position = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *position))
    torch.set_rng_state(states["torch"])
    if ("cuda" in states) == torch.cuda.is_available():  # states of the other device's generator do not fit
        tracker.set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# One fault, every rank


def _group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks: faults and file lists are Python objects."""
    return None if dist.get_backend() == "gloo" else _gloo(dist.group.WORLD)


@functools.cache
def _gloo(world: dist.ProcessGroup) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


@contextmanager
def _together(doing: str) -> Iterator[None]:
    """Leave the block on all ranks or on none: a fault of any rank is a CheckpointError on every rank.

    Where the block is itself collective, its collectives must carry faults too (torch's checkpoint code does).
    """
    fault, lines = None, []
    try:
        yield
    except (Exception, CheckpointException) as error:
        fault, lines = error, _lines(error)
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, lines, group=_group())
    distinct = dict.fromkeys(line for part in everyone for line in part)
    if distinct:
        raise CheckpointError(f"{doing}: " + "\n".join(distinct)) from fault


def _on_first_rank(doing: str, function: Callable[[], T]) -> T:
    """The value that ``function`` returns on rank 0, on every rank."""
    box: list[Any] = [None]
    with _together(doing):
        if dist.get_rank() == 0:
            box[0] = function()
    dist.broadcast_object_list(box, src=0, group=_group())
    return box[0]


def _lines(error: BaseException) -> list[str]:
    if isinstance(error, CheckpointError):
        return str(error).splitlines()
    if isinstance(error, CheckpointException):
        faults = {rank: fault for rank, (fault, _) in error.failures.items()}
    else:
        faults = {dist.get_rank(): error}
    return [f"rank {rank}: {type(fault).__name__}: {fault}" for rank, fault in faults.items()]
