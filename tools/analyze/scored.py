"""Responses token by token: the text, log-probability and entropy of each token, of a model or of a run's own record.

A model scores the responses of a samples file (forward.py), after the prompts that evaluation would give it. A run
folder holds what the policy said of the responses that training recorded (``log.samples``), rounded to 4 decimals.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import PromptConfig
from megatron_ext.metrics.writer import SAMPLES

from ..progress import ToolProgress
from ..report.data import read_responses
from .inputs import Problems, SampleRow, kind_of, labels_of, prompts_of, read_problems, read_samples

if TYPE_CHECKING:
    from megatron_ext.methods.base import Needs
    from megatron_ext.types import TokenStats

    from .forward import Scorer


@dataclass(frozen=True)
class Scored:
    """One response. ``entropy`` and ``logprob`` are ``[T]`` fp64 in nats, ``texts`` each token's text."""

    problem: tuple[str, str]
    texts: tuple[str, ...]
    entropy: np.ndarray
    logprob: np.ndarray
    correct: bool | None = None
    step: int = 0
    group_reward: float | None = None
    reward: float | None = None
    truncated: bool = False
    ids: tuple[int, ...] = ()
    stats: TokenStats | None = None


@dataclass(frozen=True)
class Source:
    """The responses of one input. ``origin`` and ``notes`` say in words what they are."""

    label: str
    path: Path
    kind: str
    responses: list[Scored]
    origin: str
    notes: list[str] = field(default_factory=list)

    @property
    def entropy(self) -> np.ndarray:
        return np.concatenate([response.entropy for response in self.responses])

    @property
    def texts(self) -> list[str]:
        return [text for response in self.responses for text in response.texts]

    def described(self) -> dict[str, Any]:
        """For the JSON of an analysis."""
        return {
            "input": str(self.path),
            "origin": self.origin,
            "notes": self.notes,
            "responses": len(self.responses),
            "tokens": int(sum(len(response.texts) for response in self.responses)),
        }


def sources(options: argparse.Namespace, console: Console, *, needs: Needs | None = None) -> list[Source]:
    """The token-level responses of ``options.inputs``, in order. Raises ConfigError.

    Models need ``--samples`` (one for all, or one for each) and ``--data``; ``needs`` are statistics besides
    log-probability and entropy.
    """
    labels = labels_of(options.inputs, options.labels)
    kinds = [kind_of(path) for path in options.inputs]
    if bad := [path for path, kind in zip(options.inputs, kinds, strict=True) if kind not in ("run", "model")]:
        raise ConfigError(f"{bad[0]}: holds no entropies; give a model and --samples, or the folder of a run")
    files = iter(paired_samples(options, [kind == "model" for kind in kinds]))
    found = []
    for label, path, kind in zip(labels, options.inputs, kinds, strict=True):
        if kind == "run":
            found.append(of_run(label, path, options.steps, options.limit))
        else:
            found.append(of_model(label, path, next(files), options, console, needs))
    return found


def paired_samples(options: argparse.Namespace, is_model: Sequence[bool]) -> list[Path]:
    """A samples file for each model. Raises ConfigError where their numbers do not fit."""
    count = sum(is_model)
    if not count:
        return []
    if not options.samples:
        raise ConfigError("--samples: found none; a model needs responses to score: the .jsonl files of evaluate")
    if len(options.samples) not in (1, count):
        raise ConfigError(
            f"--samples: found {len(options.samples)} for {count} models, expected one for all of them or one for each"
        )
    return list(options.samples) * (count if len(options.samples) == 1 else 1)


def of_run(label: str, path: Path, steps: tuple[int, int] | None, limit: int | None = None) -> Source:
    """What training recorded. Raises ConfigError where there is nothing."""
    first, last = steps or (0, 2**53)
    try:
        rows = [row for row in read_responses(path / SAMPLES) if first <= row.step <= last][:limit]
    except ValueError as error:
        raise ConfigError(str(error)) from None
    found = [
        Scored(
            problem=("", row.problem_id),
            texts=tuple(row.tokens),
            entropy=np.array([math.nan if value is None else value for value in row.entropy], dtype=np.float64),
            logprob=np.array([math.nan if value is None else value for value in row.logprob], dtype=np.float64),
            correct=row.outcome == "correct",
            step=row.step,
            reward=row.reward,
            group_reward=row.group_reward,
            truncated=row.truncated,
        )
        for row in rows
    ]
    known = [row for row in found if len(row.texts) and np.isfinite([row.entropy, row.logprob]).all()]
    if not known:
        among = f" of steps {first}-{last}" if steps else ""
        raise ConfigError(
            f"{path}: no response{among} in {SAMPLES}; train with log.samples above 0, or give an export and --samples"
        )
    dropped = len(found) - len(known)
    notes = [f"{dropped} responses without tokens or with a number that is not finite are left out"] if dropped else []
    origin = f"responses recorded in training, steps {known[0].step} to {known[-1].step}, rounded to 4 decimals"
    return Source(label, path, "run", known, origin, notes)


