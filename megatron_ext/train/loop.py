"""A run from its configuration to its last checkpoint: sync, rollout, reward, train, save, again.

The rollout engine and the optimizer may be too large to share a device. Under ``model.offload_optimizer`` optimizer
state and gradients are there only while the engine sleeps: it sleeps from the end of sampling until the next step's
sync, is created when the optimizer is already at rest, and checkpoints are saved from where the state lies at rest.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext import cpu_compat
from megatron_ext.checkpoint.checkpoint import Checkpoints, set_rng
from megatron_ext.checkpoint.collectives import on_rank_0
from megatron_ext.checkpoint.weight_initializer import WeightInitializer, weights_identity
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config
from megatron_ext.data.curriculum import data_order
from megatron_ext.data.dataset import load_training_data
from megatron_ext.data.sampler import DataOrder
from megatron_ext.metrics import warnings_log
from megatron_ext.metrics.alarms import Alarms
from megatron_ext.metrics.display import Watch
from megatron_ext.metrics.writer import MetricsWriter, sample_record, token_texts, write_config
from megatron_ext.model import kernels, parallel
from megatron_ext.model.architectures import Architecture, read_architecture
from megatron_ext.model.build import build_policy, build_reference
from megatron_ext.model.critic import build_critic
from megatron_ext.model.hf_weights import PolicyWeights
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.reference import Reference
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.rollout.base import RolloutEngine, RolloutError
from megatron_ext.rollout.model_files import load_tokenizer
from megatron_ext.rollout.registry import check_engine, create_engine
from megatron_ext.rollout.rewards.function_pool import FunctionPool
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.train.collect_rollouts import EncodedProblem, Rollouts
from megatron_ext.train.method_factory import create_method, optimizers
from megatron_ext.train.resume import check_resume
from megatron_ext.train.signals import REQUEUE, StopSignals
from megatron_ext.train.step import Learner
from megatron_ext.types import Episode, TokenStats

DONE = 0  # exit code: finished


@dataclass
class Trainer:
    """Everything a step needs, built once."""

    config: Config
    learner: Learner
    engine: RolloutEngine
    pool: RewardPool | FunctionPool
    problems: list[EncodedProblem]
    order: DataOrder
    alarms: Alarms
    checkpoints: Checkpoints
    step: int = 0  # training steps done

    def sync(self) -> None:
        """Stream the policy's weights to the engine, stamped with the number of steps they have seen."""
        self.engine.update_weights(PolicyWeights(self.learner.policy), self.step)

    @contextmanager
    def optimizers_present(self) -> Iterator[None]:
        """Optimizer state and gradients are on the device; under ``model.offload_optimizer`` only inside."""
        if not self.config.model.offload_optimizer:
            yield
            return
        for each in self.learner.trained.values():
            each.restore()
        yield
        for each in self.learner.trained.values():
            each.offload()

    def next_problems(self, count: int) -> list[EncodedProblem]:
        """The next ``count`` problems."""
        return [self.problems[i] for i in self.order.take(count, step=self.step)]

    def state(self) -> dict[str, Any]:
        return {
            "method": self.learner.method.state_dict(),
            "order": self.order.state_dict(),
            "bad_steps": {name: each.bad_steps for name, each in self.learner.trained.items()},
            "alarms": self.alarms.state_dict(),
            "reference": self.reference_identity(),
        }

    def load_state(self, step: int, state: dict[str, Any]) -> None:
        if state["reference"] != self.reference_identity():
            raise ConfigError(
                "resume: the reference model is not the checkpoint's: the weights in "
                f"{self.config.model.weights or self.config.model.path} differ; restore model.path and model.weights, "
                "or start a new run with another name"
            )
        self.step = step
        self.learner.method.load_state_dict(state["method"])
        self.order.load_state_dict(state["order"])
        for name, each in self.learner.trained.items():
            each.bad_steps = state["bad_steps"][name]
        self.alarms.load_state_dict(state["alarms"])

    def reference_identity(self) -> str | None:
        """Which weights the KL is taken to; None without a reference model."""
        return None if self.learner.reference is None else weights_identity(self.config.model)

    def save(self, watch: Watch) -> None:
        """Begin the checkpoint of this step, unless there is one."""
        if self.checkpoints.step != self.step:
            self.publish(watch, wait=True)
            with watch.phase("save"):
                self.checkpoints.save(self.step, self.state())

    def publish(self, watch: Watch, *, wait: bool) -> None:
        """Commit the checkpoint that is being written, if it is; ``time/save_s`` is what the run waited for saves."""
        if not self.checkpoints.is_writing:
            return
        with watch.phase("save"):
            published = self.checkpoints.publish(wait=wait)
        if published is not None:
            watch.count("save_background", published.seconds)


