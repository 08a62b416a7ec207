"""What a run's folder holds, read for the report and checked: a file that is not what was written is said, not guessed.

A number that is missing, null, NaN, infinite or beyond LARGEST is None. Anything else that is not as tools/train.py and
tools.evaluate write it raises ValueError with file, line and field.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_ext import files
from megatron_ext.config.redact import redact
from megatron_ext.metric import Metric
from megatron_ext.metrics.glossary import GLOSSARY, Glossary
from megatron_ext.metrics.writer import CONFIG, MEANINGS, METRICS, read_steps

EVALUATION = "evaluation.json"
LARGEST = 1e300  # beyond it, sums and ranges overflow
LAST_STEP = 2**53
SAMPLE_BYTES = 48_000_000  # of samples.jsonl, read in WINDOWS places where the file is larger
WINDOWS = 48


@dataclass(frozen=True)
class Metrics:
    """The steps of a run and, by metric, a value for each of them; NaN where there is none."""

    steps: Sequence[int]
    columns: Mapping[str, array[float]]

    def values(self, name: str) -> list[float | None]:
        return [None if math.isnan(value) else value for value in self.columns.get(name, ())]


def load_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps of a run as they were written. Raises ValueError when there are none or one is damaged."""
    path = folder / METRICS
    records = list(read_steps(path)) if path.is_file() else []
    for record in records:
        for name, value in record.items():
            _number(value, f"{path}, step {str(record['step'])[:30]}, {name}")
    if not records:
        raise ValueError(f"{folder}: expected the folder of a run with {METRICS}, found no finished step there")
    return records


def read_metrics(folder: Path) -> Metrics:
    """The steps of a run, eight bytes a number. Raises ValueError when there are none or one is damaged."""
    path = folder / METRICS
    steps: list[int] = []
    columns: dict[str, array[float]] = {}
    for record in read_steps(path) if path.is_file() else ():
        step = record.pop("step")
        if not (steps[-1] if steps else -1) < step <= LAST_STEP:
            raise ValueError(
                f"{path}, entry {len(steps) + 1}: step {str(step)[:30]} follows {steps[-1] if steps else 'the start'}; "
                "steps increase: lines were lost, or two runs wrote to the file. Repair it or move it away"
            )
        for name, value in record.items():
            if name not in columns:
                columns[name] = array("d", [math.nan]) * len(steps)
            columns[name].append(_number(value, f"{path}, step {step}, {name}"))
        steps.append(step)
        for column in columns.values():
            if len(column) < len(steps):
                column.append(math.nan)
    if not steps:
        raise ValueError(f"{folder}: expected the folder of a run with {METRICS}, found no finished step there")
    return Metrics(steps, columns)


def read_config(folder: Path) -> dict[str, Any]:
    """A run's configuration without its secrets; empty where there is none."""
    path = folder / CONFIG
    if not path.is_file():
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(config).__name__}; repair or remove it")
    return redact(config)


def read_glossary(folder: Path) -> Glossary:
    """What the run's metrics mean: today's words, and for a method's own metrics those that the run wrote."""
    path = folder / MEANINGS
    if not path.is_file():
        return GLOSSARY
    try:
        found = TypeAdapter(list[Metric]).validate_python(read_json(path))
        return Glossary(metric for metric in found if GLOSSARY.find(metric.name) is None)
    except ValueError as error:
        raise ValueError(f"{path}: not descriptions of metrics: {error}; repair or remove it") from None


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of the configuration; empty where there is none."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def read_json(path: Path) -> Any:
    try:
        return files.read_json(path, max_bytes=files.LARGE_BYTES)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not JSON: {error}; repair or remove it") from None


# --- schemas ---


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) <= LARGEST else None


def _all_finite(values: list[float | None]) -> list[float | None]:
    return [_finite(value) for value in values]


Number = Annotated[float | None, AfterValidator(_finite)]
Numbers = Annotated[list[float | None], AfterValidator(_all_finite)]
Share = Annotated[float, Field(ge=0, le=1 + 1e-9)]  # a mean of ones may be rounded up


