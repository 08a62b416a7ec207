"""Train a recipe.

    megatron-entropy train siren-tiny-cpu                              a shipped recipe, or a TOML file
    megatron-entropy train RECIPE optimizer.lr=2e-4 train.steps=50      any key, dotted, TOML values
    megatron-entropy train RECIPE --print-config                        the whole configuration, checked and explained
    megatron-entropy train RECIPE --dry-run                             all but the GPUs' work: data, shards, the plan

Starts the recipe's ranks on this machine (parallel.ranks_per_node) unless a launcher has set RANK. The same
command resumes from the newest valid checkpoint of the run.

Exit codes: 0 done, 75 stopped by a signal, the state saved (run the command again), 2 configuration or data, 3 the
verifier, engine or gradients cannot be trusted, or an alarm stopped the run (alarms.stop), 4 a checkpoint could not
be written, 76 stopped again and again before anything new was saved, 77 a rank hung (it is named, with what all ranks
were doing), 130 a second Ctrl-C, nothing saved; anything else is a crash. SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C
save after the current step.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import traceback
from contextlib import nullcontext
from typing import Any

from megatron_ext import heartbeat
from megatron_ext.config.describe import to_toml
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.config.redact import redact
from megatron_ext.config.schema import Config
from megatron_ext.config.shipped import find_recipe
from megatron_ext.metrics import warnings_log
from megatron_ext.metrics.trackers import check_trackers
from megatron_ext.rollout.registry import find_engine
from megatron_ext.train.run_folder import RunFolder
from megatron_ext.train.signals import REQUEUE, StopSignals, heed_interrupts, ignore_signals, leave

from . import faults, module_of, ranks
from .arguments import add_recipe, command_parser
from .dry_run import dry_run
from .plan import read_valid
from .recipes import slurm_command

CONFIGURATION, HEALTH, SAVING = 2, 3, 4
OUT_OF_MEMORY = (
    "megatron-entropy plan RECIPE says what needs how much. Lower train.micro_batch_tokens or "
    "rollout.gpu_memory_utilization, set model.recompute, model.fused_head or an offload, or raise parallel.tensor"
)


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("train", __doc__)
    add_recipe(parser, example="train.steps=50")
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the merged, checked configuration as TOML, every key with its description, and stop",
    )
    parser.add_argument("--dry-run", action="store_true", help="check all but the arithmetic, print the plan")
    options = parser.parse_intermixed_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        if not ranks.launched():
            print("interrupted: nothing was started", file=sys.stderr)
        return ranks.INTERRUPTED
    except Exception as error:
        if (code := faults.consequence()) is not None:  # another rank's, which has said why
            return code
        if (meaning := _meaning(error)) is None:
            raise
        return faults.report(*meaning)


def _run(options: argparse.Namespace) -> int:
    config = (read_valid if options.dry_run else load_config)(options.recipe, options.overrides)
    if ranks.launched():
        warnings_log.hold()
        _check_launch(config)
        _set_allocator(config)
        if options.dry_run and ranks.local_rank() > 0:
            return 0  # one rank of every node tries it
    complete = _check_own_code(config)
    if options.print_config:
        print(to_toml(redact(complete)))
        return 0
    if options.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # it builds what runs elsewhere, and needs no GPU
        return dry_run(config)
    check_trackers(config.log.trackers)
    return _train(config) if ranks.launched() else _launch(config, options)


def _meaning(error: Exception) -> tuple[int, str] | None:
    """The exit code and the message of a fault that has one: the only place that says which. None for a defect."""
    if isinstance(error, ConfigError):
        return CONFIGURATION, f"configuration error\n{error}"
    from megatron_ext.checkpoint.manifest import CheckpointError
    from megatron_ext.metrics.alarms import AlarmError
    from megatron_ext.model.trainable import TrainingError
    from megatron_ext.rollout.base import RolloutError  # these bring torch, which any other fault has already
    from megatron_ext.rollout.rewards.reward_pool import VerifierError
    from megatron_ext.train.mismatch import MismatchError

    if isinstance(error, VerifierError):
        return HEALTH, f"reward health\n{error}"
    if isinstance(error, (AlarmError, MismatchError, RolloutError, TrainingError)):
        return HEALTH, f"training health\n{error}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        traceback.print_exc()
        return CONFIGURATION, f"GPU memory\n{error}\n{OUT_OF_MEMORY}"
    if isinstance(error, CheckpointError):
        return SAVING, f"checkpoint\n{error}"
    return None


def _check_launch(config: Config) -> None:
    """The launcher's number of ranks is the recipe's."""
    p, launched = config.parallel, int(os.environ["WORLD_SIZE"])
    if launched != p.world:
        raise ConfigError(
            f"parallel: the recipe wants nodes {p.nodes} x ranks_per_node {p.ranks_per_node} = {p.world} ranks, found "
            f"{launched} launched; ask Slurm for --nodes={p.nodes} --gpus-per-node={p.ranks_per_node}, or set "
            "parallel.nodes and parallel.ranks_per_node to what there is"
        )


def _set_allocator(config: Config) -> None:
    """Segments that grow: micro-batches differ in size, and fixed segments fragment. Before torch is imported.

    Not beside a colocated engine that sleeps: vLLM's sleep mode maps memory itself, and its all-reduce shares the
    memory of CUDA graphs by IPC handles, which growing segments do not have. What is set already wins.
    """
    engine = find_engine(config.rollout)
    if (
        not (engine.colocated and engine.sleeps)
        and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    ):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def _check_own_code(config: Config) -> dict[str, Any]:
    """The configuration with the method's own defaults filled in; its options and ``model.family`` are checked here."""
    from megatron_ext.model.architectures import find_family
    from megatron_ext.train.method_factory import create_method  # brings torch: only when needed

    find_family(config.model.family)
    method = create_method(config)
    options = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    return config.model_dump() | {"method": {"name": config.method.get("name"), **options}}


