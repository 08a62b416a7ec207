"""A recipe at its full size without its cluster: everything but the arithmetic on the GPUs.

    megatron-entropy train RECIPE --dry-run        one recipe, in words
    megatron-entropy dry-run                       every full-size recipe under recipes/, a line each
    megatron-entropy dry-run --json                the same as JSON

Checks the configuration and the method's options; reads the data, or a sample where it is not here; packs the
first mini-batch; builds, for every pipeline rank, the real Megatron shard of the full world (plan/meta_build.py);
compares the elements of all shards and what the export would stream with config.json, and the planner's bytes with the
shards'.

Exit codes: 0 all is right (what is not here yet is named), 1 something differs or does not fit, 2 configuration.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.manifest import MANIFEST
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config
from megatron_ext.config.shipped import RECIPES, outside
from megatron_ext.model.architectures import Architecture, find_family, read_architecture
from megatron_ext.plan.device import TOTAL_BYTES
from megatron_ext.plan.layout import Plan, make_plan
from megatron_ext.plan.memory import num_engines
from megatron_ext.plan.sizes import hf_tensors, num_parameters
from megatron_ext.plan.speed import RATES
from megatron_ext.rollout.registry import find_engine

from .arguments import command_parser
from .plan import method_roles, read_valid, table

FULL_SIZE = "[a-z]*/*-[0-9]*n[0-9]*g.toml"
GPU = "h100"  # of the recipes' GPUs the one with the least memory
SAMPLE, SAMPLE_PROBLEMS = RECIPES / "tiny", 32  # what stands in for data and tokenizers that are not here
RIGHT, WRONG, CONFIGURATION = 0, 1, 2


@contextmanager
def _silent() -> Iterator[None]:
    """Within, libraries do not warn: Transformer Engine and Apex are absent, Megatron builds something instead."""
    megatron = logging.getLogger("megatron")
    level = megatron.level
    with warnings.catch_warnings(record=True):
        megatron.setLevel(logging.ERROR)
        try:
            yield
        finally:
            megatron.setLevel(level)


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    right: bool

    def __str__(self) -> str:
        return self.what if self.right else f"WRONG: {self.what}"


@_silent()
def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("dry-run", __doc__)
    parser.add_argument("recipes", nargs="*", help="files or names of recipes (default: every full-size one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    recipes = options.recipes or full_size_recipes()
    if not recipes:
        print(
            f"configuration error\nno full-size recipe (*/*-NnMg.toml) below {RECIPES}; name recipes",
            file=sys.stderr,
        )
        return CONFIGURATION
    found, code, recipe = [], RIGHT, ""
    try:
        with Shards() as shards:
            for recipe in recipes:
                plan, checks = inspect(read_valid(recipe), shards)
                wrong = [str(check) for check in checks if not check.right]
                code = WRONG if wrong else code
                found.append({**plan.as_dict(), "checks": [str(check) for check in checks], "wrong": wrong})
                if not options.json:
                    print("\n  ".join([one_line(plan), *wrong]), flush=True)
    except ConfigError as error:
        print(f"configuration error\n{recipe}: {error}", file=sys.stderr)
        return CONFIGURATION
    if options.json:
        print(json.dumps(found, indent=2))
    return code


def one_line(plan: Plan) -> str:
    p, peak = plan.config.parallel, plan.worst.peak / 1e9
    count = num_parameters(plan.architecture)
    return f"{plan.config.name}: {count:,} parameters on {p.world} ranks, {peak:.1f} GB on the worst"


def full_size_recipes() -> list[Path]:
    """Every shipped recipe that names its nodes and GPUs."""
    return sorted(RECIPES.glob(FULL_SIZE))


@_silent()
def dry_run(config: Config) -> int:
    """One recipe in words; returns the exit code."""
    from megatron_ext.train.method_factory import create_method
    from megatron_ext.train.without_effect import without_effect

    lines = [f"without effect: {line}" for line in without_effect(config, create_method(config))]
    lines += data_path(config)
    with Shards() as shards:
        plan, checks = inspect(config, shards)
    print("\n".join([*lines, "", *(str(check) for check in checks), "", *table(plan), "", *first_step(plan)]))
    return RIGHT if all(check.right for check in checks) else WRONG


def inspect(config: Config, shards: Shards) -> tuple[Plan, list[Check]]:
    """The plan of a valid configuration, and what was compared with the built shards."""
    plan = make_plan(config, method_roles(config), rates=RATES[GPU], gpu_memory=TOTAL_BYTES[GPU])
    worst = f"{plan.worst.peak / 1e9:.1f} GB on the worst GPU ({plan.worst.worst_phase}), {plan.free / 1e9:.1f} GB free"
    return plan, [packing_check(config), *shards.checks(plan), Check(worst, plan.fits)]


def data_path(config: Config) -> Iterator[str]:
    """Reads the data as a run would, or a sample of the tiny task; names what has to be brought here first."""
    from megatron_ext.data.curriculum import data_order
    from megatron_ext.data.dataset import load_training_data
    from megatron_ext.rollout.model_files import load_tokenizer
    from megatron_ext.rollout.rewards.reward_pool import RewardPool

    model, data = Path(config.model.path), config.data
    yield from missing(config)
    here = any(model.glob("tokenizer*"))
    if not here and not config.prompt.template:  # the tiny task's template, which stands in, has no system turn
        config = config.model_copy(update={"prompt": config.prompt.model_copy(update={"system": ""})})
    try:
        tokenizer = load_tokenizer(model if here else SAMPLE / "base")
    except ValueError as error:
        raise ConfigError(f"model.path: {error}") from None
    answer_format = config.prompt.answer_format
    with (
        RewardPool(config.reward.workers, answer_format=answer_format) as pool,
        tempfile.TemporaryDirectory() as folder,
    ):
        real, path = Path(data.train).is_file(), Path(folder) / "sample.jsonl"
        if not real:
            problems = (SAMPLE / "data" / "train.jsonl").read_text().splitlines(keepends=True)
            path.write_text("".join(problems[:SAMPLE_PROBLEMS]))
            config = config.model_copy(update={"data": data.model_copy(update={"train": str(path)})})
        score = None if config.reward.function else pool.score
        encoded, lines = load_training_data(config, score=score, tokenizer=tokenizer)
    if not real:
        yield f"the first problems of the tiny task stand in for it: {lines[-1].removeprefix('data: ')}"
        return
    yield from lines
    yield f"longest prompt: {max(len(ids) for _, ids in encoded)} tokens"
    epochs = config.train.steps * config.rollout.prompts / len(encoded)
    yield f"the run: {config.train.steps} steps = {epochs:.1f} epochs -> {config.run_dir}"
    if data.curriculum and Path(data.curriculum).is_file():
        order = data_order(config, encoded)
        starts = zip(order.stages, order.starts, strict=True)
        stages = [f"{len(stage)} problems from step {first + 1}" for stage, first in starts]
        yield f"curriculum: {data.curriculum}: {', then '.join(stages)}"


def missing(config: Config) -> Iterator[str]:
    """What the run needs and is not here, with what prepares it."""
    model, data = Path(config.model.path), config.data
    download = f"hf download {config.model.hub or 'ID'} --local-dir {outside(config.model.path)}"
    if not any(model.glob("*.safetensors")):
        yield f"weights: not found here, to be prepared with {download}"
    if not any(model.glob("tokenizer*")):
        yield "tokenizer: not found here, comes with the weights"
    if not Path(data.train).is_file():
        schema = '{"prompt": ..., "answer": ...} a line'
        yield f"data.train: {data.train} not found here, to be prepared from {data.hub or 'its source'}, {schema}"
    if data.curriculum and not Path(data.curriculum).is_file():
        command = f"megatron-entropy semantic-entropy RECIPE --out {data.curriculum}"
        yield f"data.curriculum: {data.curriculum} not found here, to be prepared with {command}"
    for path in config.validation.data if config.validation.every else ():
        if not Path(path).is_file():
            yield f"validation.data: {path} not found here, to be prepared with megatron-entropy data"
    if config.model.weights and not (Path(config.model.weights) / MANIFEST).is_file():
        yield f"model.weights: {config.model.weights} not found here: it is a checkpoint of another run"
    if fault := find_engine(config.rollout).missing_package():
        yield f"rollout.engine: {config.rollout.engine}: {fault}"


def packing_check(config: Config) -> Check:
    """The first mini-batch of one data-parallel rank, every sequence at full length, and its fullest micro-batch."""
    from megatron_ext.model import zigzag
    from megatron_ext.train import packing

    p, prompt, response = config.parallel, config.data.max_prompt_tokens, config.rollout.max_response_tokens
    per_rank = config.train.mini_batch_prompts * config.rollout.samples // p.data
    full = ([0] * prompt, [0] * response)
    bins = packing.split([full] * per_rank, config.train.micro_batch_tokens, chunks=p.chunks)
    fullest = max(bins, key=len)
    packed = packing.pack([full] * len(fullest), multiple=p.token_multiple, chunks=p.chunks)
    tokens, predicted = len(packed.tokens), len(packed.logit_positions)
    right = tokens % p.token_multiple == 0 and tokens - config.train.micro_batch_tokens < p.token_multiple
    right &= predicted == response * len(fullest) and sum(map(len, bins)) == per_rank
    cut = ""
    if p.context > 1:
        parts = [zigzag.cut(packed, rank, p.context) for rank in range(p.context)]
        right &= all(len(part.tokens) * p.context == tokens for part in parts)
        right &= sum(len(part.targets) for part in parts) == predicted
        most = max(len(part.targets) for part in parts)
        cut = f"; each of {p.context} context-parallel ranks has {tokens // p.context:,}, and predicts at most {most:,}"
    return Check(
        f"packing: {per_rank} responses of a mini-batch on each data-parallel rank in {len(bins)} micro-batches, the "
        f"fullest of {len(fullest)} sequences, {tokens:,} tokens and {predicted:,} of them predicted{cut}",
        right,
    )


class Shards:
    """Builds shards and compares them with config.json and the plan. Equal layouts are built once.

    A process of its own does it: what Megatron-Core needs without CUDA is changed there (megatron_ext/cpu_compat.py).
    """

    def __init__(self) -> None:
        self._pool = multiprocessing.get_context("fork").Pool(1)
        self._built: dict[str, list[Any]] = {}

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.terminate()
        self._pool.join()

    def build(self, plan: Plan) -> list[Any]:
        """One ``plan.meta_build.Shard`` for each pipeline rank, of its first tensor, expert and data-parallel rank."""
        key = repr((plan.config.model, plan.config.parallel, plan.roles.reference, plan.roles.critic))
        if key not in self._built:
            self._built[key] = self._pool.apply(build_shards, (plan.config,))
        return self._built[key]

    def checks(self, plan: Plan) -> list[Check]:
        shards, a = self.build(plan), plan.architecture
        stages = sum(shard.modules for shard in shards)
        total, expected = sum(shard.hf_elements for shard in shards), num_parameters(a)
        checks = [
            Check(
                f"shards: {stages} stages on {len(shards)} pipeline ranks of {plan.config.parallel.world} built; all "
                f"shards together have {total:,} parameters, config.json gives {expected:,}",
                total == expected,
            ),
            self._export(a, shards),
        ]
        for shard, planned in zip(shards, plan.ranks, strict=True):
            items = planned.phases["score"]
            differ = [
                f"{k} {v:,} built, {items.get(k, 0):,.0f} planned" for k, v in shard.held.items() if v != items[k]
            ]
            held = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in shard.held.items())
            checks.append(Check(f"rank {shard.rank}: {'; '.join(differ) or held + ', as planned'}", not differ))
        return checks

    def _export(self, a: Architecture, shards: Sequence[Any]) -> Check:
        tensors = dict(hf_tensors(a))
        right = all(dict(shard.stream) == tensors and len(shard.stream) == len(tensors) for shard in shards)
        size = sum(math.prod(shape) for shape in tensors.values()) * 2 / 1e9
        return Check(f"export: {len(tensors)} tensors by the names and shapes of {a.name}, {size:.1f} GB bf16", right)


@_silent()
def build_shards(config: Config) -> list[Any]:
    """One ``plan.meta_build.Shard`` for each pipeline rank, of its first tensor, expert and data-parallel rank."""
    from megatron_ext.plan.meta_build import build_shard
    from megatron_ext.train.method_factory import create_method

    p, needs = config.parallel, create_method(config).needs
    architecture = read_architecture(read_hf_config(config.model.path), find_family(config.model.family))
    ranks = range(0, p.world, p.world // p.pipeline)
    return [build_shard(config, architecture, needs, rank) for rank in ranks]


def first_step(plan: Plan) -> list[str]:
    """What the run would do first."""
    c = plan.config
    t, p, r = plan.tokens(), c.parallel, c.rollout
    engines = num_engines(c)
    sees = (
        f"; {c.method['name']} sees the whole step first"
        if plan.roles.old
        else ", the first mini-batch's in its update"
    )
    lines = [
        "the first step:",
        f"  rollout   {engines} {r.engine} engines sample {t['responses']} responses to {t['prompts']} prompts at "
        f"temperature {r.temperature}, {t['responses'] // engines} each, of at most {r.max_response_tokens} tokens",
        f"  score     log-probs and entropies of the old policy{', the reference' * plan.roles.reference}"
        f"{', values of the critic' * plan.roles.critic}{sees}",
        f"  update    {t['updates']} updates of {t['responses_per_update']} responses, {p.data} data-parallel ranks x "
        f"{t['micro_batches_per_update']} micro-batches of at most {c.longest_sequence:,} tokens a sequence",
        f"  sync      {num_parameters(plan.architecture) * 2 / 1e9:.1f} GB of weights to every engine",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
