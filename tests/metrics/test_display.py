"""A run's clock adds up; its display degrades to lines."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megatron_ext.methods.siren import SIREN
from megatron_ext.metrics.display import Watch
from megatron_ext.metrics.glossary import Glossary
from megatron_ext.metrics.spans import BESIDE


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def steps(watch: Watch, clock: Clock, count: int) -> list[dict[str, float]]:
    found = []
    for step in range(1, count + 1):
        with watch.phase("rollout", total=4) as phase:
            clock.now += 2
            phase.advance(4, tokens=300)
        for _ in range(2):  # a phase entered twice adds up
            with watch.phase("update"):
                clock.now += 0.5
        clock.now += 1
        found.append(watch.times())
        watch.step(step, found[-1] | {"reward/mean": step / 10, "response/length": 1234.5, "odd/key": 9.0})
    return found


def test_the_clock_adds_up_and_starts_anew_each_step():
    clock, out = Clock(), io.StringIO()
    with Watch(5, console=Console(file=out, width=40), clock=clock) as watch:
        first, second = steps(watch, clock, 2)
        assert watch.eta() == "0:00:12"  # three steps of four seconds
    expected = {"time/rollout_s": 2, "time/update_s": 1, "time/step_s": 4, "speed/rollout_tokens_per_s": 150}
    assert first == expected == second


def test_a_wait_without_tokens_has_no_speed_and_a_second_thread_stands_in_the_timeline():
    clock = Clock()
    with Watch(1, show=False, clock=clock) as watch:
        clock.now = 5
        watch.restart()
        with watch.phase("rollout") as phase:
            clock.now += 2
            phase.advance(4, tokens=300)
        with watch.phase("rollout"):  # for what another thread generates
            clock.now += 6
        watch.count("rollout_background", 7.0, tokens=700)
        watch.beside(6.0, 13.0)
        assert watch.take_spans() == [("rollout", 0, 2), ("rollout", 2, 8), (BESIDE, 1, 8)]
        found = watch.times()
    assert found["time/rollout_s"] == 8 and found["speed/rollout_tokens_per_s"] == 150
    assert found["time/rollout_background_s"] == 7 and found["speed/rollout_background_tokens_per_s"] == 100
    assert "speed/update_tokens_per_s" not in found


def test_without_a_terminal_there_is_one_line_per_step():
    clock, out = Clock(), io.StringIO()
    with Watch(5, title="tiny", console=Console(file=out, width=40), clock=clock) as watch:
        steps(watch, clock, 3)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1] == "tiny 2/5  reward 0.2  length 1234  seconds 4  ETA 0:00:12"


def test_on_a_terminal_there_are_bars_and_a_table():
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with Watch(5, title="tiny", console=console, clock=clock) as watch:
        steps(watch, clock, 3)
        with watch.phase("rollout", total=64) as phase:
            phase.advance(7)
    text = out.getvalue()
    assert "3/5" in text and "ETA 0:00:08" in text and "7/64" in text
    assert "reward" in text and "0.3" in text and "1234" in text


OWN = Glossary(SIREN.glossary())
HARD = {  # as long as numbers get
    "reward/mean": 0.12345,
    "entropy/full": 1.23456,
    "entropy/nucleus": 1.2345e-05,
    "siren/selected_share": 0.2,
    "loss/total": -5.68243e-05,
    "grad/norm": 12345.6,
    "clip/high": 0.00140123,
    "response/length": 15234.5,
    "response/truncated": 0.25,
    "time/step_s": 1234.56,
}


@pytest.mark.parametrize(("width", "at_least"), [(60, 5), (80, 7), (160, 11), (20, 2)])
def test_the_table_leaves_columns_out_and_cuts_no_number(width: int, at_least: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=40, color_system=None)
    with Watch(100_000, resume_step=12_344, title="tiny", glossary=OWN, console=console) as watch:
        watch.step(12_345, HARD)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    header = next(i for i, line in reversed([*enumerate(lines)]) if line.startswith("step") or " step " in line)
    names, numbers = lines[header].split(), lines[header + 1].split()
    assert len(names) >= at_least and names[:2] == ["step", "reward"] and len(lines[header + 1]) <= width
    keys = {metric.short: metric.name for metric in OWN.metrics}
    for name, number in zip(names, numbers, strict=True):
        value = 12_345 if name == "step" else HARD[keys[name]]
        assert float(number) == pytest.approx(value, rel=5e-4), name


def test_a_table_follows_the_terminal_when_it_is_resized() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160, height=40, color_system=None)
    with Watch(100, title="tiny", glossary=OWN, console=console) as watch:
        watch.step(1, HARD)
        console.width = 60
        out.truncate(0)
    last = out.getvalue().splitlines()
    assert any("reward" in line for line in last) and not any("clipped" in line for line in last)


def test_a_phase_that_counts_nothing_shows_no_question_mark() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=40, color_system=None)
    with (
        Watch(5, title="tiny", console=console) as watch,
        watch.phase("sync"),
        watch.phase("rollout", total=64) as phase,
    ):
        phase.advance(7)
    assert "7/64" in out.getvalue() and "?" not in out.getvalue().replace("[?25", "")


def test_other_ranks_keep_the_clock_and_print_nothing():
    clock, out = Clock(), io.StringIO()
    with Watch(5, show=False, console=Console(file=out, force_terminal=True), clock=clock) as watch:
        assert steps(watch, clock, 1)[0]["time/step_s"] == 4
    assert out.getvalue() == ""


def test_a_phase_that_raises_still_counts():
    clock = Clock()
    with Watch(5, show=False, clock=clock) as watch:
        with pytest.raises(RuntimeError), watch.phase("reward"):
            clock.now += 3
            raise RuntimeError
        assert watch.times()["time/reward_s"] == 3


def test_spans_are_told_from_the_moment_at_which_the_ranks_met():
    clock = Clock()
    with Watch(5, show=False, clock=clock) as watch:
        with watch.phase("validation"):
            clock.now += 7
        watch.restart()  # what was before is forgotten
        clock.now += 1
        with watch.phase("update"):
            clock.now += 2
            with watch.waiting():
                clock.now += 3
            clock.now += 4
        assert watch.take_spans() == [("waiting", 3, 6), ("update", 1, 10)] and watch.take_spans() == []
        assert watch.times()["time/update_s"] == 9  # a wait is part of its phase
