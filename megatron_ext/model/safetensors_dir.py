"""The safetensors files of a model directory: what they hold, what is wrong with them, and their tensors to slice."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from safetensors import safe_open
from torch import Tensor

from megatron_ext.files import first_fault, open_regular, parse_json, read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """A tensor by its file's header. ``dtype`` is safetensors' name."""

    file: str
    dtype: str
    shape: tuple[int, ...]


_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Tensor(BaseModel):
    """What a header says of a tensor."""

    dtype: Annotated[str, Field(max_length=16)]
    shape: list[_Count]
    data_offsets: Annotated[list[_Count], Field(min_length=2, max_length=2)]


class _Index(BaseModel):
    weight_map: dict[str, Annotated[str, Field(pattern="^[^/]{1,255}$")]]


_HEADER, _INDEX = TypeAdapter(dict[str, _Tensor]), TypeAdapter(_Index)


class SafetensorsDir:
    """``entries`` of all readable files; ``faults`` has a line for every file that is absent, truncated or damaged."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.faults: list[str] = []
        for file in self._files():
            try:
                self.entries |= _read_header(self.path / file)
            except (OSError, ValueError) as error:
                self.faults.append(f"{file}: {error}")

    @property
    def dtype(self) -> torch.dtype:
        """Of all tensors, once ``misfits`` has found none."""
        return DTYPES[next(iter(self.entries.values())).dtype]

    def tensor(self, name: str) -> StoredTensor:
        """A tensor to slice: only what is asked for is read."""
        entry = self.entries[name]
        return StoredTensor(self._open[entry.file].get_slice(name), entry.shape)

    @cached_property
    def _open(self) -> dict[str, Any]:
        return {file: safe_open(self.path / file, "pt") for file in {e.file for e in self.entries.values()}}

    def _files(self) -> list[str]:
        if (self.path / INDEX).is_file():
            try:
                return sorted(set(_INDEX.validate_python(read_json(self.path / INDEX)).weight_map.values()))
            except ValidationError as error:
                fault = first_fault(error)
            except (OSError, ValueError) as error:
                fault = str(error)
            raise ValueError(f"{self.path / INDEX}: is no index of safetensors files: {fault}")
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        raise ValueError(f"{self.path}: holds neither {SINGLE} nor {INDEX}")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor in a file, read where it is indexed."""

    slices: Any
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Tensor:
        return self.slices[index]


def misfits(found: SafetensorsDir, shapes: Mapping[str, tuple[int, ...]], dtype: str | None) -> list[str]:
    """A line for every file at fault or, with none, for every tensor that is missing, unexpected, misshapen or of
    another dtype.

    ``dtype`` is torch's name of what all should have; None: any floating dtype, the same for all.
    """
    if found.faults:
        return found.faults
    lines = [f"missing tensor {name}" for name in shapes if name not in found.entries]
    lines += [f"unexpected tensor {name}" for name in found.entries if name not in shapes]
    for name, entry in found.entries.items():
        if name in shapes and entry.shape != shapes[name]:
            lines.append(f"{name}: found shape {list(entry.shape)}, expected {list(shapes[name])} ({entry.file})")
    stored = [entry.dtype for entry in found.entries.values()]
    named = [name for key, name in NAMES.items() if str(key) == f"torch.{dtype}"]
    wanted, source = (named or [None])[0], "config.json's dtype"
    if not dtype:
        wanted, source = max(dict.fromkeys(stored), key=stored.count, default=None), "what most tensors have"
        wanted = wanted if wanted in DTYPES else "a floating dtype"
    others = {name: entry for name, entry in found.entries.items() if entry.dtype != wanted}
    if len(others) == len(stored) > 1 and len(set(stored)) == 1:
        return [*lines, f"all {len(stored)} tensors: found {stored[0]}, expected {wanted}, {source}"]
    return lines + [
        f"{name}: found {entry.dtype}, expected {wanted}, {source} ({entry.file})" for name, entry in others.items()
    ]


def _read_header(path: Path) -> dict[str, Entry]:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"is truncated or no safetensors file: {size} bytes, its header alone would need {8 + length}"
            )
        header = parse_json(file.read(length))
    try:
        tensors = _HEADER.validate_python({name: header[name] for name in header if name != "__metadata__"})
    except ValidationError as error:
        raise ValueError(f"its header is none of safetensors: {first_fault(error)}") from None
    except TypeError:
        raise ValueError("its header is no JSON object") from None
    end = 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if size != end:
        raise ValueError(f"found {size} bytes, expected {end}: the file is {'truncated' if size < end else 'too long'}")
    return {name: Entry(path.name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
