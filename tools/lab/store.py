"""Results of the lab as small JSON files, one a run: from them alone the page is drawn.

``collect`` reads the folders of finished trainings and writes ``results/<run>.json`` with all seeds: the curves that
the page and the claims use, of every held-out problem how many of its n responses were right (``c``) and their mean
length, the commit and the machine, and the configuration. The untrained model is ``results/untrained.json``.
docs/lab/results holds those of the page in the repository.

Where the results lie in another folder than the runs, they stay when the runs are gone: what is there is not done again
(``left_to_do``), and seeds from other machines and days come together in one file.
"""

from __future__ import annotations

import json
import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext import methods
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config
from megatron_ext.methods.base import Controller
from megatron_ext.metrics.writer import METRICS, SAMPLES, read_steps

from ..evaluate import load_evaluations
from . import provenance
from .plan import BASE, EVALUATION, LABEL, Job, LabPlan, LabRun, configuration, job_name, settings_that_differ

RESULTS = "results"
UNTRAINED = "untrained"
LIKELY = (0.5, 0.95)  # probabilities that part unlikely, likely and almost certain tokens
DIGITS = 5
KEPT = (
    *("entropy/full", "entropy/nucleus", "reward/mean", "reward/outcome/correct", "response/length"),
    *("response/truncated", "data/stage", "time/step_s"),
)


def collect(plan: LabPlan, folder: Path, out: Path) -> None:
    """Write the results of every run of the plan that has a finished seed in ``folder``, beside the seeds that ``out``,
    if it is another folder, has of it.

    Raises ConfigError where ``out`` holds results of a run that was made with other settings: nothing is written then.
    """
    earlier = {run.name: {} if folder == out else _seeds_of(_checked(plan, out, run)) for run in plan.runs}
    made = out / RESULTS
    made.mkdir(parents=True, exist_ok=True)
    if (base := _evaluation(folder / BASE)) is not None:
        _write(made / f"{UNTRAINED}.json", {"run": UNTRAINED, "seeds": [_seed(0, folder / BASE, base, (), False)]})
    for run in plan.runs:
        folders = [(seed, folder / job_name(run.name, seed)) for seed in plan.seeds_of(run)]
        finished = [(seed, path, found) for seed, path in folders if (found := _evaluation(path)) is not None]
        if not finished:
            continue
        there = earlier[run.name]
        config, _ = configuration(plan, run, 0, folder)
        controller = methods.create(config.method).controller
        own = () if controller is None else (controller.measured, controller.target, controller.output)
        keys = (*KEPT, *(curve.key for curve in plan.curves), *(key for key in own if isinstance(key, str)))
        with_tokens = run.name in plan.details.tokens
        there |= {seed: _seed(seed, path, found, keys, with_tokens) for seed, path, found in finished}
        content = _settings(plan, run, config) | {
            "method": config.method["name"],
            "prompts": config.rollout.prompts,
            "controller": None if controller is None else vars(controller),
            "seeds": [there[seed] for seed in sorted(there)],
        }
        _write(made / f"{run.name}.json", content)


def left_to_do(plan: LabPlan, jobs: Sequence[Job], out: Path) -> list[Job]:
    """The jobs whose results ``out`` does not have, and those whose model one of them starts from.

    Raises ConfigError where it holds results of other settings.
    """
    steps = {job.name: job.steps for job in jobs}
    collected = {BASE} if read_untrained(out) else set[str]()
    for run in plan.runs:
        for seed in (read(plan, out, run) or {"seeds": ()})["seeds"]:
            name = job_name(run.name, seed["seed"])
            if len(seed["curves"]["entropy/full"]) == steps[name]:
                collected.add(name)
    needed = {job.needs for job in jobs if job.name not in collected}
    return [job for job in jobs if job.name not in collected or job.name in needed]


def read(plan: LabPlan, out: Path, run: LabRun) -> Mapping[str, Any] | None:
    """A run's results with the plan's seeds; None where there are none. Raises ConfigError for those of other
    settings."""
    content = _checked(plan, out, run)
    if content is None:
        return None
    return dict(content) | {"seeds": [seed for seed in content["seeds"] if seed["seed"] < plan.seeds]}


