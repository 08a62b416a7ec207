"""A training step beside TRL's: the same task, model, updates and cores, one after the other.

    megatron-entropy bench step [--sizes tiny large] [--steps 24] [--rounds 1] [--only 'dr_grpo DP*'] [--deterministic]

dr_grpo and siren on this machine's cores, data-parallel and tensor-parallel, and TRL's GRPOTrainer with dr_grpo's loss
in the environment that ``make .venv-trl/.installed`` makes. tiny is the shipped base model; large is a random one of
10.4 M parameters whose responses have 200 tokens. A step is one generation, its rewards and all its updates; the first
steps do not count. With several rounds all runs are made as often, in turn, and a ratio is the median of those within
the rounds, since the speed of a machine drifts. On the tiny model the first round ends with an evaluation of the same
held-out problems, so that speed is not bought with learning. No times are printed unless engine and trainer agree to
1e-4 nats and TRL reads the same token ids. Writes ``runs/bench/step.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_ext import methods
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.config.schema import Config
from megatron_ext.data.dataset import load_training_data
from megatron_ext.data.prompts import render_prompts
from megatron_ext.files import write_atomically
from megatron_ext.rollout.model_files import load_tokenizer

from .. import command
from ..evaluate import load_evaluations
from ..lab.plan import recipe_of
from ..quickstart import HELD_OUT
from .rollout import BASE, WARM_UP, parameters, random_model, started, steps_of

PEER = "TRL"
PHASES = ("rollout", "reward", "old_logprob", "update", "sync")


@dataclass(frozen=True)
class Size:
    model: Path
    settings: tuple[str, ...]
    evaluates: bool


def run(options: argparse.Namespace) -> int:
    python = Path(options.peer) / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"--peer: no such file: {python}; make it with: make {options.peer}/.installed")
    cores = len(os.sched_getaffinity(0))
    runs = ours(cores, deterministic=options.deterministic)
    chosen = [each for each in runs if any(fnmatch(each[0], pattern) for pattern in options.only)]
    if not chosen:
        raise ConfigError(f"--only: found {options.only}, expected names or patterns of {[name for name, *_ in runs]}")
    console, rows = Console(width=None if sys.stdout.isatty() else 120), list[dict[str, Any]]()
    out = Path(options.out) / "step.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, size in sizes(folder, options.sizes).items():
            rounds = list[list[dict[str, Any]]]()
            for number in range(options.rounds):
                of_round, measured = replace(size, evaluates=size.evaluates and number == 0), list[dict[str, Any]]()
                own = folder / f"{name}-{number}"
                for label, method, layout in chosen:
                    console.print(f"{name}: {label} ...", highlight=False)
                    settings = (*size.settings, *layout, f"train.steps={options.steps}")
                    measured.append({"size": name, "run": label, **trained(own, label, method, of_round, settings)})
                console.print(f"{name}: {PEER} ...", highlight=False)
                settings = (*size.settings, f"train.steps={options.steps}")
                measured.append({"size": name, "run": PEER, **peer(own, python, of_round, settings, cores)})
                rounds.append(measured)
            rows += [over_rounds(rounds, number) for number in range(len(rounds[0]))]
            console.print(table(rows, cores, options.steps))
            write_atomically(out, json.dumps(rows, indent=2) + "\n")
    console.print(out, highlight=False)
    return 0


def over_rounds(rounds: list[list[dict[str, Any]]], number: int) -> dict[str, Any]:
    """Run ``number`` with its medians over the rounds, and the ratios that it has to two others of its round."""
    own = [measured[number] for measured in rounds]
    found = own[0] | {
        "step_s": statistics.median(row["step_s"] for row in own),
        "over_peer": statistics.median(measured[number]["step_s"] / measured[-1]["step_s"] for measured in rounds),
        "over_first": statistics.median(measured[number]["step_s"] / measured[0]["step_s"] for measured in rounds),
    }
    if "phases" in found:
        found["phases"] = {phase: statistics.median(row["phases"][phase] for row in own) for phase in PHASES}
    return found


def sizes(folder: Path, names: list[str]) -> dict[str, Size]:
    made = {"tiny": Size(BASE, ("rollout.batch_size=256",), True)}
    if "large" in names:
        shape = ("rollout.prompts=8", "train.mini_batch_prompts=2", "rollout.max_response_tokens=200")
        made["large"] = Size(random_model(folder / "random"), (*shape, "train.micro_batch_tokens=4096"), False)
    return {name: made[name] for name in names}


def ours(cores: int, *, deterministic: bool = False) -> list[tuple[str, str, tuple[str, ...]]]:
    """Name, method and layout of each run."""
    data = ("parallel.tensor=1", f"parallel.ranks_per_node={cores}")
    tensor = (f"parallel.tensor={cores}", f"parallel.ranks_per_node={cores}")
    found = [
        (f"dr_grpo DP {cores}", "dr_grpo", data),
        (f"siren DP {cores}", "siren", data),
        (f"dr_grpo TP {cores}", "dr_grpo", tensor),
    ]
    if deterministic:
        found.append((f"deterministic TP {cores}", "dr_grpo", (*tensor, "model.deterministic=true")))
    return found


def trained(folder: Path, label: str, method: str, size: Size, settings: tuple[str, ...]) -> dict[str, Any]:
    """Medians over a run's steps, and its evaluation. Raises RuntimeError when it fails or its engine is wrong."""
    name = label.replace(" ", "-")
    own = folder / name
    counted = steps_of(folder, name, str(recipe_of(method)), f"model.path={size.model}", *settings)[WARM_UP:]
    medians = {phase: statistics.median(step[f"time/{phase}_s"] for step in counted) for phase in PHASES}
    found = {"step_s": statistics.median(step["time/step_s"] for step in counted), "phases": medians}
    rollout = load_config(recipe_of(method), [f"model.path={size.model}", *settings]).rollout
    tokens = rollout.prompts * rollout.samples * statistics.median(step["response/length"] for step in counted)
    found |= {"parameters": parameters(size.model), "tokens": tokens}
    if size.evaluates:
        started(command("convert", "to-hf", str(own), str(own / "hf")))
        found |= {"avg@8": evaluated(own / "hf", folder / f"{name}.json")}
    return found


