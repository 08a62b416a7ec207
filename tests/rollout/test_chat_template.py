"""Prompts in chat templates: what transformers makes of them, and templates that take all there is."""

from __future__ import annotations

import resource
import subprocess
import time
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megatron_ext.rollout import chat_template
from megatron_ext.rollout.chat_template import TemplateError, render

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
PROMPTS = ["What is 2+2?", 'ünïcode "quotes"\nand <|im_end|> 数学', "", "{{ 1 }}"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True)
def in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the product starts it, and not in a fork as for all other tests."""
    monkeypatch.setattr(chat_template, "subprocess", subprocess)


@pytest.fixture
def tokenizer():
    found = AutoTokenizer.from_pretrained(BASE)
    found.add_special_tokens({"bos_token": "<|im_start|>"})
    return found


@pytest.mark.parametrize("template", [None, CHATML])
def test_prompts_are_rendered_as_transformers_does(template: str | None, tokenizer) -> None:
    if template is not None:
        tokenizer.chat_template = template
    expected = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False)
        for p in PROMPTS
    ]
    found = render(tokenizer, PROMPTS)
    assert found == expected and len(set(found)) == len(PROMPTS)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.encode(found[0], add_special_tokens=False) == ids


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        ("{{ 'x' * 10**10 }}", 0, "MemoryError"),
        ("{{ '%10000000000d' % 1 }}", 0, "MemoryError"),
        ("{{ 'x' | center(10**10) }}", 0, "MemoryError"),
        ("{{ 'x' * 10**5 }}", 0, "a prompt of 4 characters becomes 100000, expected at most 32784"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", 0, "s of computing"),
        ("{{ 10**(10**9) }}", 0, "s of computing"),
        ("{% for %}", 0, "TemplateSyntaxError"),
        ("{% if messages[0].content == 'last' %}{{ raise_exception('no') }}{% endif %}", 2, "TemplateError: no"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", 0, "SecurityError"),
        ("{% include '/etc/passwd' %}", 0, "Error"),
    ],
)
def test_a_template_that_takes_too_much(
    template: str, prompt: int, message: str, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "CPU_S", 3.0)  # the start takes 1
    monkeypatch.setattr(chat_template, "WALL", 200.0)
    tokenizer.chat_template = template
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.process_time()
    with pytest.raises(TemplateError, match=message) as caught:
        render(tokenizer, ["What", "is", "last"])
    assert caught.value.prompt == prompt and len(str(caught.value)) < 1500
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_maxrss < 2.5e6 or after.ru_maxrss == before.ru_maxrss  # kB, of the largest of all children so far
    assert after.ru_utime - before.ru_utime < 6 and time.process_time() - start < 2


def test_no_secret_reaches_it(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its environment is that of the reward workers."""
    seen: list[dict[str, str]] = []
    real = chat_template.subprocess.run

    def run(*args, env, **named):
        seen.append(env)
        return real(*args, env=env, **named)

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(chat_template.subprocess, "run", run)
    render(tokenizer, ["p"])
    assert len(seen) == 1 and "HF_TOKEN" not in seen[0] and "PATH" in seen[0]
