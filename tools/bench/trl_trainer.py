"""TRL's GRPOTrainer on a training run of ours: run by the interpreter of TRL's own environment (tools/bench/step.py).

    .venv-trl/bin/python -m tools.bench.trl_trainer RUN.json

RUN.json: the model's folder, the problems with the text and the ids of their prompts, and the settings of our recipe.
Writes the trained model to ``out`` and the seconds of each step, one line a step, to ``out/steps.jsonl``. A step is one
generation and all its updates, as ours is.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.types import Problem


class Steps(TrainerCallback):
    """Writes how long each generation and its updates took."""

    def __init__(self, path: Path, updates: int) -> None:
        self.path, self.updates = path, updates
        self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.updates == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step_s": time.perf_counter() - self.begun}) + "\n")


def main(path: str) -> None:
    run = json.loads(Path(path).read_text())
    out = Path(run["out"])
    out.mkdir(parents=True)
    torch.set_num_threads(run["threads"])
    tokenizer = AutoTokenizer.from_pretrained(run["model"], trust_remote_code=False)
    for problem in run["problems"]:
        found = tokenizer(problem["text"])["input_ids"]
        if found != problem["ids"]:
            raise SystemExit(f"{problem['text']!r}: TRL would read {found}, the trainer reads {problem['ids']}")
    columns = {"prompt": "text", "answer": "answer", "verifier": "verifier", "numbers": "numbers"}
    problems = [{column: problem[key] for column, key in columns.items()} for problem in run["problems"]]
    updates, responses = run["updates"], run["mini_batch_prompts"] * run["samples"]
    config = GRPOConfig(
        output_dir=str(out / "trainer"),
        max_steps=run["steps"] * updates,
        per_device_train_batch_size=responses,
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        num_generations=run["samples"],
        max_completion_length=run["max_response_tokens"],
        temperature=run["temperature"],
        beta=0.0,
        epsilon=run["clip_low"],
        epsilon_high=run["clip_high"],
        loss_type="dr_grpo",
        scale_rewards="none",
        learning_rate=run["lr"],
        lr_scheduler_type="constant",
        weight_decay=run["weight_decay"],
        adam_beta1=run["beta1"],
        adam_beta2=run["beta2"],
        adam_epsilon=run["eps"],
        max_grad_norm=run["clip_grad"],
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=updates,
        disable_tqdm=True,
        seed=run["seed"],
    )
    with RewardPool(run["workers"]) as pool:

        def reward(completions: list[str], answer: list[str], verifier: list[str], numbers: list, **_: Any) -> list:
            asked = [
                (Problem("", "", gold, verifier=kind, numbers=tuple(given)), text)
                for text, gold, kind, given in zip(completions, answer, verifier, numbers, strict=True)
            ]
            return [found.value for found in pool.score(asked)]

        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32, trust_remote_code=False),
            args=config,
            train_dataset=Dataset.from_list(problems),
            processing_class=tokenizer,
            reward_funcs=reward,
            callbacks=[Steps(out / "steps.jsonl", updates)],
        )
        trainer.train()
    trainer.save_model(str(out / "model"))


if __name__ == "__main__":
    main(sys.argv[1])
