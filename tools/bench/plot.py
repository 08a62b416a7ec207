"""Horizontal bars as a standalone SVG, by hand: ours dark, peers light, the value at the end of each bar."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, LABEL, BAR, GAP = 760, 220, 18, 6


def bars(charts: Sequence[tuple[str, Sequence[tuple[str, float, bool]]]]) -> str:
    """One chart under the other; each is a title and its (label, value, ours)."""
    parts, y = [], 10
    for title, rows in charts:
        y += 24
        parts.append(f'<text x="10" y="{y}" font-weight="bold">{escape(title)}</text>')
        y += 10
        longest = max((value for _, value, _ in rows), default=1.0)
        for label, value, ours in rows:
            length = max(1.0, (WIDTH - LABEL - 90) * value / longest)
            middle = y + BAR - 5
            parts.append(f'<text x="{LABEL - 8}" y="{middle}" text-anchor="end">{escape(label)}</text>')
            color = "#1f4e79" if ours else "#b8c4d0"
            parts.append(f'<rect x="{LABEL}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{color}"/>')
            parts.append(f'<text x="{LABEL + length + 6:.1f}" y="{middle}">{value:.3g}</text>')
            y += BAR + GAP
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    size = f'width="{WIDTH}" height="{y + 14}" viewBox="0 0 {WIDTH} {y + 14}"'
    background = f'<rect width="{WIDTH}" height="{y + 14}" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{background}{"".join(parts)}</svg>\n'
