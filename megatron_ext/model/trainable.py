"""A model with its optimizer and schedule, and the totals of what its micro-batches report: of policy and critic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_ext.config.schema import OptimizerConfig
from megatron_ext.methods.base import Reducer
from megatron_ext.model import parallel
from megatron_ext.model.build import Decay, Policy, build_optimizer, build_scheduler
from megatron_ext.model.optimizer_state import OptimizerState, reset, sub_optimizers
from megatron_ext.types import Batch


class TrainingError(RuntimeError):
    """Training cannot go on: gradients stay non-finite."""


@dataclass
class TrainableModel:
    """A model with its AdamW and its schedule, which go by ``options``, named ``section`` in the recipe."""

    model: Policy
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    section: str = "optimizer"
    options: OptimizerConfig = OptimizerConfig()
    bad_steps: int = 0  # updates in a row without a finite gradient

    def __post_init__(self) -> None:
        self._state = OptimizerState(self.optimizer)
        self._updated = False  # since the training step began

    @classmethod
    def build(cls, model: Policy, options: OptimizerConfig, section: str = "optimizer") -> TrainableModel:
        """The model, whose weights are loaded, with a fresh optimizer and schedule."""
        o = options
        decay = None if o.schedule == "constant" else Decay(o.schedule, o.min_lr, o.decay_steps)
        optimizer = build_optimizer(
            model,
            lr=o.lr,
            weight_decay=o.weight_decay,
            beta1=o.beta1,
            beta2=o.beta2,
            eps=o.eps,
            clip_grad=o.clip_grad,
            decay=decay,
        )
        optimizer.reload_model_params()
        scheduler = build_scheduler(
            optimizer, lr=o.lr, warmup_steps=o.warmup_steps, weight_decay=o.weight_decay, decay=decay
        )
        return cls(model, optimizer, scheduler, section, options)

    def offload(self) -> None:
        """Free the gradients and move the optimizer's state to host memory, until ``restore``."""
        self._state.offload()
        for chunk in self.model.chunks:
            chunk.offload_grad_buffers()

    def restore(self) -> None:
        self._state.restore()
        for chunk in self.model.chunks:
            chunk.restore_grad_buffers()

    def restart(self) -> None:
        """Forget the optimizer's moments and steps, also at rest; weights and schedule stay."""
        reset(self.optimizer)

    def zero_grad(self) -> None:
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def update(self, max_bad_steps: int) -> tuple[float, float]:
        """Clip and step with the gradient in the buffers: its norm before clipping, and the learning rate.

        A non-finite gradient skips the update on every rank, since its norm is everyone's: the norm is then NaN.
        Raises TrainingError after ``max_bad_steps`` in a row.
        """
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        lr = self.optimizer.param_groups[0]["lr"]
        if math.isfinite(norm):
            self.clip(norm)
            self.optimizer.step_with_ready_grads()
            if self.options.step_unit == "update":
                self.scheduler.step(1)
            self._updated, self.bad_steps = True, 0
            return norm, lr
        self.bad_steps += 1
        if self.bad_steps >= max_bad_steps:
            raise TrainingError(
                f"the gradient was not finite in {self.bad_steps} updates in a row (train.max_bad_steps); "
                f"the last checkpoint is intact: lower {self.section}.lr, or inspect metrics.jsonl"
            )
        return math.nan, lr

    def clip(self, norm: float) -> None:
        """Scale the gradient, whose norm is known, as the optimizer's own ``step`` would, which measures it again."""
        for part in sub_optimizers(self.optimizer):
            most, parameters = part.config.clip_grad, part.get_parameters()
            if most > 0 and parameters:
                clip_grad_by_total_norm_fp32(parameters, max_norm=most, total_norm=norm)

    def end_step(self) -> None:
        """A training step is over: its weights are gathered, and a schedule that counts such steps goes on."""
        self.model.finish_param_sync()
        if self.options.step_unit == "rollout" and self._updated:
            self.scheduler.step(1)
        self._updated = False


def totals(sums: list[dict[str, Tensor]], batch: Batch, reduce: Reducer) -> dict[str, float]:
    """What the micro-batches of ``batch`` reported on the last stage (nothing on the others), over all ranks.

    Names under ``loss/`` are sums, all others means over the mini-batch's tokens; the same on every rank.
    """
    own = {name: torch.stack([each[name].double() for each in sums]).sum() for name in sums[0]} if sums else None
    total = parallel.from_last_stage(own)
    reduced = reduce.sum(torch.stack(list(total.values()))).tolist()
    counted = max(batch.num_tokens, 1)
    return {
        name: value / (1 if name.startswith("loss/") else counted) for name, value in zip(total, reduced, strict=True)
    }
