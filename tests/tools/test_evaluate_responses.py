"""What is counted in a response's text, and the file that keeps responses, against counts by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from tools.evaluate.responses import has_loop, reflective_words, repeated_share
from tools.evaluate.samples_file import SamplesFile
from tools.samples import read_samples

HEADER = {"set": "a", "decoding": {"temperature": 1.0}, "model": {"model.safetensors": "1f"}}


def test_repeated_4_grams() -> None:
    assert repeated_share(["a", "b", "c"]) == repeated_share([]) == 0
    assert repeated_share(["a", "b", "c", "d", "e"]) == 0
    # abcd bcda cdab dabc abcd: the last stood before
    assert repeated_share(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert repeated_share(["x"] * 10) == pytest.approx(6 / 7)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("word " * 31, False),
        ("word " * 32, True),  # 32 words of one
        ("so it is " * 10, False),  # 30 words
        ("then " + "so it is " * 11, True),
        (" ".join(f"w{i}" for i in range(64)) + " end", False),
        ((" ".join(f"w{i}" for i in range(64)) + " ") * 3, False),  # three copies
        ((" ".join(f"w{i}" for i in range(64)) + " ") * 4, True),
        ((" ".join(f"w{i}" for i in range(65)) + " ") * 9, False),  # a longer block than is looked for
        ("", False),
    ],
)
def test_loops(text: str, found: bool) -> None:
    assert has_loop(text.split()) is found


def test_reflective_words() -> None:
    text = "Wait, let me check: verifying ... I double-checked it. Alternatively, let's reconsider. Waiter! checkers"
    assert reflective_words(text) == {"verify": 1, "check": 2, "wait": 1, "alternatively": 1, "reconsider": 1}


def line(problem: str, number: int, **changed: Any) -> dict[str, Any]:
    return {
        **{"set": "a", "id": problem, "sample": number, "text": "so\n\\boxed{4}", "response_ids": [5, 6], "length": 2},
        **{"truncated": False, "outcome": "correct", "extracted": "4", "correct": True},
        **changed,
    }


def test_responses_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "model" / "a.jsonl"
    file = SamplesFile(path, HEADER)
    file.append([line("p", 0), line("p", 1, outcome="no_answer", extracted=None, correct=False)])
    with pytest.raises(ConfigError, match="another evaluation writes there"):
        SamplesFile(path, HEADER)
    file.close()
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(line("q", 0)).encode()[:40])  # killed in the middle of a line
    assert [(each.id, each.sample) for each in read_samples(path)] == [("p", 0), ("p", 1)]
    again = SamplesFile(path, HEADER)
    assert again.responses == file.responses and list(again.responses) == [("p", 0), ("p", 1)]
    assert path.read_bytes() == whole
    again.append([line("q", 0)])
    again.close()
    assert [each.id for each in read_samples(path)] == ["p", "p", "q"]
    path.write_bytes(b'{"header": {"se')  # killed in the first
    assert not SamplesFile(path, HEADER).responses
    assert path.read_bytes() == whole[: whole.index(b"\n") + 1]


def test_responses_of_another_evaluation_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    SamplesFile(path, HEADER).close()
    other = HEADER | {"decoding": {"temperature": 0.6}, "prompt": {"suffix": "!"}}
    with pytest.raises(ConfigError) as caught:
        SamplesFile(path, other)
    assert str(caught.value).splitlines()[1:] == [
        "  decoding.temperature: 1.0 there, 0.6 now",
        '  prompt.suffix: null there, "!" now',
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes", "is no samples file"),
        (b"my notes\n", "line 1: Expecting value.*remove or rename it"),
        (json.dumps(line("p", 0)).encode() + b"\n", "does not begin with the header"),
        (json.dumps({"header": HEADER}).encode() + b'\n{"id": "p"}\n', "line 2 is not a response"),
        (json.dumps({"header": HEADER}).encode() + 2 * (b"\n" + json.dumps(line("p", 0)).encode()) + b"\n", "twice"),
    ],
)
def test_other_files_stay_as_they_are(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        SamplesFile(path, HEADER)
    assert path.read_bytes() == content
