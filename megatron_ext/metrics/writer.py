"""What a run leaves behind for people, in files of its folder that rank 0 writes.

``config.json`` (redacted), ``metrics.jsonl`` (one flat JSON object per step, the validation before training as step 0),
``glossary.json`` (its keys' meaning), ``samples.jsonl`` (a few responses per step, token by token), ``timeline.jsonl``
(what every rank did when, step by step) and ``planner.json`` (on what it ran). Steps count from 1. Everything under
``time/`` and ``speed/`` depends on the machine; every other key is a function of the configuration and the seed, so two
runs can be compared bit for bit (tools/compare_runs.py). Experiment trackers are fed from these files (trackers.py).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from megatron_ext.config.redact import redact
from megatron_ext.files import parse_json, read_lines, write_atomically
from megatron_ext.metrics.glossary import GLOSSARY, Glossary
from megatron_ext.metrics.spans import Span
from megatron_ext.metrics.trackers import FINISH_S, Trackers

if TYPE_CHECKING:
    from megatron_ext.types import Episode

CONFIG, METRICS, SAMPLES, MEANINGS = "config.json", "metrics.jsonl", "samples.jsonl", "glossary.json"
TIMELINE, PLANNER = "timeline.jsonl", "planner.json"
STEP_OF_TIMELINE = re.compile(rb'\{"step": (\d{1,16}),')  # how a line of it begins
STRICT = "MEGATRON_ENTROPY_STRICT_METRICS"  # set by tests: a metric that the glossary does not have is an error


class MetricsWriter:
    """Appends one line per step to ``metrics.jsonl``, synced to disk, for the report and the trackers.

    Resuming after step ``resume_step`` removes what later steps wrote and a half-written last line, so a run
    that was killed and resumed leaves the file an uninterrupted one leaves. Write a step before its checkpoint:
    what the checkpoint promises is then on disk. ``resume_step`` 0 starts the files anew.

    NaN and infinity are written as ``null``: valid JSON has neither, and a column stays numbers or missing.
    Raises ValueError when the file to resume holds a line that is not a step, other than the last, when its steps do
    not increase by one, or when it ends before ``resume_step``. One that is not there begins anew; ``lines`` says so.
    ``trackers`` are those of ``log.trackers``: they read ``config.json`` at once, and end with this context.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        trackers: Sequence[str],
        total_steps: int,
        resume_step: int = 0,
        glossary: Glossary = GLOSSARY,
    ):
        folder, self._glossary = Path(run_dir), glossary
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics, self._samples, self._timeline = folder / METRICS, folder / SAMPLES, folder / TIMELINE
        self._lines: list[str] = []
        if resume_step:
            first = _check_steps(self._metrics, resume_step)
            if first > 1:
                self._lines.append(f"{self._metrics}: steps before {first} are not in it: the file was moved away")
        for path, parse in ((self._metrics, parse_json), (self._samples, parse_json), (self._timeline, _step_alone)):
            if path is self._metrics and resume_step and not path.exists():
                continue  # until there is a step to write: an emptied file is one whose lines were lost
            path.touch()
            _cut_after(path, resume_step, parse)
        _replace(folder / MEANINGS, [vars(metric) for metric in glossary.metrics])
        _sync_folder(folder)
        self._last, self._total = resume_step or -1, total_steps
        self._trackers = Trackers(folder, trackers, resume_step=resume_step)

    def write(self, step: int, metrics: Mapping[str, SupportsFloat], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append a step: flat metrics and ``sample_record`` objects. On return they survive a kill."""
        assert self._last < step <= self._total, (self._last, step, self._total)
        self._last = step
        if os.environ.get(STRICT):
            for key in metrics:
                self._glossary.require(key)
        values = {key: _number(value) for key, value in metrics.items()}
        _append(self._samples, [{"step": step, **sample} for sample in samples], sync=True)
        _append(self._metrics, [{"step": step} | {key: _or_null(value) for key, value in values.items()}], sync=True)

    def write_timeline(self, step: int, ranks: Sequence[Sequence[Span]]) -> None:
        """Append what each rank did in a step, before ``write``: ``[number of the name, begin, end]`` of each span."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(s.name for spans in ranks for s in spans))}
        lists = [[[numbers[s.name], round(s.begin, 4), round(s.end, 4)] for s in spans] for spans in ranks]
        _append(self._timeline, [{"step": step, "names": list(numbers), "ranks": lists}], sync=False)

    def lines(self) -> list[str]:
        """What there is to tell the user since the last call."""
        lines, self._lines = self._lines + self._trackers.lines(), []
        return lines

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        at_once = error is not None and not issubclass(error, Exception)  # the user interrupted it
        self._lines += self._trackers.close(failed=error is not None, wait_s=0.0 if at_once else FINISH_S)


def read_steps(path: str | Path) -> Iterator[dict[str, Any]]:
    """The objects of ``metrics.jsonl`` or ``samples.jsonl``, streamed; a half-written last line is left out.

    Raises ValueError naming the line when one in the middle is not a JSON object with a ``step``.
    """
    return (record for record, _ in _lines(Path(path)))


def write_config(run_dir: str | Path, config: Mapping[str, Any]) -> None:
    """Write the run's configuration (``config.model_dump(mode="json")``) for the report, without its secrets."""
    target = Path(run_dir) / CONFIG
    target.parent.mkdir(parents=True, exist_ok=True)
    _replace(target, redact(config))


def write_planner(run_dir: str | Path, described: Mapping[str, Any]) -> None:
    """Write what the planner has to know of a run besides its configuration (train/timeline.py::describe_run)."""
    _replace(Path(run_dir) / PLANNER, described)


def sample_record(
    episode: Episode,
    tokens: Sequence[str],
    entropy: Sequence[float],
    logprob: Sequence[float],
    *,
    group_reward: float,
) -> dict[str, Any]:
    """One response for ``samples.jsonl``: a text, an entropy in nats and a log-probability for each token.

    ``tokens`` comes from ``token_texts``; the numbers are rounded to 4 decimals. ``group_reward`` is the mean of the
    responses to the same prompt, NaN where one is unknown. Raises ValueError when the
    three differ in length.
    """
    if not len(tokens) == len(entropy) == len(logprob):
        raise ValueError(f"sample: {len(tokens)} tokens, {len(entropy)} entropies, {len(logprob)} log-probabilities")
    return {
        "problem_id": episode.problem.problem_id,
        "prompt": episode.problem.prompt,
        "answer": episode.problem.answer,
        "extracted": episode.reward.extracted,
        "reward": _or_null(episode.reward.value),
        "group_reward": _or_null(round(group_reward, 4)),
        "outcome": episode.reward.outcome,
        "truncated": episode.sample.truncated,
        "group": episode.group,
        "tokens": list(tokens),
        "entropy": [_or_null(round(float(value), 4)) for value in entropy],
        "logprob": [_or_null(round(float(value), 4)) for value in logprob],
    }


def token_texts(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> list[str]:
    """Each token's share of the text; their concatenation is ``decode(ids)``.

    A character that spans several tokens belongs to the last of them, the others get an empty text. Decoding
    needs the previous character's tokens as context (leading spaces), hence a window and not a token alone.
    """
    texts: list[str] = []
    start = read = 0
    for end in range(1, len(ids) + 1):
        known, now = decode(ids[start:read]), decode(ids[start:end])
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(known) :])
        start, read = read, end
    return texts


