"""A stream of Hugging Face-named tensors -> a model directory that ``transformers`` alone loads.

What comes in which order is announced before, so every file's header is written first and each tensor goes to disk
as it arrives: one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from megatron_ext.model.safetensors_dir import INDEX, NAMES, SINGLE

CHAT_TEMPLATE = "chat_template.jinja"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
COPIED = (  # of the model the run started from, where present; config.json is written with the weights' dtype
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "vocab.json",
    "merges.txt",
    *LICENSES,
    "NOTICE",
    "USE_POLICY.md",
)
SHARD_BYTES = 4 * 2**30
Shapes = Mapping[str, tuple[int, ...]]


def write_hf(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    *,
    shapes: Shapes,
    dtype: torch.dtype,
    source: Path,
    card: str,
    chat_template: str = "",
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write safetensors files of at most ``shard_bytes`` of tensors, index, configuration, tokenizer, model card.

    ``shapes`` names what ``weights`` yields, in that order; all of ``dtype``. A tensor larger than the limit gets a
    file of its own. ``source`` is the directory that configuration and tokenizer come from, ``chat_template`` takes the
    place of that tokenizer's. Returns the bytes of the weights. The directory appears whole or not at all. Raises
    ValueError when the stream is not what was announced.
    """
    files = _plan(shapes, dtype, shard_bytes)
    total = sum(_size(shape, dtype) for shape in shapes.values())
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        stream = iter(weights)
        for file, names in files.items():
            with (partial / file).open("wb") as out:
                _write_file(out, {name: shapes[name] for name in names}, dtype, stream)
        for name, _ in stream:
            raise ValueError(f"export: {name} follows the last tensor that was announced")
        if len(files) > 1:
            of = {name: file for file, names in files.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(of.items()))}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (partial / "config.json").write_text(_config(source, dtype))
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        if chat_template:
            _set_chat_template(partial, chat_template)
        (partial / "README.md").write_text(card, encoding="utf-8", errors="replace")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _set_chat_template(folder: Path, text: str) -> None:
    """One template, where transformers looks first: none is left in the tokenizer's configuration."""
    (folder / CHAT_TEMPLATE).write_text(text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    if path.is_file() and "chat_template" in (config := json.loads(path.read_text(encoding="utf-8"))):
        del config["chat_template"]
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _plan(shapes: Shapes, dtype: torch.dtype, limit: int) -> dict[str, list[str]]:
    """File -> the tensors in it, as they come."""
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = _size(shape, dtype)
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups)}


def _write_file(out: BinaryIO, shapes: Shapes, dtype: torch.dtype, stream: Iterator[tuple[str, Tensor]]) -> None:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _size(shape, dtype)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)  # tensors start at a multiple of 8 bytes
    out.write(len(content).to_bytes(8, "little") + content)
    for name, shape in shapes.items():
        found, tensor = next(stream, ("nothing", torch.empty(0)))
        if (found, tuple(tensor.shape), tensor.dtype) != (name, shape, dtype):
            raise ValueError(
                f"export: expected {name} {list(shape)} {dtype}, found {found} {list(tensor.shape)} {tensor.dtype}"
            )
        out.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _config(source: Path, dtype: torch.dtype) -> str:
    """``config.json`` as it is, or with the dtype that the weights have now."""
    text = (source / "config.json").read_text()
    config = json.loads(text)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    name = str(dtype).removeprefix("torch.")
    return text if config.get(key) == name else json.dumps(config | {key: name}, indent=2) + "\n"