def of_model(
    label: str, path: Path, samples: Path, options: argparse.Namespace, console: Console, needs: Needs | None = None
) -> Source:
    """The model's statistics of the responses of a samples file, computed once for equal arguments."""
    responses, notes = _scored(
        path, samples, tuple(options.data), options.limit, options.temperature, options.dtype, needs, _Quiet(console)
    )
    origin = f"responses of {samples} under {path}, temperature {options.temperature:g}, {options.dtype}"
    return Source(label, path, "model", responses, origin, notes)


class _Quiet:
    """A console that makes no difference to a cache."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Quiet)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=4)
def _scored(
    path: Path,
    samples: Path,
    data: tuple[Path, ...],
    limit: int | None,
    temperature: float,
    dtype: str,
    needs: Needs | None,
    quiet: _Quiet,
) -> tuple[list[Scored], list[str]]:
    from megatron_ext.methods.base import Needs

    from .forward import Scorer

    rows = read_samples(samples, limit=limit)
    problems = read_problems(data).of_samples(row.set for row in rows)
    rows, others = problems.known_sets(rows)
    scorer = load(path, temperature, dtype)
    prompts = prompt_ids(scorer, rows, problems, prompts_of(samples))
    responses, notes = response_ids(scorer, rows)
    if others:
        notes.append(f"sets without a problem in --data are left out: {', '.join(others)}")
    kept = [i for i, ids in enumerate(responses) if ids]
    if not kept:
        raise ConfigError(f"--samples: every response of {samples} is empty; expected text")
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept)} empty responses are left out")
    assert isinstance(scorer, Scorer)
    with ToolProgress(quiet.console) as progress:
        task = progress.add_task("scoring", total=len(kept))
        pairs = [(prompts[rows[i].problem], responses[i]) for i in kept]
        stats = scorer.score(pairs, needs or Needs(), lambda done: progress.advance(task, done))
    texts = TokenTexts(scorer.tokenizer)
    return [
        Scored(
            problem=rows[i].problem,
            texts=tuple(map(texts, responses[i])),
            entropy=_array(each.entropy),
            logprob=_array(each.logprob),
            correct=rows[i].is_correct,
            truncated=rows[i].truncated,
            ids=tuple(responses[i]),
            stats=each,
        )
        for i, each in zip(kept, stats, strict=True)
    ], notes


@lru_cache(maxsize=1)
def load(path: Path, temperature: float, dtype: str) -> Scorer:
    """A model, kept until the next one is asked for."""
    from .forward import Scorer

    return Scorer.load(path, temperature=temperature, dtype=dtype)


def prompt_ids(
    scorer: Scorer, rows: Sequence[SampleRow], problems: Problems, given: Mapping[str, PromptConfig]
) -> dict[tuple[str, str], tuple[int, ...]]:
    """What the model reads of the samples' problems: in the prompt of the samples' set (``given``), else in its own.

    Raises ConfigError where problems are missing, or a prompt cannot be made.
    """
    from megatron_ext.data.prompts import NO_PROMPT, encode_prompts, read_prompt

    if not problems:
        raise ConfigError("--data: found none; a model reads a response after its prompt: give the problem files")
    keys = list(dict.fromkeys(row.problem for row in rows))
    own = read_prompt(scorer.path) or NO_PROMPT
    found: dict[tuple[str, str], tuple[int, ...]] = {}
    for name in dict.fromkeys(name for name, _ in keys):
        mine = [key for key in keys if key[0] == name]
        prompt = given.get(name, own)
        encoded = encode_prompts(scorer.tokenizer, [problems.require(key) for key in mine], prompt)
        found |= {key: ids for key, (_, ids) in zip(mine, encoded, strict=True)}
    return found


def response_ids(scorer: Scorer, rows: Sequence[SampleRow]) -> tuple[list[list[int]], list[str]]:
    """The tokens of each response, and what to say of them: their own where this tokenizer reads them as the text."""
    found, tokenised = [], 0
    for row in rows:
        ids = row.response_ids
        if ids is None or _reads_otherwise(scorer, ids, row.text):
            tokenised += 1
            ids = scorer.ids(row.text)
        found.append(ids)
    notes = (
        [
            f"{tokenised} of {len(rows)} responses have no token ids of this tokenizer; their text was tokenised, which"
            " leaves out the end token and may cut words otherwise than the sampler did"
        ]
        if tokenised
        else []
    )
    return found, notes


def _reads_otherwise(scorer: Scorer, ids: Sequence[int], text: str) -> bool:
    if any(not 0 <= token < scorer.vocab_size for token in ids):
        return True
    return scorer.tokenizer.decode(ids, skip_special_tokens=True) != text


class TokenTexts:
    """A token's text, remembered; with its leading space also where decoding alone would drop it."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._known = tokenizer, {}

    def __call__(self, token: int) -> str:
        if token not in self._known:
            piece = self._tokenizer.convert_ids_to_tokens(token) or ""
            text = self._tokenizer.decode([token])
            leads = isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" ")
            self._known[token] = f" {text}" if leads else text
        return self._known[token]


def _array(value: Any) -> np.ndarray:
    assert value is not None
    return value.double().numpy()
