"""Evaluate Hugging Face model directories: on a file of verifiable problems, or on all sets of a paper's table.

    megatron-entropy evaluate MODEL --data eval.jsonl --samples 8 --out runs/siren/evaluation.json --label after
    megatron-entropy evaluate BASE RUN_1/hf RUN_2/hf --data eval.jsonl        side by side, differences to the first
    megatron-entropy evaluate BASE RUN/hf --suite siren --out runs/siren/table      all sets, one table, one figure
    megatron-entropy evaluate MODEL --suite siren --only aime24,amc23 --samples 4   a first look

avg@n, unbiased pass@k and maj@n with 95 % intervals. A model is asked on its own prompt where its card has one (exports
of this project), else on that of --recipe or of the suite.

With --data the output file maps labels to evaluations, so that one file holds ``before`` and ``after``; writing a label
leaves the others. Each evaluation keeps n and c per problem, with which ``compare`` pairs two of them. With --suite the
output folder gets SUITE.json, SUITE.pass_at_k.png and .json and the responses, samples/LABEL/SET.jsonl, and more
--samples add to those that are there. The same command goes on where a stopped one was; with --data the responses are
in OUT.partial until their evaluation is in OUT.

Exit codes: 0 done, 2 bad input, 3 the verifier is not to be trusted, 130 interrupted (run it again).
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from rich.console import Console

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.parallel_checks import engine_faults
from megatron_ext.config.schema import PromptConfig, RolloutConfig
from megatron_ext.config.shipped import find
from megatron_ext.rollout.registry import ENGINES, find_engine

from ..arguments import command_parser, output_file, whole_number, whole_numbers
from .model import ModelEvaluation, check_same_problems, open_pools
from .problem_set import SetPlan, load_set
from .prompt import FLAGS, ChosenPrompt, choose_prompt
from .results import load_evaluations, save_evaluation, write_json
from .sampling import Pool
from .settings import Settings
from .suite import Suite, find_suite, missing_data, read_suite
from .suite_results import pass_figure, suite_results
from .tables import side_by_side, suite_tables, table

COLOCATED = [name for name, engine in ENGINES.items() if engine.colocated]
OTHER_NAMES = {
    "data.train": "--data",
    "data.max_prompt_tokens": "--max-prompt-tokens",
    "data.max_left_out": "--max-left-out",
    "prompt.template": "--template",
    "model.path": "MODEL",
    "rollout.": "--",
}
OF_SUITES = ("only", "skip_missing", "data_dir")  # options that need --suite
OVER_SUITES = ("samples", "ks", "temperature", "top_p", "max_prompt_tokens", "max_response_tokens")  # win over a suite


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console()
    from megatron_ext.rollout.rewards.reward_pool import VerifierError

    try:
        _check_options(parser, options)
        tables = _evaluate_suite(options, console) if options.suite else _evaluate_file(options, console)
    except ConfigError as error:
        message = str(error)
        for name, here in OTHER_NAMES.items():
            message = message.replace(name, here)
        print(f"evaluate: {message}", file=sys.stderr)
        return 2
    except VerifierError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        kept = options.suite or options.out
        goes_on = "the same command goes on where it stopped" if kept else "without --out no response is kept"
        print(f"evaluate: interrupted; {goes_on}", file=sys.stderr)
        return 130
    for each in tables:
        console.print(each)
    return 0


def _evaluate_file(options: argparse.Namespace, console: Console) -> list[Any]:
    """--data: every model on one file, each kept as soon as it is known, and its responses in --out.partial before."""
    out = options.out
    if out is not None and out.exists():
        load_evaluations(out)  # a file that cannot be extended is found now, not after the evaluation
    settings = Settings(**_given(options, [field.name for field in fields(Settings)]))
    plan = SetPlan(options.data.stem, options.data, settings)
    rollout, labels = _rollout(options), _labels(options.models, options.labels)
    models = _models(options, labels)
    prompts = [_prompt(options, model) for model in options.models]
    partial = None if out is None else out.with_name(f"{out.name}.partial")
    evaluations = {}
    with ExitStack() as stack:
        pools = open_pools(stack, options.workers, prompts)
        ready = _ready([plan], models, prompts, rollout, pools, partial, console)
        for label, evaluation in ready.items():
            if len(labels) > 1:
                console.print(f"{label}: {evaluation.model}", markup=False, highlight=False)
            evaluations[label] = evaluation.run(pools)[plan.name]
            if out is not None and partial is not None:
                save_evaluation(out, label, evaluations[label])
                shutil.rmtree(partial / _folder(label))
    if partial is not None and not any(partial.iterdir()):
        partial.rmdir()
    if len(evaluations) > 1:
        try:
            return side_by_side(evaluations)
        except ValueError as error:  # other problems were left out: each stands for itself
            console.print(f"no differences: {error}", markup=False, highlight=False)
    return [table(each) for each in evaluations.values()]


def _evaluate_suite(options: argparse.Namespace, console: Console) -> list[Any]:
    """--suite: every model on all sets, and the table of them."""
    suite = _suite(options, console)
    rollout, labels = _rollout(options), _labels(options.models, options.labels, one="")
    models = _models(options, labels)
    out = options.out or Path("runs/evaluate") / suite.name
    prompts = [_prompt(options, model, suite) for model in options.models]
    found = _run(suite, models, prompts, rollout, out, options.workers, console)
    result = suite_results(suite, found)
    write_json(out / f"{suite.name}.json", result)
    curves = {key: result[key] for key in ("suite", "title", "columns", "pass_at_k")}
    write_json(out / f"{suite.name}.pass_at_k.json", curves)
    pass_figure(result, out / f"{suite.name}.pass_at_k.png")
    console.print(f"{out / suite.name}.json, .pass_at_k.png, .pass_at_k.json", markup=False, highlight=False)
    return suite_tables(result, console.width)


def _run(
    suite: Suite,
    models: dict[str, Path],
    prompts: Sequence[ChosenPrompt],
    rollout: RolloutConfig,
    out: Path,
    workers: int,
    console: Console,
) -> dict[str, dict[str, dict[str, Any]]]:
    """``label -> set -> evaluation``."""
    plans = [SetPlan(each.name, each.data, each.settings) for each in suite.sets]
    with ExitStack() as stack:
        pools = open_pools(stack, workers, prompts)
        ready = _ready(plans, models, prompts, rollout, pools, out / "samples", console)
        check_same_problems(ready)
        found = {}
        for label, evaluation in ready.items():
            console.print(f"{label}: {evaluation.model}", markup=False, highlight=False)
            found[label] = evaluation.run(pools)
    return found


def _ready(
    plans: Sequence[SetPlan],
    models: dict[str, Path],
    prompts: Sequence[ChosenPrompt],
    rollout: RolloutConfig,
    pools: Mapping[str, Pool],
    samples: Path | None,
    console: Console,
) -> dict[str, ModelEvaluation]:
    """By label. Everything is checked for all models before the first is loaded: the last one's fault is not found
    after hours of the first. Raises ConfigError."""
    sets = [load_set(plan, pools["boxed"], console) for plan in plans]
    return {
        label: ModelEvaluation(
            model,
            sets,
            prompt=prompt,
            rollout=rollout,
            samples_dir=None if samples is None else samples / _folder(label),
            console=console,
        )
        for (label, model), prompt in zip(models.items(), prompts, strict=True)
    }


def _models(options: argparse.Namespace, labels: Sequence[str]) -> dict[str, Path]:
    """By label. Raises ConfigError for a folder that holds none, and for one whose heads the GPUs cannot share."""
    shared = options.tensor_parallel_size or 1
    for model in options.models:
        hf = read_hf_config(model)
        known = shared > 1 and hf.get("num_attention_heads")
        faults = engine_faults(hf, shared, key="--tensor-parallel-size") if known else []
        if faults:
            raise ConfigError(f"{model}: {faults[0]}")
    return dict(zip(labels, options.models, strict=True))


def _suite(options: argparse.Namespace, console: Console) -> Suite:
    """The suite with the options' changes. Raises ConfigError also where data are missing."""
    path = find_suite(options.suite)
    common = _given(options, ["data_dir", "max_left_out", "seed", "limit", "allow_shorter"])
    overrides = _given(options, OVER_SUITES)
    suite = read_suite(path, overrides=overrides, only=options.only or (), **common)
    if lacking := missing_data(suite):
        if not options.skip_missing:
            raise ConfigError(
                f"--suite: {path}: data files are missing:\n{lacking}\nor say where they are with --data-dir, evaluate "
                "the other sets with --skip-missing, or some with --only"
            )
        console.print(f"left out, for their data are missing:\n{lacking}", markup=False, highlight=False)
        there = [each.name for each in suite.sets if each.data.is_file()]
        if not there:
            raise ConfigError(f"--skip-missing: {path}: no set has its data\n{lacking}")
        suite = read_suite(path, overrides=overrides, only=there, **common)
    return suite


