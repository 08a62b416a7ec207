"""Prepares a set: reads its sources row by row, leaves out what cannot be used, writes the rest and a manifest.

Only the rows that stay are kept in memory: of 1.79 million that are 17 thousand problems, those. Equal sources and
options give equal bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.public_sets import public_sets
from megatron_ext.data.dataset import Fault, Score, check_gold, check_record, load_problems
from megatron_ext.files import write_atomically
from megatron_ext.types import Problem

from ..progress import ToolProgress
from .adapters import PROBLEM_ROWS, Form, form_of
from .filters import LeftOut, Seen, question_type, summary
from .manifest import FORMAT, file_record, manifest_of, to_json, versions
from .overlap import EvaluationSets
from .solved import Range, SolveCounts, count_solved
from .sources import Row, Source, open_source, revision_of

GOLDS_PER_BATCH = 1024
Reason = tuple[str, str]  # why a row is left out: a word to count by, and a sentence


@dataclass(frozen=True)
class Options:
    """What the command line says beside the set's name, its sources and the output."""

    mapping: dict[str, str] = field(default_factory=dict)
    split: str = ""
    configs: tuple[str, ...] = ()
    against: tuple[Path, ...] = ()
    drop: tuple[str, ...] = ()
    max_chars: int | None = None
    max_tokens: int | None = None
    tokenizer: Path | None = None
    keep_solved: Range | None = None
    solved: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A row that stays so far."""

    where: str
    problem: Problem
    num_tokens: int | None = None

    def line(self) -> str:
        """As it is written."""
        p = self.problem
        record = {"id": p.problem_id, "prompt": p.prompt, "answer": p.answer, "verifier": p.verifier}
        rest = {"numbers": list(p.numbers), "kind": p.kind, "level": p.level}
        return json.dumps(record | {key: value for key, value in rest.items() if value}, ensure_ascii=False) + "\n"


def prepare(name: str, paths: Sequence[Path], out: Path, options: Options, *, score: Score, console: Console) -> None:
    """Writes ``out`` and its manifest, and says what was left out.

    ``score`` scores ``(problem, response)`` pairs, for example ``RewardPool.score``. Raises ConfigError for sources,
    columns and files that cannot be used, and when no row is left; nothing is written then.
    """
    _refuse_overwriting(out, [*paths, *options.against, *options.solved])
    opened = list(_opened(name, paths, options))
    _refuse_overwriting(out, [file for source, _ in opened for file in source.files])
    evaluation, against = _evaluation_sets(options.against)
    reader = _Reader(name, options)
    with ToolProgress(console) as progress:
        labels = _labels([source for source, _ in opened])
        num_rows = [
            reader.read(source, label, form, progress) for (source, form), label in zip(opened, labels, strict=True)
        ]
        asked, overlaps = _without_overlaps(reader.kept, evaluation, reader.left_out)
        kept = _with_good_golds(asked, score, reader.left_out, progress)
    console.print(
        "\n".join(reader.left_out.lines()) or "nothing is left out", markup=False, highlight=False, soft_wrap=True
    )
    if reader.samples is not None and options.keep_solved is not None:
        for line in reader.samples.doubts(options.keep_solved):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not kept:
        raise ConfigError(f"data: none of the {sum(num_rows)} rows of {name} can be used; nothing is written")
    content = "".join(candidate.line() for candidate in kept)
    write_atomically(out, content.encode())
    record = {
        "format": FORMAT,
        "name": name,
        "sources": [_source_record(*each, count) for each, count in zip(opened, num_rows, strict=True)],
        "options": _options_record(options),
        "against": against,
        "read": sum(num_rows),
        "kept": len(kept),
        "left_out": dict(reader.left_out.counts),
        "examples": reader.left_out.examples,
        "overlaps": overlaps,
        "golds": {"asked": len(asked), "accepted": len(kept), "rate": round(len(kept) / len(asked), 6)},
        "prompt_characters": summary([len(candidate.problem.prompt) for candidate in kept]),
        "prompt_tokens": summary([each.num_tokens or 0 for each in kept]) if options.tokenizer else None,
        "right_responses": _solved_record(kept, reader.samples),
        "output": file_record(out, out.name),
        "versions": versions(),
    }
    write_atomically(manifest_of(out), to_json(record))
    console.print(_summary(record, out), markup=False, highlight=False, soft_wrap=True)


class _Reader:
    """Rows of one source after the other; ids and prompts are told apart over all of them."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.samples = count_solved(options.solved) if options.keep_solved else None
        self.left_out, self.kept = LeftOut(), list[Candidate]()
        self._seen, self._ids = Seen(), set[str]()
        self._count_tokens = _token_counter(options.tokenizer)

    def read(self, source: Source, label: str, form: Form, progress: ToolProgress) -> int:
        """Adds the rows that can be used; how many there are."""
        task, number = progress.add_task("reading", total=source.num_rows), 0
        for number, row in enumerate(source.rows(), 1):
            found = self._checked(f"{label} row {number}", row, number, form)
            if found is not None:
                self.kept.append(found)
            progress.advance(task)
        return number

    def _checked(self, where: str, row: Row, number: int, form: Form) -> Candidate | None:
        problem, num_tokens = self._problem(where, row, number, form), None
        if isinstance(problem, Problem):
            problem = self._with_own_id(problem, number)
            reason = self._unwanted(problem, where)
            if reason is None:
                num_tokens = self._count_tokens(problem.prompt)
                reason = _too_long(num_tokens, self.options.max_tokens, "tokens")
            if reason is None:
                return Candidate(where, problem, num_tokens)
        else:
            reason = problem
        self.left_out.add(reason[0], where, reason[1])
        return None

    def _problem(self, where: str, row: Row, number: int, form: Form) -> Problem | Reason:
        try:
            fields = {key: value for key, value in form.convert(row).items() if value is not None}
        except (TypeError, AttributeError) as error:  # a column holds something else than in this set
            return "wrong_type", f"its columns cannot be read as those of {self.name}: {error}"
        except KeyError as error:  # a file of a folder with other columns than the first
            return "missing", f"it has no column {error}"
        if fields.get("answer") in (None, "") and fields.get("prompt"):
            return "no_gold", f"{str(fields['prompt'])[:80]!r}"
        if form is not PROBLEM_ROWS:
            fields["id"] = f"{self.name}-{fields.get('id') or number}"
            if isinstance(fields.get("prompt"), str):
                fields["prompt"] = fields["prompt"].strip()
        problem = check_record(where, fields)
        if isinstance(problem, Fault):
            return problem.kind, f"field {problem.field}: {problem.message}"
        return problem

    def _unwanted(self, problem: Problem, where: str) -> Reason | None:
        options = self.options
        if found := self._seen.verdict(problem, where):
            return found
        if options.drop and (kind := question_type(problem)) in options.drop:
            return kind, f"{problem.prompt[:80]!r}, answer {problem.answer[:20]!r}"
        if found := _too_long(len(problem.prompt), options.max_chars, "characters"):
            return found
        if self.samples is not None and options.keep_solved is not None:
            return self.samples.verdict(problem.problem_id, options.keep_solved)
        return None

    def _with_own_id(self, problem: Problem, number: int) -> Problem:
        """Of several problems with one id the first keeps it, whatever is left out: filters change no name."""
        name = problem.problem_id
        while name in self._ids:
            name += f"@{number}"
        self._ids.add(name)
        return replace(problem, problem_id=name)


