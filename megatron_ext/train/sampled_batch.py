"""A batch that is sampled and scored and not yet trained on, and what of it a checkpoint holds.

In the checkpoint it is whole and independent of the layout: on load a data-parallel rank takes the groups that it would
have sampled. Arrays lie there end to end, as bytes, and the rest as JSON: what is saved again has the same bits, and
nothing is unpickled but tensors and text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_ext.checkpoint.collectives import gather_on_rank_0
from megatron_ext.kept_tokens import KeptTokens
from megatron_ext.model import groups, parallel
from megatron_ext.types import Episode, Problem, Reward, Sample

State = dict[str, Any]
ARRAYS = ("prompts", "responses", "logprobs", "support_ids", "support_starts", "routing")


@dataclass
class SampledBatch:
    """The batch that step ``step`` (counted from 0) trains on.

    ``chosen`` are the prompt indices of its groups in order, ``groups`` those of this data-parallel rank, which holds
    index i where i modulo the data-parallel size is its rank. ``version``: of the weights that sampled it.
    ``num_dropped``: responses given up for it, which is up to the clock, and not saved.
    """

    step: int
    chosen: list[int]
    groups: dict[int, list[Episode]]
    metrics: dict[str, float] = field(default_factory=dict)
    version: int = 0
    num_dropped: int = 0

    def state_dict(self) -> State:
        """All ranks' groups on rank 0, nothing on the others. Collective."""
        parts = gather_on_rank_0(self.groups if parallel.same_sequences().rank() == 0 else {})
        if not parts:
            return {}
        everyone = {index: group for part in parts for index, group in part.items()}
        about = {"step": self.step, "version": self.version, "chosen": self.chosen, "metrics": self.metrics}
        return _state_of([everyone[index] for index in self.chosen], about)

    @staticmethod
    def of_state(state: State) -> SampledBatch:
        """This rank's part of what ``state_dict`` gave."""
        data, fields = groups.data(), json.loads(state["fields"])
        chosen = fields["chosen"]
        whole = zip(chosen, _groups_of(state, fields), strict=True)
        own = {index: group for index, group in whole if index % data.size() == data.rank()}
        return SampledBatch(fields["step"], chosen, own, fields["metrics"], fields["version"])


def _state_of(whole: Sequence[Sequence[Episode]], about: State) -> State:
    episodes = [episode for group in whole for episode in group]
    samples = [episode.sample for episode in episodes]
    supports = [sample.support for sample in samples]
    arrays: dict[str, list[np.ndarray | None]] = {
        "prompts": [np.array(group[0].sample.prompt_ids, np.int64) for group in whole],
        "responses": [np.array(sample.response_ids, np.int64) for sample in samples],
        "logprobs": [np.array(sample.logprobs, np.float64) for sample in samples],
        "support_ids": [None if each is None else each.ids for each in supports],
        "support_starts": [None if each is None else each.starts for each in supports],
        "routing": [sample.routing for sample in samples],
    }
    packed = {name: _packed(arrays[name]) for name in ARRAYS}
    fields = about | {
        "problems": [astuple(group[0].problem) for group in whole],
        "sizes": [len(group) for group in whole],
        "rewards": [astuple(episode.reward) for episode in episodes],
        "samples": [(sample.text, sample.truncated, sample.weight_version) for sample in samples],
        "arrays": {name: kind for name, (kind, _) in packed.items()},
    }
    return {"fields": json.dumps(fields)} | {name: content for name, (_, content) in packed.items()}


def _groups_of(state: State, fields: State) -> list[list[Episode]]:
    problems = [_problem(values) for values in fields["problems"]]
    arrays = {name: _unpacked(fields["arrays"][name], state[name]) for name in ARRAYS}
    prompts = [tuple(ids.tolist()) for ids in arrays["prompts"]]
    of_group = [group for group, size in enumerate(fields["sizes"]) for _ in range(size)]
    found: list[list[Episode]] = [[] for _ in problems]
    for number, group in enumerate(of_group):
        text, truncated, version = fields["samples"][number]
        ids = arrays["support_ids"][number]
        sample = Sample(
            prompt_ids=prompts[group],
            response_ids=tuple(arrays["responses"][number].tolist()),
            logprobs=tuple(arrays["logprobs"][number].tolist()),
            text=text,
            truncated=truncated,
            weight_version=version,
            support=None if ids is None else KeptTokens(ids, arrays["support_starts"][number]),
            routing=arrays["routing"][number],
        )
        reward = Reward(*fields["rewards"][number])
        found[group].append(Episode(problems[group], fields["chosen"][group], sample, reward))
    return found


def _problem(values: Sequence[Any]) -> Problem:
    """From its fields' values; JSON has made a list of the tuple."""
    plain: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
    return Problem(*plain)


def _packed(arrays: Sequence[np.ndarray | None]) -> tuple[State, torch.Tensor]:
    """Arrays of one dtype that are alike but in their first dimension, end to end: lengths (-1: None), dtype and shape,
    and their bytes."""
    there = [each for each in arrays if each is not None]
    whole = np.concatenate(there) if there else np.empty(0, np.uint8)
    lengths = [-1 if each is None else len(each) for each in arrays]
    content = torch.from_numpy(np.frombuffer(bytearray(whole.tobytes()), np.uint8))
    return {"lengths": lengths, "dtype": whole.dtype.name, "shape": list(whole.shape)}, content


def _unpacked(kind: State, content: torch.Tensor) -> list[Any]:
    whole = content.numpy().view(kind["dtype"]).reshape(kind["shape"])
    ends = np.cumsum([max(0, length) for length in kind["lengths"]]).tolist()
    return [
        None if length < 0 else whole[end - length : end] for length, end in zip(kind["lengths"], ends, strict=True)
    ]
