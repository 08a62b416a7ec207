"""Entropy-controlled reinforcement learning of reasoning models on Megatron-Core.

    megatron-entropy quickstart                              train, evaluate, export and report a tiny model; minutes
    megatron-entropy train siren-tiny-cpu train.steps=20     a shipped recipe, any key of it overridden
    megatron-entropy plan siren-qwen2.5-math-7b-2n8g         memory in GB and seconds of a step, without a GPU
    megatron-entropy evaluate MODEL --data eval.jsonl        avg@n, pass@k and maj@n with 95 % intervals
    megatron-entropy COMMAND --help                          options, their units and exit codes

Files are read and written from the current directory: runs go to runs/. Where a path begins with recipes/ and is not
there, the file that ships under that name is meant.
"""

from __future__ import annotations

import argparse
import difflib
import os
import runpy
import sys
from collections.abc import Sequence

from megatron_ext import __version__

from . import module_of

COMMANDS = {  # name: module, what it does
    "quickstart": ("quickstart", "the whole way on a laptop: train a tiny model, evaluate it before and after, export"),
    "train": ("train", "train a recipe, or go on with its run; --dry-run checks all that needs no GPU"),
    "evaluate": ("evaluate", "evaluate Hugging Face models on problems with known answers"),
    "data": ("data", "turn a local copy of a data set into problem rows, with filters and a manifest"),
    "convert": ("convert", "turn a run's checkpoint into a Hugging Face model, and back"),
    "report": ("report", "write a run's page: curves, evaluations, tokens"),
    "analyze": ("analyze", "figures of models and runs: token entropy, selected tokens, pass@k, what flipped"),
    "compare": ("compare_runs", "compare runs, in a table, on a page or bit by bit"),
    "paper": ("paper", "say what makes each row of a paper's tables, and set our numbers beside the published ones"),
    "recipes": ("recipes", "list the shipped recipes"),
    "methods": ("methods", "list the methods with their options and papers"),
    "plan": ("plan", "say whether a recipe fits on its GPUs, and how long a step takes"),
    "dry-run": ("dry_run", "build the shards of full-size recipes without a GPU"),
    "launch": ("launch", "launch a recipe with NeMo-Run, here or on a Slurm cluster"),
    "semantic-entropy": ("semantic_entropy", "sort training problems by semantic entropy: SENT's curriculum"),
    "lab": ("lab", "train every method on the tiny task, with a page of what each does to entropy"),
    "bench": ("bench", "time the operators and the rollout engines"),
}
EXTRAS = {"vllm": "vllm", "nemo_run": "launch", "wandb": "trackers"}  # package: which extra has it; others are in train


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given[:1])
    if options.command is None:
        _parser().print_help()
        return 2
    tool, _ = COMMANDS[options.command]
    sys.argv = [f"megatron-entropy {options.command}", *given[1:]]
    try:
        runpy.run_module(module_of(tool), run_name="__main__", alter_sys=True)  # as python -m does
    except BrokenPipeError:  # head has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at the end goes nowhere
        return 141
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in (__name__.partition(".")[0], "megatron_ext", ""):
            raise
        extra = EXTRAS.get(package, "train")
        print(
            f"megatron-entropy {options.command}: needs {package}, which is not installed\n"
            f"  {sys.executable} -m pip install 'megatron-entropy[{extra}]'",
            file=sys.stderr,
        )
        return 2
    return 0


def _command(text: str) -> str:
    if text not in COMMANDS:
        close = difflib.get_close_matches(text.replace("_", "-"), COMMANDS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(COMMANDS)}"
        raise argparse.ArgumentTypeError(f"there is no command {text!r}; {meant}")
    return text


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="megatron-entropy",
        usage="%(prog)s COMMAND [...]",
        description=__doc__,
        epilog=f"commands:\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", type=_command, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    return parser


if __name__ == "__main__":
    sys.exit(main())
