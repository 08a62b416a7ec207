"""A run from its configuration to its last checkpoint: sync, rollout, reward, train, save, again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import cpu_compat
from megatron_ext.checkpoint.collectives import on_rank_0
from megatron_ext.config.schema import Config
from megatron_ext.metrics import warnings_log
from megatron_ext.metrics.display import Watch
from megatron_ext.metrics.glossary import Glossary
from megatron_ext.metrics.spans import Span, idle_shares
from megatron_ext.metrics.writer import MetricsWriter, sample_record, token_texts, write_config, write_planner
from megatron_ext.model import parallel
from megatron_ext.rollout.base import RolloutError
from megatron_ext.train.ahead import sampled
from megatron_ext.train.balance import sequence_cost
from megatron_ext.train.collect_rollouts import exchange
from megatron_ext.train.messages import file_fault, tell
from megatron_ext.train.method_factory import roles_of
from megatron_ext.train.setup import build, reward_pool
from megatron_ext.train.signals import REQUEUE, StopSignals
from megatron_ext.train.timeline import describe_run, gather
from megatron_ext.train.trainer import StepRecord, Trainer
from megatron_ext.types import Episode, TokenStats

DONE = 0  # exit code: finished


def run(config: Config) -> int:
    """Train until ``train.steps`` or a signal; returns the exit code. Continues from the newest valid checkpoint.

    Raises ConfigError (data or configuration), VerifierError, AlarmError, CheckpointError or TrainingError.
    """
    signals = StopSignals()
    cpu_compat.enter()
    parallel.initialize(config.parallel, seed=config.train.seed, hang_minutes=config.train.hang_minutes)
    with reward_pool(config) as pool:
        trainer = build(config, pool)
        glossary = Glossary(trainer.learner.method.glossary())
        writer = _open_files(trainer, glossary)
        signals.defer()
        with writer or nullcontext(), _watch(trainer, glossary) as watch:
            train(trainer, signals, writer, watch)
        if writer is not None:
            _tell_lines(writer)
    dist.barrier(group=parallel.gloo())
    trainer.engine.close()  # last: vLLM takes the process group down with it
    step, steps = trainer.step, config.train.steps
    if step < steps and trainer.alarms.stopping:
        raise trainer.alarms.stopped()
    if step >= steps and trainer.unfinished is None:
        return DONE
    tell(f"stopped after step {step} of {steps}: the state is saved; run the same command again")
    return REQUEUE


def train(trainer: Trainer, signals: StopSignals, writer: MetricsWriter | None, watch: Watch) -> None:
    """Train until the last step, a signal or an alarm that stops the run, and save."""
    steps = trainer.config.train.steps
    validate_first(trainer, signals, writer, watch)
    if trainer.unfinished is not None:
        finish_step(trainer, trainer.unfinished, signals, writer, watch)
    while trainer.step < steps and not _is_asked_to_stop(signals) and not trainer.alarms.stopping:
        finish_step(trainer, train_step(trainer, watch), signals, writer, watch)
    trainer.save(watch)
    trainer.publish(watch, wait=True)


def validate_first(trainer: Trainer, signals: StopSignals, writer: MetricsWriter | None, watch: Watch) -> None:
    """Validate the policy that training begins with. Its record is that of step 0."""
    validation = trainer.validation
    if trainer.step == 0 and validation.is_due(0):
        found = trainer.validate(watch, lambda: _is_asked_to_stop(signals))
        if found is not None:
            tell(validation.take(0, found))
    if trainer.recorded == 0 and validation.baseline:  # also where the files begin anew
        times = watch.times()
        clock = {name: times[name] for name in ("time/validation_s",) if name in times}
        _write(writer, 0, validation.baseline | clock, [], None)


def finish_step(
    trainer: Trainer, record: StepRecord, signals: StopSignals, writer: MetricsWriter | None, watch: Watch
) -> None:
    """Validate and save where either is due, and record the step; a validation that a signal ends leaves it unfinished,
    for the checkpoint to hold."""
    metrics, samples = record
    trainer.unfinished = None
    if trainer.validation.is_due(trainer.step):
        found = trainer.validate(watch, lambda: _is_asked_to_stop(signals))
        if found is None:
            trainer.unfinished = metrics | watch.times(), samples
            return
        metrics |= found
        tell(trainer.validation.take(trainer.step, found))
    if trainer.is_due():
        trainer.save(watch)
    metrics |= watch.times()
    ranks = gather(watch)
    if ranks is not None:
        metrics |= idle_shares(ranks)
    _write(writer, trainer.step, metrics, samples, ranks)
    trainer.publish(watch, wait=False)
    watch.step(trainer.step, metrics)


def train_step(trainer: Trainer, watch: Watch) -> StepRecord:
    """One rollout step: sync, sample, score, update. All ranks have just met."""
    watch.restart()
    config, cost = trainer.config, sequence_cost(trainer.learner.policy.architecture)
    trainer.begin_stage()
    with watch.phase("sync"):
        trainer.sync()
    with sampled(trainer, watch) as batch:
        episodes, imbalance = exchange(batch, config.train.mini_batch_prompts, cost=cost)
        stale = {e.sample.weight_version for e in episodes} - {batch.version}
        if stale:
            raise RolloutError(f"rollout: samples of weight versions {sorted(stale)}, expected {batch.version} only")
        lag = trainer.step - batch.version
        with trainer.optimizers_present():
            metrics, old = trainer.learner.step(episodes, watch, lag=lag)
    values, warnings = trainer.alarms.check(metrics)
    metrics |= trainer.engine.metrics() | {"data/imbalance": imbalance} | values | batch.metrics
    if trainer.stop_group is not None:
        metrics["speed/dropped_responses"] = float(batch.num_dropped)
    if config.rollout.max_lag:
        metrics["rollout/lag"] = float(lag)
    trainer.step += 1
    for line in warnings:
        tell(f"step {trainer.step}: {line}")
    return metrics, _samples(trainer, episodes, old)


def _is_asked_to_stop(signals: StopSignals) -> bool:
    """Whether any rank has been; the same answer on every rank."""
    flag = torch.tensor([int(signals.received)])
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=parallel.gloo())  # rank 0 may be writing for long
    return bool(flag)


def _watch(trainer: Trainer, glossary: Glossary) -> Watch:
    config, show = trainer.config, dist.get_rank() == 0
    return Watch(config.train.steps, resume_step=trainer.recorded, title=config.name, glossary=glossary, show=show)


def _open_files(trainer: Trainer, glossary: Glossary) -> MetricsWriter | None:
    """The run's configuration, on what it runs, and, on rank 0, the writer that goes on after what is recorded."""
    config, step = trainer.config, trainer.recorded
    described = describe_run(roles_of(config, trainer.learner.method.needs), first_step=step + 1)

    def open_files() -> None:
        write_config(config.run_dir, config.model_dump())
        if step < config.train.steps:  # else nothing will be measured on what this start runs on
            write_planner(config.run_dir, described)
        opened.append(
            MetricsWriter(
                config.run_dir,
                trackers=config.log.trackers,
                total_steps=max(config.train.steps, trainer.step),
                resume_step=step,
                glossary=glossary,
            )
        )

    opened: list[MetricsWriter] = []
    on_rank_0(open_files, file_fault)
    if (folder := warnings_log.write_to(config.run_dir)) is not None:
        tell(f"warnings of Megatron, torch and transformers: {folder}")
    if opened:
        _tell_lines(opened[0])
    return opened[0] if opened else None


