"""A stream of Hugging Face-named tensors -> a model directory that ``transformers`` alone loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

COPIED = (  # of the model the run started from, where present
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
SHARD_BYTES = 4 * 2**30


def write_hf(
    folder: Path, weights: Iterable[tuple[str, Tensor]], *, source: Path, card: str, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write safetensors shards of at most ``shard_bytes`` (plus one tensor), index, configuration, tokenizer, card.

    ``source`` is the directory the configuration and tokenizer come from. At most one shard is in memory.
    Returns the number of bytes of the weights. The directory appears whole or not at all.
    """
    partial = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        names, total = _write_shards(partial, weights, shard_bytes)
        if len(set(names.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        (partial / "README.md").write_text(card)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return total


def _write_shards(folder: Path, weights: Iterable[tuple[str, Tensor]], limit: int) -> tuple[dict[str, str], int]:
    """``tensor -> file`` and the bytes of all. Files are numbered as they fill and named once their count is known."""
    held: dict[str, Tensor] = {}
    size, total, parts = 0, 0, []

    def flush() -> None:
        nonlocal held, size
        save_file(held, folder / f"part-{len(parts)}", metadata={"format": "pt"})
        parts.append(list(held))
        held, size = {}, 0

    for name, tensor in weights:
        held[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= limit:
            flush()
    if held:
        flush()
    names = {}
    for number, part in enumerate(parts):
        file = "model.safetensors" if len(parts) == 1 else f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (folder / f"part-{number}").rename(folder / file)
        names |= dict.fromkeys(part, file)
    return names, total
