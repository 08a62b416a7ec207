"""What a rank owns of a model and its optimizer, as rectangles of the tensors that a checkpoint names.

Megatron's distributed optimizer gives each data-parallel rank a range of every flattened parameter: it alone steps
that range and keeps its fp32 master and both moments. The model's ShardedTensors say where a parameter lies in the
full tensor (layers and experts stacked, gate and up apart). A range of a matrix in row-major order is part of a
row, full rows, part of a row: at most three rectangles. They are written where they lie and filled in place, so
nothing is gathered, and the ranges of a group of ranks are together exactly one copy.

Weights have Megatron's keys (after the model's name, but for the policy), the optimizer's states those of its
``fully_reshardable`` layout: ``[chained_N.]optimizer.state.{param,exp_avg,exp_avg_sq}.KEY``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_ext.checkpoint.storage import Chunk, Shape, Target
from megatron_ext.model.optimizer_state import allocate, sub_optimizers
from megatron_ext.model.trainable import TrainableModel

STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece(Target):
    """``stored``: this rank writes it. Ranks that hold a copy (tensor-parallel ones, of norms) leave it to one."""

    stored: bool


def trained_pieces(name: str, each: TrainableModel) -> list[Piece]:
    """Weights, masters and moments of the ranges of the model ``name`` that this rank owns.

    An optimizer that never stepped gets its zero state here.
    """
    optimizer: Any = each.optimizer
    allocate(optimizer)
    sharded, prefix = _sharded_parameters(each.model.modules), "" if name == "policy" else f"{name}."
    found = []
    for number, part in enumerate(optimizer.chained_optimizers):
        # Megatron numbers optimizers where there are two: experts have their own, empty on a stage without any
        chained = "" if len(optimizer.chained_optimizers) == 1 else f"chained_{number}."
        for parameter, owned in _ranges(part):
            held = part._get_main_param_and_optimizer_states(parameter)
            tensors = {"": parameter.detach().view(-1)[owned.start : owned.stop]}
            tensors |= {f"{chained}optimizer.state.{state}.": held[state].detach() for state in STATES}
            for kind, tensor in tensors.items():
                found += _pieces(kind + prefix, sharded[parameter], parameter, owned, tensor)
    return found


def module_pieces(modules: Sequence[GPTModel], prefix: str = "") -> list[Piece]:
    """The weights of modules, all that this rank has of them; of ranks with the same, one stores them."""
    found = []
    for parameter, sharded in _sharded_parameters(modules).items():
        owned, flat = range(parameter.numel()), parameter.detach().view(-1)
        found += _pieces(prefix, sharded, parameter, owned, flat, shared=True)
    return found


def steps_taken(each: TrainableModel) -> int:
    """Steps of this rank's AdamW, by its own count: torch's in each parameter's state, the fused one's in the group.

    All that it has were stepped together; it may have none.
    """
    optimizer: Any = each.optimizer
    for part in _adams(optimizer):
        for state in [*part.state.values(), *part.param_groups]:
            if "step" in state:
                return int(state["step"])
    return 0


def set_steps(each: TrainableModel, steps: int) -> None:
    """Make AdamW go on after ``steps``."""
    optimizer: Any = each.optimizer
    for part in _adams(optimizer):
        if isinstance(part, torch.optim.AdamW):
            for moments in part.state.values():
                moments["step"] = torch.tensor(float(steps))  # one each: AdamW counts them up in place
        elif steps:
            for group in part.param_groups:
                group["step"] = steps


def groups_state(each: TrainableModel, steps: int) -> Any:
    """What Megatron's optimizers say of themselves without tensors, in the form of its own checkpoints."""
    optimizer: Any = each.optimizer
    found = []
    for part in optimizer.chained_optimizers:
        groups = [] if part.is_stub_optimizer else part.optimizer.param_groups
        plain = [{key: value for key, value in group.items() if key != "params"} | {"step": steps} for group in groups]
        found.append({"optimizer": {"param_groups": plain}, "param_state_sharding_type": "fully_reshardable"})
    return found[0] if len(found) == 1 else dict(enumerate(found))


