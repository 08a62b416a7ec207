"""Curriculum files: read, refused for other data, and trained on stage by stage."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import load_config
from megatron_ext.config.schema import Config, DataConfig, TrainConfig
from megatron_ext.data.curriculum import FORMAT, data_order, fingerprint, read_stages, stage_of, stage_starts
from megatron_ext.types import Problem
from tests.train import whole_run

PROBLEMS = [Problem(f"p{i}", f"{i}+{i}=?", str(2 * i)) for i in range(5)]
ASCENDING = [3, 0, 4, 2, 1]


def records(**changed: Any) -> list[dict[str, Any]]:
    header = {"format": FORMAT, "problems_sha256": fingerprint(PROBLEMS), "num_problems": 5, "stages": 2}
    rows = [
        {"row": row, "id": f"p{row}", "stage": stage_of(rank, 5, 2), "entropy": rank / 10, "clusters": []}
        for rank, row in enumerate(ASCENDING)
    ]
    return [header | changed, *rows]


def write(folder: Path, content: list[dict[str, Any]]) -> Path:
    path = folder / "curriculum.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in content))
    return path


def test_stages_are_read_in_ascending_order(tmp_path: Path) -> None:
    assert read_stages(write(tmp_path, records()), PROBLEMS) == [[3, 0, 4], [2, 1]]


@pytest.mark.parametrize(
    ("problems", "words"),
    [
        (PROBLEMS[:4], "of another data set: 5 problems .* data.train has 4 .*; 1 ids only in the curriculum"),
        ([*PROBLEMS, Problem("new", "q", "1")], "1 ids only in the data, such as 'new'"),
        ([PROBLEMS[1], PROBLEMS[0], *PROBLEMS[2:]], "the ids are the same, prompts, answers or their order differ"),
        ([Problem("p0", "another prompt", "0"), *PROBLEMS[1:]], "the ids are the same"),
    ],
)
def test_a_curriculum_of_other_data_is_refused(problems: list[Problem], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_stages(write(tmp_path, records()), problems)
    assert "megatron-entropy semantic-entropy RECIPE --out FILE" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([], "not a whole curriculum"),
        (records()[:-1], "not a whole curriculum"),
        (records(format="other"), "not a whole curriculum of format semantic-entropy/1"),
        ([*records()[:-1], {"row": 1}], "not a whole curriculum"),
        ([*records()[:-1], records()[1]], "expected each of the 5 problems once"),
        (records(stages=3), "expected each of the 5 problems once and no empty stage"),
    ],
)
def test_a_damaged_curriculum_is_refused(content: list, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_stages(write(tmp_path, content), PROBLEMS)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no json\n")
    with pytest.raises(ConfigError, match="Invalid JSON"):
        read_stages(tmp_path / "text", PROBLEMS)
    with pytest.raises(ConfigError, match="make it with megatron-entropy semantic-entropy"):
        read_stages(tmp_path / "none", PROBLEMS)


def config(steps: int, path: str = "", starts: list[int] | None = None) -> Config:
    return Config(train=TrainConfig(steps=steps), data=DataConfig(curriculum=path, stage_starts=starts or []))


def test_stages_take_equal_shares_of_the_run_unless_it_says_otherwise() -> None:
    assert [stage_starts(config(steps), 2) for steps in (1, 3, 60)] == [[0, 1], [0, 2], [0, 30]]
    assert stage_starts(config(60, starts=[10, 40]), 3) == [0, 10, 40]
    for starts in ([10], [40, 10], [10, 10]):
        with pytest.raises(ConfigError, match="expected 2 ascending steps after 0"):
            stage_starts(config(60, starts=starts), 3)


def test_without_a_curriculum_all_problems_are_one_stage(tmp_path: Path) -> None:
    encoded = [(problem, (1, 2)) for problem in PROBLEMS]
    assert data_order(config(9), encoded).stages == [[0, 1, 2, 3, 4]]
    order = data_order(config(9, str(write(tmp_path, records()))), encoded)
    assert (order.stages, order.starts) == ([[3, 0, 4], [2, 1]], [0, 5])


@pytest.mark.parametrize(
    "changed",
    [{"answer": "9"}, {"verifier": "choice"}, {"numbers": (1, 2)}, {"problem_id": "x"}, {}],
    ids=["answer", "verifier", "numbers", "id", "the tokens of its prompt"],
)
def test_a_run_does_not_go_on_with_a_problem_that_has_changed(changed: dict[str, Any]) -> None:
    before = [(problem, (1, 2)) for problem in PROBLEMS]
    after = [*before[:-1], (replace(PROBLEMS[-1], **changed), (1, 2) if changed else (1, 3))]
    data_order(config(9), before).load_state_dict(data_order(config(9), before).state_dict())
    with pytest.raises(ConfigError, match="resume: the content of data.train .prompts in the model's tokens"):
        data_order(config(9), after).load_state_dict(data_order(config(9), before).state_dict())


def test_a_recipe_names_a_file_that_a_tool_makes(tmp_path: Path) -> None:
    """Where it is not made yet, the message has the command with the path."""
    recipe = tmp_path / "recipe.toml"
    tiny = whole_run.RECIPES / "tiny" / "tiny-cpu.toml"
    recipe.write_text(f'parent = "{tiny}"\n[data]\ncurriculum = "later.jsonl"\n')
    with pytest.raises(ConfigError, match=f"megatron-entropy semantic-entropy RECIPE --out {tmp_path}/later.jsonl"):
        load_config(recipe)
    with pytest.raises(ConfigError, match="no stages without data.curriculum"):
        load_config(tiny, ["data.stage_starts=[3]"])


def test_a_run_goes_through_the_stages_and_resumes_in_one(tmp_path: Path) -> None:
    """Ten problems, the last five first; the boundary is behind step 2, the kill behind step 3."""
    data = (whole_run.RECIPES / "tiny/data/train.jsonl").read_text().splitlines(keepends=True)[:10]
    (tmp_path / "train.jsonl").write_text("".join(data))
    rows = [json.loads(line) for line in data]
    problems = [Problem(row["id"], row["prompt"], row["answer"], row["verifier"]) for row in rows]
    header = records(problems_sha256=fingerprint(problems), num_problems=10)[0]
    content = [
        {"row": (i + 5) % 10, "id": rows[(i + 5) % 10]["id"], "stage": i // 5, "entropy": 0.0} for i in range(10)
    ]
    options = [
        *(f'data.train="{tmp_path}/train.jsonl"', f'data.curriculum="{write(tmp_path, [header, *content])}"'),
        *("train.steps=4", "log.samples=4"),
    ]
    sent = "sent/sent-tiny-cpu.toml"
    assert whole_run.train(tmp_path / "whole", sent, *options) == 0
    samples = (tmp_path / "whole" / "run" / "samples.jsonl").read_text().splitlines()
    taken = [(record["step"], record["problem_id"]) for record in map(json.loads, samples)]
    second, first = [row["id"] for row in rows[:5]], [row["id"] for row in rows[5:]]
    assert len(taken) == 16 and all(problem in (first if step <= 2 else second) for step, problem in taken)
    assert [step["data/stage"] for step in whole_run.metrics(tmp_path / "whole")] == [0, 0, 1, 1]
    whole_run.train_and_die(tmp_path / "killed", sent, *options, after=3)
    assert whole_run.train(tmp_path / "killed", sent, *options) == 0
    assert whole_run.metrics(tmp_path / "killed") == whole_run.metrics(tmp_path / "whole")
    assert whole_run.contents(tmp_path / "killed", 4) == whole_run.contents(tmp_path / "whole", 4)
