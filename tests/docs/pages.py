"""The pages that people write by hand: README, CONTRIBUTING and docs/."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[tuple[int, str, str]]:
    """Line number, the line above the fence, and content of every fenced block of ``language``."""
    lines, found = text.splitlines(), []
    starts = [i for i, line in enumerate(lines) if line == f"```{language}"]
    for start in starts:
        end = lines.index("```", start)
        found.append((start + 1, lines[start - 1] if start else "", "\n".join(lines[start + 1 : end])))
    return found
