"""The critic of a training step: its values before the first update, and its gradient on a mini-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.methods.base import Method, Reducer
from megatron_ext.model import critic as model
from megatron_ext.model import parallel
from megatron_ext.model.trainable import Trained, totals
from megatron_ext.train import packing
from megatron_ext.train.packing import Micros
from megatron_ext.types import Batch


def values(critic: Trained, micros: Micros) -> Tensor:
    """Values of a mini-batch without gradient, ``[T]`` in the order of its tokens, on every stage."""
    results = model.values(critic.model, [packed for _, packed in micros])
    joined = None
    if results is not None:
        joined = {"value": torch.cat(results)[packing.positions(micros).to(cpu_compat.device())]}
    return parallel.from_last_stage(joined)["value"]


def gradients(critic: Trained, method: Method, batch: Batch, micros: Micros, reduce: Reducer) -> dict[str, float]:
    """Leave the gradient of the mini-batch's value loss in the critic's buffers; the metrics of its tokens."""
    splits = [batch.rows(rows) for rows, _ in micros]
    sums: list[dict[str, Tensor]] = []

    def loss(number: int, value: Tensor) -> Tensor:
        micro, _ = splits[number]
        sums.append(method.value_metrics(micro, value.detach()))
        return method.value_loss(micro, value).sum()

    critic.zero_grad()
    model.values_backward(critic.model, [packed for _, packed in micros], loss)
    return totals(sums, batch, reduce)