def _too_long(length: int | None, longest: int | None, unit: str) -> Reason | None:
    if length is None or longest is None or length <= longest:
        return None
    return "too_long", f"{length} {unit}, expected at most {longest}"


def _opened(name: str, paths: Sequence[Path], options: Options) -> Iterator[tuple[Source, Form]]:
    """The sources, all of them found and understood before one is read to its end."""
    known = public_sets().get(name)
    for path in paths:
        usual = (known.split, known.config) if known else ("", ())
        source = open_source(path, split=options.split, configs=options.configs, usual=usual)
        yield source, form_of(name, source.columns, options.mapping)


def _evaluation_sets(paths: Sequence[Path]) -> tuple[EvaluationSets, list[dict[str, Any]]]:
    """The problems of ``--against`` and a record of each file."""
    problems, records = [], []
    for path in paths:
        try:
            found, _ = load_problems(path, score=None)
        except ConfigError as error:
            raise ConfigError(str(error).replace("data.train", "--against")) from None
        problems += [(f"{path.stem} {problem.problem_id}", problem.prompt) for problem in found]
        records.append(file_record(path, path.name) | {"problems": len(found)})
    return EvaluationSets(problems), records


def _without_overlaps(
    kept: Sequence[Candidate], evaluation: EvaluationSets, left_out: LeftOut
) -> tuple[list[Candidate], list[dict[str, str]]]:
    """Those in no evaluation set, and which of the others matched which problem: all of them, for the manifest."""
    matches = evaluation.matches([candidate.problem.prompt for candidate in kept])
    for number, match in matches.items():
        left_out.add("in_evaluation_set", kept[number].where, f"{kept[number].problem.problem_id}: {match}")
    listed = [
        {"row": kept[number].where, "id": kept[number].problem.problem_id, "match": str(match)}
        for number, match in matches.items()
    ]
    return [candidate for number, candidate in enumerate(kept) if number not in matches], listed


