"""A Hugging Face model's statistics of given tokens, without sampling: exact over the whole vocabulary, in fp32.

Prompts and responses run through the model's body in right-padded batches of similar length (what is behind a token
does not change it). The output layer then sees LOGITS_AT_ONCE / V positions at a time, so that logits of a long
response over a large vocabulary never stand in memory together. The statistics are those of training's operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from megatron_ext import cpu_compat
from megatron_ext.config.errors import ConfigError
from megatron_ext.methods.base import Needs
from megatron_ext.ops import policy_stats
from megatron_ext.rollout.model_files import load_config, load_tokenizer
from megatron_ext.types import OF_MIN_P, TokenStats

LOGITS_AT_ONCE = 2**26  # 256 MB in fp32
BATCH_TOKENS = 8192  # of a batch, padding included
TOLERANCE = 1e-3  # of logits by both ways, in parts of the largest
Pair = tuple[Sequence[int], Sequence[int]]  # prompt and response ids


@dataclass
class Scorer:
    """A loaded model. ``temperature`` divides logits before every statistic, as in training."""

    path: Path
    model: Any
    tokenizer: Any
    temperature: float = 1.0

    @classmethod
    def load(cls, path: Path, *, temperature: float = 1.0, dtype: str = "float32") -> Scorer:
        """Raises ConfigError for a folder that holds no model."""
        logging.disable_progress_bar()
        try:
            load_config(path)  # refuses code of the model's own
            tokenizer = load_tokenizer(path)
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: no model that can be loaded: {str(error)[:300]}") from None
        return cls(path, model.to(cpu_compat.device()).eval(), tokenizer, temperature)

    @torch.no_grad()
    def score(
        self, pairs: Sequence[Pair], needs: Needs, on_done: Callable[[int], None] | None = None
    ) -> list[TokenStats]:
        """The statistics of each pair's response tokens, on the CPU. ``on_done`` is told of pairs that are done.

        Raises ConfigError for a pair that is longer than the model's positions, or has no prompt.
        """
        self._check(pairs)
        found: dict[int, TokenStats] = {}
        for batch in _batches([len(prompt) + len(response) for prompt, response in pairs]):
            hidden = self._hidden([[*pairs[i][0], *pairs[i][1]] for i in batch])
            spans = [(len(pairs[i][0]) - 1, len(pairs[i][0]) + len(pairs[i][1]) - 1) for i in batch]
            picked = torch.cat([hidden[row, start:stop] for row, (start, stop) in enumerate(spans)])
            targets = torch.tensor([token for i in batch for token in pairs[i][1]], dtype=torch.int64)
            stats = self._stats(picked, targets.to(picked.device), needs)
            end = 0
            for i in batch:
                start, end = end, end + len(pairs[i][1])
                found[i] = stats.map(lambda value, start=start, end=end: value[start:end])
            if on_done is not None:
                on_done(len(batch))
        return [found[i] for i in range(len(pairs))]

    @torch.no_grad()
    def next_token(
        self, prompts: Sequence[Sequence[int]], on_done: Callable[[int], None] | None = None
    ) -> Iterator[Tensor]:
        """For each prompt the log-probabilities ``[V]`` (fp32) of what comes next, in no fixed order."""
        self._check([(prompt, ()) for prompt in prompts])
        per_chunk = max(1, LOGITS_AT_ONCE // self.vocab_size)
        for batch in _batches([len(prompt) for prompt in prompts]):
            hidden = self._hidden([list(prompts[i]) for i in batch])
            last = torch.stack([hidden[row, len(prompts[i]) - 1] for row, i in enumerate(batch)])
            for part in last.split(per_chunk):
                yield from (self._logits(part) / self.temperature).log_softmax(-1).cpu()
            if on_done is not None:
                on_done(len(batch))

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _hidden(self, sequences: Sequence[list[int]]) -> Tensor:
        """``[sequences, longest, D]``: what the output layer sees."""
        longest = max(map(len, sequences))
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences], device=self.model.device)
        return self.model.base_model(input_ids=padded, use_cache=False).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden).float()

    def _stats(self, hidden: Tensor, targets: Tensor, needs: Needs) -> TokenStats:
        """``[T, D]``, ``[T]`` -> statistics ``[T]``."""
        by_probability = needs.min_p is not None
        fields = {name: name for name in ("logprob", "entropy")} | (OF_MIN_P if by_probability else {})
        if needs.nucleus_p is not None:
            fields["nucleus_entropy"] = "nucleus_entropy"
        per_chunk = max(1, LOGITS_AT_ONCE // self.vocab_size)
        parts = [
            policy_stats(
                self._logits(part),
                target,
                temperature=self.temperature,
                top_p=needs.nucleus_p,
                min_p=needs.min_p,
                nucleus="exclusive" if by_probability else needs.nucleus,
                want=tuple(fields),
                grad=(),
            )
            for part, target in zip(hidden.split(per_chunk), targets.split(per_chunk), strict=True)
            if len(target)
        ]
        if not parts:
            return TokenStats(**{field: torch.empty(0) for field in fields.values()})
        return TokenStats(**{field: torch.cat([part[n] for part in parts]).cpu() for n, field in fields.items()})

    def _check(self, pairs: Sequence[Pair]) -> None:
        most = getattr(self.model.config, "max_position_embeddings", None)
        longest = max((len(prompt) + len(response) for prompt, response in pairs), default=0)
        if most is not None and longest > most:
            raise ConfigError(
                f"{self.path}: the longest prompt and response have {longest} tokens, the model has {most} positions; "
                "take samples of at most that length"
            )
        largest = max((token for pair in pairs for part in pair for token in part), default=0)
        if largest >= self.vocab_size:
            raise ConfigError(
                f"{self.path}: found token {largest}, the model's vocabulary has {self.vocab_size}: the responses are "
                "of a model with another tokenizer; remove response_ids from the samples, and their text is tokenised"
            )
        if any(not prompt for prompt, _ in pairs):
            raise ConfigError(f"{self.path}: a prompt has no tokens; the first response token needs one before it")
        if pairs:
            self._check_output_layer([*pairs[0][0], *pairs[0][1]][:8])

    @torch.no_grad()
    def _check_output_layer(self, ids: list[int]) -> None:
        """Some architectures change logits behind the output layer, or scale what goes into it."""
        whole = self.model(input_ids=torch.tensor([ids], device=self.model.device), use_cache=False).logits[0].float()
        ours = self._logits(self._hidden([ids])[0])
        if not torch.allclose(whole, ours, atol=TOLERANCE * float(whole.abs().max())):
            raise ConfigError(
                f"{self.path}: {type(self.model).__name__} changes its logits behind the output layer, which analyses "
                "do not follow; expected an architecture like Qwen2, Qwen3 or Llama"
            )


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Positions of sequences of similar length, the longest first, at most BATCH_TOKENS with padding, or one."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        count = max(1, BATCH_TOKENS // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count
