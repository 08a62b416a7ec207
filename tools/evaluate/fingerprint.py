"""What responses depend on besides their problem: two evaluations with the same may share a samples file."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ext.files import sha256

from .settings import Settings

WEIGHTS = ("*.safetensors", "*.bin")
DESCRIPTIONS = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
)
SCORING = ("megatron-entropy", "math-verify")  # what says which answers are right
DECODING = ("temperature", "top_p", "max_prompt_tokens", "max_response_tokens", "seed")


@cache
def model_files(model: Path) -> dict[str, str]:
    """``name -> sha256`` of the directory's weights and of what says how they are used."""
    names = {path.name for pattern in WEIGHTS for path in model.glob(pattern)}
    names |= {name for name in DESCRIPTIONS if (model / name).is_file()}
    return {name: sha256(model / name) for name in sorted(names)}


def model_sha256(model: Path) -> str:
    """Of all of ``model_files``."""
    return hashlib.sha256(json.dumps(model_files(model)).encode()).hexdigest()


def header(
    model: Path, name: str, data_sha256: str, settings: Settings, prompt: dict[str, Any], engine: str
) -> dict[str, Any]:
    """Of a samples file."""
    return {
        "set": name,
        "data": data_sha256,
        "model": model_files(model),
        "decoding": {key: getattr(settings, key) for key in DECODING},
        "prompt": prompt,
        "engine": engine,
        "versions": {name: version(name) for name in SCORING},
    }
