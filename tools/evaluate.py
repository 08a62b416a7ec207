"""Evaluate Hugging Face model directories on a file of verifiable problems: avg@n, pass@k, maj@n with intervals.

    megatron-entropy evaluate MODEL --data eval.jsonl --samples 8 --out runs/siren/evaluation.json --label after
    megatron-entropy evaluate BASE RUN_1/hf RUN_2/hf --data eval.jsonl        side by side, differences to the first

The output file maps labels to evaluations, so that one file holds ``before`` and ``after``; writing a label
leaves the others. Each evaluation keeps n and c per problem, with which tools/compare_runs.py pairs two of
them. Exit codes: 0 done, 2 bad input, 3 the verifier is not to be trusted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import DataConfig, PromptConfig, RolloutConfig
from megatron_ext.config.shipped import find
from megatron_ext.files import LARGE_BYTES, read_json
from megatron_ext.metrics.eval_stats import CONFIDENCE, bootstrap, majority, per_problem
from megatron_ext.rollout.registry import ENGINES, check_engine, find_engine

from .arguments import command_parser, output_file, whole_number, whole_numbers
from .evaluation_tables import side_by_side, table
from .progress import ToolProgress

if TYPE_CHECKING:
    from megatron_ext.rollout.base import Request, Sampling
    from megatron_ext.types import Problem, Reward, Sample

SCORED_AT_ONCE = 1024
COLOCATED = [name for name, engine in ENGINES.items() if engine.colocated]
MAX_LEFT_OUT = DataConfig().max_left_out
VOTING = ("correct", "wrong")  # other outcomes have no readable answer to the question asked
OTHER_NAMES = {
    "data.train": "--data",
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "data.max_left_out": "--max-left-out",
    "model.path": "MODEL",
    "rollout.": "--",
}


class Engine(Protocol):
    """What is used of a rollout engine."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: Callable[[list[Sample]], None] | None = None
    ) -> list[Sample]: ...


class Pool(Protocol):
    """What is used of a reward pool."""

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]: ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to decode and what to report. Raises ConfigError for values that contradict each other."""

    samples: int = 8
    ks: tuple[int, ...] = ()  # pass@k; empty: the powers of two up to ``samples``
    temperature: float = 1.0
    top_p: float = 1.0
    max_prompt_tokens: int = 4096
    max_response_tokens: int = 1024
    max_left_out: float = MAX_LEFT_OUT  # share of the data's rows that may have a fault
    prompt_suffix: str = ""
    seed: int = 0
    limit: int | None = None  # only the first problems of the file

    def __post_init__(self) -> None:
        for name in ("samples", "max_prompt_tokens", "max_response_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit: expected at least 1, found {self.limit}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p: expected a share in (0, 1], found {self.top_p}")
        if not 0 <= self.max_left_out <= 1:
            raise ConfigError(f"--max-left-out: expected a share from 0 to 1, found {self.max_left_out}")
        if not 0 <= self.temperature <= 100:
            raise ConfigError(f"--temperature: expected 0 (greedy) to 100, found {self.temperature}")
        if self.temperature == 0 and self.samples > 1:
            raise ConfigError(f"--temperature 0 samples the same response {self.samples} times: use --samples 1")
        bad = [k for k in self.ks if not 1 <= k <= self.samples]
        if bad:
            raise ConfigError(
                f"--k: pass@{max(bad)} cannot be estimated from --samples {self.samples}; expected values from 1 to "
                f"{self.samples}: raise --samples or leave out {', '.join(map(str, bad))}"
            )

    def reported_ks(self) -> list[int]:
        powers = [2**i for i in range(self.samples.bit_length()) if 2**i <= self.samples]
        return sorted(set(self.ks or powers))


def evaluate(
    model: str | Path,
    data: str | Path,
    settings: Settings,
    *,
    rollout: RolloutConfig | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Evaluate the model directory ``model`` on the JSON Lines file ``data``; the result is plain JSON.

    ``rollout`` names the engine and its options (None: transformers). ``workers`` score (0: one per core). Progress
    goes to ``console`` (None: silent). Raises ConfigError for a missing model or file, faulty data and an engine that
    is not installed, VerifierError when rewards cannot be trusted.
    """
    hf = read_hf_config(model)
    if not Path(data).is_file():
        raise ConfigError(f"--data: no such file: {data}; give a JSON Lines file with prompt and answer")
    from megatron_ext.data.dataset import encode_problems, load_problems
    from megatron_ext.rollout.registry import create_engine
    from megatron_ext.rollout.rewards.reward_pool import RewardPool

    rollout = (rollout or RolloutConfig()).model_copy(update={"max_response_tokens": settings.max_response_tokens})
    check_engine(rollout)
    console = console or Console(quiet=True)
    with RewardPool(workers) as pool:
        problems, report = load_problems(data, score=pool.score, max_left_out=settings.max_left_out)
        console.print(report.summary(), markup=False, highlight=False)
        engine = create_engine(
            model,
            rollout,
            dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
            max_prompt_tokens=settings.max_prompt_tokens,
            log_dir=Path("runs"),
        )
        encoded, report = encode_problems(
            engine.tokenizer,
            problems[: settings.limit],
            max_prompt_tokens=settings.max_prompt_tokens,
            prompt=PromptConfig(suffix=settings.prompt_suffix),
        )
        if report.faults:
            console.print(report.summary(), markup=False, highlight=False)
        result = measure(engine, pool, encoded, settings, console=console)
        template = getattr(engine.tokenizer, "chat_template", None)
        engine.close()
    return {
        "model": str(model),
        "data": {"path": str(data), "sha256": hashlib.sha256(Path(data).read_bytes()).hexdigest()},
        "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        "engine": rollout.engine,
        "versions": {name: version(name) for name in ("megatron-entropy", "math-verify", "transformers", "torch")},
        **result,
    }