def peer(folder: Path, python: Path, size: Size, settings: tuple[str, ...], cores: int) -> dict[str, Any]:
    """The same of TRL's run with the settings of our dr_grpo recipe."""
    config = load_config(recipe_of("dr_grpo"), [*settings, f"model.path={size.model}"])
    out = folder / PEER
    file = folder / f"{PEER}.json"
    file.write_text(json.dumps(settings_of(config, out, cores)))
    environment = os.environ | {"PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": str(cores)}
    started([str(python), "-m", "tools.bench.trl_trainer", str(file)], environment)
    steps = [json.loads(line)["step_s"] for line in (out / "steps.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"step_s": statistics.median(steps[WARM_UP:]), "parameters": parameters(size.model)}
    if size.evaluates:
        found |= {"avg@8": evaluated(out / "model", folder / f"{PEER}-evaluation.json")}
    return found


def settings_of(config: Config, out: Path, cores: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.model.path)
    problems, _ = load_training_data(config, score=None, tokenizer=tokenizer)
    texts = render_prompts(tokenizer, [problem for problem, _ in problems], config.prompt)
    method: Any = methods.create(config.method)
    o = config.optimizer
    return {
        "model": str(config.model.path),
        "out": str(out),
        "threads": cores,
        "workers": config.reward.workers,
        "steps": config.train.steps,
        "updates": config.rollout.prompts // config.train.mini_batch_prompts,
        "mini_batch_prompts": config.train.mini_batch_prompts,
        "samples": config.rollout.samples,
        "max_response_tokens": config.rollout.max_response_tokens,
        "temperature": config.rollout.temperature,
        "clip_low": method.clip_low,
        "clip_high": method.clip_high,
        "seed": config.train.seed,
        **{name: getattr(o, name) for name in ("lr", "weight_decay", "beta1", "beta2", "eps", "clip_grad")},
        "problems": [
            {"text": text, "ids": ids, "answer": p.answer, "verifier": p.verifier, "numbers": p.numbers}
            for text, (p, ids) in zip(texts, problems, strict=True)
        ],
    }


def evaluated(model: Path, out: Path) -> float:
    started(command("evaluate", str(model), *HELD_OUT, "--out", str(out), "--label", "after"))
    return load_evaluations(out)["after"]["metrics"]["avg@8"]["mean"]


def table(rows: list[dict[str, Any]], cores: int, steps: int) -> Table:
    made = Table(title=f"{steps} steps on {cores} cores, float32; seconds are medians after {WARM_UP} steps")
    for name in ("size", "run"):
        made.add_column(name)
    first = rows[0]["run"].replace(" ", "\n")
    for name in ("step, s", f"/ {PEER}", f"/ {first}", "rollout", "reward", "old", "update", "sync", "avg@8"):
        made.add_column(name, justify="right")
    for row in rows:
        phases = [f"{row['phases'][phase]:.3f}" if "phases" in row else "" for phase in PHASES]
        learned = f"{row['avg@8']:.1%}" if "avg@8" in row else ""
        size = f"{row['parameters'] / 1e6:.1f} M"
        ratios = (f"{row['over_peer']:.2f}", f"{row['over_first']:.2f}")
        made.add_row(size, row["run"], f"{row['step_s']:.3f}", *ratios, *phases, learned)
    return made
