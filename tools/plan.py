"""What a recipe needs before anything is asked of a cluster: groups, tokens, memory of the worst GPU, time of a step.

    megatron-entropy plan RECIPE [key=value ...]           a table
    megatron-entropy plan RECIPE --json                    the same as JSON
    megatron-entropy plan RECIPE --svg memory.svg          a bar chart of the memory, phase by phase
    megatron-entropy plan RECIPE --gpu a800 --mfu .3       other rates; the table says which were used
    megatron-entropy plan RECIPE --measured runs/mine      with the rates of a run, whose times stand beside their plan

A run measures for its own layout of the model, rollout engine, dtype and kind of GPU; batch, model, method and the
number of data-parallel ranks may differ. Options such as --mfu override what it measured.

Weights, gradients and optimizer are exact: the dry run (tools.train RECIPE --dry-run) compares them with the built
shards. The rest is counted, or assumed in megatron_ext/plan/device.py; what fits leaves 3 GB free.

Exit codes: 0 it fits, 1 it does not, 2 configuration, or a run that does not fit the recipe.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.config.checks import layout_faults
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from megatron_ext.config.schema import Config
from megatron_ext.model.architectures import find_family
from megatron_ext.plan.device import MARGIN, TOTAL_BYTES
from megatron_ext.plan.layout import Plan, make_plan, nearest_fit
from megatron_ext.plan.measured import Measured
from megatron_ext.plan.memory import PHASES, RECOMPUTE, Roles
from megatron_ext.plan.speed import RATES, Lengths, Rates, default_lengths
from megatron_ext.rollout.registry import find_engine

from .arguments import add_recipe, command_parser, number, output_file
from .charts import short
from .measured_run import check_fit, comparison, rates_told, read_measured

FITS, DOES_NOT_FIT, CONFIGURATION = 0, 1, 2
GB = 1e9


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        config = read_valid(options.recipe, options.overrides)
        roles = method_roles(config)
        find_family(config.model.family)
        run: Path | None = options.measured
        measured = None if run is None else read_measured(run)
        if run is not None and measured is not None:
            check_fit(run, measured, config, options.gpu)
        lengths = _lengths(options, config, measured)
        gpu = options.gpu or "h100"
        rates = _rates(options, RATES[gpu] if measured is None else measured.rates())
        known = TOTAL_BYTES[gpu] if measured is None else measured.memory
        total = options.memory_gb * GB if options.memory_gb else known
        plan = make_plan(config, roles, rates=rates, gpu_memory=total, lengths=lengths)
        nearest = None if plan.fits else nearest_fit(plan, rates=rates, lengths=lengths)
    except ConfigError as error:
        print(f"configuration error\n{error}", file=sys.stderr)
        return CONFIGURATION
    if options.svg:
        from .plan_chart import memory_chart  # matplotlib takes as long to import as the plan to make

        memory_chart(plan).savefig(options.svg, format="svg")
    if options.json:
        found = {"nearest_fit": nearest[0] if nearest else None, "rates": finite(rates), "lengths": vars(lengths)}
        found |= {} if measured is None else {"measured": [each._asdict() for each in comparison(measured)]}
        print(json.dumps(plan.as_dict() | found, indent=2))
    else:
        beside = [] if run is None or measured is None else ["", *measured_table(run, measured)]
        told = sources(rates, lengths, gpu if measured is None else measured.gpu or measured.device)
        print("\n".join([*table(plan), *verdict(plan, nearest), *beside, "", *told]))
    return FITS if plan.fits else DOES_NOT_FIT


def read_valid(recipe: str | Path, overrides: list[str] | None = None) -> Config:
    """A recipe whose layout is valid; its data and weights need not be here. Raises ConfigError."""
    config = read_config(recipe, overrides)
    if faults := layout_faults(config):
        raise ConfigError("\n".join(faults))
    return config


def method_roles(config: Config) -> Roles:
    """The models and passes that the recipe's method asks for. Raises ConfigError for a bad option."""
    from megatron_ext.train.method_factory import create_method, roles_of  # brings torch: the plan itself does without

    return roles_of(config, create_method(config).needs)


