"""Perplexity of several models' responses under one base model: SIREN Figure 7, after Yue et al. (arXiv 2504.13837)."""

from __future__ import annotations

import argparse
from textwrap import fill
from typing import Any

import numpy as np
from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.shipped import find
from megatron_ext.metrics.eval_stats import bootstrap

from . import figures
from .figures import INK, Result
from .inputs import kind_of, labels_of
from .scored import Source, of_model

MEANING = (
    "Perplexity of a response: exp of the mean negative log-probability of its tokens under the base model. Boxes: "
    "quartiles over responses and their median, whiskers 5 % to 95 %, diamond: the mean. token_perplexity pools the "
    "tokens of all responses. A lower one says that the base model would give these responses too."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=find, metavar="MODEL", help="model whose probabilities count")


def analyze(options: argparse.Namespace, console: Console) -> Result:
    files = [*options.inputs, *options.samples]
    if options.base is None or kind_of(options.base) != "model":
        raise ConfigError(f"--base: found {options.base}, expected the folder of the base model")
    if not files:
        raise ConfigError("perplexity: no samples given; name a samples file (.jsonl) for each model")
    if wrong := [path for path in files if kind_of(path) != "samples"]:
        raise ConfigError(f"{wrong[0]}: expected samples (.jsonl, or a folder of them); the model is given by --base")
    labels = labels_of(files, options.labels)
    found = [of_model(label, options.base, path, options, console) for label, path in zip(labels, files, strict=True)]
    values = [np.array([np.exp(-response.logprob.mean()) for response in source.responses]) for source in found]
    title = options.title or f"Perplexity of responses under {options.base.resolve().name}"
    figure, (axes,) = figures.panels(1, title, width=max(4.6, 1.5 * len(found) + 2.6))
    names = [f"{fill(source.label, 20)}\n{len(source.responses):,} responses" for source in found]
    boxes = axes.boxplot(
        values, tick_labels=names, whis=(5, 95), showfliers=False, showmeans=True, widths=0.5, patch_artist=True,
        medianprops={"color": INK, "linewidth": 1.6},
        meanprops={"marker": "D", "markerfacecolor": "white", "markeredgecolor": INK, "markersize": 6},
    )  # fmt: skip
    for number, box in enumerate(boxes["boxes"]):
        box.set(facecolor=figures.color(number), alpha=0.55, edgecolor=INK, linewidth=0.9)
    if max(float(np.quantile(value, 0.95)) for value in values) > 20:
        axes.set_yscale("log")
        figures.plain_log_axis(axes.yaxis)
    axes.set_ylabel("perplexity of a response")
    numbers = {source.label: _numbers(source, value) for source, value in zip(found, values, strict=True)}
    lines = [
        f"{label}: mean {each['mean']:.3f} ({each['low']:.3f} to {each['high']:.3f}), median {each['median']:.3f}, "
        f"pooled over tokens {each['token_perplexity']:.3f}"
        for label, each in numbers.items()
    ]
    return Result(title, figure, {"base": str(options.base), "models": numbers}, MEANING, lines)


def _numbers(source: Source, value: np.ndarray) -> dict[str, Any]:
    """With the 95 % interval of the mean over problems, each the mean of its responses."""
    by_problem: dict[tuple[str, str], list[float]] = {}
    for response, each in zip(source.responses, value, strict=True):
        by_problem.setdefault(response.problem, []).append(float(each))
    (interval,) = bootstrap(np.array([np.mean(values) for values in by_problem.values()])[:, None])
    pooled = np.concatenate([response.logprob for response in source.responses])
    return source.described() | {
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "median": float(np.median(value)),
        "quantiles": {f"{q:g}": float(np.quantile(value, q)) for q in (0.05, 0.25, 0.75, 0.95)},
        "token_perplexity": float(np.exp(-pooled.mean())),
    }
