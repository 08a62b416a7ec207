"""Whole tensors out of a checkpoint directory of any layout, and into one, without a model or a process group.

A checkpoint holds each tensor under a key in chunks, one for each part that a rank wrote; layers and experts are
stacked along the first axes of a key (model/param_mapping.py says what is where). ``CheckpointTensors`` puts one
together at a time, ``write_tensors`` asks for one at a time: neither holds more than that one in memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_ext.checkpoint.manifest import CheckpointError, Record
from megatron_ext.checkpoint.storage import (
    FORMAT,
    FORMAT_FILE,
    INDEX,
    Chunk,
    load_chunk,
    places_of,
    read_index,
    write_chunks,
    write_file,
    write_index,
)
from megatron_ext.files import open_regular

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: at ``index`` of what is ``stacked`` under ``key``. ``padded``: rows may follow its own."""

    key: str
    index: Shape
    stacked: Shape
    shape: Shape
    padded: bool = False

    def accepts(self, found: Sequence[int]) -> bool:
        """Whether a key of the shape ``found`` holds such tensors."""
        whole, rows = (*self.stacked, *self.shape), len(self.stacked)
        if self.padded and len(found) == len(whole) and found[rows] > whole[rows]:
            found = (*found[:rows], whole[rows], *found[rows + 1 :])
        return tuple(found) == whole


class CheckpointTensors:
    """The tensors of the checkpoint directory ``path``, whose files the caller has verified; ``entries`` by key.

    Raises CheckpointError for an index that could run code or leaves parts of a tensor out.
    """

    def __init__(self, path: Path):
        self.path, self._index = path, read_index(path)
        entries = self._index.state_dict_metadata
        self.entries = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        self._grouped = cache(self._group)

    def check(self, places: Iterable[Place], belongs: Callable[[str], bool]) -> torch.dtype:
        """The dtype of the tensors at ``places``.

        Raises CheckpointError naming every key that is missing, misshapen or of another dtype than most, and every
        key without a place that ``belongs`` to them.
        """
        places = list({place.key: place for place in places}.values())
        here = [place for place in places if place.key in self.entries]
        faults = [f"missing tensor {place.key}" for place in places if place.key not in self.entries]
        known = {place.key for place in places}
        faults += [f"unexpected tensor {key}" for key in self.entries if belongs(key) and key not in known]
        dtypes = {place.key: self.entries[place.key].properties.dtype for place in here}
        [(most, _)] = Counter(dtypes.values()).most_common(1) or [(torch.float32, 0)]
        for place in here:
            found = self.entries[place.key].size
            if not place.accepts(found):
                faults.append(f"{place.key}: found {list(found)}, expected {[*place.stacked, *place.shape]}")
            if dtypes[place.key] != most:
                faults.append(f"{place.key}: found {dtypes[place.key]}, expected {most}, what most tensors have")
        if faults:
            raise CheckpointError(f"{self.path.name}: the weights do not fit the model:\n  " + "\n  ".join(faults))
        return most

    def read(self, place: Place) -> Tensor:
        """Raises CheckpointError where the checkpoint holds only a part of it."""
        whole = torch.empty(place.shape, dtype=self.entries[place.key].properties.dtype)
        axes, covered = len(place.index), 0
        for chunk in self._grouped(place.key, axes)[place.index]:
            start, size = chunk.offsets[axes:], chunk.sizes[axes:]
            stop = [min(first + n, total) for first, n, total in zip(start, size, place.shape, strict=True)]
            if any(end <= first for first, end in zip(start, stop, strict=True)):
                continue  # padding
            stored = self._load(MetadataIndex(place.key, chunk.offsets)).view(size)
            own = stored[tuple(slice(0, end - first) for first, end in zip(start, stop, strict=True))]
            whole[tuple(slice(first, end) for first, end in zip(start, stop, strict=True))] = own
            covered += own.numel()
        if covered != whole.numel():
            raise CheckpointError(
                f"{self.path.name}: {place.key} at {list(place.index)}: found {covered} of {whole.numel()} elements"
            )
        return whole

    def _group(self, key: str, axes: int) -> dict[Shape, list[ChunkStorageMetadata]]:
        found: dict[Shape, list[ChunkStorageMetadata]] = defaultdict(list)
        for chunk in self.entries[key].chunks:
            found[tuple(chunk.offsets[:axes])].append(chunk)
        return found

    def _load(self, chunk: MetadataIndex) -> Tensor:
        with open_regular(self.path / places_of(self._index)[chunk].relative_path) as file:
            return load_chunk(file, self._index, chunk)


def write_tensors(
    folder: Path, tensors: Sequence[tuple[Place, Callable[[], Tensor]]], dtype: torch.dtype
) -> dict[str, Record]:
    """Fill the empty ``folder`` with a checkpoint of ``tensors``, calling for each when it is written; its files."""
    chunks = [_chunk(place, dtype) for place, _ in tensors]
    name = "__0_0.distcp"
    record, places = write_chunks(folder / name, zip(chunks, (get() for _, get in tensors), strict=True))
    return {
        name: record,
        INDEX: write_index(folder, chunks, places),
        "common.pt": write_file(folder / "common.pt", lambda file: torch.save({}, file)),
        FORMAT_FILE: write_file(folder / FORMAT_FILE, lambda file: file.write(FORMAT)),
    }


def _chunk(place: Place, dtype: torch.dtype) -> Chunk:
    return Chunk(
        key=place.key,
        shape=(*place.stacked, *place.shape),
        offsets=(*place.index, *[0] * len(place.shape)),
        sizes=(*[1] * len(place.index), *place.shape),
        dtype=dtype,
    )