class Record(BaseModel):
    """Unknown keys are ignored, types are not converted."""

    model_config = ConfigDict(strict=True, frozen=True)


class Response(Record):
    """A line of ``samples.jsonl``. ``group_reward`` is the mean over the responses to the same prompt."""

    step: int
    problem_id: str
    prompt: str
    answer: str
    extracted: str | None
    reward: Number
    group_reward: Number = None
    outcome: str
    truncated: bool
    tokens: list[str]
    entropy: Numbers
    logprob: Numbers


class Interval(Record):
    mean: Share
    low: Share
    high: Share


class Data(Record):
    path: str
    sha256: str


class Decoding(Record):
    samples: Annotated[int, Field(ge=1)]
    ks: list[Annotated[int, Field(ge=1)]]
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    top_p: Share
    max_response_tokens: int


class Problem(Record):
    """``c`` of ``n`` responses were right. Evaluations of earlier versions have no texts."""

    id: str
    n: Annotated[int, Field(ge=1)]
    c: Annotated[int, Field(ge=0)]
    majority: bool
    majority_answer: str | None = None
    prompt: str = ""
    answer: str = ""
    kind: str = ""
    level: str = ""


class Evaluation(Record):
    """One label of ``evaluation.json``."""

    data: Data
    decoding: Decoding
    metrics: dict[str, Interval]
    problems: Annotated[list[Problem], Field(min_length=1)]


EVALUATIONS = TypeAdapter(Annotated[dict[str, Evaluation], Field(min_length=1)])


def read_evaluations(path: Path) -> dict[str, Evaluation]:
    """``label -> evaluation``; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = EVALUATIONS.validate_python(read_json(path))
    except ValidationError as error:
        raise ValueError(
            f"{path}: {first_fault(error)}; write it with megatron-entropy evaluate, or remove it"
        ) from None
    for label, evaluation in found.items():
        for row in evaluation.problems:
            if row.c > row.n:
                raise ValueError(f"{path}: {label}, problem {row.id}: {row.c} of {row.n} right; repair or remove it")
    return found


def read_responses(path: Path) -> Iterator[Response]:
    """The responses of ``samples.jsonl``, in order; of a large file those in WINDOWS places spread over it."""
    for line, raw in _lines(path) if path.is_file() else ():
        try:
            found = Response.model_validate(json.loads(raw))
        except ValidationError as error:
            raise ValueError(f"{path}, {line}: {first_fault(error)}; repair the line or move the file away") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, {line}: not JSON: {error}; repair the line or move the file away") from None
        if not len(found.tokens) == len(found.entropy) == len(found.logprob):
            raise ValueError(
                f"{path}, {line}: {len(found.tokens)} tokens, {len(found.entropy)} entropies, {len(found.logprob)} "
                "log-probabilities; repair the line or move the file away"
            )
        yield found


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Where a line is, and the line; a half-written last one is left out."""
    size = path.stat().st_size
    whole = size <= SAMPLE_BYTES
    num_windows, window = (1, size) if whole else (WINDOWS, SAMPLE_BYTES // WINDOWS)
    with path.open("rb") as file:
        for number in range(num_windows):
            start = (size - window) * number // max(1, num_windows - 1)
            if start > file.tell():
                file.seek(start)
                file.readline()  # the rest of a line
            count = 0
            while file.tell() < start + window and (raw := file.readline()).endswith(b"\n"):
                count += 1
                yield f"line {count}" if whole else f"byte {file.tell() - len(raw)}", raw


def first_fault(error: ValidationError) -> str:
    """The first thing that is wrong: where, what was expected and what was found."""
    each = error.errors()[0]
    where = ".".join(str(part) for part in each["loc"])
    found = "" if each["type"] == "missing" else f", found {ascii(each['input'])[:60]}"
    return f"{where}: {each['msg']}{found}" if where else f"{each['msg']}{found}"


def _number(value: Any, where: str) -> float:
    """NaN for what is no finite number. Raises ValueError for what is no number at all."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}: expected a number or null, found {ascii(value)[:60]}; repair or move the file away")
    return float(value) if abs(value) <= LARGEST else math.nan
