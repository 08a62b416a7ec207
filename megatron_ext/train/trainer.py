"""A trainer: what a run's steps work with, and the state of it that a checkpoint holds.

The rollout engine and the optimizer may be too large to share a device. Under ``model.offload_optimizer`` optimizer
state and gradients are there only while the engine sleeps: it sleeps from the end of sampling until the next step's
sync, is created when the optimizer is already at rest, and checkpoints are saved from where the state lies at rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from megatron_ext.checkpoint.checkpoint import Checkpoints
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config
from megatron_ext.data.sampler import DataOrder
from megatron_ext.metrics.alarms import Alarms
from megatron_ext.metrics.display import Watch
from megatron_ext.model.hf_weights import PolicyWeights
from megatron_ext.rollout.base import RolloutEngine
from megatron_ext.rollout.rewards.function_pool import FunctionPool
from megatron_ext.rollout.rewards.reward_pool import RewardPool
from megatron_ext.train.collect_rollouts import EncodedProblem
from megatron_ext.train.messages import tell
from megatron_ext.train.sampled_batch import SampledBatch
from megatron_ext.train.step import Learner
from megatron_ext.train.validation import Validation

StepRecord = tuple[dict[str, float], list[dict[str, Any]]]  # a step's metrics, and its responses for the report


@dataclass
class Trainer:
    """Everything a step needs, built once (setup.py)."""

    config: Config
    learner: Learner
    engine: RolloutEngine
    pool: RewardPool | FunctionPool
    problems: list[EncodedProblem]
    order: DataOrder
    alarms: Alarms
    checkpoints: Checkpoints
    validation: Validation
    beside_training: bool = False  # whether the engine generates while the policy trains
    stop_group: dist.ProcessGroup | None = None  # on which ranks agree to stop a round of dynamic sampling early
    reference_identity: str | None = None  # of the weights the KL is taken to; None without a reference model
    weights: PolicyWeights = field(init=False)  # that the engine was given last
    step: int = 0  # training steps done
    ahead: deque[SampledBatch] = field(default_factory=deque)  # sampled and not yet trained on, the next step's first
    unfinished: StepRecord | None = None  # of a step whose validation is not done

    @property
    def recorded(self) -> int:
        """Steps that are in the run's files."""
        return self.step - (self.unfinished is not None)

    def sync(self) -> None:
        """Stream the policy's weights to the engine, stamped with the number of steps they have seen."""
        self.weights = PolicyWeights(self.learner.policy)
        self.engine.update_weights(self.weights, self.step)

    def validate(self, watch: Watch, is_stopped: Callable[[], bool]) -> dict[str, float] | None:
        """Metrics of the policy on the validation's problems; None if the run is to stop before they are known."""
        settings, world = self.config.validation, self.config.parallel.world
        with watch.phase("validation", total=-(-len(self.validation.problems) * settings.samples // world)) as phase:
            self.sync()
            found = self.validation.measure(self.engine, self.pool, self.step, phase, is_stopped)
            self.engine.sleep()
        return found

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

    def begin_stage(self) -> None:
        """Under ``data.stage_restart``, begin the step's stage, where it is a new one, like a run of its own."""
        if not self.config.data.stage_restart or self.step not in self.order.starts[1:]:
            return
        for each in self.learner.trained.values():
            each.restart()
        if self.learner.reference is not None:
            self.learner.reference.become(self.learner.policy)
        tell(f"step {self.step + 1}: a stage begins with a new optimizer, and the reference is the policy as it is")

    def next_problems(self, count: int, *, step: int) -> list[EncodedProblem]:
        """The next ``count`` problems, for step ``step``."""
        return [self.problems[i] for i in self.order.take(count, step=step)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside models, optimizers and schedules: rank 0's. Collective."""
        state = {
            "method": self.learner.method.state_dict(),
            "order": self.order.state_dict(),
            "bad_steps": {name: each.bad_steps for name, each in self.learner.trained.items()},
            "alarms": self.alarms.state_dict(),
            "reference": self.reference_identity,
            "architecture": asdict(self.learner.policy.architecture),
        }
        if self.config.validation.every or self.validation.best_step is not None:
            state["validation"] = self.validation.state_dict()
        if self.unfinished is not None:
            state["unfinished"] = self.unfinished
        if self.ahead:
            state["ahead"] = [batch.state_dict() for batch in self.ahead]
        return state

    def load_state(self, step: int, state: dict[str, Any]) -> None:
        if state["reference"] != self.reference_identity:
            raise ConfigError(
                "resume: the reference model is not the checkpoint's: the weights in "
                f"{self.config.model.weights or self.config.model.path} differ; restore model.path and model.weights, "
                "or start a new run with another name"
            )
        own = asdict(self.learner.policy.architecture)
        saved = state.get("architecture", own)  # a checkpoint may be older than the key
        if differing := [name for name in own if saved.get(name) != own[name]]:
            listed = ", ".join(f"{name} {saved.get(name)}, now {own[name]}" for name in differing)
            raise ConfigError(
                f"resume: {self.config.model.path} is not the checkpoint's model ({listed}); restore model.path, or "
                "start a new run with another name"
            )
        self.step = step
        try:
            self.learner.method.load_state_dict(state["method"])
        except ValueError as error:
            raise ConfigError(f"resume: {error}") from None
        self.order.load_state_dict(state["order"])
        for name, each in self.learner.trained.items():
            each.bad_steps = state["bad_steps"][name]
        self.alarms.load_state_dict(state["alarms"])
        self.unfinished = state.get("unfinished")
        if self.unfinished is not None:
            self.checkpoints.step = None  # what this step's checkpoint holds will not be the state that it ends with
        self.ahead = deque(SampledBatch.of_state(batch) for batch in state.get("ahead", ()))
        if "validation" in state:
            if line := self.validation.load_state_dict(state["validation"]):
                tell(line)
            self.checkpoints.mark_best(self.validation.best_step)

    def is_due(self) -> bool:
        """Whether the run's configuration wants a checkpoint of this step, or it is the best validated one."""
        every = self.config.checkpoint.every
        is_due = self.step == self.config.train.steps or bool(every and self.step % every == 0)
        return is_due or self.step == self.validation.best_step

    def save(self, watch: Watch) -> None:
        """Begin the checkpoint of this step, unless there is one of this state."""
        if self.checkpoints.step != self.step:
            self.publish(watch, wait=True)
            with watch.phase("save"):
                self.checkpoints.save(self.step, self.state(), best=self.validation.best_step)

    def publish(self, watch: Watch, *, wait: bool) -> None:
        """Commit the checkpoint that is being written, if it is; ``time/save_s`` is what the run waited for saves.

        ``wait`` also for what is removed: a run ends with no other checkpoints than it keeps.
        """
        if not (wait or self.checkpoints.is_writing):
            return
        with watch.phase("save"):
            published = self.checkpoints.publish(wait=wait)
        if published is not None:
            watch.count("save_background", published.seconds)
