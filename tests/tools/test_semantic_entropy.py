"""Semantic entropy against hand-computed values; the tool stopped midway ends with the same bytes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.data.curriculum import read_stages
from megatron_ext.types import Problem, Reward, Sample
from tests.train.whole_run import RECIPES, ExactRewards
from tools import semantic_entropy as tool
from tools.evaluate.fingerprint import model_sha256
from tools.semantic_entropy import cluster_shares, entropy, log_weight, measured

SENT = str(RECIPES / "sent" / "sent-tiny-cpu.toml")


def sample(text: str, *logprobs: float) -> Sample:
    return Sample((1,), tuple(range(len(logprobs))), logprobs, text, False, 0)


def test_weights_shares_and_entropy_by_hand() -> None:
    half, eighth = math.log(0.5), math.log(0.125)
    assert log_weight([half, eighth], "mean") == pytest.approx(math.log(0.25))
    assert log_weight([half, eighth], "raw") == pytest.approx(math.log(1 / 16))
    assert log_weight([half, eighth], "count") == log_weight([], "mean") == 0.0
    unknown = math.nan  # what an engine does not know counts as the others' mean
    assert log_weight([half, unknown, eighth], "mean") == pytest.approx(math.log(0.25))
    assert log_weight([half, unknown, eighth], "raw") == pytest.approx(3 * math.log(0.25))
    assert log_weight([unknown], "count") == 0.0
    with pytest.raises(ConfigError, match="--weight mean: the engine knows no log-prob of a response's 2 tokens"):
        log_weight([unknown, unknown], "mean")
    assert cluster_shares([half, half, eighth, eighth], [[0, 2], [1], [3]]) == pytest.approx([0.5, 0.4, 0.1])
    assert cluster_shares([-2000.0, -2000.0 + math.log(3)], [[0], [1]]) == pytest.approx([0.25, 0.75])  # no underflow
    assert entropy([0.5, 0.25, 0.25]) == pytest.approx(1.5 * math.log(2))
    assert entropy([1.0, 0.0]) == 0.0 and math.copysign(1, entropy([1.0])) == 1


class Equivalence(ExactRewards):
    """Asked whether an answer equals a key, knows one pair."""

    def score(self, answers: Sequence[tuple[Problem, str]]) -> list[Reward]:
        right = {("x+1", r"\boxed{1+x}")}
        return [Reward(1.0, "correct" if (p.answer, text) in right else "wrong") for p, text in answers]


def test_equivalent_answers_and_those_without_one_are_clusters() -> None:
    """Half of the mass on 1/2 = 2/4, a quarter on x+1 = 1+x, a quarter on nothing."""
    w = math.log(0.5)
    row = [
        *(sample(r"\boxed{1/2}", w), sample("no box", w), sample(r"so \boxed{2/4}", w, w), sample(r"\boxed{x+1}", w)),
        *(sample(r"\boxed{1+x}", w), sample(r"\boxed{", w), sample(r"\boxed{\frac12}", 3 * w)),
        sample(rf"\boxed{{{'9' * 2000}}}", w),
    ]
    asked = [Problem("p", "", "?")]
    [found] = measured(asked, [row], Equivalence(), "count")
    assert found["clusters"] == [[0.375, 3, None], [0.25, 2, "1/2"], [0.25, 2, "x+1"], [0.125, 1, r"\frac12"]]
    assert found["entropy"] == pytest.approx(entropy([0.375, 0.25, 0.25, 0.125]), abs=1e-6)
    [found] = measured(asked, [row], Equivalence(), "mean")
    # weights .5, but .125 for the unlikely last answer: 7 x .5 + .125 in all
    shares = [weight / 3.625 for weight in (1.5, 1.0, 1.0, 0.125)]
    assert found["entropy"] == pytest.approx(entropy(shares), abs=1e-6)


def test_reasoning_that_the_prompt_opens_is_no_answer_until_it_is_closed() -> None:
    row = [sample(r"maybe \boxed{4} but wait", -1.0), sample(r"\boxed{5}</think>so \boxed{4}", -1.0)]
    for thought, clusters in ((True, [[0.5, 1, "4"], [0.5, 1, None]]), (False, [[1.0, 2, "4"]])):
        [found] = measured([Problem("p", "", "?", in_thought=thought)], [row], Equivalence(), "count")
        assert found["clusters"] == clusters


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Eleven problems in batches of two, scored without verifier processes."""
    monkeypatch.setattr("megatron_ext.rollout.rewards.reward_pool.RewardPool", ExactRewards)
    lines = (RECIPES / "tiny/data/train.jsonl").read_text().splitlines(keepends=True)[:11]
    (tmp_path / "train.jsonl").write_text("".join(lines))
    settings = [f'data.train="{tmp_path}/train.jsonl"', "rollout.batch_size=10"]
    return [SENT, *settings, "--out", str(tmp_path / "out.jsonl"), "--samples", "4"]


