"""A small finished run on disk, for the tools that read one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_ext.methods.siren import SIREN
from megatron_ext.metrics.glossary import Glossary
from megatron_ext.metrics.writer import MetricsWriter, write_config
from tools.evaluate import save_evaluation, summary

DESCRIBED = Glossary(SIREN.glossary())


def step_metrics(step: int) -> dict[str, float]:
    return {
        "reward/mean": 0.1 * step,
        "reward/outcome/correct": 0.1 * step,
        "reward/outcome/wrong": 1 - 0.1 * step,
        "reward/outcome/crashed": 0.0,
        "entropy/full": 1 / step,
        "siren/hbar": 1.0,
        "siren/anchor": 0.9,
        "grad/norm": float("nan") if step == 2 else 0.5,
        "custom/thing": 7.0,
        "time/rollout_s": 2.0 * step,
        "time/step_s": 3.0 * step,
        "speed/rollout_tokens_per_s": 100.0,
    }


def sample(**changed: Any) -> dict[str, Any]:
    record = {
        "problem_id": "p1",
        "prompt": "1+1?",
        "answer": "2",
        "extracted": "2",
        "reward": 1.0,
        "outcome": "correct",
        "truncated": False,
        "group": 0,
        "tokens": ["It", " is", "\n", "2"],
        "entropy": [0.0, 0.5, 1.0, None],
        "logprob": [0.0, -1.0, -0.5, None],
    }
    return record | changed


def write_run(folder: Path, *, steps: int = 6, config: dict[str, Any] | None = None, **changed: float) -> Path:
    """Metrics, samples and configuration; ``changed`` (``reward__mean=...``) replaces a value in the last step."""
    with MetricsWriter(folder, trackers=[], total_steps=steps, glossary=DESCRIBED) as writer:
        for step in range(1, steps + 1):
            extra = {key.replace("__", "/"): value for key, value in changed.items()} if step == steps else {}
            writer.write(step, step_metrics(step) | extra, [sample(), sample(outcome="wrong", reward=0.0)])
    default = {"name": "tiny", "method": {"name": "siren"}, "model": {"path": "x/base"}, "train": {"steps": steps}}
    write_config(folder, config if config is not None else default)
    return folder


def evaluation(counts: list[int], sha256: str = "s", text: str = "") -> dict[str, Any]:
    """Problems with ``counts`` of 4 right; of more than 2 the majority is. ``text`` is added to every text."""
    rows = [
        {
            "id": f"{i}{text}",
            "prompt": f"{i}+1?{text}",
            "answer": f"{i + 1}{text}",
            "kind": ("even", "odd")[i % 2] + text,
            "n": 4,
            "c": c,
            "majority": c > 2,
            "majority_answer": f"voted {c}{text}",
            "length": 5.0,
            "truncated": 0.0,
        }
        for i, c in enumerate(counts)
    ]
    decoding = {"samples": 4, "temperature": 1.0, "top_p": 1.0, "max_response_tokens": 32, "ks": [1, 4]}
    return {
        "data": {"path": "eval.jsonl", "sha256": sha256},
        "decoding": decoding,
        "num_problems": len(rows),
        **summary(rows, [1, 4]),
        "problems": rows,
    }


def save_evaluations(folder: Path, text: str = "", **counts: list[int]) -> None:
    for label, values in counts.items():
        save_evaluation(folder / "evaluation.json", label, evaluation(values, text=text))
