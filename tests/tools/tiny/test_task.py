"""The tiny task, its tokenizer and the base model that is shipped with it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import sympy
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2ForCausalLM

from megatron_ext.types import Problem
from tools.tiny import base_model
from tools.tiny import task as tiny_task

TINY = Path(__file__).parents[3] / "recipes" / "tiny"
NINE = Problem("", "9 5 1 > 44?", "44", "countdown", (9, 5, 1))


@pytest.fixture(scope="module")
def shipped() -> dict[str, list[Problem]]:
    return {name: tiny_task.read(TINY / "data" / f"{name}.jsonl") for name in ("train", "eval")}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "base")


@pytest.fixture(scope="module")
def base() -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(TINY / "base").eval()


def test_shipped_data_is_what_the_default_command_writes(tmp_path):
    tiny_task.main(["--out", str(tmp_path)])
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (TINY / "data" / name).read_bytes()


def test_another_seed_gives_other_problems():
    assert tiny_task.generate(0, 20, 20) != tiny_task.generate(1, 20, 20)


def test_rows_are_small_and_mostly_countdown(shipped):
    assert (TINY / "data" / "train.jsonl").stat().st_size < 500_000
    assert len(shipped["train"]) == 3000 and len(shipped["eval"]) == 200
    assert set(json.loads((TINY / "data" / "eval.jsonl").read_text().splitlines()[0])) == {
        "id", "prompt", "answer", "verifier", "numbers",
    }  # fmt: skip
    for problems in shipped.values():
        share = sum(problem.verifier == "countdown" for problem in problems) / len(problems)
        assert 0.78 < share < 0.90
        assert len({problem.problem_id for problem in problems}) == len(problems)


def sameness(problem: Problem) -> tuple:
    """Sameness by another road than ``canonical``: sympy sorts terms and factors when numbers are symbols."""
    if problem.verifier == "countdown":
        return (frozenset(Counter(problem.numbers).items()), problem.answer)

    symbols = sympy.sympify(re.sub(r"\d+", r"n\g<0>", problem.prompt.removesuffix("=?")))
    return (symbols, tuple(sorted(re.findall(r"\d+", problem.prompt))))


def test_nothing_is_both_trained_on_and_held_out(shipped):
    held_out = {sameness(problem) for problem in shipped["eval"]}
    assert not held_out & {sameness(problem) for problem in shipped["train"]}
    everything = [tiny_task.canonical(problem) for problems in shipped.values() for problem in problems]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("2+3*4=?", "4*3+2=?", True), ("2-3*4=?", "3*4-2=?", False), ("1/2+3/4=?", "3/4+1/2=?", True),
     ("1/2-1/4=?", "1/2+1/4=?", False), ("1/2+2/3=?", "2/1+3/2=?", False)],
)  # fmt: skip
def test_canonical_form_ignores_the_order_of_terms_and_factors(one, other, same):
    first, second = (tiny_task.canonical(Problem("", prompt, "0")) for prompt in (one, other))
    assert (first == second) is same


def test_canonical_form_of_a_countdown_ignores_the_order_of_its_numbers():
    assert tiny_task.canonical(NINE) == tiny_task.canonical(Problem("", "1 9 5 > 44?", "44", "countdown", (1, 9, 5)))
    assert tiny_task.canonical(NINE) != tiny_task.canonical(Problem("", "9 5 1 > 46?", "46", "countdown", (9, 5, 1)))


def test_gold_answers_agree_with_sympy(shipped):
    for problem in [*shipped["train"], *shipped["eval"]]:
        if problem.verifier == "math":
            assert sympy.Rational(problem.answer) == sympy.sympify(problem.prompt.removesuffix("=?"))
            assert problem.numbers == ()
        else:
            numbers, target = problem.prompt.removesuffix("?").split(" > ")
            assert (numbers, target) == (" ".join(map(str, problem.numbers)), problem.answer)


def test_listed_solutions_agree_with_a_search_over_values():
    """Every target that the six orders and the two groupings reach by hand arithmetic has a solution, no other does."""
    ops = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    for numbers in [(1, 5, 9), (2, 2, 12), (7, 7, 7), (3, 10, 11)]:
        reached = set()
        for a, b, c in permutations(numbers):
            for first in ops.values():
                for second in ops.values():
                    reached |= {second(first(a, b), c), first(a, second(b, c))}
        listed = {target for key, target in tiny_task.solutions() if key == numbers}
        assert listed == {value for value in reached if 1 <= value <= tiny_task.LARGEST_TARGET}


def test_listed_solutions_agree_with_sympy():
    rng = random.Random(0)
    for (numbers, target), spelled in rng.sample(sorted(tiny_task.solutions().items()), 300):
        for expression in spelled:
            assert sympy.sympify(expression) == target
            digits = "".join(char if char.isdigit() else " " for char in expression)
            assert Counter(map(int, digits.split())) == Counter(numbers)


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"\boxed{9*5-1}", True),
        (r"\boxed{5*9-1}", True),
        (r"\boxed{9*5-1*1}", False),
        (r"\boxed{44}", False),
        (r"\boxed{9+5-1}", False),
        (r"\boxed{9*5-1", False),
        ("9*5-1", False),
        (r"\boxed{9*5-}", False),
        (r"\boxed{9/(5-5)}", False),
        (r"\boxed{1}\boxed{9*5-1}", True),
        (r"\boxed{9*5-1}\boxed{1}", False),
    ],
)
def test_a_countdown_needs_its_numbers_and_its_target(response, right):
    assert tiny_task.is_right(NINE, response) is right


@pytest.mark.parametrize(("response", "right"), [("5/4", True), ("10/8", True), ("1+1/4", True), ("4/5", False)])
def test_an_arithmetic_answer_is_a_value(response, right):
    assert tiny_task.is_right(Problem("", "1/2+3/4=?", "5/4"), f"\\boxed{{{response}}}") is right


def test_only_arithmetic_is_evaluated():
    for text in ("2**3", "abs(3)", "True", "1.5", "1 if 2 else 3", "", "007", "x"):
        with pytest.raises(ValueError):
            tiny_task.evaluate(text)


def test_tokenizer_is_one_token_a_character(tokenizer, shipped):
    assert len(tokenizer) == 64
    assert len(tokenizer("\\boxed{9*5-1}")["input_ids"]) == len(["\\boxed{", *"9*5-1}"])
    assert tokenizer("12-7")["input_ids"] == [tokenizer.convert_tokens_to_ids(char) for char in "12-7"]


def test_tokenizer_round_trip_is_exact(tokenizer, shipped):
    texts = [problem.prompt for problem in shipped["eval"]]
    texts += [
        base_model.CHARACTERS,
        "  two  spaces , and . stops !\n\n",
        r"so \boxed{(9-1)*5} \boxed {1} \box{2}",
        "",
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_chat_template_renders_one_turn(tokenizer):
    chat = [{"role": "user", "content": NINE.prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == "<user>9 5 1 > 44?<assistant>"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert len(ids) == 2 + len(NINE.prompt)
    answered = [*chat, {"role": "assistant", "content": "\\boxed{9*5-1}"}]
    assert tokenizer.apply_chat_template(answered, tokenize=False) == text + "\\boxed{9*5-1}<eos>"
    with pytest.raises(Exception, match="found system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "hi"}], tokenize=False)


def test_encoding_trains_the_response_and_its_eos_only(tokenizer):
    short = Problem("", "1+1+1=?", "3")
    ids, labels = base_model.encode(tokenizer, [(NINE, "\\boxed{9*5-1}"), (short, "\\boxed{3}")])
    assert tokenizer.decode(ids[0]) == "<user>9 5 1 > 44?<assistant>\\boxed{9*5-1}<eos>"
    assert tokenizer.decode(labels[0][labels[0] >= 0]) == "\\boxed{9*5-1}<eos>"
    assert tokenizer.decode(labels[1][labels[1] >= 0]) == "\\boxed{3}<eos>"
    assert torch.equal(ids[labels >= 0], labels[labels >= 0])


def test_demonstrations_are_right_unless_asked_to_be_wrong():
    rng = random.Random(0)
    problems = [tiny_task.draw(rng) for _ in range(200)]
    share = {
        wrong: sum(tiny_task.is_right(p, base_model.demonstrate(p, rng, wrong)) for p in problems) / len(problems)
        for wrong in (0.0, 1.0)
    }
    assert share[0.0] == 1.0 and share[1.0] < 0.15


def test_training_is_deterministic_and_learns(tokenizer, shipped):
    unseen = [(problem, "\\boxed{1}") for problem in shipped["eval"][:8]]
    ids, labels = base_model.encode(tokenizer, unseen)
    stage = base_model.Stage(steps=8, lr=2e-3, wrong_share=0.5)

    def losses(seed: int) -> tuple[float, float]:
        torch.manual_seed(seed)
        model = base_model.build_model(tokenizer)
        with torch.no_grad():
            before = model(input_ids=ids, labels=labels).loss.item()
        base_model.train(model, tokenizer, shipped["eval"], stage, rng=random.Random(f"{seed}"), batch_size=16)
        with torch.no_grad():
            return before, model(input_ids=ids, labels=labels).loss.item()

    before, after = losses(0)
    assert after < before - 0.5
    assert losses(0) == (before, after) != losses(1)


def test_base_model_is_within_its_limits(base, tokenizer):
    config = base.config
    assert sum(parameter.numel() for parameter in base.parameters()) <= 1_000_000
    assert config.num_attention_heads == config.num_key_value_heads
    for size in (config.num_attention_heads, config.num_hidden_layers, config.intermediate_size, config.vocab_size):
        assert size % 4 == 0
    assert config.vocab_size == len(tokenizer)
    assert config.hidden_size == 32 * config.num_attention_heads and not config.tie_word_embeddings
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    weights = load_file(TINY / "base" / "model.safetensors")
    assert "lm_head.weight" in weights and "model.layers.0.self_attn.q_proj.bias" in weights
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_base_model_answers_in_boxes_and_leaves_room(base, tokenizer, shipped):
    measured = base_model.measure(base, tokenizer, shipped["eval"][:100], samples=8)
    assert measured.boxed > 0.98
    assert 0.05 < measured.avg_at_k < 0.35
    assert measured.pass_at_k > measured.avg_at_k + 0.25
    assert 0.2 < measured.entropy < 0.8
    assert measured.response_tokens < base_model.MAX_RESPONSE_TOKENS


def test_base_model_answers_in_a_box_greedily(base, tokenizer):
    inputs = tokenizer(base_model.prompt_text(tokenizer, NINE), return_tensors="pt")
    ids = base.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(ids).startswith("\\boxed{") and tokenizer.decode(ids).endswith("}<eos>")
