"""The distribution of a response's first token, which shows what a bonus does to a large action space.

SIREN Figure 2 a: before training a few meaningful tokens hold nearly all probability, after an explosion none does.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from megatron_ext.config.errors import ConfigError

from ..arguments import whole_number
from ..progress import ToolProgress
from . import figures
from .figures import Result, visible
from .inputs import SampleRow, kind_of, labels_of, read_problems
from .scored import TokenTexts, load, of_run, prompt_ids

MEANING = (
    "Probability of each token as the first of a response, mean over the prompts: of a model its own distribution over "
    "the whole vocabulary, of a run the first tokens that were sampled. entropy_of_the_mean also counts what differs "
    "between prompts, mean_entropy is within a prompt; both in nats. rank: the curve's x."
)
CURVE = 1000  # ranks of the figure
LISTED = 50
LEAST = 1e-4  # probability of a token that the figure shows


@dataclass(frozen=True)
class First:
    """``tokens`` by descending ``probability``."""

    label: str
    origin: str
    prompts: int
    tokens: list[str]
    probability: np.ndarray
    mean_entropy: float | None

    @property
    def entropy(self) -> float:
        known = self.probability[self.probability > 0]
        return float(-(known * np.log(known)).sum()) + 0.0

    def numbers(self) -> dict[str, Any]:
        top = zip(self.tokens[:LISTED], self.probability[:LISTED], strict=True)
        mass = self.probability.cumsum()
        return {
            "origin": self.origin,
            "prompts": self.prompts,
            "entropy_of_the_mean": self.entropy,
            "mean_entropy": self.mean_entropy,
            "tokens_for_90_percent": int(np.searchsorted(mass, 0.9 * mass[-1])) + 1,
            "top": [{"token": token, "probability": float(value)} for token, value in top],
        }


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--top", type=whole_number(1), default=15, help="tokens of the figure (%(default)s)")


def analyze(options: argparse.Namespace, console: Console) -> Result:
    found = []
    for label, path in zip(labels_of(options.inputs, options.labels), options.inputs, strict=True):
        kind = kind_of(path)
        if kind not in ("model", "run"):
            raise ConfigError(f"{path}: expected a model with --data, or the folder of a run")
        found.append(_of_model(label, path, options, console) if kind == "model" else _of_run(label, path, options))
    title = options.title or ("First token of a response" if len(found) > 1 else f"First token of {found[0].label}")
    figure, (left, right) = figures.panels(2, title, columns=2, width=10.2)
    _draw_top(left, found, options.top)
    _draw_ranks(right, found)
    lines = [
        f"{each.label}: entropy {each.entropy:.3f} nats; "
        + ", ".join(
            f"{visible(t)} {100 * p:.1f} %" for t, p in zip(each.tokens[:6], each.probability[:6], strict=False)
        )
        for each in found
    ]
    return Result(title, figure, {"models": {each.label: each.numbers() for each in found}}, MEANING, lines)


def _of_model(label: str, path: Any, options: argparse.Namespace, console: Console) -> First:
    """The model's own distribution after every prompt of ``--data``."""
    problems = read_problems(options.data)
    scorer = load(path, options.temperature, options.dtype)
    keys = list(problems.by_set)[: options.limit]
    encoded = prompt_ids(scorer, [SampleRow(set=name, id=number, text="") for name, number in keys], problems, {})
    total, nats = np.zeros(scorer.vocab_size), 0.0
    with ToolProgress(console) as progress:
        task = progress.add_task("first tokens", total=len(encoded))
        for logprob in scorer.next_token(list(encoded.values()), lambda done: progress.advance(task, done)):
            value = logprob.double().numpy()
            total += np.exp(value)
            nats -= float((np.exp(value) * np.where(np.isneginf(value), 0.0, value)).sum())
    order = np.argsort(-total, kind="stable")
    texts = TokenTexts(scorer.tokenizer)
    tokens = [texts(int(token)) for token in order[:LISTED]]
    origin = f"{path}, the whole vocabulary, temperature {options.temperature:g}"
    return First(label, origin, len(encoded), tokens, total[order] / len(encoded), nats / len(encoded))


def _of_run(label: str, path: Any, options: argparse.Namespace) -> First:
    """The first tokens that a run sampled."""
    source = of_run(label, path, options.steps, options.limit)
    count = Counter(response.texts[0] for response in source.responses)
    ranked = sorted(count.items(), key=lambda item: (-item[1], item[0]))
    share = np.array([times for _, times in ranked]) / len(source.responses)
    entropy = math.fsum(response.entropy[0] for response in source.responses) / len(source.responses)
    return First(label, source.origin, len(source.responses), [token for token, _ in ranked], share, entropy)


def _draw_top(axes: Any, found: list[First], top: int) -> None:
    """The most likely tokens of any, side by side."""
    best: dict[str, float] = {}
    for each in found:
        for token, value in zip(each.tokens, each.probability, strict=False):
            best[token] = max(best.get(token, 0.0), float(value))
    likely = [token for token in best if best[token] >= LEAST] or list(best)
    names = sorted(likely, key=lambda token: (-best[token], token))[:top]
    height = 0.8 / len(found)
    for number, each in enumerate(found):
        known = dict(zip(each.tokens, each.probability, strict=False))
        places = [place + height * (number - (len(found) - 1) / 2) for place in range(len(names))]
        axes.barh(places, [known.get(name, 0.0) for name in names], height=0.92 * height, color=figures.color(number),
                  label=f"{each.label} ({each.entropy:.2f} nats)")  # fmt: skip
    axes.set_yticks(range(len(names)), [visible(name) for name in names], fontfamily="DejaVu Sans Mono", fontsize=9)
    axes.invert_yaxis()
    axes.grid(False)
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="probability", title="the most likely tokens")
    figures.percent_axis(axes.xaxis)
    axes.legend(loc="lower right")


def _draw_ranks(axes: Any, found: list[First]) -> None:
    for number, each in enumerate(found):
        mass = each.probability.cumsum()[:CURVE]
        axes.plot(
            range(1, len(mass) + 1), mass, color=figures.color(number), marker="o" if len(mass) < 12 else None, ms=4
        )
    axes.set_xscale("log")
    figures.plain_log_axis(axes.xaxis)
    axes.set_ylim(0, 1.03)
    figures.percent_axis(axes.yaxis)
    axes.set(
        xlabel="number of most likely tokens (log scale)", ylabel="probability together", title="how few hold it all"
    )
