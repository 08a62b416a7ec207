"""Convert between Megatron checkpoints and Hugging Face model directories, on the CPU, in one process.

    megatron-entropy convert to-hf runs/siren-tiny-cpu OUT            the newest valid checkpoint of a run
    megatron-entropy convert to-hf runs/siren-tiny-cpu/checkpoints/step_000040 OUT --max-shard-size 2GB
    megatron-entropy convert to-hf runs/siren-tiny-cpu OUT --best     the best validated one; RUN/checkpoints/best too
    megatron-entropy convert from-hf MODEL OUT                        weights only, to start runs of any layout from:
                                                                     model.weights=OUT/step_000000

A checkpoint of any layout (tensor, pipeline, virtual, expert, data) is read; its files are checked against the
manifest first. Both ways one tensor is in memory at a time. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.best import best_of
from megatron_ext.checkpoint.manifest import BEST, CheckpointError, Manifest
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import with_defaults
from megatron_ext.config.schema import Config, ParallelConfig

from .arguments import command_parser
from .progress import ToolProgress

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_ext.model.param_mapping import ParamMapping

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("convert", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    to_hf_parser = commands.add_parser("to-hf", help="checkpoint -> Hugging Face directory")
    to_hf_parser.add_argument("checkpoint", type=Path, help="a step_* directory, or a run (its newest valid one)")
    to_hf_parser.add_argument("out", type=Path)
    to_hf_parser.add_argument("--best", action="store_true", help="of a run: its best validated checkpoint")
    to_hf_parser.add_argument("--model", type=Path, help="where config and tokenizer come from (default: the run's)")
    to_hf_parser.add_argument(
        "--max-shard-size", type=num_bytes, default="4GIB", help="of a safetensors file: 500MB, 4GiB (the default)"
    )
    from_hf_parser = commands.add_parser("from-hf", help="Hugging Face directory -> Megatron checkpoint of the weights")
    from_hf_parser.add_argument("model", type=Path)
    from_hf_parser.add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", module="megatron")  # that apex and Transformer Engine are absent
    start = time.monotonic()
    try:
        _refuse_to_overwrite(options.out)
        if options.command == "to-hf":
            checkpoint = _root(options.checkpoint) / BEST if options.best else options.checkpoint
            size = to_hf(checkpoint, options.out, source=options.model, shard_bytes=options.max_shard_size)
        else:
            size = from_hf(options.model, options.out)
    except (ConfigError, CheckpointError, ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.monotonic() - start
    print(f"convert: {decimal(size)} in {seconds:.1f} s, peak memory {decimal(peak)}", file=sys.stderr)
    print(options.out)
    return 0


def to_hf(checkpoint: Path, out: Path, *, source: Path | None, shard_bytes: int) -> int:
    """Export a checkpoint; returns the bytes of its weights.

    Raises CheckpointError for a damaged, absent or unfitting one, ConfigError for a missing model.
    """
    from megatron_ext.checkpoint.full_tensors import CheckpointTensors, TensorLocation
    from megatron_ext.model.architectures import find_family, read_architecture
    from megatron_ext.model.export import write_hf
    from megatron_ext.model.param_mapping import full_mappings, hf_shapes

    from .model_card import model_card

    print(f"convert: checking the files of {checkpoint}", file=sys.stderr)
    path, found = find(checkpoint)
    source = source or Path(found.config["model"]["path"])
    family = find_family(found.config["model"].get("family", ""))  # a checkpoint may be older than the key
    architecture = read_architecture(read_hf_config(source), family)
    tensors = CheckpointTensors(path)
    mappings = [(mapping, TensorLocation.of(mapping)) for mapping in full_mappings(architecture)]
    dtype = tensors.check_policy(architecture, found.layout.get("tensor", 1))
    with ToolProgress(Console(stderr=True)) as progress:
        task = progress.add_task("tensors", total=len(mappings))

        def weights() -> Iterator[tuple[str, Tensor]]:
            for mapping, location in mappings:
                progress.advance(task)
                yield from zip(mapping.hf, mapping.sharding.join([tensors.read(location)]), strict=True)

        return write_hf(
            out,
            weights(),
            shapes=hf_shapes(architecture),
            dtype=dtype,
            source=source,
            card=model_card(path, found, source=source),
            chat_template=with_defaults(found.config)["prompt"]["template"],
            shard_bytes=shard_bytes,
        )


def from_hf(model: Path, out: Path) -> int:
    """Write the weights of a model directory as the checkpoint of step 0 below ``out``; returns their bytes.

    Raises ValueError naming everything about its files and tensors that is not as config.json says.
    """
    from megatron_ext.checkpoint.full_tensors import TensorLocation, write_tensors
    from megatron_ext.model.architectures import read_architecture
    from megatron_ext.model.hf_weights import open_weights
    from megatron_ext.model.param_mapping import full_mappings

    architecture = read_architecture(read_hf_config(model))
    stored = open_weights(model, architecture)
    mappings = full_mappings(architecture)
    config = Config.model_validate({"model": {"path": str(model)}}).model_dump()
    folder = manifest.open_partial(out, 0)
    try:
        with ToolProgress(Console(stderr=True)) as progress:
            task = progress.add_task("tensors", total=len(mappings))

            def full(mapping: ParamMapping) -> Tensor:
                progress.advance(task)
                return mapping.sharding.shard([stored.tensor(name) for name in mapping.hf], 0, 1)

            tensors = [(TensorLocation.of(mapping), partial(full, mapping)) for mapping in mappings]
            files = write_tensors(folder, tensors, stored.dtype)
        manifest.publish(folder, step=0, files=files, layout=ParallelConfig().model_dump(), config=config)
    except BaseException:
        manifest.remove(folder)
        raise
    return sum(record.bytes for record in files.values())


def find(checkpoint: Path) -> tuple[Path, Manifest]:
    """The verified checkpoint that a path means: a ``step_*`` directory, a run, its ``checkpoints``, or ``best`` there.

    Raises CheckpointError.
    """
    if checkpoint.name == BEST and not checkpoint.is_dir():
        if not checkpoint.parent.is_dir():
            raise CheckpointError(
                f"{checkpoint.parent}: no such folder; give a run's, or one of its step_* directories"
            )
        checkpoint = best_of(checkpoint.parent)
    if re.fullmatch(r"step_\d+", checkpoint.name) or (checkpoint / manifest.MANIFEST).is_file():
        return checkpoint, manifest.verify(checkpoint)
    found = manifest.newest_valid(_root(checkpoint))
    if found is None:
        raise CheckpointError(
            f"{checkpoint}: holds no checkpoint; give a run's folder or one of its step_* directories"
        )
    for line in found.refused:
        print(f"convert: {line}", file=sys.stderr)
    return found.path, found.manifest


def _root(folder: Path) -> Path:
    """Where a run, or its ``checkpoints``, has them."""
    return folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder


def num_bytes(text: str) -> int:
    """``500MB`` or ``4GiB`` in bytes. Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip().upper())
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 500MB or 4GiB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def _refuse_to_overwrite(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not empty, or no directory; remove it or give another directory")


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # conversion is for the CPU
    sys.exit(main())
