"""Files that are not what was written: the report is made, or says in one line which file, where and what to do.

Everything goes through the command line and files on disk.
"""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.tools.runs import sample, save_evaluations, step_metrics, write_run
from tools.charts import POINTS
from tools.report import data as report_data
from tools.report.data import read_responses
from tools.report.page import main


def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, what it says, and the page."""
    page = folder / "report.html"
    page.unlink(missing_ok=True)
    code = main([str(folder)])
    said = capsys.readouterr()
    return code, said.out + said.err, page.read_text() if page.exists() else ""


def whole(folder: Path) -> Path:
    write_run(folder)
    save_evaluations(folder, before=[0, 1, 2, 1] * 5, after=[2, 2, 4, 3] * 5)
    return folder


def changed(file: str, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Changes the second object of a ``.jsonl`` file, or the object of a ``.json`` file."""

    def apply(folder: Path) -> None:
        path = folder / file
        lines = path.read_text().splitlines() if file.endswith("l") else [path.read_text()]
        place = min(1, len(lines) - 1)
        found = json.loads(lines[place])
        edited = edit(found)
        lines[place] = json.dumps(found if edited is None else edited)
        path.write_text("\n".join(lines) + "\n")

    return apply


def content(file: str, data: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_bytes(data)

    return apply


def key(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets ``a.b.0.c``."""

    def edit(found: Any) -> None:
        *path, last = name.split(".")
        for part in path:
            found = found[int(part)] if isinstance(found, list) else found[part]
        found[last] = value

    return edit


def without(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(found: Any) -> None:
        *path, last = name.split(".")
        for part in path:
            found = found[int(part)] if isinstance(found, list) else found[part]
        del found[last]

    return edit


DEEP = b'{"a":' * 100_000
REFUSED = {
    "no steps": (content("metrics.jsonl", b""), "found no finished step"),
    "one half-written step": (content("metrics.jsonl", b'{"step": 1, "reward/mean'), "found no finished step"),
    "binary metrics": (content("metrics.jsonl", bytes(range(256)) * 9 + b"\n{}\n"), "metrics.jsonl, line 1"),
    "metrics that are no objects": (content("metrics.jsonl", b"[1]\n{}\n"), "no object with an integer step"),
    "deep metrics": (content("metrics.jsonl", DEEP + b"\n{}\n"), "metrics.jsonl, line 1"),
    "a string for a number": (changed("metrics.jsonl", key("reward/mean", "high")), "step 2, reward/mean: expected a "),
    "a list for a number": (changed("metrics.jsonl", key("reward/mean", [1])), "found [1]"),
    "true for a number": (changed("metrics.jsonl", key("reward/mean", True)), "found True"),
    "a step of true": (changed("metrics.jsonl", key("step", True)), "line 2: no object with an integer step"),
    "no step": (changed("metrics.jsonl", without("step")), "metrics.jsonl, line 2: no object with an integer step"),
    "a step twice": (changed("metrics.jsonl", key("step", 1)), "entry 2: step 1 follows 1; steps increase"),
    "a negative step": (content("metrics.jsonl", b'{"step": -5}\n{"step": 1}\n'), "step -5 follows the start"),
    "a huge step": (changed("metrics.jsonl", key("step", 10**400)), "steps increase"),
    "binary configuration": (content("config.json", b"\xff\xfe\x00"), "config.json: not JSON"),
    "an empty configuration": (content("config.json", b""), "config.json: not JSON"),
    "a configuration that is a list": (content("config.json", b"[]"), "expected a JSON object, found list"),
    "a deep configuration": (content("config.json", DEEP), "config.json: not JSON"),
    "a nearly too deep one": (content("config.json", b'{"a":' * 700 + b"1" + b"}" * 700), "nested too deeply"),
    "an empty evaluation file": (content("evaluation.json", b""), "evaluation.json: not JSON"),
    "no label": (content("evaluation.json", b"{}"), "evaluation.json: Dictionary should have at least 1 item"),
    "an evaluation that is a list": (content("evaluation.json", b"[]"), "should be a valid dictionary"),
    "no problems": (changed("evaluation.json", key("after.problems", [])), "after.problems: List should have at"),
    "a missing count": (changed("evaluation.json", without("after.problems.3.c")), "problems.3.c: Field required"),
    "a count of -1": (changed("evaluation.json", key("after.problems.3.c", -1)), "found -1"),
    "more right than asked": (changed("evaluation.json", key("after.problems.3.c", 99)), "problem 3: 99 of 4 right"),
    "no responses": (changed("evaluation.json", key("after.problems.3.n", 0)), "after.problems.3.n"),
    "a mean of NaN": (changed("evaluation.json", key("after.metrics.avg@4.mean", float("nan"))), "avg@4.mean"),
    "a string for a mean": (changed("evaluation.json", key("after.metrics.avg@4.mean", "1")), "avg@4.mean"),
    "an infinite temperature": (changed("evaluation.json", key("after.decoding.temperature", 1e999)), "temperature"),
    "metrics of null": (changed("evaluation.json", key("after.metrics", None)), "after.metrics"),
    "binary samples": (content("samples.jsonl", b"\x80\x81\n"), "samples.jsonl, line 1: not JSON"),
    "a deep sample": (content("samples.jsonl", DEEP + b"\n"), "samples.jsonl, line 1: not JSON"),
    "an empty line": (content("samples.jsonl", b"\n\n"), "samples.jsonl, line 1: not JSON"),
    "a sample of null": (content("samples.jsonl", b"null\n"), "samples.jsonl, line 1: Input should be"),
    "a sample without prompt": (changed("samples.jsonl", without("prompt")), "line 2: prompt: Field required"),
    "an entropy of text": (changed("samples.jsonl", key("entropy", ["a"] * 4)), "line 2: entropy.0"),
    "fewer entropies": (changed("samples.jsonl", key("entropy", [1.0])), "line 2: 4 tokens, 1 entropies"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_a_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, message = REFUSED[name]
    damage(whole(tmp_path))
    code, said, page = run(tmp_path, capsys)
    assert code == 2 and message in said and not page, said
    assert said.startswith("report: ") and len(said) < 600 and said.count("\n") == 1, said


SHOWN = {
    "null, NaN, infinities and huge numbers": changed(
        "metrics.jsonl",
        lambda _: {"step": 2, "a": None, "b": float("nan"), "c": -1e999, "d": 10**400, "e": 1e300, "f": -1e300},
    ),
    "metrics of one step alone": content("metrics.jsonl", b'{"step": 7, "reward/mean": 0.5, "time/a_s": 2}\n'),
    "a step without metrics": content("metrics.jsonl", b'{"step": 0}\n'),
    "a half-written last line": content("metrics.jsonl", b'{"step": 1, "a": 1}\n{"step": 2, "a": 1}\n{"ste'),
    "a broken last line": content("metrics.jsonl", b'{"step": 1, "a": 1}\n{"step": 2, "a": 1}\n\x00\x00\n'),
    "numbers beyond floating point's middle": content(
        "metrics.jsonl", b'{"step": 1, "a": 1e300, "time/a_s": 1e300, "time/step_s": 1e300}\n'
        b'{"step": 9007199254740992, "a": -1e300, "time/a_s": 5e-324, "time/step_s": 1e300}\n'
    ),
    "a configuration of other types": content(
        "config.json", b'{"name": {"a": 1}, "method": "a", "model": [1], "train": {"steps": {"x": 1}}, "\\ud800": 1}'
    ),
    "an empty configuration": content("config.json", b"{}"),
    "no samples": content("samples.jsonl", b""),
    "a half-written sample": content("samples.jsonl", b'{"step": 1, "problem_id'),
    "NaN in samples": changed("samples.jsonl", lambda found: found | {"entropy": [float("nan")] * 4, "reward": 1e999}),
    "huge entropies": changed("samples.jsonl", lambda found: found | {"entropy": [1e300] * 4, "logprob": [1e300] * 4}),
    "negative entropies": changed("samples.jsonl", lambda found: found | {"entropy": [-1e300, 0, 0, 0]}),
    "an empty response": changed("samples.jsonl", lambda f: f | {"tokens": [], "entropy": [], "logprob": []}),
    "evaluations of different problems": changed("evaluation.json", key("after.problems.0.id", "another")),
    "evaluations of different data": changed("evaluation.json", key("after.data.sha256", "x")),
    "one pass@k": changed("evaluation.json", lambda f: [key(f"{when}.decoding.ks", [1])(f) for when in f] and None),
    "a metric of one label": changed("evaluation.json", without("before.metrics.pass@4")),
    "k above n": changed("evaluation.json", key("after.decoding.ks", [1, 64])),
    "half a surrogate pair": changed("samples.jsonl", key("prompt", "\ud800")),
    "tokens that are half a surrogate pair": changed("samples.jsonl", key("tokens", ["\ud800", "\udc00", "", "<i>"])),
    "a control character": changed("samples.jsonl", key("prompt", "\x00\x1b[31m\u202e")),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
def test_what_can_be_shown_is_shown(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SHOWN[name](whole(tmp_path))
    code, said, page = run(tmp_path, capsys)
    assert code == 0, said
    check_page(page)


def check_page(page: str) -> None:
    assert page.startswith("<!doctype html>") and page.endswith("</html>\n")
    assert page.count("<script") == 2 == page.count("</script")
    drawn = " ".join(re.findall(r' (?:d|x|y|x1|x2|y1|y2|cx|cy|r)="([^"]*)"', page))
    assert drawn and not re.search(r"nan|inf|e\+", drawn, re.IGNORECASE)
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", drawn)]
    assert min(numbers) >= -20 and max(numbers) <= 340  # inside the picture


def test_any_change_of_any_file_ends_in_a_page_or_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = whole(tmp_path)
    files = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "samples.jsonl", "config.json")}
    files["evaluation.json"] = (folder / "evaluation.json").read_bytes()[:3000]  # of it the beginning is enough
    rng = random.Random(0)
    odd = [b"null", b"NaN", b"-1e999", b'"<script>"', b"[]", b"{}", b"true", b"9" * 400, b"\x00", b"\xff", b'"\\ud800"']
    codes = set()
    for _ in range(100):
        name = rng.choice(list(files))
        data = (folder / name).read_bytes()
        numbers = list(re.finditer(rb"-?\d+(\.\d+)?", data))
        place = rng.choice(numbers) if numbers else None
        if place is None or rng.random() < 0.2:
            at = rng.randrange(len(data) + 1)
            new = data[:at] + rng.choice(odd) + data[at + rng.randrange(30) :]
        else:
            new = data[: place.start()] + rng.choice(odd) + data[place.end() :]
        (folder / name).write_bytes(new)
        code, said, page = run(folder, capsys)
        codes.add(code)
        assert code in (0, 2) and (code == 0) == bool(page), (name, said)
        if code == 0:
            check_page(page)
        (folder / name).write_bytes(data)
    assert codes == {0, 2}


def test_faults_of_the_file_system_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "none" / "x.html")]) == 2
    assert "No such file or directory" in capsys.readouterr().err
    assert main([str(tmp_path / "run" / "metrics.jsonl")]) == 2
    assert "expected the folder of a run" in capsys.readouterr().err


def test_a_very_long_run_has_a_page_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    num_steps = 100_000
    values = step_metrics(3)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            values |= {"reward/mean": step / num_steps, "grad/norm": 50.0 if step == 777 else 1 + step % 3 / 10}
            file.write(json.dumps({"step": step} | values) + "\n")
    start = time.process_time()
    code, _, page = run(tmp_path, capsys)
    assert code == 0 and time.process_time() - start < 60
    assert len(page) < 500_000
    assert f"A point of a line is the mean of {-(-num_steps // POINTS)} steps" in page
    assert "spike at step 777: <b>50</b>" in page
    check_page(page)


def test_of_a_large_file_of_samples_both_ends_and_places_between_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "samples.jsonl"
    lines = [json.dumps({"step": step, **sample(problem_id=f"é{step}")}, ensure_ascii=False) for step in range(1, 2001)]
    path.write_text("\n".join(lines) + "\n")
    assert [row.step for row in read_responses(path)] == list(range(1, 2001))
    monkeypatch.setattr(report_data, "SAMPLE_BYTES", path.stat().st_size // 10)
    monkeypatch.setattr(report_data, "WINDOWS", 5)
    steps = [row.step for row in read_responses(path)]
    assert steps[0] == 1 and steps[-1] == 2000 and steps == sorted(set(steps)) and 150 < len(steps) < 250
    assert [sum(first < step <= first + 400 for step in steps) > 20 for first in range(0, 2000, 400)] == [True] * 5
    path.write_text("\n".join([*lines[:-1], "{}"]) + "\n")
    with pytest.raises(ValueError, match=r"samples.jsonl, byte \d+: step: Field required"):
        list(read_responses(path))
