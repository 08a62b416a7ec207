"""Metrics and samples of a run: what is written is read back, what is damaged is never passed over."""

from __future__ import annotations

import io
import json
import math
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.metrics.writer import METRICS, SAMPLES, MetricsWriter, read_steps
from tests.properties.oddities import SPOILERS, TEXTS, VALUES, damaged, limits, mutated, to_bytes, to_json
from tests.tools.runs import write_run
from tools import compare_runs

NUMBERS = st.floats() | st.integers()
NAMES = (st.sampled_from(TEXTS) | st.text(max_size=10)).filter(lambda name: name != "step" and name.isprintable())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), steps=4)


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@given(steps=st.lists(st.dictionaries(NAMES, NUMBERS, max_size=4), min_size=1, max_size=4), texts=st.lists(st.text()))
def test_what_is_written_is_read_back(steps: list[dict[str, Any]], texts: list[str]) -> None:
    """Every finite number to the bit, NaN and infinity as null, and always valid JSON."""
    with tempfile.TemporaryDirectory() as folder:
        with MetricsWriter(folder, trackers=[], total_steps=len(steps)) as writer:
            for step, values in enumerate(steps, 1):
                writer.write(step, values, [{"tokens": texts}])
        found = list(read_steps(Path(folder) / METRICS))
        for (step, values), record in zip(enumerate(steps, 1), found, strict=True):
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}
            assert repr(record) == repr({"step": step} | finite)
        text = (Path(folder) / METRICS).read_text()
        assert "NaN" not in text or any("NaN" in name for values in steps for name in values)
        assert [sample["tokens"] for sample in read_steps(Path(folder) / SAMPLES)] == [texts] * len(steps)


@given(data=st.data(), resume_step=st.integers(1, 4))
def test_a_run_goes_on_from_whole_files_only(data: st.DataObject, resume_step: int, run: Path) -> None:
    """Refused with a message and left as it was, or cut to the steps before the checkpoint, which are there."""
    records = lines(run / METRICS)
    rows = data.draw(mutated(records))
    content = b"".join(to_bytes(to_json(row)) + b"\n" for row in (rows if isinstance(rows, list) else [rows]))
    content = data.draw(st.just(content) | damaged((run / METRICS).read_bytes()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / METRICS
        path.write_bytes(content)
        (Path(folder) / SAMPLES).write_bytes(data.draw(st.just(b"") | damaged((run / SAMPLES).read_bytes())))
        with limits():
            try:
                writer = MetricsWriter(folder, trackers=[], total_steps=9, resume_step=resume_step)
            except ValueError as error:
                assert folder in str(error) and len(str(error)) < 1000
                return
        with writer:
            writer.write(resume_step + 1, {"a": 1.0})
        steps = [record["step"] for record in lines(path)]
        assert steps[-2:] == [resume_step, resume_step + 1] and steps == list(range(steps[0], steps[-1] + 1))


@pytest.mark.parametrize("name", [METRICS, SAMPLES, "config.json", "evaluation.json"])
@pytest.mark.parametrize("how", SPOILERS)
def test_what_is_no_file(how: str, name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    (run / name).touch()
    SPOILERS[how](run / name)
    if name in (METRICS, SAMPLES):
        with limits():
            try:
                MetricsWriter(run, trackers=[], total_steps=9, resume_step=4)
            except (ValueError, OSError) as error:  # either is a message of the training command
                assert name in str(error)
    compare(run, run)


def compare(*arguments: object) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), limits():
        code = compare_runs.main([str(each) for each in arguments])
    assert code in (0, 1) or (code == 2 and len(err.getvalue()) > 20)


@given(data=st.data(), bitwise=st.booleans())
def test_a_comparison_with_a_damaged_run(data: st.DataObject, bitwise: bool, run: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "run"
        other.mkdir()
        rows = data.draw(mutated(lines(run / METRICS)))
        content = b"".join(to_bytes(to_json(row)) + b"\n" for row in (rows if isinstance(rows, list) else [rows]))
        (other / METRICS).write_bytes(data.draw(st.just(content) | damaged((run / METRICS).read_bytes())))
        config = json.loads((run / "config.json").read_text())
        (other / "config.json").write_bytes(to_bytes(to_json(data.draw(st.just(config) | mutated(config) | VALUES))))
        compare(run, other, *["--bitwise"] * bitwise)
