"""Data files: every fault is named by line and field, prompts are encoded, golds are scored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import PromptConfig
from megatron_ext.data.dataset import encode_problems, load_problems
from megatron_ext.data.prompts import encode_prompts
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.types import Problem, Reward

GOOD = {"prompt": "What is 2+2?", "answer": "4"}


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(2, deadline_s=20) as pool:
        yield pool


def trusting(answers: Sequence[tuple[Problem, str]]) -> list[Reward]:
    """A score for tests that are not about gold answers."""
    return [Reward(1.0, "correct") for _ in answers]


def write(folder: Path, *records: Any) -> Path:
    """A JSON Lines file; a string is written as it is."""
    path = folder / "train.jsonl"
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records))
    return path


def test_lines_become_problems(tmp_path: Path, pool: RewardPool):
    path = write(
        tmp_path,
        {"prompt": "a", "answer": r"\frac{1}{2}", "id": "first", "source": "ignored"},
        "",
        {"prompt": "b", "answer": 12, "id": 7, "numbers": None, "kind": "algebra", "level": 5},
        {"prompt": "c", "answer": "9\n", "verifier": "countdown", "numbers": [3, 2, 1]},
        {"prompt": "d", "answer": "(B)", "verifier": "choice", "level": "hard"},
    )
    problems, report = load_problems(path, score=pool.score, strict=True)
    assert problems == [
        Problem("first", "a", r"\frac{1}{2}"),
        Problem("7", "b", "12", kind="algebra", level="5"),
        Problem("4", "c", "9", "countdown", (3, 2, 1)),
        Problem("5", "d", "(B)", "choice", level="hard"),
    ]
    assert (report.num_read, report.num_kept, report.counts) == (4, 4, {})
    assert report.summary() == "4 of 4 problems kept"


@pytest.mark.parametrize(
    ("record", "field", "kind", "words"),
    [
        ("{'prompt': 1}", "(all)", "not_json", "not JSON"),
        ("[" * 100_000, "(all)", "not_json", "not JSON"),
        ('{"prompt": "p", "answer": ' + "9" * 5000 + "}", "(all)", "not_json", "not JSON"),
        (["a", "b"], "(all)", "wrong_type", "found list"),
        ({"answer": "4"}, "prompt", "missing", "the line has ['answer']"),
        ({"prompt": "p"}, "answer", "missing", "the line has ['prompt']"),
        ({"prompt": "p", "answer": None}, "answer", "missing", "missing"),
        ({"prompt": "p\ud800", "answer": "4"}, "prompt", "invalid", "half of a surrogate pair"),
        ({"prompt": [{"role": "user", "content": "p"}], "answer": "4"}, "prompt", "wrong_type", "found list"),
        ({"prompt": "p", "answer": 4.0}, "answer", "wrong_type", "found float '4.0'"),
        ({"prompt": "p", "answer": ["4", "5"]}, "answer", "wrong_type", "found list"),
        ({"prompt": "p", "answer": True}, "answer", "wrong_type", "found bool"),
        ({"prompt": " ", "answer": "4"}, "prompt", "empty", "empty"),
        ({"prompt": "p", "answer": "\n"}, "answer", "empty", "empty"),
        ({"prompt": "p", "answer": "4", "id": 1.5}, "id", "wrong_type", "found float"),
        ({"prompt": "p", "answer": "4", "kind": ["a"]}, "kind", "wrong_type", "found list"),
        (
            {"prompt": "p", "answer": "4", "verifier": "maths"},
            "verifier",
            "invalid",
            "math, countdown, choice, found 'maths'",
        ),
        ({"prompt": "p", "answer": "4", "verifier": ["math"]}, "verifier", "invalid", "found ['math']"),
        ({"prompt": "p", "answer": "4", "verifier": "countdown"}, "numbers", "missing", "numbers to use"),
        ({"prompt": "p", "answer": "4", "verifier": "countdown", "numbers": "1 3"}, "numbers", "wrong_type", "str"),
        ({"prompt": "p", "answer": "4", "verifier": "countdown", "numbers": [1, 3.0]}, "numbers", "wrong_type", "3.0"),
        ({"prompt": "p", "answer": "4", "verifier": "countdown", "numbers": [-1, 5]}, "numbers", "wrong_type", "-1"),
        ({"prompt": "p", "answer": "4/1", "verifier": "countdown", "numbers": [4, 1]}, "answer", "invalid", "'4/1'"),
        ({"prompt": "p", "answer": "4.0", "verifier": "countdown", "numbers": [4, 1]}, "answer", "invalid", "'4.0'"),
        ({"prompt": "p", "answer": "4", "level": ["5"]}, "level", "wrong_type", "list"),
        (GOOD, "prompt", "duplicate", "the prompt of line 1, with the same answer"),
        (GOOD | {"answer": "5"}, "answer", "conflicting", "not the answer of line 1 to the same prompt"),
    ],
)
def test_faults_are_left_out_and_named(tmp_path: Path, record: Any, field: str, kind: str, words: str):
    path = write(tmp_path, GOOD, record, {"prompt": "What is 3+3?", "answer": "6"})
    problems, report = load_problems(path, score=trusting, max_left_out=1 / 3)
    assert [problem.answer for problem in problems] == ["4", "6"]
    assert (report.num_read, report.num_kept, report.counts) == (3, 2, {kind: 1})
    (fault,) = report.faults
    assert (fault.where, fault.field) == ("line 2", field)
    assert words in fault.message
    assert str(fault) in report.summary() and f"left out: {kind} 1" in report.summary()
    with pytest.raises(ConfigError, match="1 faults in 3 problems and data.strict is on") as caught:
        load_problems(path, score=trusting, strict=True)
    assert str(fault) in str(caught.value)


def test_a_hundred_copies_of_every_line(tmp_path: Path):
    records = [{"prompt": f"What is {n}+1?", "answer": str(n + 1)} for n in range(30)]
    problems, report = load_problems(write(tmp_path, *records * 100), score=trusting)
    assert [problem.answer for problem in problems] == [str(n + 1) for n in range(30)]
    assert report.counts == {"duplicate": 2970}
    assert len(report.summary().splitlines()) == 7 and "and 2965 more" in report.summary()


def test_a_misspelt_verifier_in_most_lines_stops_the_run(tmp_path: Path):
    records = [{"prompt": f"What is {n}+1?", "answer": str(n + 1), "verifier": "math"} for n in range(300)]
    bad = [record | {"verifier": "maths"} if n < 237 else record for n, record in enumerate(records)]
    path = write(tmp_path, *bad, {"prompt": "p"}, records[299])  # the last one only repeats
    with pytest.raises(ConfigError) as caught:
        load_problems(path, score=trusting)
    message = str(caught.value)
    assert (
        "238 of the 302 problems" in message and "data.max_left_out = 0.01" in message and "at least 0.7881" in message
    )
    assert "63 of 302 problems kept; left out: duplicate 1, invalid 237, missing 1" in message
    assert "line 1, field verifier: expected one of math, countdown, choice, found 'maths'" in message
    assert "line 301, field answer: missing" in message and "and 232 more" in message
    assert len(load_problems(path, score=trusting, max_left_out=0.7881)[0]) == 63
    with pytest.raises(ConfigError):
        load_problems(path, score=trusting, max_left_out=0.788)


def test_every_problem_has_an_id_of_its_own(tmp_path: Path):
    records = [{"prompt": f"What is {n}+1?", "answer": str(n + 1)} for n in range(6)]
    ids = [{"id": "a"}, {"id": "a@3"}, {"id": "a"}, {}, {"id": 4}, {"id": "a"}]
    path = write(tmp_path, *({**record, **own} for record, own in zip(records, ids, strict=True)))
    problems, report = load_problems(path, score=trusting, strict=True)
    assert [problem.problem_id for problem in problems] == ["a", "a@3", "a@3@3", "4", "4@5", "a@6"]
    assert report.num_renamed == 3 and "; 3 with the id of another problem" in report.summary()


def test_an_unparsable_gold_answer_stops_the_run(tmp_path: Path, pool: RewardPool):
    path = write(
        tmp_path,
        GOOD,
        {"prompt": "p", "answer": "@@"},
        {"prompt": "q", "answer": r"\frac{1}{2"},
        {"prompt": "r", "answer": "1=2"},  # readable, and yet no response could be right
        {"prompt": "s", "answer": "x" * 2000},
    )
    with pytest.raises(ConfigError) as caught:
        load_problems(path, score=pool.score)
    message = str(caught.value)
    assert "4 gold answers" in message and "remove the lines" in message
    assert "line 2, field answer: gold '@@' scored against itself is bad_gold" in message
    assert r"line 3, field answer: gold '\\frac{1}{2' scored against itself is no_answer" in message
    assert "line 4, field answer: gold '1=2' scored against itself is contradiction" in message
    assert "line 5, field answer: gold 'xxx" in message and "is too_long" in message
    assert len(message) < 1500

    with pytest.raises(ConfigError, match="4 of the 5 problems .* have a fault"):
        load_problems(path, score=pool.score, skip_unparsable_gold=True)
    problems, report = load_problems(path, score=pool.score, skip_unparsable_gold=True, max_left_out=0.8)
    assert [problem.answer for problem in problems] == ["4"]
    assert report.counts == {"unparsable_gold": 4}
    with pytest.raises(ConfigError, match="data.strict"):
        load_problems(path, score=pool.score, skip_unparsable_gold=True, strict=True)


def test_a_choice_without_a_letter_is_no_gold_answer(tmp_path: Path, pool: RewardPool):
    path = write(tmp_path, GOOD, {"prompt": "p", "answer": "A or B", "verifier": "choice"})
    with pytest.raises(ConfigError, match="gold 'A or B' scored against itself is bad_gold"):
        load_problems(path, score=pool.score)


def test_golds_are_scored_in_the_answer_format(tmp_path: Path):
    rows = [GOOD, {"prompt": "p", "answer": "(1,\n2)"}, {"prompt": "q", "answer": "C", "verifier": "choice"}]
    path = write(tmp_path, *rows, {"prompt": "r", "answer": r"\boxed{5}"})
    with RewardPool(1, deadline_s=20, answer_format="answer_line") as pool:
        problems, report = load_problems(path, score=pool.score, strict=True, answer_format="answer_line")
        assert (len(problems), report.faults) == (4, ())
        with pytest.raises(ConfigError, match="4 gold answers .*scored against themselves"):
            load_problems(path, score=pool.score)


@pytest.mark.parametrize("gold", ["$42$", r"\boxed{42}", r"\(42\)", "10,000", r"50\%", "(1,2]", r"x=\frac{1}{2}", "C"])
def test_golds_in_every_dress_are_right_against_themselves(tmp_path: Path, pool: RewardPool, gold: str):
    (problem,), report = load_problems(write(tmp_path, {"prompt": "p", "answer": gold}), score=pool.score, strict=True)
    assert (problem.answer, report.faults) == (gold, ())


def test_thousands_of_integer_golds_are_checked_once_each(tmp_path: Path, pool: RewardPool):
    """AIME golds are integers below 1000: equal ones are scored once, so the whole file takes seconds."""
    records = [{"prompt": f"problem {n}", "answer": str(n % 1000)} for n in range(5000)]
    problems, report = load_problems(write(tmp_path, *records), score=pool.score, strict=True)
    assert len(problems) == 5000 and not report.faults


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 read, 0 kept"),
        (b"\n \n", "0 read, 0 kept"),
        (b'{"question": "p", "answer": "4"}\n', r"1 read, 0 kept(.|\n)*line 1, field prompt: missing"),
        (b'{"prompt": "\xff", "answer": "4"}\n', "not UTF-8"),
    ],
)
def test_a_file_without_problems_stops_the_run(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "train.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_problems(path, score=trusting)


def test_a_file_that_cannot_be_read_stops_the_run(tmp_path: Path):
    with pytest.raises(ConfigError, match="No such file"):
        load_problems(tmp_path / "none.jsonl", score=trusting)
    with pytest.raises(ConfigError, match="Is a directory"):
        load_problems(tmp_path, score=trusting)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path):
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(load_problems(path, score=trusting, strict=True)[0]) == 1


VOCABULARY = ["<unk>", "<s>", "user", ":", "bot", "What", "is", "2", "+", "?", "Box", "it", "."]


def tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", unk_token="<unk>")
    fast.chat_template = chat_template
    return fast


def test_prompt_without_a_chat_template_is_plain_text():
    [(_, ids)] = encode_prompts(tokenizer(), [Problem("0", "What is 2+2?", "4")], PromptConfig(suffix=" Box it."))
    assert [VOCABULARY[i] for i in ids] == ["<s>", "What", "is", "2", "+", "2", "?", "Box", "it", "."]


def test_prompt_with_a_chat_template_is_a_turn_and_the_opening_of_the_answer():
    template = (
        "{% for turn in messages %}{{ turn.role }} : {{ turn.content }} {% endfor %}"
        "{% if add_generation_prompt %}bot :{% endif %}"
    )
    [(_, ids)] = encode_prompts(tokenizer(template), [Problem("0", "What is 2?", "4")], PromptConfig(suffix=" Box it."))
    assert isinstance(ids, tuple)
    assert [VOCABULARY[i] for i in ids] == ["user", ":", "What", "is", "2", "?", "Box", "it", ".", "bot", ":"]


def test_overlong_prompts_are_left_out_and_named():
    problems = [Problem("short", "What is 2?", "2"), Problem("long", "What is 2+2+2?", "6")]
    kept, report = encode_problems(tokenizer(), problems, max_prompt_tokens=5)
    assert kept == [(problems[0], (1, 5, 6, 7, 9))]
    assert (report.num_read, report.num_kept, report.counts) == (2, 1, {"overlong_prompt": 1})
    assert "problem long, field prompt: 9 tokens, expected at most data.max_prompt_tokens = 5" in report.summary()
    with pytest.raises(ConfigError, match=r"1 of 2 prompts are too long, 1 are left; the longest has 9 tokens"):
        encode_problems(tokenizer(), problems, max_prompt_tokens=5, strict=True)
    with pytest.raises(ConfigError, match=r"2 of 2 prompts are too long, 0 are left"):
        encode_problems(tokenizer(), problems, max_prompt_tokens=4)
    assert len(encode_problems(tokenizer(), problems, max_prompt_tokens=9, strict=True)[0]) == 2