def _lines(path: Path, parse: Callable[[bytes], Any] = parse_json) -> Iterator[tuple[dict[str, Any], int]]:
    """Each complete line's object and the offset behind it."""
    end, fault = 0, ""
    try:
        for number, raw in enumerate(read_lines(path), 1):
            if fault:
                raise ValueError(f"{path}, {fault}. Repair the line or move the file away")
            if not raw.endswith(b"\n"):
                return  # killed while writing
            end += len(raw)
            try:
                record = parse(raw)
                if not isinstance(record, dict) or type(record.get("step")) is not int:
                    raise ValueError("no object with an integer step")
            except ValueError as error:
                fault = f"line {number}: {str(error)[:200]}; found {raw[:60]!r}"  # the last one may be what a kill left
            else:
                yield record, end
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; move it away") from None


def _check_steps(path: Path, resume_step: int) -> int:
    """The first step that the file has, or will have. Raises ValueError unless it goes on to ``resume_step``, or begins
    behind it: it was moved away then, and a kill came before the next checkpoint."""
    first: int | None = None
    last: int | None = None
    for record, _ in _lines(path) if path.exists() else ():
        step = record["step"]
        if last is not None and step != last + 1:
            raise ValueError(
                f"{path}: step {step} follows step {last}, expected {last + 1}: lines were lost, or two runs wrote to "
                "it; restore the file, or move it away and the run goes on with a new one"
            )
        first, last = step if first is None else first, step
        if step >= resume_step:
            break
    if path.exists() and (last or 0) != resume_step and first != resume_step + 1:
        raise ValueError(
            f"{path}: its last step is {last or 0}, but the checkpoint to go on from is of step {resume_step}: lines "
            "were lost; restore the file, or move it away and the run goes on with a new one"
        )
    return resume_step + 1 if first is None else max(first, 1)


def _step_alone(raw: bytes) -> Any:
    """Of a line of the timeline, which is long where there are many ranks: its spans are not looked at."""
    match = STEP_OF_TIMELINE.match(raw)
    return {"step": int(match[1])} if match and raw.endswith(b"]}\n") else None


def _cut_after(path: Path, step: int, parse: Callable[[bytes], Any]) -> None:
    """Remove the lines of later steps and an incomplete last line. Steps increase: what goes is a suffix."""
    keep = 0
    for record, end in _lines(path, parse) if step else ():
        if record["step"] > step:
            break
        keep = end
    with path.open("r+b") as file:
        file.truncate(keep)
        os.fsync(file.fileno())


def _replace(target: Path, value: Any) -> None:
    write_atomically(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _append(path: Path, records: Sequence[Mapping[str, Any]], *, sync: bool) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    with path.open("ab") as file:
        file.write(text.encode("utf-8", "replace"))  # a model can emit half a surrogate pair
        file.flush()
        if sync:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """A new file's name is safe only when its folder is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _number(value: Any) -> float | int:
    return +value if isinstance(value, int) else float(value)  # of a bool, 0 or 1


def _or_null(value: float | int) -> float | int | None:
    return value if isinstance(value, int) or math.isfinite(value) else None
