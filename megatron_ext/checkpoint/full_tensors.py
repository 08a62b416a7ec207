"""Full tensors out of a checkpoint directory of any layout, and into one, without a model or a process group.

A checkpoint holds each tensor under a key in chunks, one for each rectangle that a rank wrote; layers and experts are
stacked along the first axes of a key (model/param_mapping.py says what is where). ``CheckpointTensors`` puts one
together at a time, ``write_tensors`` asks for one at a time: neither holds more than that one in memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
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
    extents_of,
    load_chunk,
    read_index,
    write_chunks,
    write_file,
    write_index,
)
from megatron_ext.files import open_regular
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.param_mapping import ParamMapping, full_mappings
from megatron_ext.model.tp_sharding import Vocabulary

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor is in a checkpoint: at ``index`` of the ``stacked`` layers and experts under ``key``.

    ``padded``: its first axis is the vocabulary, which is padded there for the tensor-parallel ranks that saved it.
    """

    key: str
    index: Shape
    stacked: Shape
    shape: Shape
    padded: bool = False

    @classmethod
    def of(cls, mapping: ParamMapping) -> TensorLocation:
        padded = isinstance(mapping.sharding, Vocabulary)
        return cls(mapping.key, mapping.index, mapping.stacked, mapping.shape, padded)

    def saved_shape(self, padded_vocab: int) -> Shape:
        """Of its whole key, where the vocabulary is padded to ``padded_vocab``."""
        first, *others = self.shape
        return (*self.stacked, padded_vocab if self.padded else first, *others)


class CheckpointTensors:
    """The tensors of the checkpoint directory ``path``, whose files the caller has verified; ``entries`` by key.

    Raises CheckpointError for an index that could run code or leaves parts of a tensor out.
    """

    def __init__(self, path: Path):
        self.path, self._index = path, read_index(path)
        entries = self._index.state_dict_metadata
        self.entries = {k: v for k, v in entries.items() if isinstance(v, TensorStorageMetadata)}
        self._grouped = cache(self._group)

    def check_policy(self, architecture: Architecture, tensor: int) -> torch.dtype:
        """The dtype of the policy's weights, which ``tensor`` tensor-parallel ranks have saved.

        Raises CheckpointError naming every key that is missing, misshapen or of another dtype than most, and every
        other one of a policy's weights: a model without it would be another model.
        """
        locations = list({each.key: TensorLocation.of(each) for each in full_mappings(architecture)}.values())
        here = [location for location in locations if location.key in self.entries]
        faults = [f"missing tensor {location.key}" for location in locations if location.key not in self.entries]
        known = {location.key for location in locations}
        faults += [f"unexpected tensor {key}" for key in self.entries if _is_policy(key) and key not in known]
        dtypes = {location.key: self.entries[location.key].properties.dtype for location in here}
        [(most, _)] = Counter(dtypes.values()).most_common(1) or [(torch.float32, 0)]
        padded_vocab = architecture.padded_vocab(tensor)
        for location in here:
            found, expected = tuple(self.entries[location.key].size), location.saved_shape(padded_vocab)
            if found != expected:
                faults.append(f"{location.key}: found {list(found)}, expected {list(expected)}")
            if dtypes[location.key] != most:
                faults.append(f"{location.key}: found {dtypes[location.key]}, expected {most}, what most tensors have")
        if faults:
            raise CheckpointError(f"{self.path.name}: the weights do not fit the model:\n  " + "\n  ".join(faults))
        return most

    def read(self, location: TensorLocation) -> Tensor:
        """Raises CheckpointError where the checkpoint holds only a part of it."""
        full = torch.empty(location.shape, dtype=self.entries[location.key].properties.dtype)
        axes, covered = len(location.index), 0
        for chunk in self._grouped(location.key, axes)[location.index]:
            start, size = chunk.offsets[axes:], chunk.sizes[axes:]
            stop = [min(first + n, total) for first, n, total in zip(start, size, location.shape, strict=True)]
            if any(end <= first for first, end in zip(start, stop, strict=True)):
                continue  # padding
            stored = self._load(MetadataIndex(location.key, chunk.offsets)).view(size)
            own = stored[tuple(slice(0, end - first) for first, end in zip(start, stop, strict=True))]
            full[tuple(slice(first, end) for first, end in zip(start, stop, strict=True))] = own
            covered += own.numel()
        if covered != full.numel():
            raise CheckpointError(
                f"{self.path.name}: {location.key} at {list(location.index)}: found {covered} of {full.numel()} "
                "elements"
            )
        return full

    def _group(self, key: str, axes: int) -> dict[Shape, list[ChunkStorageMetadata]]:
        found: dict[Shape, list[ChunkStorageMetadata]] = defaultdict(list)
        for chunk in self.entries[key].chunks:
            found[tuple(chunk.offsets[:axes])].append(chunk)
        return found

    def _load(self, chunk: MetadataIndex) -> Tensor:
        with open_regular(self.path / extents_of(self._index)[chunk].relative_path) as file:
            return load_chunk(file, self._index, chunk)


def _is_policy(key: str) -> bool:
    """Whether a key of a run's checkpoint is of the policy's weights: not of its optimizer, or of another model."""
    return key.startswith(("embedding.", "decoder.", "output_layer."))


def write_tensors(
    folder: Path, tensors: Sequence[tuple[TensorLocation, Callable[[], Tensor]]], dtype: torch.dtype
) -> dict[str, Record]:
    """Fill the empty ``folder`` with a checkpoint of ``tensors``, calling for each when it is written; its files."""
    chunks = [_chunk(location, dtype) for location, _ in tensors]
    name = "__0_0.distcp"
    record, extents = write_chunks(folder / name, zip(chunks, (get() for _, get in tensors), strict=True))
    return {
        name: record,
        INDEX: write_index(folder, chunks, extents),
        "common.pt": write_file(folder / "common.pt", lambda file: torch.save({}, file)),
        FORMAT_FILE: write_file(folder / FORMAT_FILE, lambda file: file.write(FORMAT)),
    }


def _chunk(location: TensorLocation, dtype: torch.dtype) -> Chunk:
    return Chunk(
        key=location.key,
        shape=(*location.stacked, *location.shape),
        offsets=(*location.index, *[0] * len(location.shape)),
        sizes=(*[1] * len(location.index), *location.shape),
        dtype=dtype,
    )
