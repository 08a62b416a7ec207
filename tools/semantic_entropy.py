"""Sort a recipe's training problems by the semantic entropy of its initial policy (SENT, arXiv 2512.04359).

    megatron-entropy semantic-entropy sent-tiny-cpu                        writes the recipe's data.curriculum
    megatron-entropy semantic-entropy RECIPE --out FILE [key=value ...]    as training takes them

Every problem is answered ``--samples`` times at temperature 1 by the recipe's model, within its response length.
Responses with equivalent final answers form a
cluster C, those without an answer one more:

    P(C) = sum of its responses' weights / sum of all           SE = - sum_C P(C) log P(C), in nats

``--weight`` is a response's weight. The paper says probability, not whether it is normalised by length: ``mean``
exp(mean log-prob of its tokens), ``raw`` exp(sum), which leaves nearly all mass on the shortest response, or ``count``
1. FILE is a curriculum (megatron_ext/data/curriculum.py): problems ascending, in ``--stages`` stages; a histogram
is written beside it (FILE with .png). Results are kept in FILE.partial as they come: a tool that was stopped goes on
with the same command and ends with the same file.

Exit codes: 0 done, 2 bad input, 3 the verifier cannot be trusted, 130 interrupted (run it again).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_ext.config.checks import check_layout
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from megatron_ext.config.schema import Config
from megatron_ext.config.shipped import outside
from megatron_ext.files import write_atomically
from megatron_ext.metrics.eval_stats import clusters

from .arguments import add_recipe, command_parser

if TYPE_CHECKING:
    from megatron_ext.types import Problem, Sample

    from .evaluate import Engine, Pool

WEIGHTS = ("mean", "raw", "count")
ENTROPY_DIGITS, SHARE_DIGITS = 6, 4
Encoded = Sequence[tuple["Problem", tuple[int, ...]]]


def log_weight(logprobs: Sequence[float], kind: str) -> float:
    """The log of a response's weight from its tokens' log-probs; ``kind`` is one of ``WEIGHTS``.

    Tokens whose log-prob the engine does not know (NaN) count as the others' mean. Raises ConfigError without any.
    """
    if kind == "count" or not logprobs:
        return 0.0
    known = [value for value in logprobs if math.isfinite(value)]
    if not known:
        raise ConfigError(
            f"--weight {kind}: the engine knows no log-prob of a response's {len(logprobs)} tokens; --weight count "
            "needs none"
        )
    return math.fsum(known) / len(known) if kind == "mean" else math.fsum(known) * (len(logprobs) / len(known))


def cluster_shares(log_weights: Sequence[float], members: Sequence[Sequence[int]]) -> list[float]:
    """P(C) of each cluster, given as positions of responses."""
    top = max(log_weights)
    weights = [math.exp(value - top) for value in log_weights]
    total = math.fsum(weights)
    return [math.fsum(weights[i] for i in cluster) / total for cluster in members]


def entropy(shares: Sequence[float]) -> float:
    """``-sum P log P`` in nats."""
    return -math.fsum(share * math.log(share) for share in shares if share > 0) + 0.0


def measured(
    problems: Sequence[Problem],
    samples: Sequence[Sequence[Sample]],
    pool: Pool,
    kind: str,
    answer_format: str = "boxed",
) -> list[dict[str, Any]]:
    """``entropy`` and ``clusters`` of each problem from its responses; largest share first."""
    from megatron_ext.rollout.rewards.extraction import MAX_ANSWER_CHARS, extract
    from megatron_ext.rollout.rewards.voting import equal_answers

    found = []
    votes = [
        [extract(sample.text, answer_format, in_thought=problem.in_thought) for sample in row]
        for problem, row in zip(problems, samples, strict=True)
    ]
    votes = [[None if vote is None or len(vote) > MAX_ANSWER_CHARS else vote for vote in row] for row in votes]
    equal = equal_answers(pool.score, problems, votes, answer_format)
    for row, answers, known in zip(samples, votes, equal, strict=True):
        members = clusters(answers, lambda key, answer, known=known: (key, answer) in known)
        silent = [i for i, answer in enumerate(answers) if answer is None]
        members += [silent] if silent else []
        shares = cluster_shares([log_weight(sample.logprobs, kind) for sample in row], members)
        listed = [
            [round(share, SHARE_DIGITS), len(part), answers[part[0]]]
            for share, part in zip(shares, members, strict=True)
        ]
        listed.sort(key=lambda cluster: -cluster[0])
        found.append({"entropy": round(entropy(shares), ENTROPY_DIGITS), "clusters": listed})
    return found


def measure(
    engine: Engine, pool: Pool, problems: Encoded, config: Config, options: argparse.Namespace, start: int
) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """The rows of one batch of problems after the other from problem ``start``, and the tokens sampled for them.

    A response depends on ``train.seed``, its problem's number in the data and its own number.
    """
    from megatron_ext.rollout.base import Request, Sampling
    from megatron_ext.rollout.sampling import seed_of

    sampling, count = Sampling(1.0, 1.0, config.rollout.max_response_tokens), options.samples
    per_batch = problems_per_batch(config, count)
    for first in range(start, len(problems), per_batch):
        part = problems[first : first + per_batch]
        requests = [
            Request(ids, seed_of(config.train.seed, row, number))
            for row, (_, ids) in enumerate(part, first)
            for number in range(count)
        ]
        samples = engine.generate(requests, sampling)
        rows = [samples[i : i + count] for i in range(0, len(samples), count)]
        yield (
            [
                {"row": row, "id": problem.problem_id, **result}
                for (row, (problem, _)), result in zip(
                    enumerate(part, first),
                    measured([problem for problem, _ in part], rows, pool, options.weight, config.prompt.answer_format),
                    strict=True,
                )
            ],
            sum(len(sample.response_ids) for sample in samples),
        )


def problems_per_batch(config: Config, samples: int) -> int:
    return max(1, config.rollout.batch_size // samples)


class Partial:
    """The results so far: a header and the rows of whole batches, in the order of the data."""

    def __init__(self, path: Path, header: dict[str, Any], per_batch: int) -> None:
        """Takes over what an earlier call with the same header left. Raises ConfigError for any other file."""
        self.path, self.rows = path, []
        if path.exists() and path.stat().st_size:
            self.rows = self._taken_over(header, per_batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(_line(record) for record in [header, *self.rows]), encoding="utf-8")

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += rows
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_line, rows)))
            file.flush()
            os.fsync(file.fileno())

    def _taken_over(self, header: dict[str, Any], per_batch: int) -> list[dict[str, Any]]:
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what has no end was being written
        try:
            found, *rows = [json.loads(line) for line in lines] or [header]
        except ValueError:
            found, rows = None, []
        if not isinstance(found, dict) or [row.get("row") for row in rows] != list(range(len(rows))):
            raise ConfigError(f"{self.path} is damaged: remove it to begin anew")
        differing = [key for key in found.keys() | header.keys() if found.get(key) != header.get(key)]
        if differing:
            lines = [f"  {key}: there {found.get(key)!r}, now {header.get(key)!r}" for key in sorted(differing)]
            raise ConfigError(
                f"{self.path} was begun with other settings; go on with those, remove it, or give another --out\n"
                + "\n".join(lines)
            )
        whole = len(rows) if len(rows) == header["num_problems"] else len(rows) // per_batch * per_batch
        return rows[:whole]


def write_curriculum(path: Path, header: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort ascending, number the stages, write the whole file or none of it; the rows as written."""
    from megatron_ext.data.curriculum import stage_of

    ordered = sorted(rows, key=lambda row: (row["entropy"], row["row"]))
    staged = [
        {"row": row["row"], "id": row["id"], "stage": stage_of(rank, len(rows), header["stages"])} | row
        for rank, row in enumerate(ordered)
    ]
    write_atomically(path, "".join(_line(record) for record in [header, *staged]))
    return staged


