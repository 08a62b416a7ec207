"""Hugging Face weights into this rank's Megatron parameters, and all ranks' parameters out as Hugging Face tensors.

    load_weights   each rank reads its own slices of the safetensors files; a check names all that does not fit
    PolicyWeights  full HF tensors, one by one, on every rank: what rollout engines are fed with

Which parameter is made of which tensors is in param_mapping.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_ext import cpu_compat
from megatron_ext.model import groups
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.build import Policy
from megatron_ext.model.layers import have_transformer_engine
from megatron_ext.model.param_mapping import ParamMapping, Shape, hf_shapes, mappings, stage_mappings
from megatron_ext.model.safetensors_dir import SafetensorsDir, misfits
from megatron_ext.model.tp_sharding import TPSharding

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 8192  # compared at once


def open_weights(path: str | Path, a: Architecture) -> SafetensorsDir:
    """The model directory's tensors, every one of them checked.

    Raises ValueError naming each file that is absent, truncated or damaged and each tensor that is missing, unexpected,
    misshapen or of another dtype than config.json states.
    """
    found = SafetensorsDir(path)
    if a.tied and _HEAD in found.entries:
        if not found.faults and not _equal(found, _HEAD, _EMBEDDING):
            raise ValueError(
                f"{path}: config.json has tie_word_embeddings, but {_HEAD} is another tensor than {_EMBEDDING}; set it "
                "to false to keep the head, or remove the head"
            )
        del found.entries[_HEAD]  # a second copy of the embedding
    least = a.num_layers if a.experts is None else (a.num_layers - len(a.experts.dense_layers)) * a.experts.num
    faults = [f"found {len(found.entries)} tensors, expected at least {least}"]
    if found.faults or least <= len(found.entries):  # else names would be made for what is not there
        faults = misfits(found, hf_shapes(a), a.dtype)
    if faults:
        raise ValueError(f"{path}: the weights do not fit {a.name}:\n  " + "\n  ".join(faults))
    return found


def _equal(found: SafetensorsDir, *names: str) -> bool:
    """Whether two tensors are the same, compared a part at a time."""
    a, b = (found.entries.get(name) for name in names)
    if a is None or b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    one, other = (found.tensor(name) for name in names)
    starts = range(0, a.shape[0], _ROWS)
    return all(torch.equal(one[start : start + _ROWS], other[start : start + _ROWS]) for start in starts)


def load_weights(module: GPTModel, a: Architecture, path: str | Path) -> None:
    """Fill one stage of this rank from a model directory (see ``open_weights`` for what is raised)."""
    stored = open_weights(path, a)
    parameters = dict(module.named_parameters())
    own = module_mappings(module, a)
    assert parameters.keys() == {mapping.megatron for mapping in own}, parameters.keys() ^ {
        mapping.megatron for mapping in own
    }
    for mapping in own:
        group = groups.expert_tensor() if mapping.expert else groups.tensor()
        shard = mapping.sharding.shard([stored.tensor(name) for name in mapping.hf], group.rank(), group.size())
        assert shard.shape == parameters[mapping.megatron].shape, (mapping.megatron, shard.shape)
        parameters[mapping.megatron].data.copy_(shard)


def module_mappings(module: GPTModel, a: Architecture) -> list[ParamMapping]:
    """The mappings of what one stage of this rank holds."""
    layers = [layer.layer_number - 1 for layer in list[Any](module.decoder.layers)]
    fused = have_transformer_engine()
    return mappings(a, layers, first=module.pre_process, last=module.post_process, experts=own_experts(a), fused=fused)


def own_experts(a: Architecture, rank: int | None = None) -> range:
    """The experts that an expert-parallel rank (None: this one) holds."""
    group = groups.expert()
    count = a.experts.num // group.size() if a.experts else 0
    first = (group.rank() if rank is None else rank) * count
    return range(first, first + count)


@dataclass
class PolicyWeights:
    """The policy's weights as full HF tensors; every iteration streams those of its moment (see ``stream``).

    Whoever lets the policy train before it takes them again closes them first.
    """

    policy: Policy
    closed: bool = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        assert not self.closed
        modules = self.policy.modules
        return stream(self.policy, [{name: p.detach() for name, p in m.named_parameters()} for m in modules])

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of what an iteration yields, in its order."""
        dtype = next(self.policy.modules[0].parameters()).dtype
        return [(name, dtype, shape) for name, shape in stream_names(self.policy)]


