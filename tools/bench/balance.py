"""How long data-parallel ranks wait for one another in an update, with groups dealt in turn and dealt for balance.

    megatron-entropy bench balance [--ranks 64] [--samples 8] [--longest 8192] [--model CONFIG_DIR]
    megatron-entropy bench balance --lengths RUN        lengths of the responses that a run recorded (samples.jsonl)

A simulation with the trainer's own rule (train/balance.py) and its count of what a sequence costs; nothing is trained.
Drawn lengths are log-normal around a tenth of the longest, cut there; half of the variance of their logarithm lies
between problems. Of a run's recorded responses, which are single ones of their groups, each is drawn for itself.

    in turn      group i trains on rank i mod ranks
    by tokens    dealt by number of tokens
    by work      dealt by operations, attention included: what a run does
    bound        no division of whole groups waits less: the mean, the costliest group, and the two cheapest of the
                 ranks + 1 costliest, of which two share a rank

Writes ``runs/bench/balance.json``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.metrics.writer import SAMPLES, read_steps
from megatron_ext.model.architectures import read_architecture
from megatron_ext.train.balance import deal, least_longest, loads, sequence_cost

PER_RANK = (1, 2, 4, 8, 16)  # groups of a mini-batch on a rank
MINI_BATCHES = 20
PROMPT = 200  # tokens
SPREAD = 1.0  # standard deviation of a length's logarithm

Draw = Callable[[np.random.Generator, int, int], np.ndarray]  # (groups, samples) -> response lengths [groups, samples]


def run(options: argparse.Namespace) -> int:
    cost = sequence_cost(read_architecture(read_hf_config(options.model)))
    draw = drawn(options.longest) if options.lengths is None else recorded(Path(options.lengths))
    rows = [{"groups": count, **idle(draw, cost, options.ranks, count, options.samples)} for count in PER_RANK]
    source = f"drawn up to {options.longest}" if options.lengths is None else f"of {options.lengths}"
    print_table(rows, f"idle share of {options.ranks} ranks, {options.samples} responses a group, lengths {source}")
    out = Path(options.out) / "balance.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"ranks": options.ranks, "samples": options.samples, "lengths": source, "model": str(options.model)}
    out.write_text(json.dumps(facts | {"rows": rows}, indent=2) + "\n")
    print(f"{out} written")
    return 0


def idle(
    draw: Draw, cost: Callable[[int], float], ranks: int, per_rank: int, samples: int, seed: int = 0
) -> dict[str, float]:
    """The idle shares of MINI_BATCHES updates by each rule, and the bound."""
    size = ranks * per_rank
    lengths = PROMPT + draw(np.random.default_rng(seed), MINI_BATCHES * size, samples)
    tokens = [int(group.sum()) for group in lengths]
    costs = [sum(cost(int(length)) for length in group) for group in lengths]
    owners = {
        "in turn": [number % ranks for number in range(len(costs))],
        "by tokens": deal(tokens, size, ranks, first=0),
        "by work": deal(costs, size, ranks, first=0),
    }
    parts = [slice(start, start + size) for start in range(0, len(costs), size)]
    longest = {
        name: [max(loads(costs[part], each[part], ranks)) for part in parts] for name, each in owners.items()
    } | {"bound": [least_longest(costs[part], ranks) for part in parts]}
    return {name: 1 - math.fsum(costs) / (ranks * math.fsum(each)) for name, each in longest.items()}


def drawn(longest: int) -> Draw:
    """Long-tailed lengths, alike in a group."""

    def draw(chance: np.random.Generator, groups: int, samples: int) -> np.ndarray:
        of_problem, own = chance.normal(size=(groups, 1)), chance.normal(size=(groups, samples))
        exponent = SPREAD * (of_problem + own) / math.sqrt(2)
        return np.clip(np.rint(longest / 10 * np.exp(exponent)), 1, longest).astype(int)

    return draw


def recorded(folder: Path) -> Draw:
    """Lengths of a run's recorded responses. Raises ConfigError where there are none."""
    path = folder / SAMPLES
    try:
        known = np.array([len(sample["tokens"]) for sample in read_steps(path)])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--lengths: {path}: {error}; expected the responses that a run recorded") from None
    if not len(known):
        raise ConfigError(f"--lengths: {path} holds no response; set log.samples above 0 in the run")
    return lambda chance, groups, samples: chance.choice(known, size=(groups, samples))


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    names = [name for name in rows[0] if name != "groups"]
    for name in ("groups a rank and update", *names):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row["groups"]), *(f"{row[name]:.1%}" for name in names))
    Console().print(table)