def measure(
    engine: Engine,
    pool: Pool,
    problems: Sequence[tuple[Problem, tuple[int, ...]]],
    settings: Settings,
    *,
    console: Console,
) -> dict[str, Any]:
    """Sample every problem ``settings.samples`` times, score, and reduce to metrics with 95 % intervals.

    A response depends on the seed, its problem's number in the file and its own number, not on the batching.
    """
    start = time.perf_counter()
    with ToolProgress(console) as progress:
        samples = _generate(engine, [ids for _, ids in problems], settings, progress)
        seconds = time.perf_counter() - start
        answers = [
            (problem, sample.text) for (problem, _), row in zip(problems, samples, strict=True) for sample in row
        ]
        scored: list[Reward] = []
        task = progress.add_task("judging", total=len(answers))
        for first in range(0, len(answers), SCORED_AT_ONCE):
            part = answers[first : first + SCORED_AT_ONCE]
            scored += pool.score(part)
            progress.advance(task, len(part))
        n = settings.samples
        rewards = [scored[first : first + n] for first in range(0, len(scored), n)]
        votes = [[reward.extracted if reward.outcome in VOTING else None for reward in row] for row in rewards]
        winners = [
            majority(row, lambda key, answer, known=known: (key, answer) in known)
            for row, known in zip(votes, equivalent_answers(pool, votes), strict=True)
        ]
    rows = [
        {
            "id": problem.problem_id,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "kind": problem.kind or problem.verifier,
            "n": n,
            "c": sum(reward.outcome == "correct" for reward in scored_row),
            "majority": winner is not None and scored_row[winner].outcome == "correct",
            "majority_answer": None if winner is None else scored_row[winner].extracted,
            "length": sum(len(sample.response_ids) for sample in sampled) / n,
            "truncated": sum(sample.truncated for sample in sampled) / n,
        }
        for (problem, _), sampled, scored_row, winner in zip(problems, samples, rewards, winners, strict=True)
    ]
    num_tokens = sum(len(sample.response_ids) for row in samples for sample in row)
    outcomes = Counter(str(reward.outcome) for reward in scored)
    return {
        "decoding": asdict(settings) | {"ks": settings.reported_ks()},
        "num_problems": len(rows),
        "confidence": CONFIDENCE,
        **summary(rows, settings.reported_ks()),
        "outcomes": {name: count / len(scored) for name, count in outcomes.most_common()},
        "time": {"rollout_s": seconds, "rollout_tokens_per_s": num_tokens / max(seconds, 1e-9)},
        "problems": rows,
    }


def summary(rows: Sequence[dict[str, Any]], ks: Sequence[int]) -> dict[str, Any]:
    """``metrics`` and ``response`` with intervals over problems, from the rows per problem."""
    columns = per_problem(rows, ks)
    response = {name: [row[name] for row in rows] for name in ("length", "truncated")}
    everything = {**columns, **response}
    intervals = bootstrap(np.array(list(everything.values())).T)
    found = {name: asdict(interval) for name, interval in zip(everything, intervals, strict=True)}
    return {"metrics": {name: found[name] for name in columns}, "response": {name: found[name] for name in response}}