def test_a_curriculum_is_ascending_and_fits_its_data(arguments: list[str], tmp_path: Path) -> None:
    assert tool.main(arguments) == 0
    header, *rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (header["samples"], header["weight"], header["stages"], header["num_problems"]) == (4, "mean", 2, 11)
    values = [row["entropy"] for row in rows]
    assert values == sorted(values) and 0 <= values[0] < values[-1] <= math.log(4) + 1e-6
    assert [row["stage"] for row in rows] == [0] * 6 + [1] * 5
    assert all(sum(cluster[1] for cluster in row["clusters"]) == 4 for row in rows)
    data = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    problems = [Problem(row["id"], row["prompt"], row["answer"], row["verifier"]) for row in data]
    assert [len(stage) for stage in read_stages(tmp_path / "out.jsonl", problems)] == [6, 5]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "out.png", "train.jsonl"]


@pytest.mark.parametrize(
    "torn", [b"", b'{"row": 6, "id": "tiny', b'{"row": 6, "id": "x", "entropy": 9.0, "clusters": []}\n']
)
def test_stopped_midway_it_ends_with_the_same_bytes(
    torn: bytes, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind the third batch, with nothing, half a row or half a batch of the next one on disk."""
    assert tool.main(arguments) == 0
    expected = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    real = tool.Partial.add

    def add(self: Any, rows: list) -> None:
        if len(self.rows) == 6:
            with self.path.open("ab") as file:
                file.write(torn)
            raise KeyboardInterrupt
        real(self, rows)

    monkeypatch.setattr(tool.Partial, "add", add)
    assert tool.main(arguments) == 130
    assert not (tmp_path / "out.jsonl").exists()
    batches: list[int] = []
    monkeypatch.setattr(tool.Partial, "add", lambda self, rows: (batches.append(len(rows)), real(self, rows)))
    assert tool.main(arguments) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == expected and batches == [2, 2, 1]


def test_bad_input_exits_2_and_says_what_to_do(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*changed: str) -> str:
        assert tool.main([*arguments, *changed]) == 2
        return capsys.readouterr().err

    assert "--samples: expected at least 1, found 0" in refused("--samples", "0")
    assert "--stages: expected at most the 11 problems, found 12" in refused("--stages", "12")
    assert "data.train: no such file: none.jsonl" in refused("data.train=none.jsonl")
    assert "train.sed: unknown key; did you mean seed?" in refused("train.sed=1")
    (tmp_path / "out.jsonl").write_text("something else\n")
    assert "out.jsonl exists and was made with other settings: remove it" in refused()
    (tmp_path / "out.jsonl").unlink()
    monkeypatch.setattr(tool.Partial, "add", lambda self, rows: (_ for _ in ()).throw(KeyboardInterrupt))
    assert tool.main(arguments) == 130
    message = refused("train.seed=5")
    assert "was begun with other settings" in message and "seed: there 0, now 5" in message
    other = tmp_path / "other" / "base"  # another model of the same name
    shutil.copytree(RECIPES / "tiny" / "base", other)
    (other / "generation_config.json").write_text("{}")
    message = refused(f'model.path="{other}"')
    assert "was begun with other settings" in message and "model_sha256: there" in message
    monkeypatch.undo()
    without_out = [argument for argument in arguments if argument not in ("--out", str(tmp_path / "out.jsonl"))]
    assert tool.main([*without_out, 'data.curriculum=""']) == 2
    assert "say where to write the curriculum with --out" in capsys.readouterr().err


def test_the_shipped_curriculum_belongs_to_the_shipped_data() -> None:
    from megatron_ext.config.loading import load_config
    from megatron_ext.data.dataset import load_problems

    config = load_config(SENT)
    problems, _ = load_problems(config.data.train, score=lambda answers: [Reward(1.0, "correct") for _ in answers])
    assert [len(stage) for stage in read_stages(config.data.curriculum, problems)] == [1500, 1500]
    header = json.loads(Path(config.data.curriculum).read_text().partition("\n")[0])
    made_by = (header["model_sha256"], header["engine"], header["dtype"])
    assert made_by == (model_sha256(Path(config.model.path)), config.rollout.engine, config.model.dtype)
