"""The README.md of an exported model: where its weights come from, under which licence, how they were trained.

Its front matter is what the Hugging Face Hub reads: ``base_model`` where the recipe names it (model.hub), ``license``
where the base model's directory tells it: in its own card or by a licence file, which goes along. ``prompt`` is the
recipe's (megatron_ext/data/prompts.py reads it back), with the file that holds its chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id
from yaml import YAMLError

from megatron_ext.checkpoint.manifest import Manifest
from megatron_ext.config.loading import with_defaults
from megatron_ext.config.redact import redact
from megatron_ext.model.export import CHAT_TEMPLATE, LICENSES

CARD = "README.md"
UNKNOWN = "unknown: the base model's directory does not tell it; ask its publisher before passing these weights on"


def model_card(checkpoint: Path, found: Manifest, *, source: Path) -> str:
    """The card of a checkpoint's export; ``source`` is the directory of the model that the run started from."""
    config: dict[str, Any] = redact(found.config)
    base = config["model"].get("hub") or config["model"]["path"]
    terms, licence = license_of(source)
    front = ModelCardData(
        base_model=_hub_id(config["model"].get("hub", "")), library_name="transformers", pipeline_tag="text-generation"
    )
    prompt = with_defaults(config)["prompt"]
    prompt["template"] = CHAT_TEMPLATE if prompt["template"] else ""
    for key, value in terms.items():
        front[key] = value
    if found.step or any(prompt[key] for key in ("system", "prefix", "suffix", "template")):  # a base model has none
        front["prompt"] = prompt
    weights = config["model"].get("weights", "")
    start = f"`{weights}`, a checkpoint that began from `{base}`" if weights else f"`{base}`"
    if found.step == 0:
        return f"---\n{front.to_yaml()}\n---\n\n# {Path(base).name}\n\nThe weights of {start}, not trained further.\n"
    front.tags = ["reinforcement-learning", str(config["method"]["name"])]
    datasets = _hub_id(config["data"].get("hub", ""))
    front.datasets = [datasets] if datasets else None
    rollout = config["rollout"]
    lines = [
        f"---\n{front.to_yaml()}\n---",
        "",
        f"# {config['name']}",
        "",
        f"Exported from {checkpoint.name} of run `{config['name']}`: {start} after {found.step} steps of "
        "reinforcement learning with verifiable rewards.",
        "",
        f"- base model: `{base}`{'' if front.base_model else ' (no id on the Hugging Face Hub is known: model.hub)'}",
        f"- licence: {licence}",
        f"- method: `{json.dumps(config['method'])}`",
        f"- data: `{config['data']['train']}`",
        f"- rollouts: {rollout['prompts']} prompts x {rollout['samples']} responses a step, temperature "
        f"{rollout['temperature']}, at most {rollout['max_response_tokens']} tokens",
        f"- prompt: `{json.dumps(prompt)}`",
        f"- learning rate: {config['optimizer']['lr']}",
        f"- trained with: {', '.join(f'{name} {value}' for name, value in found.versions.items())}",
        *_evaluation(checkpoint.parent.parent / "evaluation.json"),
        *("", "## Recipe", "", "```json", json.dumps(config, indent=1), "```", ""),
    ]
    return "\n".join(lines)


def license_of(source: Path) -> tuple[dict[str, str], str]:
    """The Hub's keys for the licence of a model directory, and the same in words."""
    stated, fault = _front_matter(source / CARD)
    named = {
        key: stated[key] for key in ("license", "license_name", "license_link") if isinstance(stated.get(key), str)
    }
    files = [name for name in LICENSES if (source / name).is_file()]
    if "license" in named:
        name = named.get("license_name", named["license"])
        return named, f"{name}, as the base model's card says" + (f"; its text is {files[0]}" if files else "")
    if files:
        other = {"license": "other", "license_name": "base-model", "license_link": files[0]}
        return other, f"that of the base model, whose text is {files[0]}{fault}"
    return {"license": "unknown"}, f"{UNKNOWN}{fault}"


def _front_matter(card: Path) -> tuple[Mapping[str, Any], str]:
    """Metadata of a card, and what to say where it cannot be read."""
    try:
        return (metadata_load(card) if card.is_file() else None) or {}, ""
    except (ValueError, YAMLError):
        return {}, f" ({card.name} there has metadata that cannot be read)"


def _hub_id(text: str) -> str | None:
    """``text`` where it is an id on the Hugging Face Hub, None where it is a sentence or nothing."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return None
    return text if "/" in text else None


def _evaluation(file: Path) -> list[str]:
    """A table of what tools.evaluate wrote into the run's folder; nothing where there is no such file."""
    if not file.is_file():
        return []
    from .evaluate import load_evaluations

    found = load_evaluations(file)
    names = list(dict.fromkeys(name for each in found.values() for name in each["metrics"]))
    lines = ["", "## Evaluation", "", f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    for name in names:
        values = [each["metrics"].get(name) for each in found.values()]
        lines.append(f"| {name} | {' | '.join(_interval(value) for value in values)} |")
    return lines


def _interval(value: dict[str, float] | None) -> str:
    return "" if value is None else f"{value['mean']:.1%} ({value['low']:.1%} .. {value['high']:.1%})"
