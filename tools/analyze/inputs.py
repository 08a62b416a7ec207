"""The files that analyses read, checked: samples of an evaluation, problems, folders of runs and of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import PromptConfig
from megatron_ext.files import first_fault
from megatron_ext.metrics.writer import METRICS, SAMPLES
from megatron_ext.records import Problem

from ..samples import EXAMPLE, SampleRow, damaged, sample_lines
from ..samples import read_samples as rows_of

Kind = Literal["run", "model", "evaluation", "samples"]


def kind_of(path: Path) -> Kind:
    """What a path is. Raises ConfigError where it is nothing that an analysis reads."""
    if path.is_dir() and ((path / METRICS).is_file() or (path / SAMPLES).is_file()):
        return "run"
    if path.is_dir() and (path / "config.json").is_file():
        return "model"
    if path.is_file() and path.suffix == ".json":
        return "evaluation"
    if path.suffix == ".jsonl" and path.is_file() or path.is_dir() and next(path.rglob("*.jsonl"), None):
        return "samples"
    found = "is there, but" if path.exists() else "is not there;"
    raise ConfigError(
        f"{path} {found} expected a model (a folder with config.json and safetensors), the folder of a run (with "
        f"{METRICS}), an evaluation (.json), or samples (.jsonl, or a folder of them)"
    )


def labels_of(paths: Sequence[Path], given: Sequence[str]) -> list[str]:
    """A name for each path: those given, or the shortest ends of the paths that differ. Raises ConfigError."""
    if given:
        if len(given) != len(paths) or len(set(given)) < len(given):
            raise ConfigError(
                f"--labels: found {', '.join(given)} for {len(paths)} inputs, expected a different one for each, in "
                "their order"
            )
        return list(given)
    for parts in range(1, 6):
        names = ["/".join(_named(path).parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(paths, 1)]


def _named(path: Path) -> Path:
    """Without the ending of a file; what follows a dot in a model's name stays."""
    path = path.resolve()
    return path.with_suffix("") if path.suffix in (".json", ".jsonl") else path


def read_samples(path: Path, *, limit: int | None = None) -> list[SampleRow]:
    """The responses of a samples file, or of all below a folder; ``limit`` keeps the first problems' of each file.

    Raises ConfigError for a missing or empty file, a damaged line, and the same sample of a problem twice.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(f"--samples: {path} holds no samples, expected .jsonl files as evaluate writes them")
    rows: list[SampleRow] = []
    for file in files:
        first: dict[tuple[str, str], None] = {}
        for row in rows_of(file):
            if row.problem not in first and limit is not None and len(first) >= limit:
                continue
            first[row.problem] = None
            rows.append(row)
        if not first:
            raise ConfigError(f"--samples: {file} is empty, expected lines like {EXAMPLE}")
    seen: set[tuple[str, str, int]] = set()
    for row in rows:
        if (key := (row.set, row.id, row.sample)) in seen:
            raise ConfigError(
                f"--samples: {path}: sample {row.sample} of problem {row.id} of set {row.set!r} is there twice; give "
                "the samples of one model at a time"
            )
        seen.add(key)
    return rows


def by_problem(rows: Sequence[SampleRow]) -> dict[tuple[str, str], list[SampleRow]]:
    """``(set, id) -> responses`` in order of their first response."""
    found: dict[tuple[str, str], list[SampleRow]] = {}
    for row in rows:
        found.setdefault(row.problem, []).append(row)
    return found


def prompts_of(path: Path) -> dict[str, PromptConfig]:
    """``set -> prompt`` that the responses of the samples below a path were sampled with, where headers say it."""
    found: dict[str, PromptConfig] = {}
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        header = next((line.header for line in sample_lines(file)), None)
        if header is not None and isinstance(header.get("prompt"), dict):
            try:
                found[str(header.get("set", ""))] = PromptConfig.model_validate(header["prompt"])
            except ValidationError as error:
                raise damaged(file, 1, f"prompt in the header: {first_fault(error)}") from None
    return found


@dataclass(frozen=True)
class Problems:
    """Problems of all files, or folders of them, given with ``--data``: a file's stem is the name of its set."""

    by_set: dict[tuple[str, str], Problem]

    def __bool__(self) -> bool:
        return bool(self.by_set)

    def of_samples(self, sets: Iterable[str]) -> Problems:
        """As samples of these sets name them. Where one of the sets, and only one, is no file's name, its problems are
        those of the files that are no set's, as far as their ids tell them apart."""
        sets = set(sets)
        unknown = sets - {name for name, _ in self.by_set}
        if len(unknown) != 1:
            return self
        free = [(key, problem) for (name, key), problem in self.by_set.items() if name not in sets]
        times = Counter(key for key, _ in free)
        (name,) = unknown
        return Problems(self.by_set | {(name, key): problem for key, problem in free if times[key] == 1})

    def find(self, key: tuple[str, str]) -> Problem | None:
        """The problem of a sample, None where its set has none of its id."""
        return self.by_set.get(key)

    def known_sets(self, rows: Sequence[SampleRow]) -> tuple[list[SampleRow], list[str]]:
        """The rows of the sets of which any problem is here, and the names of the other sets. All rows if none is."""
        known = {row.set for row in rows if self.find(row.problem)}
        others = sorted({row.set for row in rows} - known)
        return ([row for row in rows if row.set in known], others) if known else (list(rows), [])

    def require(self, key: tuple[str, str]) -> Problem:
        """Raises ConfigError."""
        problem = self.find(key)
        if problem is None:
            sets = ", ".join(sorted({name for name, _ in self.by_set}))
            raise ConfigError(
                f"--data: no problem {key[1]} of set {key[0]!r} in {sets or 'any file'}; give the problem files that "
                "the samples were made from"
            )
        return problem


def read_problems(paths: Sequence[Path]) -> Problems:
    """Raises ConfigError for a file that cannot be read."""
    from megatron_ext.data.dataset import load_problems

    found: dict[tuple[str, str], Problem] = {}
    files = [file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    sets: dict[str, Path] = {}
    for path in files:
        if (other := sets.setdefault(path.stem, path)) is not path:
            raise ConfigError(f"--data: {other} and {path} would both be the set {path.stem!r}; rename one of them")
        problems, _ = load_problems(path, score=None)
        found |= {(path.stem, problem.problem_id): problem for problem in problems}
    return Problems(found)
