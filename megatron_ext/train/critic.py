"""The critic of a training step: its values before the first update, and its gradient on a mini-batch."""

from __future__ import annotations

from torch import Tensor

from megatron_ext.methods.base import Method, Reducer
from megatron_ext.model import critic as model
from megatron_ext.model import parallel
from megatron_ext.model.trainable import TrainableModel, totals
from megatron_ext.train.packing import MiniBatch
from megatron_ext.types import Batch


def values(critic: TrainableModel, mini_batch: MiniBatch) -> Tensor:
    """Values of a mini-batch without gradient, ``[T]`` in the order of its tokens, on every stage."""
    results = model.values(critic.model, mini_batch.micro_batches)
    joined = None if results is None else {"value": mini_batch.join(results)}
    return parallel.from_last_stage(joined)["value"]


def gradients(
    critic: TrainableModel, method: Method, batch: Batch, mini_batch: MiniBatch, reduce: Reducer
) -> dict[str, float]:
    """Leave the gradient of the mini-batch's value loss in the critic's buffers; the metrics of its tokens."""
    parts = mini_batch.split(batch)
    sums: list[dict[str, Tensor]] = []

    def loss(number: int, value: Tensor) -> Tensor:
        micro_batch, _ = parts[number]
        sums.append(method.value_metrics(micro_batch, value.detach()))
        return method.value_loss(micro_batch, value).sum()

    critic.zero_grad()
    model.values_backward(critic.model, mini_batch.micro_batches, loss)
    return totals(sums, batch, reduce)
