"""The prompt of a run goes with its export: trained, exported by the command, read back, and rendered the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_ext.checkpoint import manifest
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import PromptConfig
from megatron_ext.data.prompts import encode_prompts, read_prompt
from megatron_ext.records import Problem
from megatron_ext.train.resume import check_resume
from tests.train import whole_run
from tools.convert import main

TEMPLATE = (
    "{% for m in messages %}<user>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPT = PromptConfig(system="be brief", prefix="solve ", suffix='\n"box" it: {x}', answer_format="boxed")
BASE = whole_run.RECIPES / "tiny" / "base"


def test_an_exported_model_carries_the_prompt_it_was_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(TEMPLATE)
    overrides = ['prompt.system="be brief"', 'prompt.prefix="solve "', 'prompt.suffix="\\n\\"box\\" it: {x}"']
    options = [*overrides, f"prompt.template={file}", "data.max_prompt_tokens=96", "train.steps=1"]
    assert whole_run.train(tmp_path, "grpo/grpo-tiny-cpu.toml", *options) == 0
    file.unlink()  # what the run was told is in its checkpoint
    assert main(["to-hf", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    trained = PROMPT.model_copy(update={"template": TEMPLATE})
    assert read_prompt(tmp_path / "hf") == trained
    exported, original = AutoTokenizer.from_pretrained(tmp_path / "hf"), AutoTokenizer.from_pretrained(BASE)
    problem = Problem("0", "9 5 1 > 44?", "44")
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": 'solve 9 5 1 > 44?\n"box" it: {x}'},
    ]
    expected = exported.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    for tokenizer, prompt in ((original, trained), (exported, PROMPT), (exported, read_prompt(tmp_path / "hf"))):
        [(_, ids)] = encode_prompts(tokenizer, [problem], prompt or PromptConfig())
        assert list(ids) == expected
    found = manifest.verify(next((tmp_path / "run" / "checkpoints").glob("step_*"))).config
    with pytest.raises(ConfigError, match=r"prompt.template: checkpoint '{% for m"):
        check_resume(found, found | {"prompt": PromptConfig(system="be brief").model_dump()})


def test_a_model_without_a_prompt_in_its_card(tmp_path: Path) -> None:
    assert read_prompt(tmp_path) is None
    for card in ("# nothing", "---\nlicense: mit\n---\n", "---\nlicense: [\n---\n"):
        (tmp_path / "README.md").write_text(card)
        assert read_prompt(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nprompt:\n  system: brief\n---\n")
    assert read_prompt(tmp_path) == PromptConfig(system="brief")
    for prompt, message in (
        ("  sistem: brief", "sistem: Extra inputs are not permitted"),
        ("  answer_format: last", "answer_format: Input should be"),
        ("  template: chat_template.jinja", "no such file: .*chat_template.jinja"),
    ):
        (tmp_path / "README.md").write_text(f"---\nprompt:\n{prompt}\n---\n")
        with pytest.raises(ConfigError, match=message):
            read_prompt(tmp_path)
