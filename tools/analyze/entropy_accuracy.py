"""Entropy against accuracy over a run, of several runs.

What AER (arXiv 2510.10959, section 3) and EntroPIC argue with: accuracy is bought with entropy, R = -a exp(H) + b
(Cui et al., arXiv 2505.22617), until there is none left. Also both over the steps, as in SENT Figures 1 and 4.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich.console import Console

from megatron_ext.config.errors import ConfigError

from ..report.data import Metrics, read_glossary, read_metrics
from . import figures
from .figures import Result
from .inputs import kind_of, labels_of

MEANING = (
    "entropy: mean over a step's tokens, of the policy that sampled, in nats; accuracy: the metric named, of the same "
    "step. fit: least squares of accuracy = b - a exp(entropy) over the run's steps, with its R2. Curves are moving "
    "averages; the numbers are not smoothed."
)
ENTROPY = "entropy/full"
ACCURACY = ("validation/avg", "reward/outcome/correct", "reward/mean")  # the first that a run has


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--accuracy", metavar="METRIC", help=f"of the run's metrics (the first there is of {', '.join(ACCURACY)})")
    add("--entropy", metavar="METRIC", default=ENTROPY, help="of the run's metrics (%(default)s)")


def analyze(options: argparse.Namespace, console: Console) -> Result:
    for path in options.inputs:
        if kind_of(path) != "run":
            raise ConfigError(f"{path}: expected the folder of a run with its metrics; found a {kind_of(path)}")
    labels = labels_of(options.inputs, options.labels)
    runs = {label: _read(path, options) for label, path in zip(labels, options.inputs, strict=True)}
    title = options.title or (
        "Accuracy and entropy over training" if len(runs) > 1 else f"Accuracy and entropy: {labels[0]}"
    )
    averaged = max(figures.averaged_over(len(run["steps"])) for run in runs.values())
    curves = f"Curves: moving averages over {averaged} steps, three times as many at the left. " if averaged > 1 else ""
    below = f"{curves}Circle: start, square: end. Dashed: fit of accuracy = b - a exp(entropy)."
    figure, axes = figures.panels(3, title, subtitle=below, width=11.4)
    for number, (label, run) in enumerate(runs.items()):
        _draw(axes, run, label, figures.color(number))
    metric = " / ".join(dict.fromkeys(run["accuracy_metric"] for run in runs.values()))
    for panel in axes:
        figures.percent_axis(panel.yaxis) if panel is not axes[1] else None
    axes[0].set(xlabel="entropy (nats)", ylabel=f"accuracy ({metric})", title="accuracy against entropy")
    axes[1].set(xlabel="step", ylabel="entropy (nats)", title="entropy", ylim=(0, None))
    axes[2].set(xlabel="step", ylabel=f"accuracy ({metric})", title="accuracy", ylim=(0, None))
    if len(runs) > 1:
        axes[2].legend(loc="lower right")
    lines = [_line(label, run) for label, run in runs.items()]
    return Result(title, figure, {"runs": runs}, MEANING, lines)


def _read(path: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The steps that have both numbers. Raises ConfigError where there are fewer than two."""
    try:
        metrics, _ = read_metrics(path), read_glossary(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    name = options.accuracy or next((each for each in ACCURACY if each in metrics.columns), ACCURACY[-1])
    for each in (name, options.entropy):
        if each not in metrics.columns:
            close = ", ".join(sorted(key for key in metrics.columns if key.split("/")[0] == each.split("/")[0])[:8])
            raise ConfigError(
                f"{path}: has no metric {each}; it has {close or ', '.join(sorted(metrics.columns)[:12])}"
            )
    steps, entropy, accuracy = _both(metrics, options.entropy, name, options.steps)
    if len(steps) < 2:
        raise ConfigError(f"{path}: {len(steps)} steps have both {options.entropy} and {name}, expected at least 2")
    return {
        "input": str(path),
        "entropy_metric": options.entropy,
        "accuracy_metric": name,
        "steps": steps,
        "entropy": entropy,
        "accuracy": accuracy,
        "correlation": _correlation(entropy, accuracy),
        "fit": fit(entropy, accuracy),
    }


def _both(
    metrics: Metrics, entropy: str, accuracy: str, span: tuple[int, int] | None
) -> tuple[list[int], list[float], list[float]]:
    first, last = span or (0, 2**53)
    rows = [
        (step, h, r)
        for step, h, r in zip(metrics.steps, metrics.values(entropy), metrics.values(accuracy), strict=True)
        if h is not None and r is not None and first <= step <= last
    ]
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def fit(entropy: list[float], accuracy: list[float]) -> dict[str, float] | None:
    """``accuracy = b - a exp(entropy)`` by least squares; None where entropy does not vary."""
    x, y = np.exp(np.array(entropy)), np.array(accuracy)
    if not np.isfinite(x).all() or np.ptp(x) < 1e-9:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    spread = float(((y - y.mean()) ** 2).sum())
    rest = float(((y - slope * x - intercept) ** 2).sum())
    return {"a": float(-slope), "b": float(intercept), "r2": 1 - rest / spread if spread > 0 else float("nan")}


def _correlation(entropy: list[float], accuracy: list[float]) -> float:
    if np.ptp(entropy) == 0 or np.ptp(accuracy) == 0:
        return float("nan")
    return float(np.corrcoef(entropy, accuracy)[0, 1])


def _draw(axes: Any, run: dict[str, Any], label: str, color: str) -> None:
    steps, entropy, accuracy = run["steps"], np.array(run["entropy"]), np.array(run["accuracy"])
    smooth = [figures.smoothed(values.tolist()) for values in (entropy, accuracy)]
    path = [figures.smoothed(values.tolist(), 3) for values in (entropy, accuracy)]
    axes[0].scatter(entropy, accuracy, s=9, color=color, alpha=0.25, linewidths=0)
    axes[0].plot(*path, color=color, lw=1.6)
    axes[0].plot(path[0][0], path[1][0], "o", ms=8, mfc="white", mec=color, mew=1.6, zorder=4)
    axes[0].plot(path[0][-1], path[1][-1], "s", ms=8, color=color, mec="white", mew=1.2, zorder=4)
    if run["fit"] is not None:
        x = np.linspace(entropy.min(), entropy.max(), 80)
        axes[0].plot(x, run["fit"]["b"] - run["fit"]["a"] * np.exp(x), color=color, lw=1.1, ls=(0, (4, 3)))
    for panel, raw, values in ((axes[1], entropy, smooth[0]), (axes[2], accuracy, smooth[1])):
        panel.plot(steps, raw, color=color, lw=0.8, alpha=0.3)
        panel.plot(steps, values, color=color, label=label)


def _line(label: str, run: dict[str, Any]) -> str:
    entropy, accuracy, found = run["entropy"], run["accuracy"], run["fit"]
    line = (
        f"{label}: entropy {entropy[0]:.3f} to {entropy[-1]:.3f} nats, accuracy {accuracy[0]:.3f} to {accuracy[-1]:.3f}"
    )
    if found is None:
        return line
    return f"{line}; accuracy = {found['b']:.3f} - {found['a']:.3f} exp(entropy), R2 {found['r2']:.2f}"
