"""The league's plan, as shipped or with a choice of its trials; and what two runs did to entropy."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

from tools.lab.plan import LabPlan, load_plan

ROOT = Path(__file__).parents[3]
PLAN = ROOT / "recipes/league/league.toml"
TUNING = ROOT / "recipes/league/tuning.toml"
FALLING = [0.4, 0.4, 0.3, 0.3, 0.2, 0.2, 0.18, 0.2, 0.22]  # loses .2 nats
FLAT = [0.4] * 9


def plan_with(folder: Path, chosen: dict[str, int], text: str = "") -> LabPlan:
    """The league's plan, or one of ``text``, of which these trials are chosen."""
    axes = {axis["run"]: axis["trials"] for axis in tomllib.loads(TUNING.read_text())["axis"]}
    lines = []
    for run, trial in chosen.items():
        overrides = axes[run][trial - 1] if trial else []
        lines += [f"[run.{run}]", f"trial = {trial}", f"set = {json.dumps(overrides)}", "right = []", "lost = []"]
    (folder / "chosen.toml").write_text("\n".join(lines))
    content = text or PLAN.read_text()
    assert content.count("recipes/league/chosen.toml") == 1
    (folder / "league.toml").write_text(content.replace("recipes/league/chosen.toml", f"{folder}/chosen.toml"))
    return load_plan(folder / "league.toml")