def table(plan: Plan) -> list[str]:
    """The plan in lines of text."""
    facts, worst = plan.as_dict(), plan.worst
    t = plan.tokens()
    lines = [
        f"{plan.config.name}: {facts['model']}, {facts['parameters']:,} parameters"
        + (f", {facts['active_parameters']:,} active" if plan.architecture.experts else ""),
        "groups: " + ", ".join(f"{name} {size}" for name, size in facts["groups"].items()),
        f"a step: {t['prompts']} prompts, {t['responses']} responses, at most {t['most_tokens']:,} tokens; "
        f"{t['updates']} updates of {t['responses_per_update']} responses, at most {t['micro_batches_per_update']} "
        f"micro-batches of {t['micro_batch_tokens']:,} tokens on each data-parallel rank"
        + f", {t['micro_batch_tokens_per_rank']:,} on each context-parallel one"
        * (plan.config.parallel.context > 1),
        f"models: policy{', reference' * plan.roles.reference}{', critic' * plan.roles.critic}; "
        f"{plan.config.rollout.engine} decodes {plan.kv_sequences} full-length sequences at once on an engine of "
        f"{plan.config.rollout.tensor_parallel_size} GPU(s)",
        "",
        f"memory of the worst GPU (pipeline rank {worst.rank}), GB" + "".join(f"{phase:>10}" for phase in PHASES),
    ]
    items = list(dict.fromkeys(item for phase in PHASES for item in worst.phases[phase]))
    for item in items:
        lines.append(f"  {item:<44}" + "".join(_gb(worst.phases[phase].get(item)) for phase in PHASES))
    lines.append(f"  {'total':<44}" + "".join(_gb(worst.total(phase)) for phase in PHASES))
    groups = ", ".join(f"{name} {ranks}" for name, ranks in facts["communicators"].items())
    lines.append(f"NCCL communicators by their ranks: {groups or 'none'}")
    modes = ", ".join(f"{mode} {size / GB:.1f}" for mode, size in plan.activations().items())
    lines.append(f"activations by recompute mode, GB: {modes} (the recipe: {plan.config.model.recompute})")
    if len(plan.ranks) > 1:
        lines.append("peak by pipeline rank, GB: " + ", ".join(f"{rank.peak / GB:.1f}" for rank in plan.ranks))
    total = plan.step_s
    lines.append("")
    lines.append(
        f"a step takes about {short(total)} s: "
        + ", ".join(f"{k} {short(v)}" for k, v in plan.seconds.items())
        + "; the rollout runs beside score and update" * plan.rolls_out_beside
    )
    lines.append(
        f"the run of {plan.config.train.steps} steps: about {plan.config.train.steps * total / 3600:.0f} h, "
        f"{plan.config.train.steps * total / 3600 * plan.config.parallel.world:,.0f} GPU hours"
    )
    return lines


def verdict(plan: Plan, nearest: tuple[list[str], Plan] | None) -> list[str]:
    """Whether it fits, and if not what does."""
    worst = plan.worst
    size = f"{worst.peak / GB:.1f} of {plan.gpu_memory / GB:.1f} GB ({worst.worst_phase}, pipeline rank {worst.rank})"
    if plan.fits:
        others = [mode for mode in RECOMPUTE if _too_large(plan, mode)]
        rest = f"; it would not with model.recompute = {' or '.join(others)}" if others else ""
        return [f"fits: {size}{rest}"]
    lines = [f"does not fit: {size}, expected at least {MARGIN / GB:.1f} GB free"]
    if plan.kv_sequences == 0:
        lines.append("the KV cache cannot hold one sequence of full length")
    if nearest is None:
        cuts = "tensor_parallel_size" in find_engine(plan.config.rollout).keys
        rest = (
            "another rollout.tensor_parallel_size" if cuts else "rollout.engine=vllm, which can cut its copy over GPUs"
        )
        return [*lines, f"no layout that was tried on these GPUs fits: take more nodes, shorter sequences, or {rest}"]
    changes, other = nearest
    return [*lines, f"nearest layout that fits, with {other.worst.peak / GB:.1f} GB: {' '.join(changes)}"]


def _too_large(plan: Plan, mode: str) -> bool:
    changed = plan.config.model.model_copy(update={"recompute": mode})
    config = plan.config.model_copy(update={"model": changed})
    rates = RATES["h100"]  # of no consequence here
    return not make_plan(config, plan.roles, rates=rates, gpu_memory=plan.gpu_memory).fits


