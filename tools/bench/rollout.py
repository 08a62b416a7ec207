"""Rollout engines side by side: the same training run with each, at two model sizes.

    megatron-entropy bench rollout [--steps 8] [--engines hf vllm vllm_server]

Trains the tiny task's GRPO recipe at TP 2 with every engine, on the shipped base model and on a larger random one that
answers at full length, and reads what the runs measured. Tokens are response tokens; the step is all of it: rollout,
reward, passes, update, sync. A run whose engine disagrees with the trainer's log-probs ends the benchmark. The first
steps, in which engines warm up, do not count. Writes ``runs/bench/rollout.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ext.config.shipped import find

from .. import command

RECIPE = "recipes/grpo/grpo-tiny-cpu.toml"
BASE = find("recipes/tiny/base")
WARM_UP = 2  # steps
WORST = 1e-4  # mean nats between engine and trainer, float32
LARGE = {
    "hidden_size": 384,
    "intermediate_size": 1152,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
PROMPTS, SAMPLES = 8, 8  # of a step, in one update


def run(options: argparse.Namespace) -> int:
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as folder:
        models = {"tiny": (BASE, 32), "large": (random_model(Path(folder) / "model"), 96)}
        for size, (model, length) in models.items():
            for engine in options.engines:
                console.print(f"{size} {engine} ...", highlight=False)
                rows.append({"model": size, "engine": engine, **measured(Path(folder), model, engine, length, options)})
    table = Table(title=f"{options.steps} steps, TP 2, two ranks on {len(os.sched_getaffinity(0))} cores, float32")
    for name in ("model", "parameters", "engine", "response tokens", "tokens/s", "sync", "step", "rollout share"):
        table.add_column(name, justify="left" if name in ("model", "engine") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['parameters'] / 1e6:.1f} M",
            row["engine"],
            f"{row['tokens']:.0f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['sync_s']:.3f} s",
            f"{row['step_s']:.2f} s",
            f"{row['rollout_s'] / row['step_s']:.0%}",
        )
    console.print(table)
    out = Path(options.out) / "rollout.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=2) + "\n")
    console.print(out, highlight=False)
    return 0


def measured(folder: Path, model: Path, engine: str, length: int, options: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps after the warm-up. Raises RuntimeError when the run fails or its engine is wrong."""
    name = f"{model.name}-{engine}"
    settings = [f"model.path={model}", f"rollout.engine={engine}", f"rollout.max_response_tokens={length}"]
    settings += [f"train.steps={options.steps}", f"rollout.enforce_eager={str(not options.compile).lower()}"]
    settings += [f"rollout.prompts={PROMPTS}", f"train.mini_batch_prompts={PROMPTS}", f"rollout.samples={SAMPLES}"]
    steps = steps_of(folder, name, RECIPE, *settings)
    worst = max(step["mismatch/mean"] for step in steps)
    steps = steps[WARM_UP:]
    median = {key: statistics.median(step[key] for step in steps) for key in steps[0] if key != "step"}
    return {
        "parameters": parameters(model),
        "tokens": statistics.median(step["response/length"] * PROMPTS * SAMPLES for step in steps),
        "tokens_per_s": median["speed/rollout_tokens_per_s"],
        "rollout_s": median["time/rollout_s"],
        "sync_s": median["time/sync_s"],
        "step_s": median["time/step_s"],
        "mismatch": worst,
    }


def steps_of(folder: Path, name: str, recipe: str, *settings: str) -> list[dict[str, float]]:
    """Train, and the metrics of every step. Raises RuntimeError when the run fails or its engine is wrong."""
    common = ("checkpoint.every=0", "log.trackers=[]", "alarms.mismatch=0")
    started(command("train", recipe, f"name={name}", f"log.dir={folder}", *settings, *common))
    steps = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    worst = max(step["mismatch/mean"] for step in steps)
    if not worst < WORST:
        raise RuntimeError(
            f"{name}: engine and trainer differ by {worst:.2g} nats, expected below {WORST:g}: no timing"
        )
    return steps


def started(line: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    """Run a command to its end. Raises RuntimeError with the end of what it said where it fails."""
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}: exit code {done.returncode}\n{done.stdout[-4000:]}")


def parameters(model: Path) -> int:
    from megatron_ext.config.checks import read_hf_config
    from megatron_ext.model.architectures import read_architecture
    from megatron_ext.plan.sizes import num_parameters

    return num_parameters(read_architecture(read_hf_config(model)))


def random_model(folder: Path) -> Path:
    """A Qwen2 with random weights and the tiny task's tokenizer, whose answers are as long as they may be."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base: Any = AutoConfig.from_pretrained(BASE, trust_remote_code=False)
    derived = ("layer_types", "head_dim")  # from the sizes
    config = type(base)(**{name: value for name, value in base.to_dict().items() if name not in derived} | LARGE)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.lm_head.weight.data[config.eos_token_id] = 0.0
    model.save_pretrained(folder)
    for file in BASE.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder
