"""Turn a local copy of a data set into the problem rows that training and evaluation read.

megatron-entropy data --list                    the known sets: where they are from, how to fetch and prepare each
megatron-entropy data gsm8k data/hub/gsm8k --out data/gsm8k.jsonl
megatron-entropy data deepscaler data/hub/deepscaler --out data/deepscaler.jsonl \\
    --against data/aime24.jsonl data/math500.jsonl          without problems of these evaluation sets
megatron-entropy data mine problems.parquet --map prompt=question,answer=final.answer --out data/mine.jsonl
megatron-entropy data entropic-math data/dapo-math-17k.jsonl data/orz-57k.jsonl data/deepscaler.jsonl \\
    --drop true-false,choice,proof --solved samples.jsonl --keep-solved 1..7 --out data/entropic-math.jsonl
megatron-entropy data --check data/gsm8k.jsonl              is it as its manifest says?

A SOURCE is a parquet, Arrow, JSON, JSON Lines or CSV file, a folder of these, what save_to_disk wrote, a snapshot of a
Hub repository, or a prepared file; nothing is fetched. What cannot be used is left out and reported: rows without a
gold answer, golds that the verifier cannot read or does not accept against themselves, duplicates (the first stays),
the same problem with another answer, and what the options ask for. Beside FILE.jsonl goes FILE.manifest.json.

Exit codes: 0 done; 2 something cannot be used, nothing is written; 3 the verifier does not work; 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.public_sets import PublicSet, public_sets

from ..arguments import command_parser, output_file, whole_number
from .filters import QUESTION_TYPES
from .solved import Range


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    if options.list:
        print("\n\n".join(map(_listed, _chosen(parser, options.name))))
        return 0
    from megatron_ext.rollout.rewards.reward_pool import VerifierError

    try:
        if options.check is not None:
            from .manifest import check

            print(check(options.check))
        else:
            _prepare(parser, options)
    except ConfigError as error:
        print(f"data: {str(error).removeprefix('data: ')}", file=sys.stderr)
        return 2
    except VerifierError as error:
        print(f"data: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("data: interrupted; nothing is written", file=sys.stderr)
        return 130
    return 0


def _prepare(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.name is None or not options.sources or options.out is None:
        parser.error("expected NAME SOURCE... --out FILE, or --list, or --check FILE")
    if (options.keep_solved is None) != (not options.solved):
        parser.error("--keep-solved and --solved go together: which problems to keep, and the samples that tell")
    if (options.max_tokens is not None) and options.tokenizer is None:
        parser.error("--max-tokens: needs --tokenizer DIR, whose tokens are counted")
    from megatron_ext.rollout.rewards.reward_pool import RewardPool

    from .prepare import Options, prepare

    values = {name: getattr(options, name) for name in Options.__dataclass_fields__}
    values |= {name: tuple(values[name]) for name in ("configs", "against", "solved")}
    with RewardPool(options.workers) as pool:
        prepare(
            options.name,
            options.sources,
            options.out,
            Options(**values),
            score=pool.score,
            console=Console(stderr=False),
        )


def _chosen(parser: argparse.ArgumentParser, name: str | None) -> list[PublicSet]:
    known = public_sets()
    if name is not None and name not in known:
        parser.error(f"there is no set called {name!r}; expected one of {', '.join(known)}")
    return [known[name]] if name is not None else list(known.values())


def _listed(found: PublicSet) -> str:
    where = found.hub or found.url or f"made of {', '.join(found.parts)}"
    copy = "".join(
        f", {label} {value}" for label, value in (("config", ", ".join(found.config)), ("split", found.split)) if value
    )
    rows = f"{found.rows:,} rows" if found.rows else "size depends on the model"
    lines = [
        f"{found.name}: {found.use}, {rows}, {where}{copy}",
        f"  used by  {found.used}",
        f"  licence  {found.licence}",
    ]
    lines += [f"  note     {found.traps}"] if found.traps else []
    return "\n".join([*lines, *(f"  $ {command}" for command in found.commands())])


def _mapping(text: str) -> dict[str, str]:
    """``prompt=question,answer=final.answer``; names are checked where the columns are known."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(field.strip() and column.strip() for field, _, column in pairs):
        raise argparse.ArgumentTypeError(
            f"found {text!r}, expected field=column,..., such as prompt=question,answer=gold"
        )
    return {field.strip(): column.strip() for field, _, column in pairs}


def _types(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if not set(found) <= set(QUESTION_TYPES):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected any of {','.join(QUESTION_TYPES)}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("data", __doc__)
    add = parser.add_argument
    add("name", metavar="NAME", nargs="?", help="a known set, or with --map any name")
    add("sources", metavar="SOURCE", nargs="*", type=Path, help="local copies, read one after the other")
    add("--out", type=output_file, help="the JSON Lines file to write, such as data/NAME.jsonl")
    add("--list", action="store_true", help="the known sets, or the one called NAME, and stop")
    add("--check", type=Path, metavar="FILE", help="compare a prepared file with its manifest, and stop")
    add(
        "--against",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="evaluation sets whose problems are left out: prepared files, compared by 13-grams of words",
    )
    add(
        "--map",
        dest="mapping",
        type=_mapping,
        default={},
        metavar="FIELD=COLUMN,...",
        help="columns of another schema: prompt, answer [, id, verifier, numbers, kind, level]; dots lead inside",
    )
    add("--split", default="", help="of a folder with several (the set's own)")
    add("--config", dest="configs", action="append", default=[], help="of a folder with several; may be repeated")
    add("--max-chars", type=whole_number(1), help="leave out longer prompts, in characters")
    add("--max-tokens", type=whole_number(1), help="the same in tokens of --tokenizer, without a chat template")
    add("--tokenizer", type=Path, metavar="DIR", help="a model's folder; its tokens go into the manifest")
    add(
        "--drop",
        type=_types,
        default=(),
        metavar="TYPE,...",
        help=f"leave out question types, told by their words: {','.join(QUESTION_TYPES)}",
    )
    add(
        "--keep-solved",
        type=Range.parse,
        metavar="LOW..HIGH",
        help="keep problems with so many right responses in --solved, such as 1..7 of 8, or 1..",
    )
    add(
        "--solved",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="samples of models, a response a line with id and correct; counted together",
    )
    add("--workers", type=whole_number(0), default=0, help="processes that verify golds; 0: one per core, at most 16")
    return parser
