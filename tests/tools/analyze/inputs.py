"""Samples of the tiny base model's problems, written by hand, and the analyses run as a user does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_ext.metrics.writer import MetricsWriter, write_config
from tests.tools import runs
from tools.analyze.__main__ import main

BASE = Path("recipes/tiny/base")
DATA = Path("recipes/tiny/data/eval.jsonl")
TEXTS = (r"\boxed{5}", r"\boxed{2*6-7}", r"\boxed{12-7}", r"\boxed{5+0+(1-1)*3}")


def row(number: int, sample: int, text: str, correct: bool | None, **changed: Any) -> dict[str, Any]:
    found = {"set": "eval", "id": f"tiny-eval-{number}", "sample": sample, "text": text, "correct": correct}
    return found | changed


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def write_samples(path: Path, problems: int = 4) -> Path:
    """Four responses to each problem, with ids, the first ``number % 4`` of them right."""
    from megatron_ext.rollout.model_files import load_tokenizer

    tokenizer = load_tokenizer(BASE)
    eos = tokenizer.convert_tokens_to_ids("<eos>")
    rows = []
    for number in range(problems):
        for sample, text in enumerate(TEXTS):
            ids = [*tokenizer.encode(text, add_special_tokens=False), eos]
            rows.append(row(number, sample, text, sample < number % 4, response_ids=ids, length=len(ids)))
    return write_lines(path, rows)


def write_counts(path: Path, counts: dict[str, tuple[int, int]], set_name: str = "eval") -> Path:
    """``id -> (n, c)``: a samples file with so many responses, so many of them right."""
    rows = [
        {"set": set_name, "id": name, "sample": number, "text": "", "correct": number < c}
        for name, (n, c) in counts.items()
        for number in range(n)
    ]
    return write_lines(path, rows)


def record(tokens: list[str], entropy: list[float], **changed: Any) -> dict[str, Any]:
    return runs.sample(tokens=tokens, entropy=entropy, logprob=[-1.0] * len(tokens), **changed)


def write_recorded(folder: Path, steps: list[tuple[dict[str, float], list[dict[str, Any]]]], samples: int = 4) -> Path:
    with MetricsWriter(folder, trackers=[], total_steps=len(steps), glossary=runs.DESCRIBED) as writer:
        for number, (metrics, records) in enumerate(steps, 1):
            writer.write(number, metrics, records)
    write_config(folder, {"name": "r", "rollout": {"samples": samples}})
    return folder


def analyze(out: Path, name: str, *arguments: Any) -> dict[str, Any]:
    """The numbers that an analysis writes; its figure is a picture of a sane size with something on it."""
    assert main([name, *map(str, arguments), "--out", str(out)]) == 0
    with Image.open(out / f"{name}.png") as picture:
        assert picture.format == "PNG"
        assert 600 <= picture.width <= 3000 and 500 <= picture.height <= 3000
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24) or ()) > 10
    found = json.loads((out / f"{name}.json").read_text())
    assert found["analysis"] == name and found["title"] and found["meaning"]
    assert found["title"] in (out / "index.html").read_text().replace("&gt;", ">")
    return found