def _samples(trainer: Trainer, episodes: Sequence[Episode], old: TokenStats) -> list[dict[str, Any]]:
    """The first responses of different prompts, token by token, for the report, which rank 0 writes."""
    if dist.get_rank() != 0:
        return []
    num = trainer.config.rollout.samples
    chosen = range(0, len(episodes), num)[: trainer.config.log.samples]
    assert old.entropy is not None
    ends = torch.tensor([len(e.sample.response_ids) for e in episodes]).cumsum(0).tolist()
    records = []
    for i in chosen:
        span = slice(ends[i] - len(episodes[i].sample.response_ids), ends[i])
        texts = token_texts(trainer.engine.tokenizer.decode, episodes[i].sample.response_ids)
        stats = (old.entropy[span].tolist(), old.logprob[span].tolist())
        group_reward = sum(episode.reward.value for episode in episodes[i : i + num]) / num
        records.append(sample_record(episodes[i], texts, *stats, group_reward=group_reward))
    return records


def _write(
    writer: MetricsWriter | None,
    step: int,
    metrics: dict[str, float],
    samples: list[dict[str, Any]],
    ranks: Sequence[Sequence[Span]] | None,
) -> None:
    """A step's metrics, responses and timeline into the run's files, on rank 0, which has the writer."""
    if writer is not None:
        if ranks is not None:
            writer.write_timeline(step, ranks)
        writer.write(step, metrics, samples)
        _tell_lines(writer)


def _tell_lines(writer: MetricsWriter) -> None:
    for line in writer.lines():
        tell(line)