def _with_good_golds(
    kept: Sequence[Candidate], score: Score, left_out: LeftOut, progress: ToolProgress
) -> list[Candidate]:
    """Those whose gold answer the verifier reads and accepts as an answer to itself."""
    task, good = progress.add_task("golds", total=len(kept)), []
    for start in range(0, len(kept), GOLDS_PER_BATCH):
        part = dict(enumerate(kept[start : start + GOLDS_PER_BATCH]))
        faults = check_gold({number: candidate.problem for number, candidate in part.items()}, score)
        for number, fault in faults.items():
            left_out.add(fault.kind, part[number].where, fault.message)
        good += [candidate for number, candidate in part.items() if number not in faults]
        progress.advance(task, len(part))
    return good


def _token_counter(tokenizer: Path | None) -> Callable[[str], int | None]:
    if tokenizer is None:
        return lambda text: None
    from megatron_ext.rollout.model_files import load_tokenizer

    try:
        loaded = load_tokenizer(tokenizer)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"--tokenizer: {tokenizer} holds no tokenizer: {str(error)[:200]}") from None
    return lambda text: len(loaded.encode(text))


def _refuse_overwriting(out: Path, read: Sequence[Path]) -> None:
    written = {out.resolve(), manifest_of(out).resolve()}
    for path in read:
        if path.resolve() in written:
            raise ConfigError(f"--out: {out} is read, too; give another file")
        if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
            raise ConfigError(f"--out: {out} lies in {path}, which is read as a whole; give a file elsewhere")


def _labels(sources: Sequence[Source]) -> list[str]:
    """What rows are named by: the file's name, or its path where another source has the name too."""
    names = Counter(source.path.name for source in sources)
    return [source.path.name if names[source.path.name] == 1 else str(source.path) for source in sources]


def _source_record(source: Source, form: Form, num_rows: int) -> dict[str, Any]:
    root = source.path if source.path.is_dir() else source.path.parent
    return {
        "path": str(source.path),
        "revision": revision_of(source.path),
        "columns": list(form.columns),
        "rows": num_rows,
        "files": [file_record(file, file.relative_to(root).as_posix()) for file in source.files],
    }


def _options_record(options: Options) -> dict[str, Any]:
    return {
        "map": options.mapping,
        "split": options.split,
        "config": list(options.configs),
        "drop": list(options.drop),
        "max_chars": options.max_chars,
        "max_tokens": options.max_tokens,
        "tokenizer": options.tokenizer and options.tokenizer.name,
        "keep_solved": options.keep_solved and str(options.keep_solved),
        "solved": [file_record(path, path.name) for path in options.solved],
    }


def _solved_record(kept: Sequence[Candidate], samples: SolveCounts | None) -> dict[str, int] | None:
    """``{"3 of 8": 120}``: how many of the kept problems had how many right responses."""
    if samples is None:
        return None
    pairs = Counter(
        (samples.correct[each.problem.problem_id], samples.sampled[each.problem.problem_id]) for each in kept
    )
    return {f"{correct} of {sampled}": pairs[correct, sampled] for correct, sampled in sorted(pairs)}


def _summary(record: dict[str, Any], out: Path) -> str:
    golds, chars, known = record["golds"], record["prompt_characters"], public_sets().get(record["name"])
    lines = [
        f"{out}: {record['kept']} of {record['read']} rows kept; {golds['rate']:.2%} of {golds['asked']} golds verify "
        f"themselves; prompts of {chars['min']} to {chars['max']} characters, median {chars['median']}"
    ]
    if known is not None and known.use == "evaluation" and known.rows != record["kept"]:
        lines.append(f"note: as published {record['name']} has {known.rows} problems, here are {record['kept']}")
    return "\n".join(lines)
