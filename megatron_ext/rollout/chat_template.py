"""Prompts in a model's chat template, which is a program of the model directory: it is rendered within bounds.

Jinja's sandbox keeps a template from files and modules, not from loops without end or from ``"x" * 10**10``. So a
process of its own renders, with a limit on its memory, under a deadline, and no secrets in its environment; a prompt
that comes out far longer than it went in is refused. It is started by ``exec``: a trainer must not be forked.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from megatron_ext.rollout.rewards.worker_pool import inherited

MAX_BYTES = 2**30  # of memory, besides what Python and transformers take
CPU_S, PER_PROMPT_S = 30.0, 0.01  # of computing, the start included; a usual template takes .0001 s
WALL = 10.0  # times as long by the clock, on a busy machine
SPARE_CHARACTERS, GROWTH = 2**15, 4  # a rendered prompt has at most 2^15 characters and four times its own


class TemplateError(ValueError):
    """A chat template cannot be applied. ``prompt`` is the number of the prompt where it failed."""

    def __init__(self, prompt: int, message: str) -> None:
        super().__init__(message)
        self.prompt = prompt


def render(tokenizer: Any, prompts: Sequence[str], *, system: str = "", template: str = "") -> list[str]:
    """Each prompt as the turn of a user, and the opening of the answer, in the template of a transformers tokenizer.

    ``system`` is a turn before it, ``template`` takes the place of the tokenizer's. Raises TemplateError where the
    template raises, does not end, leaves the system out, or takes or gives too much.
    """
    work = {
        "template": template or tokenizer.get_chat_template(),
        "system": system,
        "special": tokenizer.special_tokens_map,
        "prompts": list(prompts),
        "cpu_s": round(CPU_S + PER_PROMPT_S * len(prompts)),
    }
    command = [sys.executable, "-P", __file__]
    environment = inherited() | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(work, default=str),
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=WALL * work["cpu_s"],
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(0, f"it has not ended after {WALL * work['cpu_s']:.0f} s") from None
    rendered = [json.loads(line) for line in done.stdout.splitlines()]
    if rendered and not isinstance(rendered[-1], str):
        raise TemplateError(len(rendered) - 1, rendered[-1]["error"])
    if len(rendered) < len(prompts):
        if done.returncode == -signal.SIGXCPU:
            raise TemplateError(len(rendered), f"it has not ended after {work['cpu_s']} s of computing")
        raise TemplateError(len(rendered), f"its process ended with code {done.returncode}: {done.stderr[-300:]}")
    return rendered


def main() -> None:
    """Read the work from standard input; a line of JSON for each prompt, the last one an error if there is one."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    work = json.load(sys.stdin)
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (work["cpu_s"], work["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    system = [{"role": "system", "content": work["system"]}] if work["system"] else []
    for prompt in work["prompts"]:
        turns = [*system, {"role": "user", "content": prompt}]
        try:
            [text], _ = render_jinja_template(
                [turns], chat_template=work["template"], add_generation_prompt=True, **work["special"]
            )
            given = len(work["system"]) + len(prompt)
            most = SPARE_CHARACTERS + GROWTH * given
            if len(text) > most:
                raise ValueError(f"a prompt of {given} characters becomes {len(text)}, expected at most {most}")
            if work["system"].strip() not in text:
                raise ValueError("it leaves out the system turn")
            reply = json.dumps(text)
        except Exception as error:  # the template may raise anything
            reply = json.dumps({"error": f"{type(error).__name__}: {str(error)[:1000]}"})
        print(reply, file=replies, flush=True)
        if reply.startswith("{"):
            break


if __name__ == "__main__":
    main()
