"""Data and curriculum files: any rows are problems with prompt ids or a message, read as a run reads them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from megatron_ext.data.curriculum import fingerprint, read_stages
from megatron_ext.data.dataset import load_training_data
from megatron_ext.rollout.model_files import load_tokenizer
from megatron_ext.rollout.rewards.verify import VERIFIERS
from megatron_ext.types import Problem
from tests.properties.oddities import SPOILERS, TEXTS, VALUES, damaged, limits, mutated, to_bytes, to_json
from tests.train.whole_run import ExactRewards

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
ROWS = [json.loads(line) for line in (TINY / "data" / "train.jsonl").read_text().splitlines()[:6]]
ROWS += [{"prompt": f"{i} {i} > {2 * i}?", "answer": str(2 * i), "id": i} for i in range(1, 4)]
TOKENIZER = load_tokenizer(TINY / "base")
LONGEST_MESSAGE = 20_000


def load(path: Path, *, max_left_out: float = 1.0, **data: bool | float | str) -> list[tuple[Problem, tuple[int, ...]]]:
    """What a run would train on; nothing where it is refused with a message."""
    data |= {"train": str(path), "max_left_out": max_left_out}
    overrides = [
        f"data.{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in data.items()
    ]
    config = read_config(TINY / "tiny-cpu.toml", overrides)
    with limits():
        try:
            problems, lines = load_training_data(config, score=ExactRewards().score, tokenizer=TOKENIZER)
        except ConfigError as error:
            assert str(error).startswith("data.") and len(str(error)) < LONGEST_MESSAGE
            return []
    assert problems and len("\n".join(lines)) < LONGEST_MESSAGE
    for problem, ids in problems:
        json.dumps([problem.problem_id, problem.prompt, problem.answer], ensure_ascii=False).encode()
        assert 0 < len(ids) <= config.data.max_prompt_tokens and all(0 <= each < len(TOKENIZER) for each in ids)
        assert problem.prompt.strip() and problem.answer.strip() and problem.verifier in VERIFIERS
    assert len({problem.prompt for problem, _ in problems}) == len(problems)
    return problems


def rows_as_bytes(rows: list[Any]) -> bytes:
    return b"".join(to_bytes(to_json(row)) + b"\n" for row in rows)


@given(
    data=st.data(),
    strict=st.booleans(),
    skip_unparsable_gold=st.booleans(),
    max_left_out=st.sampled_from([0.01, 0.5, 1.0]),
)
def test_rows_with_something_wrong(
    data: st.DataObject, strict: bool, skip_unparsable_gold: bool, max_left_out: float
) -> None:
    rows = data.draw(mutated(ROWS))
    content = rows_as_bytes(rows if isinstance(rows, list) else [rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_bytes(data.draw(st.just(content) | damaged(content)))
        load(path, strict=strict, skip_unparsable_gold=skip_unparsable_gold, max_left_out=max_left_out)


FIELDS = {
    "prompt": st.sampled_from(TEXTS) | st.text(max_size=30) | VALUES,
    "answer": st.sampled_from(TEXTS) | st.integers() | st.text(max_size=30) | VALUES,
    "id": st.integers() | st.text(max_size=5) | VALUES,
    "verifier": st.sampled_from(list(VERIFIERS)) | VALUES,
    "level": st.text(max_size=5) | st.integers() | VALUES,
    "numbers": st.lists(st.integers(-1, 99), max_size=4) | VALUES,
}


@given(rows=st.lists(st.fixed_dictionaries({}, optional=FIELDS), max_size=6))
def test_rows_of_any_values(rows: list[dict[str, Any]]) -> None:
    """One row at fault is left out; it takes no other with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.jsonl"
        path.write_bytes(rows_as_bytes(rows))
        alone = {problem.prompt for problem, _ in load(path, skip_unparsable_gold=True)}
        path.write_bytes(rows_as_bytes([*rows, *ROWS]))
        together = {problem.prompt for problem, _ in load(path, skip_unparsable_gold=True)}
        assert together >= alone | {row["prompt"] for row in ROWS}


@pytest.mark.parametrize("how", [how for how in SPOILERS if how != "waiting for a writer"])
def test_what_is_no_file(how: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(rows_as_bytes(ROWS))
    assert len(load(path)) == len(ROWS)
    SPOILERS[how](path)
    assert load(path) == []


PROBLEMS = [Problem(str(i), f"p{i}", "1") for i in range(4)]
CURRICULUM = [
    {"format": "semantic-entropy/1", "problems_sha256": fingerprint(PROBLEMS), "num_problems": 4, "stages": 2},
    *({"row": i, "id": str(i), "stage": i // 2, "entropy": 0.5 * i, "clusters": [[1.0, 8, "1"]]} for i in range(4)),
]


@given(data=st.data())
def test_a_curriculum_with_something_wrong(data: st.DataObject) -> None:
    rows = data.draw(mutated(CURRICULUM))
    content = rows_as_bytes(rows if isinstance(rows, list) else [rows])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curriculum.jsonl"
        path.write_bytes(data.draw(st.just(content) | damaged(content)))
        with limits():
            try:
                stages = read_stages(path, PROBLEMS)
            except ConfigError as error:
                assert str(error).startswith("data.curriculum") and len(str(error)) < LONGEST_MESSAGE
            else:
                assert sorted(sum(stages, [])) == [0, 1, 2, 3] and all(stages)