def plot(path: Path, rows: Sequence[dict[str, Any]], samples: int) -> None:
    """How many problems have which entropy, coloured by stage."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = [[row["entropy"] for row in rows if row["stage"] == stage] for stage in sorted({r["stage"] for r in rows})]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    labels = [f"stage {number}: {len(part)} problems" for number, part in enumerate(stages, 1)]
    axes.hist(stages, bins=40, range=(0, math.log(samples) or 1.0), stacked=True, label=labels)
    mean = math.fsum(row["entropy"] for row in rows) / len(rows)
    axes.set(xlabel="semantic entropy, nats", ylabel="problems", title=f"{len(rows)} problems, mean {mean:.2f} nats")
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def make(config: Config, options: argparse.Namespace, console: Console) -> Path:
    """Measure every problem and write the curriculum. Raises ConfigError, VerifierError."""
    out = Path(options.out or outside(config.data.curriculum))
    no_stages = {"curriculum": "", "stage_starts": [], "stage_restart": False}
    config = config.model_copy(update={"data": config.data.model_copy(update=no_stages)})
    if str(out) == ".":
        raise ConfigError("--out: the recipe names no data.curriculum; say where to write the curriculum with --out")
    for name in ("samples", "stages"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name}: expected at least 1, found {getattr(options, name)}")
    check_layout(config)
    from megatron_ext.data.curriculum import FORMAT, fingerprint
    from megatron_ext.data.dataset import load_training_data
    from megatron_ext.rollout.registry import create_engine
    from megatron_ext.rollout.rewards.reward_pool import RewardPool

    from .evaluate.fingerprint import model_sha256

    with RewardPool(
        config.reward.workers, deadline_s=config.reward.deadline_s, answer_format=config.prompt.answer_format
    ) as pool:
        engine = create_engine(
            config.model.path,
            config.rollout,
            dtype=config.model.dtype,
            max_prompt_tokens=config.data.max_prompt_tokens,
            log_dir=out.parent,
        )
        problems, lines = load_training_data(config, score=pool.score, tokenizer=engine.tokenizer)
        console.print("\n".join(lines), markup=False, highlight=False)
        if len(problems) < options.stages:
            raise ConfigError(f"--stages: expected at most the {len(problems)} problems, found {options.stages}")
        header = {
            "format": FORMAT,
            "problems_sha256": fingerprint([problem for problem, _ in problems]),
            "num_problems": len(problems),
            "stages": options.stages,
            "model": Path(config.model.path).name,
            "model_sha256": model_sha256(Path(config.model.path)),
            "engine": config.rollout.engine,
            "dtype": config.model.dtype,
            "prompt": config.prompt.model_dump(),
            "samples": options.samples,
            "weight": options.weight,
            "temperature": 1.0,
            "max_response_tokens": config.rollout.max_response_tokens,
            "batch_size": config.rollout.batch_size,
            "seed": config.train.seed,
        }
        _refuse_other(out, header)
        partial = Partial(out.with_name(f"{out.name}.partial"), header, problems_per_batch(config, options.samples))
        if partial.rows:
            console.print(f"going on after {len(partial.rows)} of {len(problems)} problems")
        _fill(partial, engine, pool, problems, config, options, console)
        engine.close()
    rows = write_curriculum(out, header, partial.rows)
    plot(out.with_suffix(".png"), rows, options.samples)
    partial.path.unlink()
    mean = math.fsum(row["entropy"] for row in rows) / len(rows)
    line = f"{out}: {len(rows)} problems in {options.stages} stages, mean {mean:.3f} nats"
    console.print(line, highlight=False, soft_wrap=True)
    return out


def _fill(
    partial: Partial,
    engine: Engine,
    pool: Pool,
    problems: Encoded,
    config: Config,
    options: argparse.Namespace,
    console: Console,
) -> None:
    start, tokens, total = time.perf_counter(), 0, len(problems)
    columns = (
        TextColumn("problems"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    told = len(partial.rows) * 10 // total
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=len(partial.rows), speed="")
        for rows, num_tokens in measure(engine, pool, problems, config, options, len(partial.rows)):
            partial.add(rows)
            tokens += num_tokens
            speed = f"{tokens / (time.perf_counter() - start):,.0f} tokens/s"
            progress.update(task, completed=len(partial.rows), speed=speed)
            tenths = len(partial.rows) * 10 // total
            if tenths > told and not console.is_terminal:
                console.print(f"{len(partial.rows)} of {total} problems, {speed}", highlight=False)
            told = tenths


def _refuse_other(out: Path, header: dict[str, Any]) -> None:
    """A finished file is made again only with its own settings."""
    if not out.exists():
        return
    with out.open(encoding="utf-8") as file:
        first = file.readline()
    if first != _line(header):
        raise ConfigError(f"--out: {out} exists and was made with other settings: remove it or give another --out")


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("semantic-entropy", __doc__)
    add_recipe(parser, example="rollout.max_response_tokens=2048")
    parser.add_argument("--out", help="the curriculum file (the recipe's data.curriculum)")
    parser.add_argument("--samples", type=int, default=8, help="responses per problem, M (%(default)s)")
    parser.add_argument("--stages", type=int, default=2, help="stages of the curriculum, N (%(default)s)")
    parser.add_argument("--weight", choices=WEIGHTS, default=WEIGHTS[0], help="of a response (%(default)s)")
    options = parser.parse_intermixed_args(arguments)
    from megatron_ext.rollout.rewards.reward_pool import VerifierError

    try:
        make(read_config(options.recipe, options.overrides), options, Console())
    except ConfigError as error:
        print(f"semantic_entropy: {error}", file=sys.stderr)
        return 2
    except VerifierError as error:
        print(f"semantic_entropy: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("semantic_entropy: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
