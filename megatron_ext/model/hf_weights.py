"""The tables between Hugging Face tensors and Megatron parameters, for loading, streaming and export.

One ``Rule`` a parameter: the Megatron name on this rank, the HF names it is made of, and a ``Layout`` that
knows how the tensors are cut over the tensor-parallel ranks. Everything else is a loop over rules:

    load_weights    HF tensors -> this rank's parameters (a coverage check names what is missing or left over)
    stream_weights  all ranks' parameters -> whole HF tensors, one rule at a time, on every rank
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from safetensors import safe_open
from torch import Tensor

from megatron_ext import host
from megatron_ext.model import groups
from megatron_ext.model.hf_config import Architecture
from megatron_ext.model.layers import have_transformer_engine


class Layout(Protocol):
    """How whole HF tensors become one parameter per tensor-parallel rank, and back."""

    def cut(self, whole: list[Tensor], rank: int, size: int) -> Tensor: ...

    def join(self, parts: list[Tensor]) -> list[Tensor]: ...


class Replicated:
    """The same tensor on every rank."""

    def cut(self, whole: list[Tensor], rank: int, size: int) -> Tensor:
        return whole[0]

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        return [parts[0]]


@dataclass(frozen=True)
class Split:
    """Equal slices along ``dim``; several tensors (gate and up) are cut apart and stacked per rank."""

    dim: int
    num_tensors: int = 1

    def cut(self, whole: list[Tensor], rank: int, size: int) -> Tensor:
        return torch.cat([tensor.chunk(size, self.dim)[rank] for tensor in whole], self.dim)

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        stacked = [part.chunk(self.num_tensors, self.dim) for part in parts]
        return [torch.cat([rank[i] for rank in stacked], self.dim) for i in range(self.num_tensors)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, zero-padded to a multiple of the ranks."""

    vocab_size: int

    def cut(self, whole: list[Tensor], rank: int, size: int) -> Tensor:
        width = -(-self.vocab_size // size)
        rows = whole[0][rank * width : (rank + 1) * width]
        return torch.cat([rows, rows.new_zeros(width - len(rows), *rows.shape[1:])])

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        return [torch.cat(parts)[: self.vocab_size]]


@dataclass(frozen=True)
class QKV:
    """Query, key and value interleaved by key-value group, the order of Megatron's fused projection."""

    num_heads: int
    num_groups: int
    head_dim: int

    def cut(self, whole: list[Tensor], rank: int, size: int) -> Tensor:
        rest = whole[0].shape[1:]
        groups = [x.reshape(self.num_groups, -1, self.head_dim, *rest).chunk(size)[rank] for x in whole]
        return torch.cat(groups, 1).reshape(-1, *rest)

    def join(self, parts: list[Tensor]) -> list[Tensor]:
        rest = parts[0].shape[1:]
        fused = torch.cat(parts).reshape(self.num_groups, -1, self.head_dim, *rest)
        query, key, value = fused.split([self.num_heads // self.num_groups, 1, 1], 1)
        return [x.reshape(-1, *rest) for x in (query, key, value)]


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter: its name on the stage that holds it, and the HF tensors it is made of."""

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


def layer_rules(a: Architecture, layer: int, local: int) -> list[Rule]:
    """Rules of decoder layer ``layer`` (counted over the model), number ``local`` on its pipeline stage."""
    hf, meg = f"model.layers.{layer}.", f"decoder.layers.{local}."
    fused = have_transformer_engine()  # TE keeps a norm's weight in the linear layer that follows it
    qkv = QKV(a.num_heads, a.num_groups, a.head_dim)
    projections = ("q_proj", "k_proj", "v_proj")

    def qkv_rule(kind: str) -> Rule:
        names = tuple(f"{hf}self_attn.{p}.{kind}" for p in projections)
        return Rule(f"{meg}self_attention.linear_qkv.{kind}", names, qkv)

    def norm_rule(hf_name: str, own: str, in_linear: str) -> Rule:
        name = f"{in_linear}.layer_norm_weight" if fused else f"{own}.weight"
        return Rule(meg + name, (f"{hf}{hf_name}.weight",), Replicated())

    rules = [
        norm_rule("input_layernorm", "input_layernorm", "self_attention.linear_qkv"),
        qkv_rule("weight"),
        Rule(f"{meg}self_attention.linear_proj.weight", (f"{hf}self_attn.o_proj.weight",), Split(1)),
        norm_rule("post_attention_layernorm", "pre_mlp_layernorm", "mlp.linear_fc1"),
        Rule(
            f"{meg}mlp.linear_fc1.weight",
            (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
            Split(0, num_tensors=2),
        ),
        Rule(f"{meg}mlp.linear_fc2.weight", (f"{hf}mlp.down_proj.weight",), Split(1)),
    ]
    if a.qkv_bias:
        rules.append(qkv_rule("bias"))
    if a.qk_norm:
        rules += [
            Rule(f"{meg}self_attention.{x}_layernorm.weight", (f"{hf}self_attn.{x}_norm.weight",), Replicated())
            for x in ("q", "k")
        ]
    return rules


def stage_rules(a: Architecture, stage: int, num_stages: int) -> list[Rule]:
    """All rules of one pipeline stage."""
    per_stage = a.num_layers // num_stages
    first, last = stage == 0, stage == num_stages - 1
    embedding = ("model.embed_tokens.weight",)
    rules = [Rule("embedding.word_embeddings.weight", embedding, Vocabulary(a.vocab_size))] if first else []
    for local in range(per_stage):
        rules += layer_rules(a, stage * per_stage + local, local)
    if last:
        rules.append(Rule("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()))
    if last and not (a.tied and first):
        output = embedding if a.tied else ("lm_head.weight",)
        rules.append(Rule("output_layer.weight", output, Vocabulary(a.vocab_size)))
    return rules


def load_weights(module: GPTModel, a: Architecture, path: str | Path) -> None:
    """Fill this rank's parameters from the safetensors files of a model directory.

    Raises ValueError naming every tensor that is missing, unexpected or misshapen.
    """
    stage, num_stages = groups.pipeline().rank(), groups.pipeline().size()
    tensor = groups.tensor()
    rules = stage_rules(a, stage, num_stages)
    parameters = dict(module.named_parameters())
    read, available = open_safetensors(path)
    every = {name for s in range(num_stages) for rule in stage_rules(a, s, num_stages) for name in rule.hf}
    tied_copy = {"lm_head.weight"} if a.tied else set()
    faults = [f"missing tensor {name}" for name in sorted(every - available)]
    faults += [f"unexpected tensor {name}" for name in sorted(available - every - tied_copy)]
    faults += [f"parameter {name} has no rule" for name in sorted(set(parameters) - {rule.megatron for rule in rules})]
    if not faults:
        for rule in rules:
            cut = rule.layout.cut([read(name) for name in rule.hf], tensor.rank(), tensor.size())
            parameter = parameters[rule.megatron]
            if cut.shape != parameter.shape:
                faults.append(
                    f"{' + '.join(rule.hf)}: gives shape {list(cut.shape)}, expected {list(parameter.shape)} "
                    f"for {rule.megatron}"
                )
            else:
                parameter.data.copy_(cut)
    if faults:
        raise ValueError(f"{path}: the weights do not fit {a.name}:\n  " + "\n  ".join(faults))


def open_safetensors(path: str | Path) -> tuple[Callable[[str], Tensor], set[str]]:
    """A reader ``name -> tensor`` over all safetensors files of a directory, and the names they hold."""
    folder = Path(path)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
    elif (folder / "model.safetensors").is_file():
        with safe_open(folder / "model.safetensors", "pt") as file:
            file_of = dict.fromkeys(file.keys(), "model.safetensors")
    else:
        raise ValueError(f"{path}: holds neither model.safetensors nor model.safetensors.index.json")
    handles = {name: safe_open(folder / name, "pt") for name in set(file_of.values())}
    return lambda name: handles[file_of[name]].get_tensor(name), set(file_of)


def stream_weights(module: GPTModel, a: Architecture) -> Iterator[tuple[str, Tensor]]:
    """The model's weights as whole HF tensors (see ``stream``)."""
    return stream({name: parameter.detach() for name, parameter in module.named_parameters()}, a)


def stream(parameters: Mapping[str, Tensor], a: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Tensors laid out like this rank's parameters (weights, gradients) as whole HF tensors, one by one, on the CPU.

    Every rank of the model-parallel group gets every tensor. Collective over the tensor- and pipeline-parallel
    groups: all their ranks must consume the iterator.
    """
    stage, num_stages = groups.pipeline().rank(), groups.pipeline().size()
    tensor = groups.tensor()
    dtype = next(iter(parameters.values())).dtype
    for source in range(num_stages):
        for rule in stage_rules(a, source, num_stages):
            if a.tied and rule.megatron == "output_layer.weight":
                continue
            whole = None
            if source == stage:
                own = parameters[rule.megatron].contiguous()
                parts = [torch.empty_like(own) for _ in range(tensor.size())]
                dist.all_gather(parts, own, group=tensor)
                whole = rule.layout.join(parts)
            for name, value in zip(rule.hf, _from_stage(whole, len(rule.hf), source, dtype), strict=True):
                yield name, value.cpu()


def _from_stage(whole: list[Tensor] | None, count: int, source: int, dtype: torch.dtype) -> list[Tensor]:
    group = groups.pipeline()
    if group.size() == 1:
        assert whole is not None
        return whole
    root = dist.get_process_group_ranks(group)[source]
    shapes: list = [None if whole is None else [list(x.shape) for x in whole]]
    dist.broadcast_object_list(shapes, src=root, group=group)
    received = whole or [torch.empty(shape, dtype=dtype, device=host.device()) for shape in shapes[0]]
    assert len(received) == count
    received = [x.contiguous() for x in received]
    for x in received:
        dist.broadcast(x, src=root, group=group)
    return received
