"""Every analysis that the inputs allow, and of the others why not."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_ext.metrics.writer import METRICS, SAMPLES

from ..report.data import EVALUATION
from .inputs import kind_of
from .registry import ANALYSES

EXPORT = "hf"  # of a run: where the quickstart and the docs put its export


class Step(NamedTuple):
    """An analysis with its arguments, or with the reason why it cannot be done."""

    name: str
    arguments: list[str] | None
    reason: str = ""


def plan(options: argparse.Namespace) -> list[Step]:
    """What to run on ``options.inputs``, in the registry's order. Raises ConfigError for an input that is nothing."""
    kinds = {path: kind_of(path) for path in options.inputs}
    runs = [path for path, kind in kinds.items() if kind == "run"]
    exports = [path / EXPORT for path in runs if (path / EXPORT / "config.json").is_file()]
    given = [path for path, kind in kinds.items() if kind == "model"]
    models = list({path.resolve(): path for path in [*exports, *given]}.values())
    counted = [path for path, kind in kinds.items() if kind in ("evaluation", "samples")]
    counted += [path for path in runs if (path / EVALUATION).is_file()]
    counted = counted or list(options.samples)
    recorded = [path for path in runs if (path / SAMPLES).is_file() and (path / SAMPLES).stat().st_size]
    scorable = bool(models and options.samples and options.data)
    token_level = [*models, *_samples(options)] if scorable else recorded
    steps = []
    for name in ANALYSES:
        chosen, reason = _inputs_of(name, options, token_level, models, recorded, counted, runs)
        steps.append(Step(name, [*map(str, chosen), *_common(name, options)] if chosen else None, reason))
    return steps


def _inputs_of(
    name: str,
    options: argparse.Namespace,
    token_level: Sequence[Path | str],
    models: Sequence[Path],
    recorded: Sequence[Path],
    counted: Sequence[Path],
    runs: Sequence[Path],
) -> tuple[Sequence[Path | str], str]:
    """The inputs of an analysis, or none and the reason."""
    if name == "perplexity":
        ready = options.base and options.samples and options.data
        return (options.samples, "") if ready else ([], "needs --base, --samples and --data")
    if name == "entropy-accuracy":
        measured = [path for path in runs if (path / METRICS).is_file()]
        return measured, "" if measured else "needs the folder of a run"
    if name in ("pass-at-k", "levels", "flips"):
        return counted, "" if counted else f"needs --samples, an evaluation, or a run with {EVALUATION}"
    if name == "first-tokens":
        chosen = models if models and options.data else recorded
        return chosen, "" if chosen else f"needs a model and --data, or a run with {SAMPLES}"
    reason = f"needs a model with --samples and --data, or a run with {SAMPLES} (log.samples above 0)"
    return token_level, "" if token_level else reason


def _samples(options: argparse.Namespace) -> list[str]:
    return ["--samples", *map(str, options.samples)]


def _common(name: str, options: argparse.Namespace) -> list[str]:
    """The options of the command that each analysis shares."""
    found = ["--out", str(options.out), "--quantile", str(options.quantile), "--temperature", str(options.temperature)]
    found += ["--dtype", options.dtype]
    if options.data:
        found += ["--data", *map(str, options.data)]
    if options.limit:
        found += ["--limit", str(options.limit)]
    if options.steps:
        found += ["--steps", "-".join(map(str, options.steps))]
    if name == "perplexity":
        found += ["--base", str(options.base)]
    return found
