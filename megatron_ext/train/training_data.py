"""The training problems of a run, read and encoded once for all ranks."""

from __future__ import annotations

from typing import Any

from megatron_ext.checkpoint.collectives import on_rank_0
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config
from megatron_ext.data.dataset import load_training_data
from megatron_ext.rollout.model_files import load_tokenizer
from megatron_ext.rollout.rewards.function_pool import FunctionPool
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.train.collect_rollouts import EncodedProblem
from megatron_ext.train.messages import file_fault, tell


def load_problems(config: Config, pool: RewardPool | FunctionPool, *, vocab_size: int) -> list[EncodedProblem]:
    """Rank 0 reads, verifies and encodes the data and tells the others; a fault is raised on every rank."""

    def load() -> list[EncodedProblem]:
        score = None if isinstance(pool, FunctionPool) else pool.score
        problems, lines = load_training_data(config, score=score, tokenizer=tokenizer_of(config, vocab_size))
        for line in lines:
            tell(line)
        return problems

    return on_rank_0(load, file_fault)


def tokenizer_of(config: Config, vocab_size: int) -> Any:
    """The model's tokenizer. Raises ConfigError if it has ids that the model has no embedding for."""
    path = config.model.path
    try:
        tokenizer = load_tokenizer(path)
    except Exception as error:  # transformers and tokenizers have no error of their own for a damaged file
        raise ConfigError(f"model.path: the tokenizer in {path} cannot be loaded: {error}") from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise ConfigError(
            f"model.path: the tokenizer in {path} has token ids up to {largest}, expected less than config.json's "
            f"vocab_size {vocab_size}; take both from the same model"
        )
    return tokenizer
