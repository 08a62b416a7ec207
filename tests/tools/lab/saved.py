"""A finished run of the lab on disk."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_ext.metrics.writer import MetricsWriter
from tests.tools.runs import evaluation, sample
from tools.evaluate import save_evaluation
from tools.lab.plan import LABEL

STEPS = 9


def save_run(
    folder: Path,
    name: str,
    *,
    entropy: list[float],
    right: int = 2,
    reward: float = 0.3,
    curves: dict[str, list[float]] | None = None,
    **metrics: float,
) -> None:
    """A finished run whose other metrics are the same in every step; ``aer__target`` is ``aer/target``. ``right`` of
    four responses to the first of two held-out problems are right, and all to the second; ``reward`` is the share of
    right answers in training."""
    with MetricsWriter(folder / name, trackers=[], total_steps=STEPS) as writer:
        for step, nats in enumerate(entropy, 1):
            shares = {
                "reward/mean": reward,
                "reward/outcome/correct": reward,
                "response/length": 9.0,
                "time/step_s": 2.0,
            }
            own = {key.replace("__", "/"): value for key, value in metrics.items()}
            own |= {key: values[step - 1] for key, values in (curves or {}).items()}
            record = sample(entropy=[0.9, 0.1, 0.0, None], logprob=[-1.0, math.log(0.9), -0.001, None])
            writer.write(step, {"entropy/full": nats, **shares, **own}, [record])
    counts = evaluation([right, 4])
    counts["response"] = {"length": {"mean": 5.0}}
    save_evaluation(folder / name / "evaluation.json", LABEL, counts)
