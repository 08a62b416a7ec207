"""One model on one or several sets: prompts and lengths checked, responses sampled, scored and reduced to numbers.

Everything that can be refused is refused by ``ModelEvaluation(...)``; ``run`` loads the model if a response is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.positions import max_positions
from megatron_ext.config.schema import RolloutConfig
from megatron_ext.rollout.registry import check_engine

from ..progress import ToolProgress
from .fingerprint import SCORING, header
from .problem_set import ProblemSet, left_out
from .prompt import ChosenPrompt
from .samples_file import Samples, SamplesFile
from .sampling import Encoded, Lengths, Pool, SetEvaluation

REFILLS = 8  # batches after which an engine that refills its own runs empty, and what it did is written


class ModelEvaluation:
    """A model directory and the sets it is to be evaluated on. Raises ConfigError for what cannot be done."""

    def __init__(
        self,
        model: Path,
        sets: Sequence[ProblemSet],
        *,
        prompt: ChosenPrompt,
        rollout: RolloutConfig,
        samples_dir: Path | None,
        console: Console,
    ) -> None:
        """``samples_dir``: where responses are kept, a file for each set (None: nowhere)."""
        self.model, self.prompt, self.rollout, self.console = model, prompt, rollout, console
        self.hf = read_hf_config(model)
        check_engine(rollout)
        for note in prompt.notes:
            self._say(note)
        self.tokenizer = _tokenizer(model)
        self.chat_template_sha256 = prompt.chat_template_sha256(self.tokenizer)
        self.problem_sets = list(sets)
        encoded = [self._encode(each) for each in sets]  # all are checked before the first file is made
        self.left_out = [missing for _, missing, _ in encoded]
        self.sets = [
            SetEvaluation(each.plan.name, each.settings, problems, lengths, self._samples(each, samples_dir))
            for each, (problems, _, lengths) in zip(sets, encoded, strict=True)
        ]

    def run(self, pools: Mapping[str, Pool]) -> dict[str, dict[str, Any]]:
        """``set -> evaluation``, plain JSON. ``pools``: by answer format, that of the prompt.

        Raises VerifierError when rewards cannot be trusted.
        """
        scorer = pools[self.prompt.prompt.answer_format]
        todo = [len(each.todo()) for each in self.sets]
        for each, left in zip(self.sets, todo, strict=True):
            if there := len(each.encoded) * each.settings.samples - left:
                self._say(f"{each.name}: {there} of {there + left} responses are there")
        engine = self._engine() if any(todo) else None
        found = {}
        for problem_set, each, missing in zip(self.problem_sets, self.sets, self.left_out, strict=True):
            start, num_tokens = time.perf_counter(), 0
            if engine is not None:
                with ToolProgress(self.console) as progress:
                    num_tokens = each.sample(engine, scorer, progress, self._at_once())
            seconds = time.perf_counter() - start
            each.samples.close()
            found[each.name] = {
                **self._about(problem_set, each, missing),
                **each.result(scorer, self.prompt.prompt.answer_format),
                "time": {"rollout_s": seconds, "rollout_tokens_per_s": num_tokens / max(seconds, 1e-9)},
            }
        if engine is not None:
            engine.close()
        return found

    def _about(self, problem_set: ProblemSet, each: SetEvaluation, missing: dict[str, Any]) -> dict[str, Any]:
        """What the responses are of."""
        return {
            "model": str(self.model),
            "data": {"path": str(problem_set.plan.data), "sha256": problem_set.sha256},
            "prompt": self.prompt.record(),
            "chat_template_sha256": self.chat_template_sha256,
            "engine": self.rollout.engine,
            "lengths": asdict(each.lengths),
            "left_out": missing,
            "versions": {name: version(name) for name in (*SCORING, "transformers", "torch")},
        }

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _at_once(self) -> int:
        """How many responses are asked for, scored and written together."""
        return self.rollout.batch_size * (REFILLS if check_engine(self.rollout).continuous_batching else 1)

    def _encode(self, problem_set: ProblemSet) -> tuple[Encoded, dict[str, Any], Lengths]:
        from megatron_ext.data.dataset import encode_problems

        settings = problem_set.settings
        encoded, report = encode_problems(
            self.tokenizer,
            problem_set.problems,
            max_prompt_tokens=settings.max_prompt_tokens,
            prompt=self.prompt.prompt,
        )
        if report.faults:
            self._say(f"{problem_set.plan.name}: {report.summary()}")
        missing = problem_set.left_out["counts"] | report.counts
        listed = problem_set.left_out["problems"] + left_out(report)["problems"]
        lengths = Lengths.of(encoded, settings, max_positions(self.hf))
        self._check_lengths(problem_set, lengths)
        return encoded, {"counts": missing, "problems": listed}, lengths

    def _check_lengths(self, problem_set: ProblemSet, lengths: Lengths) -> None:
        if lengths.used_min == lengths.asked:
            return
        name, allowed = problem_set.plan.name, problem_set.settings.allow_shorter
        assert lengths.positions is not None
        longest = lengths.positions - lengths.used_min
        room = f"{lengths.used_min}" if lengths.used_min > 0 else "none"
        found = (
            f"--max-response-tokens: {name}: {self.model} has {lengths.positions} positions and the longest prompt "
            f"{longest} tokens, which leaves {room} for a response, but {lengths.asked} are asked for"
        )
        if lengths.used_min < 1:
            raise ConfigError(f"{found}; lower --max-prompt-tokens below {lengths.positions}")
        if not allowed:
            raise ConfigError(
                f"{found}. Lower --max-response-tokens to {lengths.used_min}, or take what fits with --allow-shorter: "
                "the result then says both"
            )
        self._say(
            f"{name}: responses have at most {lengths.used_min} to {lengths.used_max} tokens instead of "
            f"{lengths.asked}: {self.model} has {lengths.positions} positions"
        )

    def _samples(self, problem_set: ProblemSet, folder: Path | None) -> Samples:
        if folder is None:
            return Samples()
        plan = problem_set.plan
        prompt = self.prompt.prompt.model_dump()
        first = header(self.model, plan.name, problem_set.sha256, plan.settings, prompt, self.rollout.engine)
        return SamplesFile(folder / f"{plan.name}.jsonl", first)

    def _engine(self) -> Any:
        from megatron_ext.rollout.registry import create_engine

        response = max(each.lengths.used_max for each in self.sets)
        engine = create_engine(
            self.model,
            self.rollout.model_copy(update={"max_response_tokens": response}),
            dtype=self.hf.get("dtype") or self.hf.get("torch_dtype") or "float32",
            max_prompt_tokens=max(len(ids) for each in self.sets for _, ids in each.encoded),
            log_dir=Path("runs"),
        )
        return engine


def check_same_problems(evaluations: Mapping[str, ModelEvaluation]) -> None:
    """Raises ConfigError where models leave out different problems of a set, for then they cannot be compared."""
    (first, base), *others = evaluations.items()
    for label, other in others:
        for a, b in zip(base.sets, other.sets, strict=True):
            ids, own = ({problem.problem_id for problem, _ in each.encoded} for each in (a, b))
            if ids != own:
                only, other_only = (", ".join(sorted(each)[:5]) or "none" for each in (ids - own, own - ids))
                raise ConfigError(
                    f"{a.name}: prompts that are too long leave different problems to the models: {only} to {first} "
                    f"alone, {other_only} to {label} alone; raise --max-prompt-tokens, or evaluate them one by one"
                )


def open_pools(stack: ExitStack, workers: int, prompts: Sequence[ChosenPrompt]) -> dict[str, Pool]:
    """A pool for each answer format of the prompts, and for boxed answers, as which golds are checked."""
    from megatron_ext.rollout.rewards.reward_pool import RewardPool

    formats = dict.fromkeys(["boxed", *(each.prompt.answer_format for each in prompts)])
    return {name: stack.enter_context(RewardPool(workers, answer_format=name)) for name in formats}


def _tokenizer(model: Path) -> Any:
    from megatron_ext.rollout.model_files import load_tokenizer

    try:
        return load_tokenizer(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {model} cannot be loaded: {error}") from None
