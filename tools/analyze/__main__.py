"""Figures and numbers on models and runs: token entropy, selected tokens, perplexity, pass@k, what flipped.

    megatron-entropy analyze entropy-accuracy runs/siren runs/grpo --out runs/analysis
    megatron-entropy analyze all runs/quickstart --out runs/analysis      what there is to see, and of the rest why not
    megatron-entropy analyze NAME --help                                  inputs and options, with an example

Each analysis writes NAME.png and NAME.json into --out, with an index.html of all figures there. Models are folders in
Hugging Face format; samples are the .jsonl files that evaluate leaves, data the problem files they were made from.

Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.shipped import find

from ..arguments import command_parser, number, whole_number
from .registry import ANALYSES

ALL = "all"
OUT = Path("runs/analysis")
DTYPES = ("float32", "bfloat16", "float64")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = _names().parse_args(given[:1]).name
    console = Console(soft_wrap=True)
    try:
        if name == ALL:
            return _everything(_parser(ALL, None).parse_args(given[1:]), console)
        module = _module(name)
        _run(name, module, _parser(name, module).parse_args(given[1:]), console)
    except ConfigError as error:
        print(f"analyze {name}: {error}", file=sys.stderr)
        return 2
    return 0


def _run(name: str, module: Any, options: argparse.Namespace, console: Console) -> None:
    """Do one analysis and write what it found. Raises ConfigError."""
    from . import figures

    try:
        options.out.mkdir(parents=True, exist_ok=True)  # found now, not after the work
    except OSError as error:
        raise ConfigError(f"--out: {options.out} cannot be made: {error.strerror}") from None
    with figures.styled():
        result = module.analyze(options, console)
    for path in figures.save(result, name, options.out):
        console.print(f"wrote {path}", markup=False, highlight=False)
    for line in result.lines:
        console.print(f"  {line}", markup=False, highlight=False)
    figures.write_index(options.out, list(ANALYSES))


def _everything(options: argparse.Namespace, console: Console) -> int:
    """All analyses that the inputs allow. 2 where there is none."""
    from . import figures
    from .everything import plan

    missing = []
    steps = plan(options)
    for step in steps:
        reason = step.reason
        if step.arguments is not None:
            console.rule(step.name)
            module = _module(step.name)
            try:
                _run(step.name, module, _parser(step.name, module).parse_args(step.arguments), console)
            except ConfigError as error:
                reason = str(error)
        if reason:
            missing.append((step.name, reason))
    if len(missing) < len(steps):
        console.rule("result")
        index = figures.write_index(options.out, list(ANALYSES), missing)
        console.print(f"wrote {index}", markup=False, highlight=False)
    for name, reason in missing:
        console.print(f"left out {name}: {reason}", markup=False, highlight=False)
    return 0 if len(missing) < len(steps) else 2


def _module(name: str) -> Any:
    return importlib.import_module(f".{ANALYSES[name].module}", __package__)


def _parser(name: str, module: Any) -> argparse.ArgumentParser:
    inputs = "runs, models, evaluations or samples" if module is None else ANALYSES[name].inputs
    example = "all RUN --samples samples.jsonl --data eval.jsonl" if module is None else ANALYSES[name].example
    text = f"{'Every analysis that the inputs allow.' if module is None else module.__doc__.strip()}\n\n"
    parser = command_parser(f"analyze {name}", f"{text}    megatron-entropy analyze {example}")
    add = parser.add_argument
    add("inputs", type=find, nargs="+", metavar="INPUT", help=inputs)
    add("--samples", type=Path, nargs="+", default=[], help="responses: one file or folder for all models, or one each")
    add(
        "--data",
        type=find,
        nargs="+",
        default=[],
        metavar="FILE",
        help="problem files, or folders of them, that samples were made from",
    )
    add("--out", type=Path, default=OUT, help="folder of the figures (%(default)s)")
    if module is not None:
        add("--title", default="", help="of the figure")
        add("--labels", nargs="+", default=[], help="names of the inputs, in their order")
    add("--limit", type=whole_number(1), help="only the first problems of a samples file, or responses of a run")
    add("--steps", type=_steps, metavar="FIRST-LAST", help="of a run: only these steps, such as 1-50")
    add("--quantile", type=number(above=-1e-9, at_most=1.0), default=0.8, help="of token entropy (%(default)s)")
    add("--temperature", type=number(at_most=100), default=1.0, help="that logits are divided by (%(default)s)")
    add("--dtype", choices=DTYPES, default=DTYPES[0], help="of a model's weights (%(default)s)")
    if module is None:
        add("--base", type=find, metavar="MODEL", help="of perplexity: the base model")
    else:
        module.arguments(parser)
    return parser


def _steps(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash)) or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected steps such as 1-50 or 60")
    return int(first), int(last or first)


def _name(text: str) -> str:
    if text != ALL and text not in ANALYSES:
        close = difflib.get_close_matches(text.replace("_", "-"), [*ANALYSES, ALL], n=1)
        meant = f"did you mean {close[0]}?" if close else f"expected one of {', '.join([*ANALYSES, ALL])}"
        raise argparse.ArgumentTypeError(f"there is no analysis {text!r}; {meant}")
    return text


def _names() -> argparse.ArgumentParser:
    width = max(map(len, ANALYSES))
    listed = "\n".join(f"  {name:<{width}}  {each.summary}" for name, each in ANALYSES.items())
    parser = command_parser("analyze", __doc__)
    parser.usage = "%(prog)s NAME INPUT [INPUT ...] [options]"
    parser.epilog = f"analyses:\n{listed}\n  {ALL:<{width}}  all of these that the inputs allow"
    parser.add_argument("name", type=_name, metavar="NAME", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
