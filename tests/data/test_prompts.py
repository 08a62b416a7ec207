"""A recipe's ``[prompt]`` as the model reads it, against what transformers makes of the same turns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_ext.checkpoint.manifest import differing_keys
from megatron_ext.config.aliases import with_new_names
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config, with_defaults, with_template_text
from megatron_ext.config.schema import Config, PromptConfig
from megatron_ext.data.dataset import load_problems
from megatron_ext.data.prompts import chat_template, encode_prompts, render_prompts
from megatron_ext.records import Problem
from megatron_ext.rollout.rewards.reward_pool import RewardPool

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROBLEMS = [Problem("first", "2+2?", "4"), Problem("second", "3+3?", "6")]
PROMPT = PromptConfig(system="Be brief.", prefix="Solve: ", suffix="\nBox it.")


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(RECIPES / "tiny" / "base")


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("own", [False, True], ids=["the tokenizer's template", "the recipe's template"])
def test_turns_are_those_that_transformers_renders(own: bool, system: str, tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "chatml.jinja"
    file.write_text(CHATML)
    prompt = PROMPT.model_copy(update={"system": system, "template": str(file) if own else ""})
    found = dict(encode_prompts(tokenizer, PROBLEMS, prompt)) if own or not system else {}
    if not own and system:
        with pytest.raises(ConfigError, match="problem first: .*knows the roles user and assistant, found system"):
            render_prompts(tokenizer, PROBLEMS, prompt)
        return
    tokenizer.chat_template = CHATML if own else tokenizer.chat_template
    for problem, question in zip(PROBLEMS, ("Solve: 2+2?\nBox it.", "Solve: 3+3?\nBox it."), strict=True):
        turns = [{"role": "user", "content": question}]
        turns = [{"role": "system", "content": system}, *turns] if system else turns
        expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert list(found[problem]) == expected and len(expected) > len(question) // 2


def test_a_base_model_reads_plain_text(tokenizer) -> None:
    tokenizer.chat_template = None
    assert chat_template(tokenizer) is None
    assert render_prompts(tokenizer, PROBLEMS, PROMPT)[0] == "Be brief.\n\nSolve: 2+2?\nBox it."
    assert render_prompts(tokenizer, PROBLEMS)[1] == "3+3?"
    [(_, ids), _] = encode_prompts(tokenizer, PROBLEMS, PROMPT)
    assert list(ids) == tokenizer.encode("Be brief.\n\nSolve: 2+2?\nBox it.")
    with_template = PROMPT.model_copy(update={"template": CHATML})
    assert render_prompts(tokenizer, PROBLEMS, with_template)[0] == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSolve: 2+2?\nBox it.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("opening", "thought"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)])
def test_a_template_that_opens_the_reasoning_is_noticed(opening: str, thought: bool, tokenizer) -> None:
    tokenizer.chat_template = CHATML.replace("assistant\n{%", f"assistant\n{opening}{{%")
    told = PromptConfig(suffix=" Reason within <think> </think>.")
    assert [problem.in_thought for problem, _ in encode_prompts(tokenizer, PROBLEMS, told)] == [thought] * 2


def test_a_template_that_leaves_the_system_turn_out_is_refused(tokenizer) -> None:
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    prompt = PROMPT.model_copy(update={"template": silent})
    with pytest.raises(ConfigError, match="prompt.template: .*problem first: .*it leaves out the system turn"):
        render_prompts(tokenizer, PROBLEMS, prompt)
    assert render_prompts(tokenizer, PROBLEMS, prompt.model_copy(update={"system": ""}))[0] == "Solve: 2+2?\nBox it."


def recipe(folder: Path, content: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(f'parent = "recipes/tiny/tiny-cpu.toml"\n{content}')
    return path


def test_a_recipe_finds_its_template_beside_itself_and_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(CHATML)
    config = read_config(recipe(tmp_path, '[prompt]\ntemplate = "mine.jinja"\nsystem = "Be brief."'))
    assert config.prompt == PromptConfig(system="Be brief.", template=CHATML)
    (tmp_path / "mine.jinja").unlink()
    assert with_template_text(config.prompt) is config.prompt  # nothing is read again
    saved = config.model_dump()
    assert not differing_keys(with_defaults(saved), config.model_dump())
    other = read_config(recipe(tmp_path, '[prompt]\nsystem = "Be brief."'), [f"prompt.template={CHATML[:-1]!r}"])
    assert list(differing_keys(with_defaults(saved), other.model_dump())) == ["prompt.template"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: None, "prompt.template: no such file: absent.jinja; give a Jinja file"),
        (lambda path: path.mkdir(), "prompt.template: .*absent.jinja cannot be read"),
        (lambda path: path.write_bytes(b"{{ \xff }}"), "cannot be read: .*; expected Jinja in UTF-8"),
        (lambda path: path.write_text("chatml"), "is no chat template"),
    ],
)
def test_a_template_that_cannot_be_read(spoil, message: str, tmp_path: Path) -> None:
    spoil(tmp_path / "absent.jinja")
    with pytest.raises(ConfigError, match=message):
        read_config(recipe(tmp_path, '[prompt]\ntemplate = "absent.jinja"'))


def test_the_key_of_before_is_named_and_read_from_old_checkpoints() -> None:
    with pytest.raises(ConfigError, match="data.prompt_suffix: unknown key; here it is prompt.suffix"):
        read_config(RECIPES / "tiny" / "tiny-cpu.toml", ["data.prompt_suffix=x"])
    old = Config().model_dump()
    del old["prompt"]
    old["data"]["prompt_suffix"] = " Box it."
    assert with_new_names(old)["data"] == Config().model_dump()["data"]
    assert with_defaults(old) == Config(prompt=PromptConfig(suffix=" Box it.")).model_dump()
    assert "prompt" not in old and old["data"]["prompt_suffix"] == " Box it."


def test_llamas_turns_without_its_dates() -> None:
    """The format that Meta documents for Llama 3.1, written out by hand."""
    config = read_config(RECIPES / "siren" / "siren-llama-3.1-8b-1n8g.toml")
    tokenizer = AutoTokenizer.from_pretrained(RECIPES / "tiny" / "base")
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    assert render_prompts(tokenizer, PROBLEMS[:1], config.prompt) == [
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ]


def test_dapos_prompt_is_that_of_its_rows() -> None:
    prompt = read_config(RECIPES / "entropy_advantage" / "entropy_advantage-qwen2.5-7b-4n8g.toml").prompt
    assert prompt.prefix + "2+2?" + prompt.suffix == (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.\n\n2+2?\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    )
    assert (prompt.answer_format, prompt.system, prompt.template) == ("answer_line", "", "")


def test_the_documented_rows_are_problems(tmp_path: Path) -> None:
    [block] = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.DOTALL)
    (tmp_path / "rows.jsonl").write_text(block)
    with RewardPool(1, deadline_s=20) as pool:
        problems, _ = load_problems(tmp_path / "rows.jsonl", score=pool.score, strict=True)
        said = {"math": "0.5", "countdown": "(1+2)*3", "choice": "B. five"}
        rewards = pool.score([(problem, rf"\boxed{{{said[problem.verifier]}}}") for problem in problems])
    assert [problem.verifier for problem in problems] == list(said)
    assert [reward.outcome for reward in rewards] == ["correct"] * 3
