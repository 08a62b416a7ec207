"""A run's times beside what the planner says of it, and the rates that it puts in the place of assumed ones."""

from __future__ import annotations

from html import escape
from pathlib import Path

from megatron_ext.config.errors import ConfigError
from megatron_ext.metrics.writer import PLANNER

from ..charts import short
from ..measured_run import comparison, rates_told, read_measured


def planned(folder: Path) -> str:
    """HTML; nothing where the run does not say on what it ran."""
    if not (folder / PLANNER).is_file():
        return ""
    try:
        measured = read_measured(folder)
        times, rates = comparison(measured), rates_told(measured)
    except ConfigError as error:
        return f'<h2>Plan</h2><p class="sub">Not compared with the planner: {escape(str(error))}</p>'
    known = "" if measured.gpu else f" There is no data sheet of {measured.device} here to assume rates from."
    about = (
        f"Seconds of a step, medians of {measured.num_steps} on {measured.config.parallel.world} x {measured.device}, "
        "and what the planner says: at the rates that it assumes, and at the run's own, with which megatron-entropy "
        f"plan RECIPE --measured {folder} plans.{known}"
    )
    rows = "".join(
        f'<tr><th>{escape(each.phase)}</th><td class="n">{short(each.measured)}</td>'
        f'<td class="n">{short(each.at_assumed_rates)}</td><td class="n">{short(each.at_its_own)}</td></tr>'
        for each in times
    )
    told = "".join(
        f'<tr><th>{escape(name)}</th><td class="n">{escape(own)}</td><td class="n">{escape(assumed)}</td></tr>'
        for name, assumed, own in rates
    )
    return (
        f'<h2>Plan</h2><p class="sub">{escape(about)}</p><div class="pair"><div class="card"><table><tr><th>phase</th>'
        '<th class="n">measured</th><th class="n">at assumed rates</th><th class="n">at its own</th></tr>'
        f'{rows}</table></div><div class="card"><table><tr><th>rate</th><th class="n">measured</th>'
        f'<th class="n">assumed</th></tr>{told}</table></div></div>'
    )