def equivalent_answers(
    pool: Pool, votes: Sequence[Sequence[str | None]], answer_format: str = "boxed"
) -> list[set[tuple[str, str]]]:
    """For each problem the pairs ``(key, answer)`` that the clustering of evaluation.clusters finds equal.

    The verifier lives in killable processes, so it is asked in rounds, all problems at once: everything still
    alone against the earliest of them. Plain integer arithmetic is compared here, exactly. ``answer_format`` is
    the pool's.
    """
    from megatron_ext.rollout.rewards.verify import as_response
    from megatron_ext.types import Problem

    equal: list[set[tuple[str, str]]] = [set() for _ in votes]
    alone = [list(dict.fromkeys(answer for answer in row if answer is not None)) for row in votes]
    while any(len(answers) > 1 for answers in alone):
        asked: list[tuple[int, str, str]] = []
        for row, answers in enumerate(alone):
            if not answers:
                continue
            key, *others = answers
            for other in others:
                values = exact_value(key), exact_value(other)
                if None in values:
                    asked.append((row, key, other))
                elif values[0] == values[1]:
                    equal[row].add((key, other))
        questions = [(Problem("", "", key), as_response(other, answer_format)) for _, key, other in asked]
        for (row, key, other), reward in zip(asked, pool.score(questions) if questions else [], strict=True):
            if reward.outcome == "correct":
                equal[row].add((key, other))
        alone = [
            [answer for answer in answers[1:] if (answers[0], answer) not in known]
            for answers, known in zip(alone, equal, strict=True)
        ]
    return equal


def exact_value(answer: str) -> Fraction | None:
    """The value of integers joined by ``+ - * /`` and brackets, None for anything else."""
    from .tiny.task import evaluate as value_of

    try:
        return value_of(answer) if len(answer) <= 60 else None
    except (ValueError, ZeroDivisionError):
        return None


def load_evaluations(path: str | Path) -> dict[str, dict[str, Any]]:
    """``label -> evaluation`` of a file written by this tool. Raises ConfigError for any other file."""
    try:
        found = read_json(path, max_bytes=LARGE_BYTES)
    except (ValueError, OSError):
        found = None
    evaluations = list(found.values()) if isinstance(found, dict) else [None]
    if not all(isinstance(item, dict) and {"metrics", "problems"} <= item.keys() for item in evaluations):
        raise ConfigError(
            f"{path}: expected labels with evaluations as written by megatron-entropy evaluate; remove or rename it"
        )
    return found  # type: ignore[return-value]


def save_evaluation(path: str | Path, label: str, evaluation: dict[str, Any]) -> None:
    """Add or replace one label; the file is always whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    found = load_evaluations(target) if target.exists() else {}
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.write_text(json.dumps(found | {label: evaluation}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def _rollout(options: argparse.Namespace) -> RolloutConfig:
    """Raises ConfigError."""
    default = {"tensor_parallel_size": 1, "gpu_memory_utilization": 0.9, "enforce_eager": False}
    given = {name: getattr(options, name) for name in default if getattr(options, name) is not None}
    try:
        rollout = RolloutConfig.model_validate(
            {"engine": options.engine, "batch_size": options.batch_size, **default, **given}
        )
    except ValidationError as error:
        faults = [(str(each["loc"][0]).replace("_", "-"), each) for each in error.errors()]
        raise ConfigError(
            "\n".join(f"--{name}: {each['msg']}, found {each['input']!r}" for name, each in faults)
        ) from None
    if unheeded := set(given) - set(find_engine(rollout).keys):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given if name in unheeded)
        able = " or ".join(name for name in COLOCATED if unheeded <= set(ENGINES[name].keys))
        raise ConfigError(f"{names}: only {able} has this, found --engine {options.engine}; add --engine {able}")
    return rollout


def _labels(models: Sequence[Path], given: Sequence[str]) -> list[str]:
    """One for each model: those given, or the folders' names. Raises ConfigError for too few, or one of two models."""
    labels = list(given)
    if not labels:
        names = [model.resolve().name for model in models]
        unique = len(set(names)) == len(names)
        labels = ["evaluation"] if len(models) == 1 else names if unique else [str(model) for model in models]
    if len(labels) != len(models) or len(set(labels)) < len(labels):
        raise ConfigError(
            f"--label: found {', '.join(labels)} for {len(models)} models, expected a different one for each, in their "
            "order: --label before --label after"
        )
    return labels


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    console = Console()
    from megatron_ext.rollout.rewards.reward_pool import VerifierError

    try:
        values = {name: getattr(options, name) for name in Settings.__dataclass_fields__}
        if options.out is not None and options.out.exists():
            load_evaluations(options.out)  # a file that cannot be extended is found now, not after the evaluation
        settings, rollout, labels = Settings(**values), _rollout(options), _labels(options.models, options.labels)
        for model in options.models:
            read_hf_config(model)  # the last of them is not missed after hours of the first
        evaluations = {}
        for label, model in zip(labels, options.models, strict=True):
            if len(labels) > 1:
                console.print(f"{label}: {model}", markup=False, highlight=False)
            evaluations[label] = evaluate(
                model, options.data, settings, rollout=rollout, workers=options.workers, console=console
            )
            if options.out is not None:
                save_evaluation(options.out, label, evaluations[label])
    except ConfigError as error:
        message = str(error)
        for name, here in OTHER_NAMES.items():
            message = message.replace(name, here)
        print(f"evaluate: {message}", file=sys.stderr)
        return 2
    except VerifierError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 3
    tables = side_by_side(evaluations) if len(evaluations) > 1 else map(table, evaluations.values())
    for each in tables:
        console.print(each)
    return 0