def stream(policy: Policy, tensors: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors named and laid out like the policy's parameters as full HF tensors, one by one, on the ranks' device.

    ``tensors`` (weights, gradients) has a mapping for each module of this rank. Every rank gets every tensor, in the
    order of ``stream_names``. Collective: all ranks must consume the iterator. What a layer's experts consist of is
    exchanged at once, likewise the rest of a layer, and is what this holds beside the tensor that it yields.
    """
    pipeline = groups.pipeline()
    for stage, ranked in enumerate(_streamed_mappings(policy)):
        number, source = divmod(stage, pipeline.size())
        for bundle in _bundles(ranked):
            own = [variants[groups.expert().rank()] for variants in bundle]
            held = [tensors[number][mapping.megatron] for mapping in own] if source == pipeline.rank() else None
            gathered = _gather(held, own, next(iter(tensors[0].values())).dtype)
            if pipeline.size() > 1:
                dist.broadcast(gathered, src=dist.get_process_group_ranks(pipeline)[source], group=pipeline)
            yield from _full_tensors(bundle, gathered)
            del gathered  # before the next is made


def stream_names(policy: Policy) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of everything ``stream`` yields, in its order."""
    return [
        (name, shape)
        for ranked in _streamed_mappings(policy)
        for variants in zip(*ranked, strict=True)
        for mapping in _distinct(variants)
        for name, shape in zip(mapping.hf, mapping.shapes, strict=True)
    ]


def _streamed_mappings(policy: Policy) -> Iterator[list[list[ParamMapping]]]:
    """For each stage the mappings of every expert-parallel rank, without the second copy of a tied embedding."""
    a = policy.architecture
    for stage in range(len(policy.stages)):
        ranked = []
        for rank in range(groups.expert().size()):
            found = stage_mappings(
                a, policy.stages, stage, experts=own_experts(a, rank), fused=have_transformer_engine()
            )
            ranked.append([mapping for mapping in found if not (a.tied and mapping.megatron == "output_layer.weight")])
        yield ranked


def _distinct(variants: Sequence[ParamMapping]) -> Sequence[ParamMapping]:
    """Each expert-parallel rank has experts of its own, and a copy of everything else."""
    return variants if variants[0].expert else variants[:1]


def _bundles(ranked: Sequence[Sequence[ParamMapping]]) -> Iterator[list[tuple[ParamMapping, ...]]]:
    """The mappings of a stage, one of each expert-parallel rank side by side, by what is gathered in one collective."""

    def key(variants: tuple[ParamMapping, ...]) -> tuple[str, bool]:
        names = variants[0].megatron.split(".")
        return ".".join(names[:3]) if names[1] == "layers" else variants[0].megatron, variants[0].expert

    for _, bundle in itertools.groupby(zip(*ranked, strict=True), key):
        yield list(bundle)


def _gather(held: Sequence[Tensor] | None, mappings: Sequence[ParamMapping], dtype: torch.dtype) -> Tensor:
    """``[ranks, elements]``: each rank's ``held`` end to end, of the ranks of this stage that share the parameters.

    Uninitialised where nothing is held: on the ranks of other stages.
    """
    group, size = _sharing(mappings[0])
    own = None if held is None else torch.cat([tensor.flatten() for tensor in held])
    if own is not None and group.size() == 1:
        return own[None]
    elements = sum(map(math.prod, _shard_shapes(mappings, size)))
    gathered = torch.empty((group.size(), elements), dtype=dtype, device=cpu_compat.device())
    if own is not None:
        dist.all_gather_into_tensor(gathered.flatten(), own, group=group)
    return gathered


def _full_tensors(bundle: Sequence[tuple[ParamMapping, ...]], gathered: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The HF tensors of a bundle from what ``_gather`` got."""
    _, size = _sharing(bundle[0][0])
    shapes = _shard_shapes([variants[0] for variants in bundle], size)
    by_mapping = gathered.split([math.prod(shape) for shape in shapes], 1)
    for variants, shape, gathered_shards in zip(bundle, shapes, by_mapping, strict=True):
        for number, mapping in enumerate(_distinct(variants)):
            shards = [shard.view(shape) for shard in gathered_shards[number * size : (number + 1) * size]]
            for name, tensor in zip(mapping.hf, mapping.sharding.join(shards), strict=True):
                yield name, tensor.clone(memory_format=torch.contiguous_format)  # and not a view of what is gathered


def _sharing(mapping: ParamMapping) -> tuple[dist.ProcessGroup, int]:
    """The ranks of a stage that share the parameters of a bundle, and over how many of them one is sharded."""
    if mapping.expert:
        return groups.expert_model(), groups.expert_tensor().size()
    return groups.tensor(), groups.tensor().size()


def _shard_shapes(mappings: Sequence[ParamMapping], size: int) -> list[torch.Size]:
    """The shape of each parameter on one of the ``size`` ranks that it is sharded over."""
    return [_shard_shape(mapping.sharding, mapping.shapes, size) for mapping in mappings]


@cache
def _shard_shape(sharding: TPSharding, shapes: tuple[Shape, ...], size: int) -> torch.Size:
    with torch.device("meta"):
        return sharding.shard([torch.empty(shape) for shape in shapes], 0, size).shape
