"""The files of a checkpoint's tensors: torch's distributed format, written and read without its planners.

A key names a tensor of some global shape, stored as chunks: rectangles of it, one or more from each rank. A rank
writes its chunks one after the other into a file of its own, hashed while it is written; ``.metadata``, the index,
says which chunk lies where. Chunks of one layout are read under any other. No process group, no Megatron.

Nothing is unpickled unseen: chunks are read with ``weights_only``, the pickled index only after every class that it
names was checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_ext.checkpoint.manifest import CheckpointError, Record
from megatron_ext.files import open_regular

INDEX = ".metadata"
FORMAT_FILE = "metadata.json"  # by which Megatron's own loader knows the format
FORMAT = json.dumps(
    {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    | {"common_backend": "torch", "common_backend_version": 1}
).encode()
Shape = tuple[int, ...]
Extents = dict[MetadataIndex, _StorageInfo]  # of each chunk: its file, offset and length


@dataclass(frozen=True)
class Chunk:
    """The rectangle at ``offsets`` of ``sizes`` of the tensor ``key``, whose global shape is ``shape``."""

    key: str
    shape: Shape
    offsets: Shape
    sizes: Shape
    dtype: torch.dtype

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.key, self.offsets)


@dataclass(frozen=True)
class Target:
    """Memory to be filled with a chunk; its elements in order are the chunk's.

    The first ``stacked`` axes number layers and experts: every stored chunk has size 1 there. With ``padded`` the
    axis behind them may be longer or shorter in the checkpoint, and what lies beyond it becomes zero.
    """

    chunk: Chunk
    tensor: Tensor
    stacked: int
    padded: bool


class HashingFile:
    """A file written once from start to end, hashed on the way: nothing has to be read back for its record."""

    def __init__(self, file: IO[bytes]):
        self._file, self._digest, self._bytes = file, hashlib.sha256(), 0
        self.fault: OSError | None = None  # that ended the writing

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.fault = error
            raise
        self._digest.update(data)
        self._bytes += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._bytes

    @property
    def record(self) -> Record:
        return Record(self._digest.hexdigest(), self._bytes)


def write_file(path: Path, fill: Callable[[Any], object]) -> Record:
    """Have ``fill`` write a new file to the disk, synced; its size and hash."""
    with path.open("xb") as file:
        hashing = HashingFile(file)
        try:
            fill(hashing)
        except RuntimeError:
            if hashing.fault is None:
                raise
            raise hashing.fault from None  # torch's own word for it is "unexpected pos"
        file.flush()
        os.fsync(file.fileno())
    return hashing.record


def write_chunks(path: Path, chunks: Iterable[tuple[Chunk, Tensor]]) -> tuple[Record, Extents]:
    """Write a file of chunks in their order; holds a copy of one at a time, and of those in host memory none."""
    extents: Extents = {}

    def fill(file: HashingFile) -> None:
        for chunk, tensor in chunks:
            assert tensor.dtype == chunk.dtype and tensor.numel() == math.prod(chunk.sizes), chunk
            start = file.tell()
            torch.save(_alone(tensor).view(chunk.sizes), file)  # pyright: ignore[reportArgumentType]
            extents[chunk.index] = _StorageInfo(path.name, start, file.tell() - start)

    return write_file(path, fill), extents


def write_index(folder: Path, chunks: Iterable[Chunk], extents: Extents) -> Record:
    """Write ``.metadata`` for the chunks of all files.

    Raises CheckpointError where two chunks of one key disagree on their tensor's shape or dtype.
    """
    full_tensors: dict[str, Chunk] = {}
    grouped: dict[str, list[ChunkStorageMetadata]] = defaultdict(list)
    for chunk in chunks:
        first = full_tensors.setdefault(chunk.key, chunk)
        if (first.shape, first.dtype) != (chunk.shape, chunk.dtype):
            raise CheckpointError(f"{chunk.key}: {first.shape} {first.dtype} and {chunk.shape} {chunk.dtype}")
        grouped[chunk.key].append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=first.dtype), torch.Size(first.shape), grouped[key])
        for key, first in full_tensors.items()
    }
    index = Metadata(entries, storage_data=extents, version=CURRENT_DCP_VERSION)
    return write_file(folder / INDEX, lambda file: pickle.dump(index, file))


def read_index(folder: Path) -> Metadata:
    """The index of a checkpoint directory.

    Raises CheckpointError if it names anything but an index of tensors, or if the chunks of a tensor overlap or leave
    a part of it out.
    """
    try:
        with open_regular(folder / INDEX) as file:
            index = _IndexReader(file).load()
        _check_index(index, folder.name)
    except CheckpointError:
        raise
    except Exception as error:  # a pickle, and objects made of it, of any content
        raise CheckpointError(f"{folder.name}: {INDEX} cannot be read: {type(error).__name__}: {error}") from error
    return index


def _check_index(index: Metadata, name: str) -> None:
    pickled = [key for key, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    if pickled:
        raise CheckpointError(f"{name}: holds pickled objects, which are never loaded: {pickled[:5]}")
    for key, entry in index.state_dict_metadata.items():
        assert not isinstance(entry, BytesStorageMetadata)
        if not tiled(tuple(entry.size), [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks]):
            raise CheckpointError(f"{name}: {key}: its chunks do not cover {list(entry.size)} exactly once")
    astray = [each.relative_path for each in extents_of(index).values() if "/" in each.relative_path]
    if astray:
        raise CheckpointError(f"{name}: {INDEX} names files in other folders: {astray[:5]}")


def tiled(shape: Shape, boxes: Sequence[tuple[Shape, Shape]]) -> bool:
    """Whether boxes (offsets, sizes) cover ``shape`` without gap or overlap.

    Along the first axis the boxes' ends divide it into strips; in each, the boxes that reach into it must do so for the
    other axes. Layers, experts and ranks end at the same offsets, so that most strips have few boxes.
    """
    if not shape:
        return len(boxes) == 1
    beginning: dict[int, list[tuple[int, tuple[Shape, Shape]]]] = defaultdict(list)
    ends = {0, shape[0]}
    for offsets, sizes in boxes:
        beginning[offsets[0]].append((offsets[0] + sizes[0], (offsets[1:], sizes[1:])))
        ends |= {offsets[0], offsets[0] + sizes[0]}
    if min(ends) < 0 or max(ends) > shape[0]:
        return False
    alive: list[tuple[int, tuple[Shape, Shape]]] = []
    for start in sorted(ends)[:-1]:
        alive = [each for each in alive if each[0] > start] + beginning[start]
        if not tiled(shape[1:], [box for _, box in alive]):
            return False
    return True


def read_targets(folder: Path, index: Metadata, targets: Sequence[Target]) -> None:
    """Fill every target from the chunks that it meets, each of them read once.

    The caller has made sure that keys and shapes fit (``misfits``).
    """
    stored = {key: _by_stack(index, key, stacked) for key, stacked in {(t.chunk.key, t.stacked) for t in targets}}
    uses: dict[MetadataIndex, list[tuple[Tensor, tuple[slice, ...]]]] = defaultdict(list)
    for target in targets:
        chunk, n = target.chunk, target.stacked
        if target.padded:
            target.tensor.zero_()
        filled = target.tensor.view(chunk.sizes)
        for found in stored[chunk.key].get(chunk.offsets[:n], []):
            if meet := _overlap(chunk, found):
                here, there = meet
                uses[MetadataIndex(chunk.key, found.offsets)].append((filled[here], there))
    files: dict[str, list[MetadataIndex]] = defaultdict(list)
    for each in uses:
        files[extents_of(index)[each].relative_path].append(each)
    for name, wanted in files.items():
        with open_regular(folder / name) as file:
            for each in wanted:
                loaded = load_chunk(file, index, each)
                for destination, part in uses[each]:
                    destination.copy_(loaded[part])


def extents_of(index: Metadata) -> Extents:
    assert index.storage_data is not None
    return index.storage_data


def load_chunk(file: IO[bytes], index: Metadata, chunk: MetadataIndex) -> Tensor:
    """A stored chunk out of the open file that holds it. Raises CheckpointError unless it is what the index says."""
    entry, what = _entry(index, chunk.fqn), f"{chunk.fqn} at {list(chunk.offset or ())}"
    try:
        where = extents_of(index)[chunk]
        view: Any = _create_file_view(file, where.offset, where.length)  # pyright: ignore[reportArgumentType]
        found = torch.load(view, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of any content
        raise CheckpointError(f"{what} cannot be read: {type(error).__name__}: {error}") from error
    [sizes] = [each.sizes for each in entry.chunks if each.offsets == chunk.offset]
    if not isinstance(found, Tensor) or (found.numel(), found.dtype) != (sizes.numel(), entry.properties.dtype):
        raise CheckpointError(f"{what} is not the {entry.properties.dtype} of {list(sizes)} that {INDEX} says")
    return found


def misfits(index: Metadata, targets: Iterable[Target]) -> dict[str, str]:
    """Key -> what is wrong, for every target that the checkpoint does not hold in that shape."""
    faults: dict[str, str] = {}
    for key, target in {target.chunk.key: target for target in targets}.items():
        if key not in index.state_dict_metadata:
            faults[key] = "missing"
            continue
        found, expected = list(_entry(index, key).size), list(target.chunk.shape)
        if target.padded and len(found) == len(expected):
            expected[target.stacked] = found[target.stacked]
        if found != expected:
            faults[key] = f"found {found}, expected {expected}"
    return faults


def _entry(index: Metadata, key: str) -> TensorStorageMetadata:
    entry = index.state_dict_metadata[key]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


def _by_stack(index: Metadata, key: str, stacked: int) -> dict[Shape, list[ChunkStorageMetadata]]:
    found: dict[Shape, list[ChunkStorageMetadata]] = defaultdict(list)
    for chunk in _entry(index, key).chunks:
        assert set(chunk.sizes[:stacked]) <= {1}, (key, chunk)
        found[tuple(chunk.offsets[:stacked])].append(chunk)
    return found


def _overlap(wanted: Chunk, found: ChunkStorageMetadata) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a wanted and a stored chunk meet, as slices of each; None if they do not."""
    here, there = [], []
    for a, n, b, m in zip(wanted.offsets, wanted.sizes, found.offsets, found.sizes, strict=True):
        start, stop = max(a, b), min(a + n, b + m)
        if start >= stop:
            return None
        here.append(slice(start - a, stop - a))
        there.append(slice(start - b, stop - b))
    return tuple(here), tuple(there)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in host memory and in a storage of exactly its size: torch.save stores all of a storage."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


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
