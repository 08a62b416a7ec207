"""Train the tiny base model from scratch on the CPU, or measure it as a starting policy.

Two stages. First all demonstrations are right: the model learns to compute. Then most are wrong, in the right
form: it learns to guess, while what it can do stays within reach. The result writes the right form nearly
always and the right answer sometimes: low avg@8, much higher pass@8, and entropy in the tokens that decide the
outcome. That is what reinforcement learning needs to begin with.

    python -m tools.tiny.base_model --out recipes/tiny/base
    python -m tools.tiny.base_model --experts --out recipes/tiny/moe      a mixture of experts in bf16, trained briefly
    python -m tools.tiny.base_model --measure recipes/tiny/base
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_ext.types import Problem

from .task import canonical, draw, expressions, is_right, read, solutions

SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
BOX = "\\boxed{"
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-*/()=<>?!.,:;\\{}^_\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<assistant>{{ message.content }}<eos>"
    "{% elif message.role == 'user' %}<user>{{ message.content }}"
    "{% else %}{{ raise_exception('the tiny model knows the roles user and assistant, found ' ~ message.role) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


Model = Qwen2ForCausalLM | Qwen3MoeForCausalLM
AnyModel = TypeVar("AnyModel", Qwen2ForCausalLM, Qwen3MoeForCausalLM)


@dataclass(frozen=True)
class Stage:
    """A part of the imitation: ``wrong_share`` of its demonstrations are wrong."""

    steps: int
    lr: float
    wrong_share: float


STAGES = (Stage(steps=1500, lr=2e-3, wrong_share=0.0), Stage(steps=150, lr=3e-4, wrong_share=0.6))
BRIEF = (Stage(steps=900, lr=3e-3, wrong_share=0.0), Stage(steps=100, lr=3e-4, wrong_share=0.6))
MAX_RESPONSE_TOKENS = 24
IGNORED = -100  # a label that no loss is taken of


def build_tokenizer() -> Qwen2Tokenizer:
    """One token per character, ``\\boxed{`` as one token, 64 in all; unknown characters are dropped.

    AutoTokenizer loads every model of type qwen2 with Qwen2Tokenizer, whatever the files say, so this is one:
    byte-level with no merges, which spells the blank and the line break its own way.
    """
    characters = [{" ": "Ġ", "\n": "Ċ"}.get(character, character) for character in CHARACTERS]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate([*SPECIAL, BOX, *characters])},
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=256,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(BOX, normalized=False)])
    return tokenizer


def sizes(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What both models have. Heads, key-value heads and vocabulary divide by 4 (tensor parallel), layers too
    (pipeline)."""
    return {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "bos_token_id": None,
        "eos_token_id": SPECIAL.index("<eos>"),
        "pad_token_id": SPECIAL.index("<pad>"),
        "initializer_range": 0.04,
        "dtype": "float32",
    }


def build_model(tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A dense one, whose feed-forward divides by 4 too."""
    return sampling(Qwen2ForCausalLM(Qwen2Config(hidden_size=128, intermediate_size=320, **sizes(tokenizer))))


def build_experts(tokenizer: PreTrainedTokenizerBase) -> Qwen3MoeForCausalLM:
    """Eight experts in each layer, two a token."""
    experts = {
        "hidden_size": 64,
        "head_dim": 16,
        "intermediate_size": 192,
        "moe_intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
    }
    return sampling(Qwen3MoeForCausalLM(Qwen3MoeConfig(**experts, **sizes(tokenizer))))


def sampling(model: AnyModel) -> AnyModel:
    """With what ``generate`` does unless it is told otherwise."""
    generation: Any = model.generation_config
    generation.do_sample, generation.max_new_tokens = True, MAX_RESPONSE_TOKENS
    return model


def demonstrate(problem: Problem, rng: random.Random, wrong_share: float) -> str:
    """A response to imitate: right, or with probability ``wrong_share`` in the right form only."""
    wrong = rng.random() < wrong_share
    if problem.verifier == "countdown":
        numbers = tuple(sorted(problem.numbers))
        answer = rng.choice(expressions(numbers) if wrong else solutions()[numbers, int(problem.answer)])
    else:
        value = Fraction(problem.answer)
        slip = rng.choice((-10, -3, -2, -1, 1, 2, 3, 10)) if wrong else 0
        answer = str(value + Fraction(slip, value.denominator))
    return f"\\boxed{{{answer}}}"


def prompt_text(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    chat = [{"role": "user", "content": problem.prompt}]
    return str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))


def encode(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[Problem, str]]) -> tuple[Tensor, Tensor]:
    """Token ids and labels ``[B, L]``, padded on the right; only response tokens and their eos are labels."""
    rows = []
    for problem, response in pairs:
        prompt = tokenizer.encode(prompt_text(tokenizer, problem), add_special_tokens=False)
        target = tokenizer.encode(f"{response}{tokenizer.eos_token}", add_special_tokens=False)
        rows.append((prompt + target, [IGNORED] * len(prompt) + target))
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), SPECIAL.index("<pad>"))
    labels = torch.full((len(rows), longest), IGNORED)
    for row, (row_ids, row_labels) in enumerate(rows):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        labels[row, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels


def train(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[Problem],
    stage: Stage,
    *,
    rng: random.Random,
    batch_size: int = 256,
) -> None:
    """Imitate demonstrations of problems that are not held out."""
    steps = stage.steps
    excluded = {canonical(problem) for problem in held_out}
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01)
    # Warm-up over the first twentieth, then linearly to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
    )
    losses: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=steps)
        for _ in range(steps):
            problems = [
                problem for problem in (draw(rng) for _ in range(batch_size)) if canonical(problem) not in excluded
            ]
            pairs = [(problem, demonstrate(problem, rng, stage.wrong_share)) for problem in problems]
            ids, labels = encode(tokenizer, pairs)
            balance = {"output_router_logits": True} if isinstance(model, Qwen3MoeForCausalLM) else {}
            loss = model(input_ids=ids, labels=labels, **balance).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            recent = losses[-50:]
            progress.update(bar, advance=1, description=f"loss {sum(recent) / len(recent):.3f}")


@dataclass(frozen=True)
class Measurement:
    """A policy at temperature 1: shares of 1, entropy in nats per response token (eos included)."""

    avg_at_k: float
    pass_at_k: float
    entropy: float
    boxed: float  # share of responses that end by eos and hold a box
    countdown: float  # avg@k of the family
    arithmetic: float
    response_tokens: float


@torch.no_grad()
def measure(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    *,
    samples: int = 8,
    seed: int = 0,
    batch_size: int = 400,
) -> Measurement:
    """Sample ``samples`` responses to each problem and score them exactly."""
    torch.manual_seed(seed)
    model.eval()
    asked = [problem for problem in problems for _ in range(samples)]
    right, boxed, num_tokens, entropy_sum = [], 0, 0, 0.0
    for start in range(0, len(asked), batch_size):
        part = asked[start : start + batch_size]
        prompts = [prompt_text(tokenizer, problem) for problem in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        output = model.generate(  # pyright: ignore[reportAttributeAccessIssue] the stubs miss it
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=MAX_RESPONSE_TOKENS,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        response = output.sequences[:, inputs["input_ids"].shape[1] :]
        ended = (response == tokenizer.eos_token_id).int().cumsum(1)
        written = (ended - (response == tokenizer.eos_token_id).int()) == 0  # up to and with the first eos
        entropy = torch.distributions.Categorical(logits=torch.stack(output.logits, 1)).entropy()
        entropy_sum += float(entropy[written].sum())
        num_tokens += int(written.sum())
        texts = tokenizer.batch_decode(response, skip_special_tokens=True)
        right += [is_right(problem, text) for problem, text in zip(part, texts, strict=True)]
        boxed += sum(bool(end) and BOX in text for end, text in zip(ended[:, -1], texts, strict=True))
    return _summary(asked, right, samples, boxed, num_tokens, entropy_sum)


def _summary(
    asked: list[Problem], right: list[bool], samples: int, boxed: int, num_tokens: int, entropy_sum: float
) -> Measurement:
    correct = torch.tensor(right).float()
    family = torch.tensor([problem.verifier == "countdown" for problem in asked])
    return Measurement(
        avg_at_k=float(correct.mean()),
        pass_at_k=float(correct.view(-1, samples).amax(1).mean()),
        entropy=entropy_sum / num_tokens,
        boxed=boxed / len(asked),
        countdown=float(correct[family].mean()),
        arithmetic=float(correct[~family].mean()),
        response_tokens=num_tokens / len(asked),
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tiny.base_model", description="Train or measure the tiny base model."
    )
    parser.add_argument("--out", type=Path, default=Path("recipes/tiny/base"), help="folder (default: %(default)s)")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts, saved in bf16")
    parser.add_argument("--measure", type=Path, help="only measure the model in this folder, train nothing")
    parser.add_argument(
        "--eval",
        type=Path,
        default=Path("recipes/tiny/data/eval.jsonl"),
        help="held-out problems (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=8, help="responses per problem when measuring (default: 8)")
    options = parser.parse_args(arguments)
    held_out = read(options.eval)
    if options.measure is None:
        torch.manual_seed(options.seed)
        tokenizer = build_tokenizer()
        model = build_experts(tokenizer) if options.experts else build_model(tokenizer)
        rng = random.Random(f"demonstrations {options.seed}")  # not the stream that the held-out problems came from
        for stage in BRIEF if options.experts else STAGES:
            train(model, tokenizer, held_out, stage, rng=rng)
        (model.bfloat16() if options.experts else model).save_pretrained(options.out)
        tokenizer.save_pretrained(options.out, save_jinja_files=False)
    folder = options.out if options.measure is None else options.measure
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False).float()
    measured = measure(
        model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False), held_out, samples=options.samples
    )
    for name, value in vars(measured).items():
        Console().print(f"{name.replace('_k', f'_{options.samples}'):>16} {value:.3f}")


if __name__ == "__main__":
    main()