def _launch(config: Config, options: argparse.Namespace) -> int:
    if config.parallel.nodes > 1:
        raise ConfigError(
            f"parallel.nodes: {config.parallel.nodes} nodes cannot be started from here. With Slurm: "
            f"{slurm_command(find_recipe(options.recipe), options.overrides)}, or megatron-entropy launch; elsewhere "
            "python -m tools.ranks on every node; on this machine alone set parallel.nodes=1"
        )
    print(f"starting {config.parallel.world} ranks; the run's folder is {config.run_dir}", flush=True)
    code = ranks.run_ranks(module_of("train"), [options.recipe, *options.overrides], config.parallel.world)
    if code == 0:
        ignore_signals()  # all is saved, there is nothing to stop
        from .report.page import write_report

        print(f"report: {write_report(config.run_dir)}")
    return code


def _train(config: Config) -> int:
    heartbeat.begin(60 * config.train.hang_minutes)
    folder = RunFolder(config.run_dir) if os.environ["RANK"] == "0" else None
    with folder or nullcontext():
        try:
            from megatron_ext.train.loop import run  # brings torch

            _check_gpu()
            code = run(config)
        except SystemExit as stopped:  # by a signal, while starting
            if stopped.code != REQUEUE:
                raise
            code = faults.reason(REQUEUE)
        return code if folder is None else folder.exit_code(code)


def _check_gpu() -> None:
    """There is one for this rank, or there are none at all."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found and ranks.local_rank() >= found:
        raise ConfigError(
            f"parallel.ranks_per_node: every rank needs a GPU of its own, found {found} visible ones; set it to "
            f"{found}, or make more visible (CUDA_VISIBLE_DEVICES, --gpus-per-node)"
        )


if __name__ == "__main__":
    heed_interrupts()
    StopSignals()
    try:
        exit_code = main()
    except Exception as error:
        sys.excepthook(type(error), error, error.__traceback__)
        exit_code = 1
    finally:
        ignore_signals()
    leave(exit_code)
