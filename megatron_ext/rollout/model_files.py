"""What engines read from a Hugging Face model directory besides weights: its tokenizer, and what ends a response.

A model directory is data: code that it brings never runs. transformers would ask on standard input whether to run it,
and ``yes |`` would answer. Every ``from_pretrained`` says ``trust_remote_code=False``, after ``refuse_code``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
DESCRIPTIONS = ("config.json", "tokenizer_config.json", "generation_config.json")


def refuse_code(model_path: str | Path) -> None:
    """Raise ValueError when the model directory asks for code of its own, which its ``auto_map`` names."""
    folder = Path(model_path)
    for file in (folder / name for name in DESCRIPTIONS if (folder / name).is_file()):
        described = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(described, dict) and described.get("auto_map"):
            raise ValueError(
                f"{model_path} brings code of its own: auto_map in {file.name} is {described['auto_map']}; expected "
                "none, for code of a model never runs here. If transformers knows the architecture without it, remove "
                "auto_map and the .py files; otherwise use a model whose architecture it knows"
            )


def load_config(model_path: str | Path) -> Any:
    """The directory's configuration as transformers reads it. Raises ValueError where it would take code to."""
    refuse_code(model_path)
    return AutoConfig.from_pretrained(model_path, trust_remote_code=False)


def load_tokenizer(model_path: str | Path) -> Any:
    """The directory's tokenizer. Raises ValueError where there is none, for which transformers would make an empty one,
    and where it would take code."""
    refuse_code(model_path)
    if not any((Path(model_path) / name).is_file() for name in VOCABULARIES):
        raise ValueError(
            f"{model_path} holds no tokenizer, expected tokenizer.json or one of {', '.join(VOCABULARIES[1:])}; copy "
            "the tokenizer files of the model it was made from"
        )
    return AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)


def eos_ids(model_path: str | Path) -> list[int]:
    """The tokens that end a response. Raises ValueError when the model directory names none."""
    try:
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:
        eos = None
    eos = load_config(model_path).eos_token_id if eos is None else eos
    if eos is None:
        raise ValueError(f"{model_path}: generation_config.json and config.json name no eos_token_id; add one")
    return [eos] if isinstance(eos, int) else list(eos)
