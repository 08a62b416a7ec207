"""A run's files survive kills and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_ext.config.redact import redact
from megatron_ext.metrics.writer import (
    METRICS,
    SAMPLES,
    MetricsWriter,
    read_steps,
    sample_record,
    token_texts,
    write_config,
)
from megatron_ext.types import Episode, Problem, Reward, Sample


def figures(step: int) -> dict[str, float]:
    return {"reward/mean": step / 7, "entropy/full": math.exp(-step), "clip/high": 0}


def run(folder: Path, first: int, last: int) -> None:
    with MetricsWriter(folder, trackers=[], total_steps=9, resume_step=first - 1) as writer:
        for step in range(first, last + 1):
            writer.write(step, figures(step), [{"tokens": ["é", "\n"]}, {"tokens": []}])


def test_a_killed_and_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path: Path):
    run(tmp_path / "whole", 1, 9)
    run(tmp_path / "killed", 1, 6)
    for name in (METRICS, SAMPLES):  # killed while writing step 7; the last checkpoint is of step 4
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(b'{"step": 7, "reward/me')
    run(tmp_path / "killed", 5, 9)
    for name in (METRICS, SAMPLES):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [r["step"] for r in read_steps(tmp_path / "whole" / SAMPLES)] == [s for s in range(1, 10) for _ in range(2)]


@pytest.mark.parametrize("cut", range(1, 40))
def test_resume_after_a_cut_at_any_byte(tmp_path: Path, cut: int):
    run(tmp_path, 1, 5)
    whole = (tmp_path / METRICS).read_bytes()
    (tmp_path / METRICS).write_bytes(whole[:-cut])
    run(tmp_path, 5, 5)
    assert (tmp_path / METRICS).read_bytes() == whole


def test_resume_at_0_starts_anew_and_a_new_folder_is_made(tmp_path: Path):
    run(tmp_path / "a" / "b", 1, 3)
    run(tmp_path / "a" / "b", 1, 1)
    assert [record["step"] for record in read_steps(tmp_path / "a" / "b" / METRICS)] == [1]


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_removed(tmp_path: Path):
    run(tmp_path, 1, 3)
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    for broken in (b"garbage\n", b"[1, 2]\n", b'{"reward/mean": 1}\n', b"\xff\n"):
        damaged = lines[0] + broken + lines[2]
        (tmp_path / METRICS).write_bytes(damaged)
        with pytest.raises(ValueError, match="line 2.*move the file away"):
            MetricsWriter(tmp_path, trackers=[], total_steps=9, resume_step=3)
        assert (tmp_path / METRICS).read_bytes() == damaged
    (tmp_path / METRICS).write_bytes(b"garbage\n" + lines[1])
    run(tmp_path, 1, 1)  # a start from 0 needs nothing of the old file
    for tail in (b"garbage\n", lines[1][:-1]):  # as the last line they are what a crash leaves
        (tmp_path / METRICS).write_bytes(lines[0] + tail)
        assert [record["step"] for record in read_steps(tmp_path / METRICS)] == [1]
        run(tmp_path, 2, 3)
        assert (tmp_path / METRICS).read_bytes() == b"".join(lines)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ((0, 1), "its last step is 2, but the checkpoint to go on from is of step 4"),
        ((), "its last step is 0, but"),
        ((0, 2, 3), "step 3 follows step 1, expected 2"),
        ((0, 1, 1, 2, 3), "step 2 follows step 2, expected 3"),
        ((0, 1, 0, 1, 2, 3), "step 1 follows step 2"),
    ],
)
def test_steps_that_were_lost_or_doubled_are_not_passed_over(tmp_path: Path, kept: tuple[int, ...], message: str):
    run(tmp_path, 1, 5)
    lines = (tmp_path / METRICS).read_bytes().splitlines(keepends=True)
    damaged = b"".join(lines[i] for i in kept)
    (tmp_path / METRICS).write_bytes(damaged)
    with pytest.raises(ValueError, match=message):
        MetricsWriter(tmp_path, trackers=[], total_steps=9, resume_step=4)
    assert (tmp_path / METRICS).read_bytes() == damaged


@pytest.mark.parametrize("steps", [(0, 3), (0, 3, 4)])
def test_steps_that_were_lost_right_behind_step_0_are_not_passed_over(tmp_path: Path, steps: tuple[int, ...]):
    (tmp_path / METRICS).write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    with pytest.raises(ValueError, match="step 3 follows step 0, expected 1"):
        MetricsWriter(tmp_path, trackers=[], total_steps=9, resume_step=steps[-1])


def test_a_file_that_was_moved_away_begins_anew_and_says_so(tmp_path: Path):
    run(tmp_path, 1, 4)
    (tmp_path / METRICS).rename(tmp_path / "old.jsonl")
    for resumed in (4, 5):
        with MetricsWriter(tmp_path, trackers=[], total_steps=9, resume_step=resumed) as writer:
            assert writer.lines() == [f"{tmp_path / METRICS}: steps before 5 are not in it: the file was moved away"]
            writer.write(resumed + 1, {"a": 1})
    assert [record["step"] for record in read_steps(tmp_path / METRICS)] == [5, 6]


@pytest.mark.parametrize("written", [0, 2])
def test_a_kill_before_the_next_checkpoint_does_not_block_a_file_that_began_anew(tmp_path: Path, written: int):
    run(tmp_path, 1, 4)
    (tmp_path / METRICS).rename(tmp_path / "old.jsonl")
    for _ in range(2):
        writer = MetricsWriter(tmp_path, trackers=[], total_steps=9, resume_step=4)
        for step in range(5, 5 + written):
            writer.write(step, figures(step))
    found = read_steps(tmp_path / METRICS) if written else []
    assert [record["step"] for record in found] == [5, 6][:written]


def test_lines_are_valid_json_and_floats_keep_every_bit(tmp_path: Path):
    third = torch.tensor(1 / 3)
    with MetricsWriter(tmp_path, trackers=[], total_steps=1) as writer:
        writer.write(
            1, {"a": math.nan, "b": -math.inf, "c": third, "d": 0.1 + 0.2, "e": 3, "f": torch.tensor(math.nan)}
        )

    def refuse(name: str) -> None:
        raise AssertionError(name)

    (line,) = (tmp_path / METRICS).read_text().splitlines()
    record = json.loads(line, parse_constant=refuse)
    assert record == {"step": 1, "a": None, "b": None, "c": third.item(), "d": 0.1 + 0.2, "e": 3, "f": None}
    assert isinstance(record["e"], int)


def test_a_written_step_is_on_disk_before_close_and_steps_only_go_up(tmp_path: Path):
    writer = MetricsWriter(tmp_path, trackers=[], total_steps=3)
    writer.write(1, figures(1))
    assert len((tmp_path / METRICS).read_text().splitlines()) == 1
    for step in (1, 0, 4):
        with pytest.raises(AssertionError):
            writer.write(step, figures(step))


def test_samples_line_up(tmp_path: Path):
    sample = Sample((1, 2), (3, 4), (-0.1, -0.2), "ab", False, 0)
    episode = Episode(Problem("p7", "1+1?", "2"), 5, sample, Reward(1.0, "correct", "2"))
    entropy = torch.tensor([0.123456, math.nan]).tolist()
    record = sample_record(episode, ["a", "\ud83d"], entropy, [-0.5, -1], group_reward=0.25)
    with MetricsWriter(tmp_path, trackers=[], total_steps=1) as writer:
        writer.write(1, {}, [record])
    (read,) = read_steps(tmp_path / SAMPLES)
    assert read["entropy"] == [0.1235, None] and read["logprob"] == [-0.5, -1]
    assert (read["step"], read["problem_id"], read["reward"], read["outcome"]) == (1, "p7", 1.0, "correct")
    assert read["group_reward"] == 0.25
    assert read["tokens"] == ["a", "?"]  # half a surrogate pair has no UTF-8
    with pytest.raises(ValueError, match="2 tokens, 1 entropies"):
        sample_record(episode, ["a", "b"], [0.1], [-0.5, -1], group_reward=math.nan)


def test_token_texts_add_up_when_a_character_spans_tokens():
    word = "aé😀\nß x"
    data = word.encode()

    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")

    texts = token_texts(decode, list(data))  # one token per byte
    assert "".join(texts) == word and len(texts) == len(data)
    assert texts[:7] == ["a", "", "é", "", "", "", "😀"]
    assert token_texts(decode, list("é".encode())[:1]) == ["\ufffd"]  # cut in the middle at the end
    assert token_texts(decode, []) == []


def test_token_texts_keep_the_spaces_a_tokenizer_strips_from_the_front():
    pieces = [" one", " two", " three"]

    def decode(ids):
        return "".join(pieces[i] for i in ids).removeprefix(" ")

    assert token_texts(decode, [0, 1, 2]) == ["one", " two", " three"]


def test_secrets_do_not_reach_the_configuration_file(tmp_path: Path):
    config = {
        "name": "run",
        "data": {"train": "https://user:hunter2@host/data?x=1&token=hunter2", "max_prompt_tokens": 8},
        "hub": {"HF_TOKEN": "hunter2", "api-key": ["hunter2"], "prefix": "postgres://u:hunter2@db"},
    }
    write_config(tmp_path, config)
    text = (tmp_path / "config.json").read_text()
    assert "hunter2" not in text
    clean = json.loads(text)
    assert clean["data"] == {"train": "https://***@host/data?x=1&token=***", "max_prompt_tokens": 8}
    assert clean["name"] == "run" and redact("https://host/a@b") == "https://host/a@b"