def saved_steps(state: dict[Any, Any]) -> int:
    """The steps in a ``groups_state``, or in what Megatron wrote in its place."""
    parts = [state] if "optimizer" in state else list(state.values())
    return max(
        (int(group.get("step") or 0) for part in parts for group in part["optimizer"]["param_groups"]), default=0
    )


def rectangles(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """(offsets, sizes) of the rectangles that hold the elements [start, stop) of ``shape`` in row-major order."""
    if start >= stop:
        return
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the full rows
    if first > last:  # all in one row
        yield from _in_row(shape, last, start, stop)
        return
    yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: Shape, number: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    begin = number * math.prod(shape[1:])
    for offsets, sizes in rectangles(shape[1:], start - begin, stop - begin):
        yield (number, *offsets), (1, *sizes)


def _pieces(
    prefix: str, sharded: Any, parameter: Tensor, owned: range, flat: Tensor, *, shared: bool = False
) -> Iterator[Piece]:
    """Divide ``flat``, the elements ``owned`` of a flattened parameter or a state of them, along its ShardedTensors.

    ``shared``: data-parallel ranks have the same elements, not each its own.
    """
    parts = [sharded] if isinstance(sharded, ShardedTensor) else list(nested_values(sharded.build()))
    for part in parts:
        assert isinstance(part, ShardedTensor) and part.data is not None and part.data.is_contiguous(), part
        begin = int(part.data.storage_offset()) - int(parameter.storage_offset())
        start, stop = max(begin, owned.start), min(begin + part.data.numel(), owned.stop)
        stacked, position = part.prepend_axis_num, start
        for offsets, sizes in rectangles(tuple(part.local_shape), start - begin, stop - begin):
            inner = zip(part.global_offset[stacked:], offsets, strict=True)
            chunk = Chunk(
                key=prefix + part.key,
                shape=tuple(part.global_shape),
                offsets=(*part.global_offset[:stacked], *(a + b for a, b in inner)),
                sizes=(*[1] * stacked, *sizes),
                dtype=flat.dtype,
            )
            tensor = flat[position - owned.start :][: math.prod(sizes)]
            copies: Any = part.replica_id
            stored = not any(copies if shared else copies[:-1])  # the last number is the data-parallel rank
            yield Piece(chunk, tensor, stacked, part.allow_shape_mismatch, stored)
            position += math.prod(sizes)


def _sharded_parameters(modules: Sequence[GPTModel]) -> dict[Tensor, ShardedTensor | ShardedTensorFactory]:
    """Each parameter with what Megatron says of its offset in the full model."""
    found = {}
    for module in modules:
        tensors = module.sharded_state_dict(metadata={})
        named = {each.data: each for name, each in tensors.items() if not _is_extra(name)}
        parameters = set(module.parameters())
        assert named.keys() == parameters, [each.key for data, each in named.items() if data not in parameters]
        found |= named
    return found


def _is_extra(name: str) -> bool:
    """Transformer Engine's FP8 recipe state: pickled objects, and empty for the dtypes used here.

    A layer has one ``_extra_state``, a grouped layer one more for each further expert: ``_extra_state1`` and so on.
    """
    return re.search(r"(^|\.)_extra_state\d*$", name) is not None


def _ranges(part: Any) -> Iterator[tuple[Tensor, range]]:
    """The parameters of which this rank steps a part, and which elements of the flattened parameter."""
    for buckets in () if part.is_stub_optimizer else (b for ranges in part.gbuf_ranges for b in ranges.values()):
        for bucket in buckets:
            for parameter, where in bucket["param_map"].items():
                yield parameter, range(where["param"].start, where["param"].end)


def _adams(optimizer: Any) -> list[Any]:
    return [part.optimizer for part in sub_optimizers(optimizer)]
