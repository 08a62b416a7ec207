"""What engines read from a Hugging Face model directory besides weights: its tokenizer, and what ends a response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_tokenizer(model_path: str | Path) -> Any:
    """The directory's tokenizer. Raises ValueError where there is none: transformers would make an empty one."""
    if not any((Path(model_path) / name).is_file() for name in VOCABULARIES):
        raise ValueError(
            f"{model_path} holds no tokenizer, expected tokenizer.json or one of {', '.join(VOCABULARIES[1:])}; copy "
            "the tokenizer files of the model it was made from"
        )
    return AutoTokenizer.from_pretrained(model_path)


def eos_ids(model_path: str | Path) -> list[int]:
    """The tokens that end a response. Raises ValueError when the model directory names none."""
    try:
        eos = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:
        eos = None
    eos = AutoConfig.from_pretrained(model_path).eos_token_id if eos is None else eos
    if eos is None:
        raise ValueError(f"{model_path}: generation_config.json and config.json name no eos_token_id; add one")
    return [eos] if isinstance(eos, int) else list(eos)
