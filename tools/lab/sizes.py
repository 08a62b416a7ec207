"""How much a plan's jobs are: steps, and hours of one core by what a prompt has taken where it was measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_ext.config.shipped import find

from .plan import Job
from .regimes import SEPARATOR
from .store import RESULTS

MEASURED = Path("docs/lab")  # where a league of nothing has its first times from
EVALUATION_PROMPTS = 256  # what an evaluation takes, in prompts of a step: 8 steps of 32


def sizes(todo: Sequence[Job], out: Path) -> list[str]:
    """A line for each group of jobs, then one for all."""
    measured = next((path for path in (out, find(MEASURED)) if seconds_by_regime(path)), None)
    seconds = {} if measured is None else seconds_by_regime(measured)
    groups = list(dict.fromkeys(job.group for job in todo))
    lines = [f"{group or 'untrained'}: {_said([j for j in todo if j.group == group], seconds)}" for group in groups]
    lines = lines if any(groups) else []  # without regimes the last line says it
    place = "" if measured is None else f" (seconds of a prompt as in {measured / RESULTS})"
    return [*lines, _said(todo, seconds) + place]


def seconds_by_regime(out: Path) -> dict[str, float]:
    """Of a prompt: the mean over results in ``out`` of the median step's, by regime, and of all under ""."""
    found: dict[str, list[float]] = {}
    for path in sorted((out / RESULTS).glob("*.json")):
        content = json.loads(path.read_text())
        for seed in content["seeds"]:
            if curve := [value for value in seed["curves"].get("time/step_s", ()) if value is not None]:
                for regime in {"", content["run"].partition(SEPARATOR)[2]}:
                    found.setdefault(regime, []).append(statistics.median(curve) / content["prompts"])
    return {regime: statistics.fmean(values) for regime, values in found.items()}


def _said(jobs: Sequence[Job], seconds: dict[str, float]) -> str:
    left = [job for job in jobs if not job.finished]
    said = f"{len(jobs)} jobs, {len(left)} to do, {sum(job.steps for job in left)} training steps"
    if not seconds:
        return said
    total = sum((job.steps * job.prompts + EVALUATION_PROMPTS) * seconds_of(job, seconds) for job in left)
    return f"{said}, about {total / 3600:.1f} core hours"


def seconds_of(job: Job, seconds: dict[str, float]) -> float:
    """Of a prompt in the job's regime; where that is not measured, in any."""
    return seconds.get(job.group.partition(",")[0], seconds[""])
