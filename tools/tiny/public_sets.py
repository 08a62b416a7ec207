"""The tiny task's problems as every public set is published: a paper's data is rehearsed without fetching any.

    python -m tools.tiny.public_sets --out recipes/tiny/data/public
    megatron-entropy data dapo-math-17k recipes/tiny/data/public/dapo-math-17k --out data/dapo-math-17k.jsonl \\
        --against data/aime24.jsonl

A folder a set, with the files of a snapshot of its Hub repository: 128 problems of train.jsonl in a training set, 12 of
eval.jsonl in an evaluation set, others in each. Answers are numbers: the math verifier takes any expression of that
value. dapo-math-17k has every row three times, and the first problem of aime24, which ``--against`` finds. Sets with
several configurations have a second one, of 8 problems. Two runs write the same bytes.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.config.public_sets import public_sets
from megatron_ext.types import Problem

from ..data.overlap import words
from . import public_rows
from .suite import is_countdown
from .task import read

TRAINING, EVALUATION, OTHER_CONFIG = 128, 12, 8  # problems
COPIES = 3  # of each row of dapo-math-17k, which has about 100
PLANTED_FROM, PLANTED_IN = "aime24", "dapo-math-17k"


class Layout(NamedTuple):
    """``file`` stands below the set's folder. ``other``: name and file of another configuration, where there are some.

    ``whole``: the set's answers are whole numbers, and none is negative.
    """

    file: str
    row: Callable[[int, Problem], Any]
    whole: bool = False
    other: tuple[str, str] | None = None


ONE_FILE = "data/train-00000-of-00001.parquet"
LAYOUTS = {
    "dapo-math-17k": Layout("data/dapo-math-17k.parquet", public_rows.dapo, whole=True),
    "openr1-math-46k-8192": Layout(ONE_FILE, public_rows.openr1_46k),
    "openr1-math-220k": Layout(
        ONE_FILE, public_rows.openr1_220k, other=("extended", "extended/train-00000-of-00001.parquet")
    ),
    "deepscaler": Layout("deepscaler.json", public_rows.deepscaler),
    "polaris-53k": Layout(ONE_FILE, public_rows.polaris),
    "orz-57k": Layout("orz_math_57k_collected.json", public_rows.orz),
    "math": Layout(ONE_FILE, public_rows.math),
    "gsm8k": Layout(
        "main/train-00000-of-00001.parquet",
        public_rows.gsm8k,
        whole=True,
        other=("socratic", "socratic/train-00000-of-00001.parquet"),
    ),
    "aime24": Layout(ONE_FILE, public_rows.aime24, whole=True),
    "aime25": Layout(ONE_FILE, public_rows.aime25, whole=True),
    "amc23-83": Layout(ONE_FILE, public_rows.amc_83, whole=True),
    "amc23": Layout("data/test-00000-of-00001.parquet", public_rows.amc_40, whole=True),
    "math500": Layout("test.jsonl", public_rows.math500),
    "olympiadbench": Layout(
        "OlympiadBench/OE_TO_maths_en_COMP/OE_TO_maths_en_COMP.parquet",
        public_rows.olympiadbench,
        other=("OE_TO_physics_en_COMP", "OlympiadBench/OE_TO_physics_en_COMP/OE_TO_physics_en_COMP.parquet"),
    ),
    "minerva": Layout("test.jsonl", public_rows.minerva),
    "omni-math": Layout("test.jsonl", public_rows.omni_math),
    "gpqa": Layout("gpqa_diamond.csv", public_rows.gpqa, whole=True, other=("gpqa_main", "gpqa_main.csv")),
    "hmmt25": Layout(ONE_FILE, public_rows.matharena),
    "brumo25": Layout(ONE_FILE, public_rows.matharena),
    "cmimc25": Layout(ONE_FILE, public_rows.matharena),
}


def deal(train: Sequence[Problem], held_out: Sequence[Problem]) -> dict[str, list[Problem]]:
    """``set -> its problems``, in the order of the data: none in two sets, but for the planted one.

    A training problem that differs from a held-out one in signs alone is passed over: ``--against`` compares words.
    """
    kept_out = {tuple(words(problem.prompt)) for problem in held_out}
    of_use: dict[str, tuple[Iterator[Problem], int]] = {
        "training": (iter([each for each in train if tuple(words(each.prompt)) not in kept_out]), TRAINING),
        "evaluation": (iter(held_out), EVALUATION),
    }
    dealt = {}
    for name, layout in LAYOUTS.items():
        problems, count = of_use[public_sets()[name].use]
        dealt[name] = list(islice((each for each in problems if is_countdown(each) or not layout.whole), count))
        if len(dealt[name]) < count:
            raise ValueError(f"{name}: {len(dealt[name])} problems are left, expected {count}")
    dealt[PLANTED_IN].insert(TRAINING // 2, dealt[PLANTED_FROM][0])
    return dealt


def files_of(name: str, problems: Sequence[Problem]) -> dict[str, bytes]:
    """``path below the set's folder -> content``, with a card where the set has several configurations."""
    layout = LAYOUTS[name]
    rows = [layout.row(number, problem) for number, problem in enumerate(problems)]
    files = {layout.file: content_of(layout.file, rows * (COPIES if name == PLANTED_IN else 1))}
    if layout.other:
        config, file = layout.other
        files[file] = content_of(file, rows[:OTHER_CONFIG])
        files["README.md"] = _card(name, {public_sets()[name].config[0]: layout.file, config: file}).encode()
    return files


def _card(name: str, configs: dict[str, str]) -> str:
    """The front matter that tells ``datasets`` which file is which configuration."""
    split = public_sets()[name].split
    lines = [
        f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {file}\n"
        for config, file in configs.items()
    ]
    return f"---\nconfigs:\n{''.join(lines)}---\nProblems of the tiny task in the schema of {name}.\n"


def content_of(file: str, rows: Sequence[Any]) -> bytes:
    """``rows`` as the kind of file that ``file`` ends in."""
    suffix = Path(file).suffix
    if suffix == ".parquet":
        return _parquet(rows)
    if suffix == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    lines = [json.dumps(row) for row in rows]
    return ("[\n" + ",\n".join(lines) + "\n]\n" if suffix == ".json" else "\n".join(lines) + "\n").encode()


def _parquet(rows: Sequence[Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny.public_sets", description="Write the tiny task's problems as public sets."
    )
    parser.add_argument("--data", type=Path, default=Path("recipes/tiny/data"), help="folder (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("recipes/tiny/data/public"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    for name, problems in deal(read(options.data / "train.jsonl"), read(options.data / "eval.jsonl")).items():
        for file, content in files_of(name, problems).items():
            path = options.out / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"{path}: {len(content) / 1000:.1f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
