"""Peak memory and time of the conversion, both ways, next to a plain copy of the files.

    python -m tools.bench.convert recipes/models/qwen2.5-math-1.5b --scratch DIR

Writes a model of that ``config.json`` with random weights into DIR (three times its size is needed), copies it,
converts it to a checkpoint and back, checks that every tensor returned bitwise, and only then prints a table.
Each is a process of its own, so its peak resident memory is its own; pages of mapped files count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_ext.config.checks import read_hf_config
from megatron_ext.model.architectures import read_architecture
from megatron_ext.model.export import write_hf
from megatron_ext.model.param_mapping import Shape, hf_shapes
from megatron_ext.model.safetensors_dir import SafetensorsDir

from .. import command

SMALL_PARENT = """import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""  # a process starts with the peak of the one it is forked from


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="directory with a config.json")
    parser.add_argument("--scratch", type=Path, required=True, help="where there is room; what is written is removed")
    options = parser.parse_args(arguments)
    shapes = hf_shapes(read_architecture(read_hf_config(options.config)))
    options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        model, checkpoint, back = (Path(folder) / name for name in ("model", "checkpoint", "back"))
        weights = random_weights(shapes)
        size = write_hf(model, weights, shapes=shapes, dtype=torch.bfloat16, source=options.config, card="")
        convert = command("convert")
        rows = {"cp -r": measured(["cp", "-r", str(model), str(back)])}
        shutil.rmtree(back)
        rows["from-hf"] = measured([*convert, "from-hf", str(model), str(checkpoint)])
        rows["to-hf"] = measured([*convert, "to-hf", str(checkpoint), str(back)])
        same(model, back, shapes)
    table = Table(title=f"{options.config.name}: {size / 1e9:.2f} GB of bf16 weights, returned bitwise")
    for name in ("", "time", "peak memory", "above the weights"):
        table.add_column(name, justify="left" if not name else "right")
    for name, (seconds, peak) in rows.items():
        table.add_row(name, f"{seconds:.1f} s", f"{peak / 1e9:.2f} GB", f"{(peak - size) / 1e9:+.2f} GB")
    Console().print(table)
    print(json.dumps({"bytes": size} | {name: {"s": s, "peak_bytes": peak} for name, (s, peak) in rows.items()}))
    return 0


def random_weights(shapes: dict[str, Shape]) -> Iterator[tuple[str, Tensor]]:
    """Random bits that are finite bf16 numbers."""
    draw = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        bits = torch.randint(0, 0x3F80, shape, dtype=torch.int16, generator=draw)  # from 0 to below 1
        yield name, bits.view(torch.bfloat16)


def measured(command: Sequence[str]) -> tuple[float, int]:
    """Wall time in seconds and peak resident bytes of a command. Raises RuntimeError if it fails."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-S", "-c", SMALL_PARENT, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}")
    return time.monotonic() - start, int(done.stdout) * 1024


def same(left: Path, right: Path, shapes: dict[str, Shape]) -> None:
    """Raises RuntimeError naming the first tensor that differs."""
    one, other = SafetensorsDir(left), SafetensorsDir(right)
    for name in shapes:
        if not torch.equal(one.tensor(name)[:].view(torch.int16), other.tensor(name)[:].view(torch.int16)):
            raise RuntimeError(f"{name} did not return bitwise")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