def run(config: Config) -> int:
    """Train until ``train.steps`` or a signal; returns the exit code. Continues from the newest valid checkpoint.

    Raises ConfigError (data or configuration), VerifierError, AlarmError, CheckpointError or TrainingError.
    """
    signals = StopSignals()
    cpu_compat.enter()
    parallel.initialize(config.parallel, seed=config.train.seed, hang_minutes=config.train.hang_minutes)
    is_rank_0 = dist.get_rank() == 0
    with _reward_pool(config) as pool:
        state = build(config, pool)
        steps = config.train.steps
        writer = _open_files(config, state.step)
        signals.defer()
        with writer or nullcontext(), Watch(steps, resume_step=state.step, title=config.name, show=is_rank_0) as watch:
            while state.step < steps and not _is_asked_to_stop(signals) and not state.alarms.stopping:
                metrics, samples = train_step(state, watch)
                if state.step == steps or (config.checkpoint.every and state.step % config.checkpoint.every == 0):
                    state.save(watch)
                metrics |= watch.times()
                if writer is not None:
                    writer.write(state.step, metrics, samples)
                    _tell_lines(writer)
                state.publish(watch, wait=False)
                watch.step(state.step, metrics)
            if state.step < steps:
                state.save(watch)
            state.publish(watch, wait=True)
        if writer is not None:
            _tell_lines(writer)
    dist.barrier(group=parallel.gloo())
    state.engine.close()  # last: vLLM takes the process group down with it
    if state.step < steps and state.alarms.stopping:
        raise state.alarms.stopped()
    if state.step >= steps:
        return DONE
    _tell(f"stopped after step {state.step} of {steps}: the state is saved; run the same command again")
    return REQUEUE


def train_step(run: Trainer, watch: Watch) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """One rollout step: sync, sample, score, update."""
    with watch.phase("sync"):
        run.sync()
    rollouts = Rollouts(run.config, run.engine, run.pool, run.step, watch)
    episodes, sampled = rollouts.collect(run.next_problems)
    stale = {e.sample.weight_version for e in episodes} - {run.step}
    if stale:
        raise RolloutError(f"rollout: samples of weight versions {sorted(stale)}, expected {run.step} only")
    run.engine.sleep()
    with run.optimizers_present():
        metrics, old = run.learner.step(episodes, watch)
    values, warnings = run.alarms.check(metrics)
    metrics |= (
        run.engine.metrics()
        | sampled
        | values
        | {"data/epoch": float(run.order.epoch), "data/stage": float(run.order.stage)}
    )
    run.step += 1
    for line in warnings:
        _tell(f"step {run.step}: {line}")
    return metrics, _samples(run, episodes, old)


def build(config: Config, pool: RewardPool | FunctionPool) -> Trainer:
    """Data first (a fault stops here), then models, optimizers, the newest checkpoint's state, and the engine.

    The engine comes last because it takes its share of the memory that is then free.
    """
    torch.manual_seed(config.train.seed)
    random.seed(config.train.seed)
    np.random.seed(config.train.seed)
    check_engine(config.rollout)
    method = create_method(config)
    with _users_files():
        architecture = read_architecture(read_hf_config(config.model.path))
    problems = _load_data(config, pool, architecture.vocab_size)
    order = data_order(config, [problem for problem, _ in problems])
    layout, model_options = parallel.model_layout(config.parallel), ModelOptions.from_config(config.model)
    overlap = parallel.overlap(config.parallel)
    _tell(f"kernels: {_kernels(config, architecture)}")
    with _users_files():
        start = WeightInitializer(config.model, architecture)  # before a model of any size is built
    policy = build_policy(architecture, layout, model_options, overlap=overlap, fused_head=config.model.fused_head)
    with _users_files():
        start.fill(policy.modules)
    reference: Reference | None = None
    if method.needs.reference:
        frozen = build_reference(architecture, layout, model_options, fused_head=config.model.fused_head)
        start.fill(frozen.modules)
        reference = Reference(frozen, device=cpu_compat.device(), offload=config.model.offload_reference)
    options = optimizers(config, method)
    actor, critic = TrainableModel.build(policy, options["optimizer"]), None
    if method.needs.value:
        value_model = build_critic(architecture, layout, model_options, fill=start.fill, overlap=overlap)
        critic = TrainableModel.build(value_model, options["critic"], section="critic")
    learner = Learner(config, method, actor, critic, reference)
    checkpoints = Checkpoints(
        config.run_dir / "checkpoints",
        trained=learner.trained,
        config=config.model_dump(),
        layout=config.parallel.model_dump(),
        keep=config.checkpoint.keep,
        asynchronous=config.checkpoint.asynchronous,
    )
    with _users_files():
        loaded = checkpoints.load(check=lambda saved: check_resume(saved.config, config.model_dump()))
    if config.model.offload_optimizer:
        for each in learner.trained.values():
            each.offload()
    engine = create_engine(
        config.model.path,
        config.rollout,
        dtype=config.model.dtype,
        max_prompt_tokens=config.data.max_prompt_tokens,
        log_dir=config.run_dir,
    )
    run = Trainer(config, learner, engine, pool, problems, order, Alarms(config.alarms), checkpoints)
    if loaded is not None:
        run.load_state(loaded.step, loaded.state)
        for line in loaded.refused:
            _tell(f"checkpoint: {line}")
        _tell(f"resuming after step {loaded.step} of {config.train.steps}")
        if loaded.rng is not None:
            set_rng(loaded.rng)
    return run