def measured_table(folder: Path, measured: Measured) -> list[str]:
    """A run's step beside its plan, and its rates."""
    lines = [
        f"{folder}: seconds of a step, medians of {measured.num_steps} on {measured.config.parallel.world} x "
        f"{measured.device}",
        f"  {'':<34}{'measured':>20}{'planned, assumed':>20}{'planned, its own':>20}",
    ]
    for each in comparison(measured):
        seconds = (each.measured, each.at_assumed_rates, each.at_its_own)
        lines.append(f"  {each.phase:<34}" + "".join(f"{short(value):>20}" for value in seconds))
    lines.append(f"  {'rate':<34}{'measured':>20}{'assumed':>20}")
    lines += [f"  {name:<34}{own:>20}{assumed:>20}" for name, assumed, own in rates_told(measured)]
    return lines


def finite(rates: Rates) -> dict[str, Any]:
    """For JSON, which has no infinity: what is not known is null."""
    values = vars(rates)
    return {name: None if value == math.inf else value for name, value in values.items()}


def sources(rates: Rates, lengths: Lengths, gpu: str) -> list[str]:
    if not math.isfinite(rates.bandwidth):
        known = f"{rates.flops / 1e9:.3g} GFLOP/s of a rank in training; {rates.source}"
        return [f"rates ({gpu}): {known}", *_told_lengths(lengths)]
    return [
        f"rates ({gpu}): {rates.flops / 1e12:.0f} TFLOP/s bf16, {rates.bandwidth / 1e12:.2f} TB/s memory, "
        f"{rates.network / 1e9:.0f} GB/s network, mfu {rates.mfu} ({rates.mfu_experts} with experts); {rates.source}",
        *_told_lengths(lengths),
    ]


def _told_lengths(lengths: Lengths) -> list[str]:
    return [
        f"lengths: {lengths.prompt:.0f} prompt and {lengths.response:.0f} response tokens on average (assumed unless "
        "given or measured); memory is for full-length sequences"
    ]


def _gb(size: float | None) -> str:
    return f"{'-' if size is None else f'{size / GB:.1f}':>10}"


def _rates(options: argparse.Namespace, known: Rates) -> Rates:
    given = {name: getattr(options, name) for name in ("flops", "bandwidth", "network", "mfu", "mfu_experts", "decode")}
    return replace(known, **{name: value for name, value in given.items() if value is not None})


def _lengths(options: argparse.Namespace, config: Config, measured: Measured | None) -> Lengths:
    """Given, else a run's as far as the recipe allows them. Raises ConfigError for a given mean above the limit."""
    most = {"prompt": config.data.max_prompt_tokens, "response": config.rollout.max_response_tokens}
    given = {kind: getattr(options, f"mean_{kind}") for kind in most}
    for kind, value in given.items():
        if value is not None and value > most[kind]:
            raise ConfigError(f"--mean-{kind}: found {value:g} tokens, expected at most the recipe's {most[kind]}")
    known = default_lengths(config)
    if measured is not None:
        known = Lengths(**{kind: min(getattr(measured.lengths, kind), limit) for kind, limit in most.items()})
    return replace(known, **{kind: value for kind, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("plan", __doc__)
    add = parser.add_argument
    add_recipe(parser, example="parallel.tensor=4")
    add("--json", action="store_true", help="print JSON")
    add("--svg", type=output_file, metavar="FILE", help="write the memory as a bar chart")
    add("--gpu", choices=list(RATES), help="whose total memory and data sheet (default h100, or that of --measured)")
    add("--measured", type=Path, metavar="RUN", help="folder of a run whose rates are used, of at least three steps")
    add("--memory-gb", type=number(), help="total memory of one GPU as torch reports it (default: that of --gpu)")
    add("--flops", type=number(), help="peak bf16 operations a second")
    add("--bandwidth", type=number(), help="memory bandwidth, bytes a second")
    add("--network", type=number(), help="bytes a second a direction between nodes, per GPU")
    add("--mfu", type=number(at_most=1), help="share of the peak that training a dense model reaches")
    add("--mfu-experts", type=number(at_most=1), help="the same with a mixture of experts")
    add("--decode", type=number(at_most=1), help="share of the memory bandwidth that decoding reaches")
    add("--mean-prompt", type=number(), help="tokens of a mean prompt")
    add("--mean-response", type=number(), help="tokens of a mean response (default half of the limit)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
