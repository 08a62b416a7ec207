"""A plan's memory as a stacked bar for each phase, in one self-contained SVG."""

from __future__ import annotations

from html import escape

from megatron_ext.plan.layout import Plan
from megatron_ext.plan.memory import PHASES

WIDTH, LEFT, RIGHT, TOP, BAR, PITCH = 760, 70, 720, 54, 34, 52
COLORS = ("#9aa0a6", "#3b6fb6", "#6ea0d8", "#9cc3ea", "#c2571a", "#e39a5c", "#7a5195", "#b48ac9", "#3d8a5f", "#8cc7a5")
GB = 1e9


def memory_chart(plan: Plan) -> str:
    """The worst pipeline rank's GPU, its limit as a line, a legend below."""
    worst = plan.worst
    items = list(dict.fromkeys(item for phase in PHASES for item in worst.phases[phase]))
    colors = {item: COLORS[number % len(COLORS)] for number, item in enumerate(items)}
    scale = (RIGHT - LEFT) / max(plan.gpu_memory * 1.05, worst.peak)
    bottom = TOP + PITCH * len(PHASES)
    height = bottom + 34 + 20 * -(-len(items) // 3)
    title = f"{plan.config.name}: memory of the worst GPU (pipeline rank {worst.rank})"
    parts = [f'<text x="{LEFT}" y="24" font-size="15" font-weight="600">{escape(title)}</text>']
    for row, phase in enumerate(PHASES):
        y, x = TOP + PITCH * row, float(LEFT)
        parts.append(f'<text x="{LEFT - 8}" y="{y + 22}" text-anchor="end">{phase}</text>')
        for item, size in worst.phases[phase].items():
            label = f"{item}: {size / GB:.1f} GB"
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size * scale:.1f}" height="{BAR}" fill="{colors[item]}">'
                f"<title>{escape(label)}</title></rect>"
            )
            x += size * scale
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 22}">{worst.total(phase) / GB:.1f} GB</text>')
    limit = LEFT + plan.gpu_memory * scale
    parts.append(f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{TOP - 8}" y2="{bottom - 10}" class="limit"/>')
    parts.append(f'<text x="{limit:.1f}" y="{TOP - 12}" text-anchor="middle">{plan.gpu_memory / GB:.1f} GB</text>')
    for number, item in enumerate(items):
        x, y = LEFT + 220 * (number % 3), bottom + 14 + 20 * (number // 3)
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colors[item]}"/>')
        parts.append(f'<text x="{x + 18}" y="{y}">{escape(item)}</text>')
    style = "text{font:12px system-ui,sans-serif;fill:#222}.limit{stroke:#c00;stroke-width:2;stroke-dasharray:5 4}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