def _kernels(config: Config, architecture: Architecture) -> str:
    """What the layers run on, in one line. Raises ConfigError where that would not do."""
    try:
        return kernels.describe(
            architecture,
            tensor=config.parallel.tensor,
            dtype=getattr(torch, config.model.dtype),
            longest=config.longest_sequence,
            fusions=ModelOptions.from_config(config.model).fusions,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _is_asked_to_stop(signals: StopSignals) -> bool:
    """Whether any rank has been; the same answer on every rank."""
    flag = torch.tensor([int(signals.received)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=parallel.gloo())  # rank 0 may be writing for long
    return bool(flag)


def _load_data(config: Config, pool: RewardPool | FunctionPool, vocab_size: int) -> list[EncodedProblem]:
    """Rank 0 reads, verifies and encodes the data and tells the others; a fault is raised on every rank."""

    def load() -> list[EncodedProblem]:
        score = None if isinstance(pool, FunctionPool) else pool.score
        problems, lines = load_training_data(config, score=score, tokenizer=_tokenizer(config, vocab_size))
        for line in lines:
            _tell(line)
        return problems

    return on_rank_0(load, _users_fault)


def _tokenizer(config: Config, vocab_size: int) -> Any:
    """The model's. Raises ConfigError if it has ids that the model has no embedding for."""
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


def _users_fault(error: Exception) -> ConfigError | None:
    """What is wrong with the user's files."""
    return ConfigError(str(error)) if isinstance(error, (ValueError, OSError)) else None


@contextmanager
def _users_files() -> Iterator[None]:
    """What is wrong with the files that are read here is a ConfigError."""
    try:
        yield
    except Exception as error:
        if (fault := _users_fault(error)) is None:
            raise
        raise fault from error


def _reward_pool(config: Config) -> RewardPool | FunctionPool:
    cores = len(os.sched_getaffinity(0))
    reward = config.reward
    workers = reward.workers or min(16, max(1, cores // config.parallel.ranks_per_node))
    if reward.function:
        return FunctionPool(reward, workers)
    return RewardPool(
        workers,
        deadline_s=reward.deadline_s,
        max_timeout_share=reward.max_timeout_share,
        correct=reward.correct,
        wrong=reward.wrong,
    )


def _open_files(config: Config, step: int) -> MetricsWriter | None:
    """The run's configuration and, on rank 0, the writer that goes on after ``step``."""

    def open_files() -> None:
        write_config(config.run_dir, config.model_dump())
        opened.append(
            MetricsWriter(
                config.run_dir, trackers=config.log.trackers, total_steps=config.train.steps, resume_step=step
            )
        )

    opened: list[MetricsWriter] = []
    on_rank_0(open_files, _users_fault)
    if (folder := warnings_log.write_to(config.run_dir)) is not None:
        _tell(f"warnings of Megatron, torch and transformers: {folder}")
    if opened:
        _tell_lines(opened[0])
    return opened[0] if opened else None


def _samples(run: Trainer, episodes: Sequence[Episode], old: TokenStats) -> list[dict[str, Any]]:
    """The first responses of different prompts, token by token, for the report, which rank 0 writes."""
    if dist.get_rank() != 0:
        return []
    num = run.config.rollout.samples
    chosen = range(0, len(episodes), num)[: run.config.log.samples]
    assert old.entropy is not None
    ends = torch.tensor([len(e.sample.response_ids) for e in episodes]).cumsum(0).tolist()
    records = []
    for i in chosen:
        span = slice(ends[i] - len(episodes[i].sample.response_ids), ends[i])
        texts = token_texts(run.engine.tokenizer.decode, episodes[i].sample.response_ids)
        stats = (old.entropy[span].tolist(), old.logprob[span].tolist())
        group_reward = sum(episode.reward.value for episode in episodes[i : i + num]) / num
        records.append(sample_record(episodes[i], texts, *stats, group_reward=group_reward))
    return records


def _tell_lines(writer: MetricsWriter) -> None:
    for line in writer.lines():
        _tell(line)


def _tell(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
