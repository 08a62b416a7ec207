"""Histogram of token entropy: SENT Figure 7 b, and the many certain tokens that selective methods start from."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.console import Console

from . import figures
from .figures import Result
from .scored import sources

MEANING = (
    "Share of tokens by the entropy, in nats, of the distribution that each was sampled from. Dashed lines: the given "
    "quantile of each input. Tokens of entropy 0 are in the first bin."
)
BINS = 60
SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def analyze(options: argparse.Namespace, console: Console) -> Result:
    found = sources(options, console)
    top = max(float(source.entropy.max()) for source in found) or 1.0
    edges = np.linspace(0.0, top, BINS + 1)
    title = options.title or ("Token entropy" if len(found) > 1 else f"Token entropy of {found[0].label}")
    figure, (axes,) = figures.panels(1, title, subtitle=_subtitle(options.quantile))
    numbers = {}
    for number, source in enumerate(found):
        entropy, color = source.entropy, figures.color(number)
        count = np.histogram(np.clip(entropy, 0.0, top), edges)[0]
        share = count / len(entropy)
        label = f"{source.label} (mean {entropy.mean():.3f})"
        axes.stairs(share, edges, color=color, lw=1.8, label=label, fill=False)
        axes.stairs(share, edges, color=color, alpha=0.12, fill=True)
        axes.axvline(np.quantile(entropy, options.quantile), color=color, lw=1.1, ls=(0, (4, 3)))
        numbers[source.label] = source.described() | _numbers(entropy, options.quantile) | {"counts": count}
    axes.set_yscale("log")
    axes.set(xlabel="entropy (nats)", ylabel="share of tokens (log scale)", xlim=(0, top), ylim=(None, 1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.legend(loc="upper right")
    lines = [
        f"{label}: {each['tokens']} tokens, mean {each['mean']:.4f} nats, {100 * each['half_in']:.1f} % of them hold "
        "half of all entropy"
        for label, each in numbers.items()
    ]
    return Result(title, figure, {"edges_nats": edges, "models": numbers}, MEANING, lines)


def _subtitle(quantile: float) -> str:
    return f"Dashed: the {100 * quantile:g} % quantile of each."


def _numbers(entropy: np.ndarray, quantile: float) -> dict[str, Any]:
    """``half_in``: the smallest share of tokens that hold half of all entropy."""
    descending = np.sort(entropy)[::-1]
    total = descending.sum()
    half = (int(np.searchsorted(descending.cumsum(), total / 2)) + 1) / len(entropy) if total > 0 else 0.0
    shares = sorted({*SHARES, quantile})
    return {
        "mean": float(entropy.mean()),
        "max": float(entropy.max()),
        "quantiles": {f"{share:g}": float(np.quantile(entropy, share)) for share in shares},
        "half_in": half,
    }
