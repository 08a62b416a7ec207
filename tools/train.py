"""Train a recipe.

    python -m tools.train recipes/siren/siren-tiny-cpu.toml
    python -m tools.train RECIPE optimizer.lr=2e-4 train.steps=50      any key, dotted, TOML values
    python -m tools.train RECIPE --print-config                        the whole configuration, checked
    python -m tools.train RECIPE --dry-run                             checks data and layout, prints the plan

Starts the recipe's ranks on this machine (parallel.ranks_per_node) unless a launcher has set RANK. The same
command resumes from the newest valid checkpoint of the run.

Exit codes: 0 done, 75 stopped by a signal with its state saved (run the command again), 2 configuration or
data, 3 the verifier cannot be trusted or an alarm stopped the run (alarms.stop), 1 anything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from typing import Any

from megatron_ext.train.config import Config, ConfigError, hf_config, load_config
from tools import ranks

CONFIGURATION, HEALTH, INTERRUPTED = 2, 3, 130


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a TOML file under recipes/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.steps=50")
    parser.add_argument("--print-config", action="store_true", help="print the merged, checked configuration and stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything short of the model, print the plan")
    options = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(options.recipe, options.overrides)
        complete = _check_method(config)
        if options.print_config:
            print(json.dumps(_redacted(complete), indent=2))
            return 0
        if options.dry_run:
            return _dry_run(config)
        if not ranks.launched():
            return _launch(config, options)
        return _train(config)
    except ConfigError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"configuration error\n{error}", file=sys.stderr)
        return CONFIGURATION


def _check_method(config: Config) -> dict[str, Any]:
    """The configuration with the method's own defaults filled in; its options are checked here."""
    from megatron_ext.train.objective import create_method  # brings torch: only when needed

    method = create_method(config)
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    return config.model_dump() | {"method": {"name": config.method.get("name"), **options}}


def _redacted(config: dict[str, Any]) -> Any:
    from megatron_ext.train.metrics import redact

    return redact(config)


def _launch(config: Config, options: argparse.Namespace) -> int:
    if config.parallel.nodes > 1:
        raise ConfigError(
            f"parallel.nodes: {config.parallel.nodes} nodes cannot be started from here; "
            "use the scripts under slurm/, which start one launcher per node"
        )
    code = ranks.run_ranks("tools.train", [options.recipe, *options.overrides], config.parallel.world)
    if code == 0:
        from tools.report import write_report

        print(f"report: {write_report(config.run_dir)}")
    return code


def _train(config: Config) -> int:
    from megatron_ext.rollout.rewards import VerifierError
    from megatron_ext.train.alarms import AlarmError
    from megatron_ext.train.loop import run

    try:
        return run(config)
    except KeyboardInterrupt:
        return INTERRUPTED
    except VerifierError as error:
        print(f"reward health\n{error}", file=sys.stderr)
        return HEALTH
    except AlarmError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"training health\n{error}", file=sys.stderr)
        return HEALTH


def _dry_run(config: Config) -> int:
    """Load and verify the data and say what the run would do."""
    from transformers import AutoTokenizer

    from megatron_ext.rollout.rewards import RewardPool
    from megatron_ext.train.curriculum import data_order
    from megatron_ext.train.data import load_training_data

    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    with RewardPool(config.reward.workers) as pool:
        encoded, lines = load_training_data(config, score=pool.score, tokenizer=tokenizer)
    print("\n".join(lines))
    order = data_order(config, [problem for problem, _ in encoded])
    p, r, t = config.parallel, config.rollout, config.train
    responses = r.prompts * r.samples
    print(f"longest prompt: {max(len(ids) for _, ids in encoded)} tokens")
    print(f"model: {config.model.path}, {hf_config(config.model.path)['architectures'][0]}, {config.model.dtype}")
    print(f"layout: {p.world} ranks = data {p.data} x pipeline {p.pipeline} x tensor {p.tensor}, sequence {p.sequence}")
    print(
        f"a step: {r.prompts} prompts x {r.samples} responses = {responses} of at most {r.max_response_tokens} "
        f"tokens; {r.prompts // t.mini_batch_prompts} updates of {t.mini_batch_prompts * r.samples} responses; "
        f"micro-batches of at most {t.micro_batch_tokens} tokens"
    )
    if config.data.curriculum:
        parts = zip(order.stages, order.starts, strict=True)
        stages = [f"{len(stage)} problems from step {first + 1}" for stage, first in parts]
        print(f"curriculum: {config.data.curriculum}: {', then '.join(stages)}")
    print(f"the run: {t.steps} steps = {t.steps * r.prompts / len(encoded):.1f} epochs -> {config.run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
