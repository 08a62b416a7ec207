"""Responses token by token for the report: the hotter the colour, the less certain the policy was.

Entropies are in nats, of the distribution the token was drawn from. Every text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_ext.train.metrics import read_steps
from tools.charts import short

NUM_HEATS = 10  # classes h0 .. h9 of the style sheet
SHOWN_STEPS, SHOWN_PER_STEP = 4, 3


def pick_samples(path: Path, steps: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    """Responses of a few steps spread over the run, the first and the last included."""
    if not path.is_file():
        return {}
    wanted = {steps[round(i * (len(steps) - 1) / (SHOWN_STEPS - 1))] for i in range(SHOWN_STEPS)}
    found: dict[int, list[dict[str, Any]]] = {}
    for record in read_steps(path):
        if record["step"] in wanted and len(found.setdefault(record["step"], [])) < SHOWN_PER_STEP:
            found[record["step"]].append(record)
    return found


def samples(found: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    """Responses token by token, the colour scale shared by all of them."""
    entropies = sorted(
        value for rows in found.values() for row in rows for value in row["entropy"] if value is not None
    )
    if not entropies:
        return ""
    hottest = max(entropies[int(0.98 * (len(entropies) - 1))], 0.05)
    parts = [f"<h2>Responses</h2>{_scale(entropies, hottest)}"]
    for step, rows in found.items():
        cards = "".join(_sample(row, hottest) for row in rows)
        is_open = " open" if step in (min(found), max(found)) else ""
        parts.append(f"<details{is_open}><summary>Step {step}</summary>{cards}</details>")
    return "".join(parts)


def _scale(entropies: Sequence[float], hottest: float) -> str:
    """Legend: the ramp, how many tokens are where on it, and how concentrated the entropy is."""
    counts = [0] * NUM_HEATS
    for value in entropies:
        counts[_heat(value, hottest)] += 1
    tallest = max(counts)
    bars = "".join(f'<span style="height:{100 * (count / tallest) ** 0.5:.0f}%"></span>' for count in counts)
    half, total, num_tokens = 0.0, math.fsum(entropies), 0
    while total > 0 and half < total / 2:
        num_tokens += 1
        half += entropies[-num_tokens]
    return (
        f'<div class="card scale"><div class="bar"><div class="hist">{bars}</div><div class="ramp"></div>'
        f'<div class="ends"><span>0</span><span>{hottest / 2:.2f}</span><span>≥ {hottest:.2f} nats</span></div></div>'
        "<p>Each token is coloured by the entropy of the distribution it was drawn from. Half of all the entropy "
        f"below sits in <b>{num_tokens / len(entropies):.1%}</b> of the tokens. "
        "Point at a token for its numbers.</p></div>"
    )


def _sample(row: Mapping[str, Any], hottest: float) -> str:
    good = row["outcome"] == "correct"
    known = [value for value in row["entropy"] if value is not None]
    chips = [
        f'<span class="chip {"good" if good else "bad"}">{escape(str(row["outcome"]))}</span>',
        *(f'<span class="chip">{escape(text)}</span>' for text in _facts(row, known)),
    ]
    tokens = zip(row["tokens"], row["entropy"], row["logprob"], strict=True)
    text = "".join(_token(token, entropy, logprob, hottest) for token, entropy, logprob in tokens)
    return (
        f'<div class="card sample">{"".join(chips)}<p class="prompt">{escape(row["prompt"])}</p>'
        f'<div class="response">{text}</div></div>'
    )


def _facts(row: Mapping[str, Any], entropies: Sequence[float]) -> list[str]:
    reward = "NaN" if row["reward"] is None else f"{row['reward']:g}"
    facts = [f"problem {row['problem_id']}", f"reward {reward}", f"{len(row['tokens'])} tokens"]
    if entropies:
        facts.append(f"mean entropy {math.fsum(entropies) / len(entropies):.3f}")
    facts.append(f"answer {row['answer']}")
    facts += [f"found {row['extracted']}"] if row["extracted"] is not None else []
    return facts + (["cut off"] if row["truncated"] else [])


def _token(text: str, entropy: float | None, logprob: float | None, hottest: float) -> str:
    heat = "" if entropy is None else f' class="h{_heat(entropy, hottest)}"'
    numbers = f"{short(entropy)} {'-' if logprob is None else short(math.exp(logprob))}"
    shown, original = escape(text), ""
    if "\n" in text:
        shown = shown.replace("\n", '<span class="nl">↵</span>\n')
        original = f' data-s="{escape(text)}"'
    return f'<i{heat} data-t="{numbers}"{original}>{shown}</i>'


def _heat(entropy: float, hottest: float) -> int:
    return min(NUM_HEATS - 1, int(NUM_HEATS * max(entropy, 0.0) / hottest))
