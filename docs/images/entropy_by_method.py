"""Draw entropy_by_method.svg, the README's picture, from the numbers inside docs/lab/index.html.

python docs/images/entropy_by_method.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
LINES = {  # run of the lab -> label, color, line width
    "grpo": ("GRPO", "#7a7d87", 2.2),
    "entropy_bonus_large": ("constant bonus of .3", "#b83f2f", 2.2),
    "siren": ("SIREN", "#2a8f62", 1.6),
    "aer": ("AER", "#d2691e", 1.6),
    "entropic": ("EntroPIC (target .25)", "#2f6fb2", 2.2),
}
PANELS = ("Entropy", "Right answers")
HIGHEST = 0.62  # nats; the exploding run leaves the picture here


def curves(page: str) -> dict[str, dict[str, list[float]]]:
    """``{figure's title: {run: mean over seeds at each step}}`` of the page's groups of methods."""
    numbers = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert numbers is not None, "docs/lab/index.html has no numbers: make it anew with python -m tools.lab --page"
    charts = json.loads(numbers[1])["charts"]
    found: dict[str, dict[str, list[float]]] = {title: {} for title in PANELS}
    for number, title in re.findall(r'<figure data-chart="(\d+)"><h3>(.*?)</h3>', page):
        if title in found:
            chart = charts[int(number)]
            assert chart["steps"] == list(range(1, 61)), f"{title}: a curve of the page leaves steps out"
            found[title] |= dict(zip(chart["names"], chart["values"], strict=True))
    return found


def means_of_five(values: list[float]) -> list[float]:
    return [sum(values[i : i + 5]) / 5 for i in range(len(values) - 4)]


def draw(found: dict[str, dict[str, list[float]]], out: Path) -> None:
    plt.rcParams |= {"svg.hashsalt": "entropy_by_method", "font.size": 10, "axes.spines.top": False}
    plt.rcParams |= {"axes.spines.right": False, "axes.titlesize": 11, "axes.titlelocation": "left"}
    figure, (entropy, right) = plt.subplots(1, 2, figsize=(9.6, 3.7), layout="constrained")
    for run, (label, color, width) in LINES.items():
        entropy.plot(range(1, 61), found["Entropy"][run], color=color, linewidth=width, label=label)
        right.plot(range(3, 59), means_of_five(found["Right answers"][run]), color=color, linewidth=width)
    entropy.axhline(0.25, color="#2f6fb2", linewidth=1, linestyle=(0, (5, 4)))
    last, color = found["Entropy"]["entropy_bonus_large"][-1], LINES["entropy_bonus_large"][1]
    entropy.text(8.5, 0.6, f"on to {last:.1f} nats at step 60", color=color, va="top")
    entropy.set(title="Entropy of the policy, nats a token", xlabel="step", ylim=(0.12, HIGHEST))
    right.set(title="Right answers in training, means of five steps", xlabel="step", ylim=(0, 0.6))
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=0))
    handles, labels = entropy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(LINES), frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    draw(
        curves((HERE.parent / "lab" / "index.html").read_text(encoding="utf-8")),
        Path(sys.argv[1]) if sys.argv[1:] else HERE / "entropy_by_method.svg",
    )
