"""Off a terminal a tool says now and then how far it is; on one it shows bars."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from tools import convert
from tools.progress import ToolProgress

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(total: int, *, seconds_each: float, console: Console | None = None) -> list[str]:
    out, clock = io.StringIO(), Clock()
    console = console or Console(file=out, width=40)
    console.file = out
    with ToolProgress(console, clock=clock) as progress:
        task = progress.add_task("sampling", total=total)
        for _ in range(total):
            clock.now += seconds_each
            progress.advance(task)
    return out.getvalue().splitlines()


def test_a_line_now_and_then_and_one_at_the_end() -> None:
    said = lines(100, seconds_each=5.0)
    assert said[0] == "sampling: 3 of 100, 0:08:05 left"
    assert said[-1] == "sampling: 100 of 100" and len(said) == 34
    done = [int(line.split()[1]) for line in said]
    assert done == [*range(3, 100, 3), 100]


@pytest.mark.parametrize("seconds_each", [0.0, 1.0, 20.0])
def test_neither_silence_nor_thousands_of_lines(seconds_each: float) -> None:
    said = lines(5000, seconds_each=seconds_each)
    assert said[-1] == "sampling: 5000 of 5000"
    assert len(said) == (1 if seconds_each == 0 else 100)


def test_a_quiet_console_says_nothing() -> None:
    assert lines(10, seconds_each=60.0, console=Console(quiet=True)) == []


def test_on_a_terminal_there_are_bars_and_no_lines() -> None:
    out = "\n".join(lines(10, seconds_each=60.0, console=Console(force_terminal=True, width=60)))
    assert "10/10" in out and "sampling: " not in out


def test_both_conversions_count_their_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["from-hf", str(BASE), str(tmp_path / "megatron")]) == 0
    (written,) = re.findall(r"^tensors: (\d+) of (\d+)$", capsys.readouterr().err, re.MULTILINE)
    assert written[0] == written[1] and int(written[0]) > 10
    assert convert.main(["to-hf", str(tmp_path / "megatron" / "step_000000"), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().err
    assert said.startswith("convert: checking the files of ") and f"tensors: {written[0]} of {written[0]}\n" in said
