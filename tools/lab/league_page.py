"""The league's page."""

from __future__ import annotations

from pathlib import Path

from .plan import LabPlan


def write(plan: LabPlan, out: Path) -> tuple[Path, Path]:
    """Write the page and the Markdown of the results in ``out`` (store.py); returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    html, markdown = out / "index.html", out / "README.md"
    markdown.write_text(f"# {plan.title}\n")
    html.write_text(f"<h1>{plan.title}</h1>\n")
    return html, markdown