def _generate(
    engine: Engine, prompts: Sequence[tuple[int, ...]], settings: Settings, progress: Progress
) -> list[list[Sample]]:
    """``samples`` responses per prompt."""
    from megatron_ext.rollout.base import Request, Sampling
    from megatron_ext.rollout.sampling import seed_of

    sampling = Sampling(settings.temperature, settings.top_p, settings.max_response_tokens)
    indices = [(problem, number) for problem in range(len(prompts)) for number in range(settings.samples)]
    requests = [Request(prompts[problem], seed_of(settings.seed, problem, number)) for problem, number in indices]
    task = progress.add_task("sampling", total=len(indices))
    samples = engine.generate(requests, sampling, lambda done: progress.advance(task, len(done)))
    return [samples[first : first + settings.samples] for first in range(0, len(samples), settings.samples)]


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = command_parser("evaluate", __doc__)
    add = parser.add_argument
    add("models", type=find, metavar="MODEL", nargs="+", help="directory with config.json, safetensors and tokenizer")
    add("--data", type=find, required=True, help="JSON Lines: prompt, answer [, id, verifier, numbers, kind, level]")
    add("--samples", type=int, default=default.samples, help="responses per problem (%(default)s)")
    add("--k", dest="ks", type=whole_numbers, default=(), help="pass@k to report, such as 1,2,4 (powers of two)")
    add("--temperature", type=float, default=default.temperature, help="0 is greedy (%(default)s)")
    add("--top-p", type=float, default=default.top_p, help="probability that is sampled from (%(default)s)")
    add(
        "--max-prompt-tokens",
        type=int,
        default=default.max_prompt_tokens,
        help="longer are left out (%(default)s)",
    )
    add(
        "--max-response-tokens",
        type=int,
        default=default.max_response_tokens,
        help="longer are cut (%(default)s)",
    )
    add("--max-left-out", type=float, default=default.max_left_out, help="share of faulty rows that may (%(default)s)")
    add("--prompt-suffix", default="", help="text after every prompt, as in the recipe")
    add("--seed", type=whole_number(0), default=default.seed, help="same seed, same responses (%(default)s)")
    add("--limit", type=int, help="only the first problems of the file")
    engine = RolloutConfig()
    add(
        "--engine",
        default=engine.engine,
        help=f"what samples: {', '.join(COLOCATED)}, or one of your own as package.module:NAME (%(default)s)",
    )
    add("--batch-size", type=int, default=engine.batch_size, help="responses decoded at once (%(default)s)")
    add("--tensor-parallel-size", type=int, help="GPUs that share the weights of a vLLM engine (1)")
    add("--gpu-memory-utilization", type=float, help="of each GPU's memory, for vLLM (0.9)")
    add(
        "--enforce-eager",
        action="store_true",
        default=None,
        help="vLLM without compilation: starts at once, generates slower",
    )
    add("--workers", type=whole_number(0), default=0, help="processes that score; 0: one per core, at most 16")
    add("--out", type=output_file, help="JSON file to add the evaluation to")
    add(
        "--label",
        dest="labels",
        action="append",
        default=[],
        help="its name in the file, such as before or after (evaluation; of several models their folders' names)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
