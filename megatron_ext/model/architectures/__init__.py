"""Model families: a file each, and the registry that finds the one of a ``config.json``.

To add one, write its file and its line in ``FAMILIES`` (docs/adding-a-model.md). No torch here.
"""

from __future__ import annotations

from typing import Any

from megatron_ext.config.errors import ConfigError
from megatron_ext.model.architectures.base import Architecture, Experts, Family, Llama3Rope, read
from megatron_ext.model.architectures.llama import LLAMA
from megatron_ext.model.architectures.qwen2 import QWEN2
from megatron_ext.model.architectures.qwen3 import QWEN3
from megatron_ext.model.architectures.qwen3_moe import QWEN3_MOE
from megatron_ext.plugins import load

__all__ = ["FAMILIES", "Architecture", "Experts", "Family", "Llama3Rope", "find_family", "read_architecture"]

FAMILIES = {  # by config.json's model_type
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "llama": LLAMA,
}


def find_family(name: str) -> Family | None:
    """The family of the user's own that ``model.family`` names; None where it is empty. Raises ConfigError."""
    if not name:
        return None
    try:
        family = load(name, key="model.family")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(family, Family):
        raise ConfigError(
            f"model.family: {name} is {family!r}, expected a megatron_ext.model.architectures.base.Family; see "
            "docs/adding-a-model.md"
        )
    return family


def read_architecture(hf: dict[str, Any], family: Family | None = None) -> Architecture:
    """The architecture that ``config.json`` describes, read by ``family`` or by the one in ``FAMILIES``.

    Raises ConfigError for a model of another family, and for what its family does not support.
    """
    model_type, classes = hf.get("model_type"), hf.get("architectures") or ["none"]
    name = classes[0] if isinstance(classes, list) else classes
    if family is None and isinstance(model_type, str):
        family = FAMILIES.get(model_type)
    if family is None or family.name != name:
        known = ", ".join(f"{each.name} ({kind})" for kind, each in FAMILIES.items()) if family is None else family.name
        raise ConfigError(
            f"config.json: architecture {name} of model_type {model_type} is not supported; expected one of {known}"
        )
    try:
        return read(hf, family)
    except ValueError as error:
        raise ConfigError(str(error)) from None
