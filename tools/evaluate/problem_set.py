"""The problems of one data file, what was left out of it, and how they are sampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.files import sha256

from .sampling import Pool
from .settings import Settings

if TYPE_CHECKING:
    from megatron_ext.data.dataset import DataReport
    from megatron_ext.types import Problem

LISTED = 20  # problems that are left out, named in the result


@dataclass(frozen=True)
class SetPlan:
    """A data file that is to be evaluated, as ``name``."""

    name: str
    data: Path
    settings: Settings


@dataclass(frozen=True)
class ProblemSet:
    """Its usable problems."""

    plan: SetPlan
    sha256: str
    problems: list[Problem]
    left_out: dict[str, Any]

    @property
    def settings(self) -> Settings:
        return self.plan.settings


def load_set(plan: SetPlan, pool: Pool, console: Console) -> ProblemSet:
    """Read and check the file. A gold answer that cannot be read costs its problem, which is counted and listed.

    Raises ConfigError for a file that cannot be read, and for other faults in more than ``max_left_out`` of its lines.
    """
    from megatron_ext.data.dataset import HARMLESS, load_problems

    if not plan.data.is_file():
        raise ConfigError(f"--data: no such file: {plan.data}; give a JSON Lines file with prompt and answer")
    problems, report = load_problems(plan.data, score=pool.score, max_left_out=1.0, skip_unparsable_gold=True)
    faults = sum(fault.kind not in (*HARMLESS, "unparsable_gold") for fault in report.faults)
    if faults > plan.settings.max_left_out * report.num_read:
        raise ConfigError(
            f"--data: {faults} of the {report.num_read} problems in {plan.data} have a fault, more than the share "
            f"--max-left-out {plan.settings.max_left_out:g}. Correct or remove them, or raise it\n{report.summary()}"
        )
    console.print(f"{plan.name}: {report.summary()}", markup=False, highlight=False)
    return ProblemSet(plan, sha256(plan.data), problems[: plan.settings.limit], left_out(report))


def left_out(report: DataReport) -> dict[str, Any]:
    """How many problems are missing for which reason, and the first of them by line."""
    return {"counts": report.counts, "problems": [str(fault)[:400] for fault in report.faults[:LISTED]]}
