"""Which prompt a model is evaluated on: its own, where it has one.

In this order: the model card of an export, a recipe, the suite. Options of the command line replace single parts of
it, and what they change is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.loading import read_config, with_template_text
from megatron_ext.config.schema import PromptConfig

FLAGS = {name: f"--{name.replace('_', '-')}" for name in PromptConfig.model_fields}
NONE = "none: the problem as it is"


@dataclass(frozen=True)
class ChosenPrompt:
    """``prompt`` holds its template as text. ``source``: where it is from, in words. ``notes``: what to tell the user
    of the choice."""

    prompt: PromptConfig
    source: str
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """For the result: the prompt's parts, the template as its text, and where they are from."""
        return {**self.prompt.model_dump(), "from": self.source}

    def chat_template_sha256(self, tokenizer: Any) -> str | None:
        """Of the text of the template that is used; None where there is none."""
        from megatron_ext.data.prompts import chat_template

        template = chat_template(tokenizer, self.prompt)
        return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def choose_prompt(
    model: Path,
    *,
    recipe: str | None = None,
    suite: tuple[str, PromptConfig | None] = ("", None),
    given: Mapping[str, str] | None = None,
) -> ChosenPrompt:
    """The prompt for the directory ``model``. ``suite``: its name and prompt. ``given``: parts by option.

    Raises ConfigError for a recipe, a template or a card that cannot be read.
    """
    from megatron_ext.data.prompts import read_prompt

    own = read_prompt(model)
    others = [] if recipe is None else [(f"recipe {recipe}", read_config(recipe).prompt)]
    others += [] if suite[1] is None else [(f"suite {suite[0]}", with_template_text(suite[1]))]
    found = [*([] if own is None else [("the model's card", own)]), *others, (NONE, PromptConfig())]
    source, prompt = found[0]
    notes = [
        f"{model}: asked on the prompt of {source}; that of {name} differs in {', '.join(differing)}"
        for name, other in others
        if own is not None and (differing := _differing(prompt, other))
    ]
    changed = with_template_text(PromptConfig.model_validate(prompt.model_dump() | dict(given or {})))
    if differing := _differing(prompt, changed):
        if source != NONE:
            parts = "; ".join(f"{FLAGS[n]} {getattr(changed, n)!r}, not {getattr(prompt, n)!r}" for n in differing)
            notes.append(f"{model}: the prompt is not that of {source}: {parts}")
        source = f"{source}, changed by {', '.join(FLAGS[name] for name in differing)}"
    return ChosenPrompt(changed, source, tuple(notes))


def _differing(a: PromptConfig, b: PromptConfig) -> list[str]:
    one, two = a.model_dump(), b.model_dump()
    return [name for name in one if one[name] != two[name]]
