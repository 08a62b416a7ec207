"""What a checkpoint costs the step it is saved after: written at once, and in the background.

    megatron-entropy bench checkpoint [--layers 10] [--model CONFIG_DIR] [--repeat 5]

A model of the configuration with so many of its layers, in bf16, with Megatron's distributed optimizer (14 bytes a
parameter), is saved by the trainer's own code. Beside the background write, and again beside the removal of the
checkpoint before, a fixed amount of work, products of matrices on one thread, goes on until well after it; what it
takes longer than alone is named beside the checkpoint's cost:

    at once       seconds of ``save``, which returns when all is on the disk, and of ``publish``
    background    seconds of ``save``, which returns when all is copied, and of ``publish``
    work beside   what the work took longer: the price of a core, a disk and a memory that are shared
    write         seconds from the copy to the disk, hidden

Memory: the state, its copy and fp32 gradients, 32 bytes a parameter. Nothing is reported unless every checkpoint has
the same bytes, and one of each kind, read back, restores the state to the bit. Writes ``runs/bench/checkpoint.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from megatron_ext import cpu_compat
from megatron_ext.checkpoint.checkpoint import Checkpoints, Published, verify
from megatron_ext.checkpoint.local_shards import trained_pieces
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_ext.model import parallel
from megatron_ext.model.architectures import read_architecture
from megatron_ext.model.build import Policy, build_policy
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.plan.sizes import num_parameters

from .peers import process_group

ONE = ParallelConfig(ranks_per_node=1)
BYTES = 32  # of a parameter: weight, master, two moments; their copy; the gradient
ROOM = 1.15
SIZE = 1024  # of the matrices
WRITE, REMOVAL = 1.3, 0.25  # how long the work beside either takes, over a write at once


def run(options: argparse.Namespace) -> int:
    with process_group("cpu"):
        cpu_compat.enter()
        parallel.initialize(ONE)
        torch.set_num_threads(1)
        model = build(options)
        folder = Path(options.out) / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            found = measure(model, folder, options.repeat)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    facts = {"model": str(options.model), "layers": options.layers, "repeat": options.repeat} | found
    print_table(facts)
    out = Path(options.out) / "checkpoint.json"
    out.write_text(json.dumps(facts, indent=2) + "\n")
    print(f"{out} written")
    return 0


def build(options: argparse.Namespace) -> TrainableModel:
    """With random weights and moments. Raises ConfigError where they would not fit in memory."""
    hf = read_hf_config(options.model) | {"num_hidden_layers": options.layers}
    architecture = read_architecture(hf)
    num, there = num_parameters(architecture), psutil.virtual_memory().available
    if ROOM * BYTES * num > there:
        raise ConfigError(
            f"--layers: {options.layers} layers are {num / 1e6:.0f} M parameters, which take {BYTES} bytes each, "
            f"{ROOM * BYTES * num / 2**30:.1f} GiB in all; found {there / 2**30:.1f} GiB: ask for fewer"
        )
    model = ModelConfig(path=str(options.model), dtype="bfloat16")
    policy = build_policy(architecture, parallel.model_layout(ONE), ModelOptions.from_config(model))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights_of(policy):
            weight.uniform_(-0.1, 0.1, generator=generator)
    trained = TrainableModel.build(policy, OptimizerConfig())
    trained.zero_grad()
    for weight in weights_of(policy):
        weight.main_grad.uniform_(-1e-3, 1e-3, generator=generator)
    trained.update(max_bad_steps=1)
    return trained


def weights_of(policy: Policy) -> list[Any]:
    return [weight for module in policy.modules for weight in module.parameters()]


def measure(model: TrainableModel, folder: Path, repeat: int) -> dict[str, Any]:
    state = [each.tensor for each in trained_pieces("policy", model) if each.stored]
    before = [each.clone() for each in state[:8]]  # the copy of all would be another checkpoint in memory
    seen, middle = set[str](), statistics.median
    at_once = [saved_at_once(model, folder, step, seen) for step in range(repeat)]
    write = middle(at_once)
    work = work_of(WRITE * write), work_of(REMOVAL * write)
    checkpoints, steps = of(model, folder, asynchronous=True), range(repeat, 2 * repeat + 1)
    first, *others = [saved_beside(checkpoints, folder, step, work, seen) for step in steps]
    for each in state[:8]:
        each.zero_()
    of(model, folder, asynchronous=False).load()
    restored = all(torch.equal(a, b) for a, b in zip(state[:8], before, strict=True))
    if len(seen) > 1 or not restored:
        raise SystemExit(
            f"bench: {len(seen)} different contents of one state, restored: {restored}; nothing is reported"
        )
    found = {name: middle(each[name] for each in others) for name in first}
    cost = middle(each["copy_s"] + each["publish_s"] for each in others)
    with_work = middle(each["copy_s"] + each["publish_s"] + max(each["work_longer_s"], 0.0) for each in others)
    return found | {
        "parameters": sum(weight.numel() for weight in weights_of(model.model)),
        "bytes": sum(each.nbytes for each in state),
        "at_once_s": write, "background_s": cost, "first_copy_s": first["copy_s"],  # with the room for it, once a run
        "ratio": cost / write, "ratio_with_work": with_work / write,
    }  # fmt: skip


def saved_at_once(model: TrainableModel, folder: Path, step: int, seen: set[str]) -> float:
    """Seconds until the checkpoint is committed; ``seen`` gets its content. The one before it is removed later."""
    checkpoints = of(model, folder, asynchronous=False)
    seconds, _ = timed(lambda: (checkpoints.save(step, {}), checkpoints.publish(wait=False)))
    checkpoints.publish(wait=True)
    seen.add(content_of(folder, step))
    return seconds


def saved_beside(
    checkpoints: Checkpoints, folder: Path, step: int, work: tuple[Callable[[], Any], Callable[[], Any]], seen: set[str]
) -> dict[str, float]:
    """Seconds of a checkpoint: written beside the first work; the one before is removed beside the second."""
    copy, _ = timed(lambda: checkpoints.save(step, {}))
    during, _ = timed(work[0])
    end, published = timed(lambda: committed(checkpoints))
    after, _ = timed(work[1])
    checkpoints.publish(wait=True)
    seen.add(content_of(folder, step))
    alone, _ = timed(lambda: (work[0](), work[1]()))  # each time anew: the speed of a machine drifts
    longer = during + after - alone
    return {
        "copy_s": copy, "publish_s": end, "write_s": published.seconds, "work_longer_s": longer, "work_alone_s": alone,
    }  # fmt: skip


def committed(checkpoints: Checkpoints) -> Published:
    """The checkpoint, once it is written, as it is after the work, and committed."""
    while (published := checkpoints.publish(wait=False)) is None:
        time.sleep(0.01)
    return published


def of(model: TrainableModel, folder: Path, *, asynchronous: bool) -> Checkpoints:
    return Checkpoints(
        folder, trained={"policy": model}, config={}, layout=ONE.model_dump(), keep=1,
        asynchronous=asynchronous,
    )  # fmt: skip


def content_of(folder: Path, step: int) -> str:
    """The hash of the tensors' file; the checkpoint is verified."""
    files = verify(folder / f"step_{step:06d}").files
    [record] = [record for name, record in files.items() if name.endswith(".distcp")]
    return record.sha256


def work_of(seconds: float) -> Callable[[], None]:
    """So many products as take about ``seconds`` now."""
    a = torch.rand(SIZE, SIZE)

    def products(count: int) -> None:
        for _ in range(count):
            torch.mm(a, a)

    products(4)
    pace = timed(lambda: products(16))[0] / 16
    return lambda: products(max(1, round(seconds / pace)))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def print_table(facts: dict[str, Any]) -> None:
    size = f"{facts['parameters'] / 1e6:.0f} M parameters, {facts['bytes'] / 1e9:.2f} GB"
    table = Table(title=f"a checkpoint of {size}, medians of {facts['repeat']}")
    for column in ("", "cost of the step, s", "of it copy", "of it publish", "work beside longer", "hidden write"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("at once", f"{facts['at_once_s']:.2f}", "-", "-", "-", "-")
    names = ("background_s", "copy_s", "publish_s", "work_longer_s", "write_s")
    table.add_row("background", *(f"{facts[name]:.2f}" for name in names))
    Console(file=sys.stdout).print(table)
    print(
        f"in the background it costs {facts['ratio']:.1%} of what it costs at once, and "
        f"{facts['ratio_with_work']:.1%} with what it takes from one core's work beside it"
    )
