"""What a model reads of a problem: the one place where a recipe's ``[prompt]`` becomes token ids.

The user's turn is ``prefix + problem + suffix``, after a turn of ``system`` where there is one, in ``template`` or the
tokenizer's own chat template. A model with neither reads ``system``, an empty line and the user's turn as plain text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import with_template_text
from megatron_ext.config.schema import PromptConfig
from megatron_ext.records import Problem
from megatron_ext.rollout.chat_template import TemplateError, render

NO_PROMPT = PromptConfig()
CARD = "README.md"


def read_prompt(model: str | Path) -> PromptConfig | None:
    """The prompt that the model directory ``model`` was trained on, as its card says; None where it says nothing.

    Raises ``ConfigError`` for a prompt that cannot be read.
    """
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    card = Path(model) / CARD
    try:
        found = (metadata_load(card) if card.is_file() else None) or {}
    except (ValueError, YAMLError):  # another publisher's
        return None
    if found.get("prompt") is None:
        return None
    try:
        prompt = PromptConfig.model_validate(found["prompt"])
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ConfigError(f"model.path: the prompt in {card} cannot be read: {faults}; correct or remove it") from None
    if not prompt.template:
        return prompt
    return with_template_text(prompt.model_copy(update={"template": str(Path(model) / Path(prompt.template).name)}))


def chat_template(tokenizer: Any, prompt: PromptConfig = NO_PROMPT) -> str | None:
    """The text of the chat template that prompts are rendered in, None where there is none."""
    template = with_template_text(prompt).template
    return template or (tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None)


def render_prompts(tokenizer: Any, problems: Sequence[Problem], prompt: PromptConfig = NO_PROMPT) -> list[str]:
    """The text that the model reads of each problem, up to the opening of its answer.

    Raises ``ConfigError`` where the template cannot be read, or does not take one of them.
    """
    turns = [prompt.prefix + problem.prompt + prompt.suffix for problem in problems]
    template = chat_template(tokenizer, prompt)
    if template is None:
        return [f"{prompt.system}\n\n{turn}" if prompt.system else turn for turn in turns]
    try:
        return render(tokenizer, turns, system=prompt.system, template=template)
    except TemplateError as error:
        name = f"problem {problems[error.prompt].problem_id}"
        fault = (
            f"prompt.template: the chat template cannot be applied to {name}: {error}; correct the file"
            if prompt.template
            else f"model.path: the model's chat template cannot be applied to {name}: {error}; take the model's own "
            "tokenizer files, or name another in prompt.template"
        )
        raise ConfigError(fault) from error


def encode_prompts(
    tokenizer: Any, problems: Sequence[Problem], prompt: PromptConfig = NO_PROMPT
) -> Iterator[tuple[Problem, tuple[int, ...]]]:
    """The problems, now with ``in_thought``, and the token ids of their prompts. Raises ``ConfigError`` as
    ``render_prompts`` does.

    Plain text gets the special tokens that the tokenizer adds, a chat template writes its own.
    """
    plain = chat_template(tokenizer, prompt) is None
    for problem, text in zip(problems, render_prompts(tokenizer, problems, prompt), strict=True):
        in_thought = text.rstrip().endswith("<think>")
        yield replace(problem, in_thought=in_thought), tuple(tokenizer.encode(text, add_special_tokens=plain))