def _prompt(options: argparse.Namespace, model: Path, suite: Suite | None = None) -> ChosenPrompt:
    given = _given(options, PromptConfig.model_fields)
    of_suite = ("", None) if suite is None else (suite.name, suite.prompt)
    return choose_prompt(model, recipe=options.recipe, suite=of_suite, given=given)


def _given(options: argparse.Namespace, names: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _folder(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", label.strip("/.")) or "model"


def _check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Raises ConfigError, SystemExit for an --out that cannot be."""
    if (options.data is None) == (options.suite is None):
        raise ConfigError("--data, --suite: expected one of them: a file of problems, or the name of a suite")
    if options.suite is None and (alone := [name for name in OF_SUITES if getattr(options, name)]):
        raise ConfigError(f"--{alone[0].replace('_', '-')}: is of --suite, found --data")
    if options.out is not None:
        try:
            output_file(str(options.out if options.suite is None else options.out / ".writable"))
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --out: {error}")


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


def _labels(models: Sequence[Path], given: Sequence[str], *, one: str = "evaluation") -> list[str]:
    """One for each model: those given, or the folders' names (``one``: of a single model). Raises ConfigError for too
    few, or one of two models."""
    labels = list(given)
    if not labels:
        names = [model.resolve().name for model in models]
        unique = len(set(names)) == len(names)
        labels = [one] if one and len(models) == 1 else names if unique else [str(model) for model in models]
    if len(labels) != len(models) or len(set(labels)) < len(labels):
        raise ConfigError(
            f"--label: found {', '.join(labels)} for {len(models)} models, expected a different one for each, in their "
            "order: --label before --label after"
        )
    return labels


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = command_parser("evaluate", __doc__)
    add = parser.add_argument
    add("models", type=find, metavar="MODEL", nargs="+", help="directory with config.json, safetensors and tokenizer")
    add("--data", type=find, help="JSON Lines: prompt, answer [, id, verifier, numbers, kind, level]")
    add("--suite", help="instead: the sets of a paper's table; a shipped suite's name, or a TOML file")
    add("--only", type=_names, help="of a suite these sets, such as aime24,amc23")
    add(
        "--data-dir", type=_folder_that_is, help="where a suite's files are, by their names (the folders that it names)"
    )
    add("--skip-missing", action="store_true", help="leave out the suite's sets whose data file is missing")
    sampled = parser.add_argument_group("sampling", "without --suite as in brackets; with it they win over the suite's")
    add = sampled.add_argument
    add("--samples", type=int, help=f"responses per problem ({default.samples})")
    add("--k", dest="ks", type=whole_numbers, help="pass@k to report, such as 1,2,4 (powers of two)")
    add("--temperature", type=float, help=f"0 is greedy ({default.temperature:g})")
    add("--top-p", type=float, help=f"probability that is sampled from ({default.top_p:g})")
    add("--max-prompt-tokens", type=int, help=f"longer are left out ({default.max_prompt_tokens})")
    add("--max-response-tokens", type=int, help=f"longer are cut ({default.max_response_tokens})")
    add("--allow-shorter", action="store_true", default=None, help="cut at the model's positions, and say so")
    add("--seed", type=whole_number(0), help=f"same seed, same responses ({default.seed})")
    add("--limit", type=int, help="only the first problems of each file")
    add("--max-left-out", type=float, help=f"share of faulty rows that may be left out ({default.max_left_out:g})")
    prompt = parser.add_argument_group("prompt", "in the place of what the model's card, the recipe or the suite has")
    add = prompt.add_argument
    add("--recipe", help="whose [prompt] a model without a card is asked on")
    for name, field in PromptConfig.model_fields.items():
        old = ("--prompt-suffix",) if name == "suffix" else ()
        choices = get_args(field.annotation) or None
        add(FLAGS[name], *old, dest=name, choices=choices, help=field.description)
    add = parser.add_argument
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
    add("--out", type=Path, help="JSON file to add the evaluation to; of a suite the folder (runs/evaluate/SUITE)")
    add(
        "--label",
        dest="labels",
        action="append",
        default=[],
        help="its name in the file, such as before or after (evaluation; of several models their folders' names)",
    )
    return parser


def _folder_that_is(text: str) -> Path:
    path = find(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"no such folder: {text}")
    return path


def _names(text: str) -> tuple[str, ...]:
    """``a,b``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
