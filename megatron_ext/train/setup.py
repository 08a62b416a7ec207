"""A trainer from its configuration: data, models, the newest checkpoint's state, the rollout engine.

Data come first, so that a fault in them stops before anything large is built. The engine comes last because it takes
its share of the memory that is then free.
"""

from __future__ import annotations

import os
import random

import numpy as np
import torch

from megatron_ext.checkpoint.checkpoint import Checkpoints
from megatron_ext.checkpoint.weight_initializer import weights_identity
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import Config
from megatron_ext.data.curriculum import data_order
from megatron_ext.metrics.alarms import Alarms
from megatron_ext.model import parallel
from megatron_ext.model.architectures import find_family, read_architecture
from megatron_ext.rollout.registry import check_engine, create_engine
from megatron_ext.rollout.rewards.function_pool import FunctionPool
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.train.messages import tell, users_files
from megatron_ext.train.method_factory import create_method
from megatron_ext.train.models import build_learner, describe_kernels
from megatron_ext.train.resume import check_resume, resume
from megatron_ext.train.trainer import Trainer
from megatron_ext.train.training_data import load_problems
from megatron_ext.train.validation import load_validation
from megatron_ext.train.without_effect import without_effect


def build(config: Config, pool: RewardPool | FunctionPool) -> Trainer:
    """Everything a step needs, where the newest valid checkpoint left it."""
    _seed(config.train.seed)
    spec = check_engine(config.rollout)
    method = create_method(config)
    if not method.policy_steps(config.train.steps):
        tell(f"method.critic_only_steps: the policy does not learn in the {config.train.steps} steps of this run")
    for line in without_effect(config, method):
        tell(f"without effect: {line}")
    with users_files():
        architecture = read_architecture(read_hf_config(config.model.path), find_family(config.model.family))
    problems = load_problems(config, pool, vocab_size=architecture.vocab_size)
    validation = load_validation(config, pool, vocab_size=architecture.vocab_size)
    order = data_order(config, problems)
    with users_files():
        tell(f"kernels: {describe_kernels(config, architecture)}")
    learner = build_learner(config, method, architecture)
    reference = None if learner.reference is None else weights_identity(config.model)  # as they were just read
    checkpoints = Checkpoints(
        config.run_dir / "checkpoints",
        trained=learner.trained,
        frozen=learner.frozen,
        config=config.model_dump(),
        layout=config.parallel.model_dump(),
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
    )
    with users_files():
        loaded = checkpoints.load(check=lambda saved: check_resume(saved.config, config.model_dump()))
    if config.model.offload_optimizer:
        for each in learner.trained.values():
            each.offload()
    recordable = config.rollout.replays_sampling and config.rollout.top_k > 0
    engine = create_engine(
        config.model.path,
        config.rollout.model_copy(update={"max_response_tokens": config.longest_response}),
        dtype=config.model.dtype,
        max_prompt_tokens=config.data.max_prompt_tokens,
        log_dir=config.run_dir,
        keeps_support=recordable and not config.validation.every,
    )
    if recordable and config.validation.every and config.rollout.engine in ("vllm", "vllm_server"):
        tell("rollout.sampling_replay: a run that validates has no kept tokens recorded: the trainer recomputes them")
    trainer = Trainer(config, learner, engine, pool, problems, order, Alarms(config.alarms), checkpoints, validation)
    trainer.beside_training, trainer.reference_identity = spec.beside_training, reference
    if config.rollout.dynamic_sampling and spec.stops_early:
        trainer.stop_group = parallel.new_gloo()
    if loaded is not None:
        resume(trainer, loaded)
    return trainer


def reward_pool(config: Config) -> RewardPool | FunctionPool:
    """The workers that score responses, not yet started."""
    cores = len(os.sched_getaffinity(0))
    reward = config.reward
    ranks = config.parallel.ranks_per_node
    workers = max(1, reward.workers // ranks if reward.workers else min(16, cores // ranks))
    if reward.function:
        return FunctionPool(reward, workers)
    return RewardPool(
        workers,
        deadline_s=reward.deadline_s,
        max_timeout_share=reward.max_timeout_share,
        correct=reward.correct,
        wrong=reward.wrong,
        answer_format=config.prompt.answer_format,
    )


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