def _checked(plan: LabPlan, out: Path, run: LabRun) -> Mapping[str, Any] | None:
    path = out / RESULTS / f"{run.name}.json"
    content = _read(path)
    if content is None:
        return None
    now = _settings(plan, run, configuration(plan, run, 0, out)[0])
    differing = settings_that_differ({key: content.get(key, "not stated") for key in now}, now)
    if differing:
        lines = "\n".join(f"  {key}: was {old!r:.80}, now {new!r:.80}" for key, (old, new) in differing.items())
        raise ConfigError(f"{path}: results of other settings; remove it, or choose another --out\n{lines}")
    return content


def _seeds_of(content: Mapping[str, Any] | None) -> dict[int, Any]:
    return {} if content is None else {seed["seed"]: seed for seed in content["seeds"]}


def read_untrained(out: Path) -> Mapping[str, Any] | None:
    return _read(out / RESULTS / f"{UNTRAINED}.json")


def controller_of(content: Mapping[str, Any]) -> Controller | None:
    return None if content["controller"] is None else Controller(**content["controller"])


def _settings(plan: LabPlan, run: LabRun, config: Config) -> dict[str, Any]:
    """What must be the same for results to be this run's: ``config``, of its first seed, and its evaluation."""
    return {
        "run": run.name,
        "recipe": str(run.recipe),
        "set": list(run.set),
        "start": run.start or "",
        "first_seed": run.first_seed,
        "evaluate": list(plan.evaluate),
        "config": config.model_dump(mode="json", exclude={"name": True, "log": True, "model": {"path"}}),
    }


def _seed(
    seed: int, folder: Path, evaluation: Mapping[str, Any], keys: Sequence[str], with_tokens: bool
) -> dict[str, Any]:
    metrics = folder / METRICS
    records = list(read_steps(metrics)) if metrics.exists() else []
    alarms = {key for record in records for key, value in record.items() if key.startswith("alarm/") and value}
    curves = {
        key: [_short(record.get(key)) for record in records]
        for key in (*keys, *sorted(alarms - {"alarm/begun"}))
        if any(record.get(key) is not None for record in records)
    }
    rows = evaluation["problems"]
    return {
        "seed": seed,
        "made": dict(provenance.read(folder)),
        "curves": curves,
        "data": evaluation["data"]["sha256"],
        "decoding": evaluation["decoding"],
        "metrics": {name: _short(value["mean"]) for name, value in evaluation["metrics"].items()},
        "length": _short(evaluation["response"]["length"]["mean"]),
        "problems": {
            "n": [row["n"] for row in rows],
            "c": [row["c"] for row in rows],
            "length": [_short(row["length"]) for row in rows],
        },
        "tokens": where_entropy_is(folder / SAMPLES, len(records)) if with_tokens else None,
    }


def where_entropy_is(path: Path, steps: int) -> list[list[float]]:
    """For sampled tokens of probability up to .5, up to .95 and above: their number and their entropy in nats.

    From the responses that the run kept of the last third of its steps.
    """
    tokens, entropy = [0, 0, 0], [0.0, 0.0, 0.0]
    for record in read_steps(path) if path.exists() else ():
        if record["step"] <= steps * 2 // 3:
            continue
        for nats, logprob in zip(record["entropy"], record["logprob"], strict=True):
            place = bisect(LIKELY, math.exp(logprob or 0.0))
            tokens[place] += 1
            entropy[place] += nats or 0.0
    return [[count, round(nats, 3)] for count, nats in zip(tokens, entropy, strict=True)]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _evaluation(folder: Path) -> Mapping[str, Any] | None:
    path = folder / EVALUATION
    return load_evaluations(path)[LABEL] if path.exists() else None


def _read(path: Path) -> Mapping[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """One line a seed: a later seed changes one line of a diff."""
    seeds = ",\n".join(json.dumps(seed, separators=(",", ":")) for seed in content["seeds"])
    head = json.dumps({key: value for key, value in content.items() if key != "seeds"})
    path.write_text(f'{head[:-1]}, "seeds": [\n{seeds}\n]}}\n')
