"""Entropy at pivotal words and in reflective sentences, and the entropy term's share of the advantage.

Entropy Advantage (arXiv 2506.14758): its pilot study (section 2 and Figure 2), and Figure 7, psi / A over training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.methods.base import Method, OneRank, Prepared
from megatron_ext.metrics.eval_stats import Difference, paired_bootstrap
from megatron_ext.types import Advantages, Batch, RolloutBatch, TokenStats

from ..report.data import read_config, section
from . import figures, words
from .batches import batch_of, create_method, groups
from .figures import Result
from .scored import Scored, Source, sources

MEANING = (
    "pivotal: mean entropy (nats) of tokens that begin a pivotal word against all others; reflective: mean entropy of "
    "sentences with a reflective keyword against all others; difference: with its 95 % interval, paired over problems. "
    "psi_share: mean of psi / |A| over the tokens with an advantage; at_the_bound: where psi is the most it may be. "
    "Lists of words: " + words.PLACE + "."
)
METHOD = "entropy_advantage"
FEWEST = 5  # of words or sentences, below which there is no mean


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pivotal", type=_words, default=words.PIVOTAL, help="pivotal words, with commas (those of arXiv 2506.14758)")
    add("--reflective", type=_words, default=words.REFLECTIVE, help="keywords of reflective sentences")
    add("--method-option", action="append", default=[], metavar="KEY=VALUE", help=f"of {METHOD}: alpha=0.4, kappa=2.0")


def analyze(options: argparse.Namespace, console: Console) -> Result:
    method = create_method(METHOD, options.method_option)
    found = sources(options, console, needs=method.needs)
    numbers: dict[str, dict[str, Any]] = {}
    for source in found:
        responses = source.responses
        numbers[source.label] = source.described() | {
            "pivotal": _compared(words.pivotal(responses, options.pivotal), len(responses)),
            "reflective": _compared(words.reflective(responses, options.reflective), len(responses)),
            "psi": _psi(source, method),
        }
    shown = [name for name in ("pivotal", "reflective") if any("mean" in each[name] for each in numbers.values())]
    has_psi = any("psi_share" in each["psi"] for each in numbers.values())
    if not shown and not has_psi:
        raise ConfigError(
            f"pivotal: fewer than {FEWEST} pivotal words and reflective sentences in any input, and no advantage to "
            "compare with; give other --pivotal words, or samples with right and wrong responses to a problem"
        )
    title = options.title or _title(shown)
    figure, axes = figures.panels(len(shown) + has_psi, title)
    for name, panel in zip(shown, axes, strict=False):
        _draw(panel, name, numbers)
    if has_psi:
        _draw_psi(axes[-1], numbers)
        if shown:
            axes[-1].set_title("the entropy term in the advantage")
    content = {"words": {"pivotal": options.pivotal, "reflective": options.reflective}, "models": numbers}
    return Result(title, figure, content, MEANING, _lines(numbers))


def _words(text: str) -> tuple[str, ...]:
    found = tuple(word.strip().lower() for word in text.split(",") if word.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected words with commas: because,therefore")
    return found


def _title(shown: Sequence[str]) -> str:
    what = {"pivotal": "pivotal words", "reflective": "reflective sentences"}
    return (
        "Entropy of " + " and ".join(what[name] for name in shown)
        if shown
        else "Share of the entropy term in the advantage"
    )


def _compared(split: words.Split, num_responses: int) -> dict[str, Any]:
    """Means of both sides, and their difference paired over problems."""
    base = {"count": len(split.meant), "per_response": len(split.meant) / num_responses, "words": split.words}
    if len(split.meant) < FEWEST or not split.others:
        return base | {"note": f"fewer than {FEWEST}: no mean"}
    mean, others = split.means()
    meant_by, others_by = split.by_problem()
    difference = _described(paired_bootstrap(others_by, meant_by)) if meant_by else None
    return base | {"mean": mean, "others": others, "difference": difference}


def _described(difference: Difference) -> dict[str, float]:
    return vars(difference.interval) | {"p": difference.p_value}


def _psi(source: Source, method: Method) -> dict[str, Any]:
    """psi / |A|: of a model one number, of a run one a step."""
    if source.kind == "model":
        batch, stats = batch_of(groups(source.responses), method)
        return _share(batch, stats, method) or {"note": "no problem has both right and wrong responses: every A is 0"}
    config = read_config(source.path)
    size = section(config, "rollout").get("samples")
    values = {response.reward for response in source.responses}
    if not isinstance(size, int) or len(values) != 2 or None in values:
        return {"note": "A is not known: recorded rewards have other than two values, or config.json is missing"}
    low, high = sorted(value for value in values if value is not None)
    steps, shares, total = [], [], []
    for step in sorted({response.step for response in source.responses}):
        chosen = [
            response for response in source.responses if response.step == step and response.group_reward is not None
        ]
        found = _share(*_step_batch(chosen, low, high, size), method) if chosen else None
        if found is not None:
            steps.append(step)
            shares.append(found["psi_share"])
            total.append(found)
    if not steps:
        return {"note": "no recorded response has an advantage: every group is all right or all wrong"}
    mean = {name: float(np.mean([each[name] for each in total])) for name in ("psi_share", "at_the_bound")}
    return mean | {"steps": steps, "by_step": shares}


def _step_batch(responses: Sequence[Scored], low: float, high: float, size: int) -> tuple[Batch, TokenStats]:
    """Single responses of groups of ``size`` with rewards ``low`` or ``high``: A follows from the group's mean."""
    lengths = torch.tensor([len(response.texts) for response in responses])
    sequence = torch.repeat_interleave(torch.arange(len(responses)), lengths)
    reward = torch.tensor([response.reward for response in responses], dtype=torch.float64)
    mean = torch.tensor([response.group_reward for response in responses], dtype=torch.float64)
    share = ((mean - low) / (high - low)).clamp(0, 1)
    std = (high - low) * (share * (1 - share) * size / max(1, size - 1)).sqrt()
    advantage = torch.where(std > 0, (reward - mean) / (std + 1e-6), 0.0).float()[sequence]
    entropy = torch.from_numpy(np.concatenate([response.entropy for response in responses])).float()
    logprob = torch.from_numpy(np.concatenate([response.logprob for response in responses])).float()
    rollouts = RolloutBatch(
        sequence=sequence, mask=torch.ones_like(sequence, dtype=torch.bool), old_logprob=logprob,
        rollout_logprob=logprob, ref_logprob=None, reward=reward.float(), group=torch.arange(len(responses)),
        truncated=torch.zeros(len(responses), dtype=torch.bool),
    )  # fmt: skip
    counts = {"num_sequences": len(responses), "num_tokens": len(sequence)}
    batch = rollouts.complete(Advantages(advantage), weight=torch.ones_like(advantage), **counts)
    return batch, TokenStats(logprob=logprob, entropy=entropy)


