"""A plan's memory as a stacked bar for each phase: the worst pipeline rank's GPU, and its limit as a line."""

from __future__ import annotations

from matplotlib import colormaps
from matplotlib.figure import Figure

from megatron_ext.plan.layout import Plan
from megatron_ext.plan.memory import PHASES

GB = 1e9


def memory_chart(plan: Plan) -> Figure:
    worst = plan.worst
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    ends = dict.fromkeys(PHASES, 0.0)
    for number, item in enumerate(dict.fromkeys(item for phase in PHASES for item in worst.phases[phase])):
        sizes = [worst.phases[phase].get(item, 0) / GB for phase in PHASES]
        axes.barh(PHASES, sizes, left=list(ends.values()), label=item, color=colormaps["tab20"](number % 20))
        ends = {phase: end + size for (phase, end), size in zip(ends.items(), sizes, strict=True)}
    for phase, end in ends.items():
        axes.annotate(f"{end:.1f} GB", (end, phase), (4, 0), textcoords="offset points", va="center")
    limit = plan.gpu_memory / GB
    axes.axvline(limit, color="red", linestyle="--", label=f"limit: {limit:.1f} GB")
    axes.set(xlabel="GB", title=f"{plan.config.name}: memory of the worst GPU (pipeline rank {worst.rank})")
    axes.set_xlim(0, 1.12 * max(limit, *ends.values()))
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)
    return figure