def _share(batch: Batch, stats: TokenStats, method: Any) -> dict[str, float] | None:
    """None where no token has an advantage."""
    prepared: Prepared = method.prepare(batch, stats, OneRank())
    known = batch.mask & (batch.advantage != 0)
    if not known.any():
        return None
    added = (method.advantage(batch, stats, prepared) - batch.advantage)[known]
    size = batch.advantage[known].abs()
    return {
        "psi_share": float((added / size).double().mean()),
        "at_the_bound": float((added >= size / method.kappa * (1 - 1e-5)).double().mean()),
    }


def _draw(axes: Axes, name: str, numbers: dict[str, dict[str, Any]]) -> None:
    known = {label: each[name] for label, each in numbers.items() if "mean" in each[name]}
    meant, others = {"pivotal": ("pivotal words", "other tokens"), "reflective": ("reflective", "other sentences")}[
        name
    ]
    places = np.arange(len(known))
    axes.bar(places - 0.2, [each["mean"] for each in known.values()], 0.37, color=figures.color(1), label=meant)
    axes.bar(places + 0.2, [each["others"] for each in known.values()], 0.37, color="#b9bdc6", label=others)
    for place, each in zip(places, known.values(), strict=True):
        figures.count_above(axes, each["count"], place - 0.2, each["mean"])
    axes.set_xticks(places, list(known))
    axes.set_xlim(-0.7, len(known) - 0.3)
    axes.set(ylabel="mean entropy (nats)", title=f"{meant} against {others}")
    axes.margins(y=0.16)
    axes.legend(loc="upper right")


def _draw_psi(axes: Axes, numbers: dict[str, dict[str, Any]]) -> None:
    bars = {label: each["psi"]["psi_share"] for label, each in numbers.items() if "psi_share" in each["psi"]}
    curves = {label: each["psi"] for label, each in numbers.items() if "steps" in each["psi"]}
    axes.set(ylabel="psi / |A|, mean over tokens")
    figures.percent_axis(axes.yaxis)
    if curves:
        for number, (label, each) in enumerate(numbers.items()):
            if label in curves:
                steps, values = each["psi"]["steps"], each["psi"]["by_step"]
                axes.plot(steps, values, color=figures.color(number), lw=0.8, alpha=0.35)
                axes.plot(steps, figures.smoothed(values), color=figures.color(number), label=label)
            elif label in bars:
                axes.axhline(bars[label], color=figures.color(number), ls=(0, (4, 3)), lw=1.2, label=label)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        if len(numbers) > 1:
            axes.legend(loc="upper right")
        return
    axes.bar(range(len(bars)), list(bars.values()), 0.5, color=figures.color(0))
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_xlim(-0.7, len(bars) - 0.3)


def _lines(numbers: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for label, each in numbers.items():
        for name in ("pivotal", "reflective"):
            part = each[name]
            means = f", {part['mean']:.3f} nats against {part['others']:.3f}" if "mean" in part else ""
            lines.append(f"{label}: {name} {part['count']} ({part['per_response']:.2f} a response){means}")
        psi = each["psi"]
        lines.append(
            f"{label}: psi / |A| {100 * psi['psi_share']:.1f} %" if "psi_share" in psi else f"{label}: {psi['note']}"
        )
    return lines
