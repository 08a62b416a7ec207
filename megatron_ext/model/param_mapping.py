"""Which Hugging Face tensors make up which Megatron parameter, by local and by Transformer Engine's names.

One ``ParamMapping`` a parameter. ``model.layers.N.`` stands before the HF names of a layer, ``decoder.layers.n.``
before the Megatron names of the n-th layer of a stage; ``e`` is an expert, ``i`` its number on the rank that holds it.

    HF                                  local                               Transformer Engine = checkpoint
    input_layernorm                     input_layernorm                     self_attention.linear_qkv.layer_norm_weight
    self_attn.{q,k,v}_proj              self_attention.linear_qkv           the same
    self_attn.o_proj                    self_attention.linear_proj          the same
    self_attn.{q,k}_norm                self_attention.{q,k}_layernorm      the same
    post_attention_layernorm            pre_mlp_layernorm                   mlp.linear_fc1.layer_norm_weight (dense)
                                                                            pre_mlp_layernorm                (experts)
    mlp.{gate,up}_proj, mlp.down_proj   mlp.linear_fc1, mlp.linear_fc2      the same
    mlp.gate                            mlp.router                          the same
    mlp.experts.e.{gate,up}_proj        mlp.experts.local_experts.i.        mlp.experts.linear_fc1.weight<i>
                                        linear_fc1
    mlp.experts.e.down_proj             ... linear_fc2                      mlp.experts.linear_fc2.weight<i>

In a checkpoint the layers are stacked along a first axis of ``decoder.layers.<name>`` and the experts along the next
one of ``mlp.experts.experts.<name>``; where layers differ in kind, each has a key with its number in it instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_ext.model.architectures import Architecture
from megatron_ext.model.tp_sharding import QKV, Replicated, Split, TPSharding, Vocabulary

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ParamMapping:
    """One Megatron parameter: its names, the HF tensors it is made of, and how they are sharded over ranks."""

    megatron: str  # on the module that holds it
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the HF tensors
    sharding: TPSharding
    key: str  # in a checkpoint
    index: Shape = ()  # where under that key: layer, expert
    stacked: Shape = ()  # how many layers and experts that key holds
    expert: bool = False  # sharded over expert-tensor-parallel ranks, held by one expert-parallel rank

    @property
    def shape(self) -> Shape:
        """Of the Megatron parameter of an unsharded model, without vocabulary padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


@dataclass(frozen=True)
class _LayerParam:
    """A ``ParamMapping`` of a layer without the layer's number: names after the prefixes."""

    local: str
    fused: str  # Transformer Engine's
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    sharding: TPSharding
    key: str
    expert: int | None = None


def mappings(
    a: Architecture,
    layers: Sequence[int],
    *,
    first: bool,
    last: bool,
    experts: Sequence[int] | None = None,
    fused: bool,
) -> list[ParamMapping]:
    """All parameters of a stage with the given decoder layers that holds the given experts of each (None: all).

    ``fused`` gives Transformer Engine's names.
    """
    vocabulary, shape = Vocabulary(a.vocab_size), (a.vocab_size, a.hidden_size)
    embedding, found = ("model.embed_tokens.weight",), []
    if first:
        name = "embedding.word_embeddings.weight"
        found.append(ParamMapping(name, embedding, (shape,), vocabulary, key=name))
    for local, layer in enumerate(layers):
        found += layer_mappings(a, layer, local, experts=experts, fused=fused)
    if last:
        name = "decoder.final_layernorm.weight"
        found.append(ParamMapping(name, ("model.norm.weight",), ((a.hidden_size,),), Replicated(), key=name))
    if last and not (a.tied and first):
        name = "output_layer.weight"
        found.append(ParamMapping(name, embedding if a.tied else ("lm_head.weight",), (shape,), vocabulary, key=name))
    return found


def stage_mappings(
    a: Architecture, stages: Sequence[int], stage: int, *, experts: Sequence[int] | None = None, fused: bool = False
) -> list[ParamMapping]:
    """The mappings of one stage, where ``stages`` counts the decoder layers of all."""
    start = sum(stages[:stage])
    last = stage == len(stages) - 1
    return mappings(a, range(start, start + stages[stage]), first=stage == 0, last=last, experts=experts, fused=fused)


def full_mappings(a: Architecture) -> list[ParamMapping]:
    """The mappings of the unsharded model: every HF tensor once, in the order of its layers."""
    return mappings(a, range(a.num_layers), first=True, last=True, fused=False)


def hf_shapes(a: Architecture) -> dict[str, Shape]:
    """Name and shape of every tensor of the Hugging Face model, in the order of ``full_mappings``."""
    return {name: shape for mapping in full_mappings(a) for name, shape in zip(mapping.hf, mapping.shapes, strict=True)}


def layer_mappings(
    a: Architecture, layer: int, local: int, *, experts: Sequence[int] | None = None, fused: bool
) -> list[ParamMapping]:
    """The mappings of decoder layer ``layer`` (counted over the model), number ``local`` on its stage."""
    mixed = a.experts is not None and bool(a.experts.dense_layers)
    found = []
    for param in [*_attention(a, layer), *_mlp(a, layer, experts)]:
        index, stacked = ((), ()) if mixed else ((layer,), (a.num_layers,))
        if param.expert is not None:
            assert a.experts is not None
            index, stacked = (*index, param.expert), (*stacked, a.experts.num)
        found.append(
            ParamMapping(
                megatron=f"decoder.layers.{local}.{param.fused if fused else param.local}",
                hf=tuple(f"model.layers.{layer}.{name}" for name in param.hf),
                shapes=param.shapes,
                sharding=param.sharding,
                key=f"decoder.layers.{layer}.{param.key}" if mixed else f"decoder.layers.{param.key}",
                index=index,
                stacked=stacked,
                expert=param.expert is not None,
            )
        )
    return found


def _norm(a: Architecture, hf: str, local: str, fused: str) -> _LayerParam:
    return _LayerParam(f"{local}.weight", fused, (f"{hf}.weight",), ((a.hidden_size,),), Replicated(), fused)


def _same(name: str, hf: Sequence[str], shapes: Sequence[Shape], sharding: TPSharding) -> _LayerParam:
    """A parameter with one name everywhere."""
    return _LayerParam(name, name, tuple(hf), tuple(shapes), sharding, name)


def _attention(a: Architecture, layer: int) -> Iterator[_LayerParam]:
    D, q, kv = a.hidden_size, a.num_heads * a.head_dim, a.num_groups * a.head_dim
    at, widths = "self_attention", (q, kv, kv)
    projections, interleaved = ("q_proj", "k_proj", "v_proj"), QKV(a.num_heads, a.num_groups, a.head_dim)
    yield _norm(a, "input_layernorm", "input_layernorm", f"{at}.linear_qkv.layer_norm_weight")
    names = [f"self_attn.{p}.weight" for p in projections]
    yield _same(f"{at}.linear_qkv.weight", names, [(width, D) for width in widths], interleaved)
    if a.qkv_bias:
        names = [f"self_attn.{p}.bias" for p in projections]
        yield _same(f"{at}.linear_qkv.bias", names, [(width,) for width in widths], interleaved)
    for x in ("q", "k") if a.qk_norm else ():
        yield _same(f"{at}.{x}_layernorm.weight", [f"self_attn.{x}_norm.weight"], [(a.head_dim,)], Replicated())
    yield _same(f"{at}.linear_proj.weight", ["self_attn.o_proj.weight"], [(D, q)], Split(1))
    fused = "pre_mlp_layernorm.weight" if a.has_experts(layer) else "mlp.linear_fc1.layer_norm_weight"
    yield _norm(a, "post_attention_layernorm", "pre_mlp_layernorm", fused)


def _mlp(a: Architecture, layer: int, experts: Sequence[int] | None) -> Iterator[_LayerParam]:
    D = a.hidden_size
    if a.experts is None or not a.has_experts(layer):
        gate_up = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
        yield _same("mlp.linear_fc1.weight", gate_up, [(a.ffn_size, D)] * 2, Split(0, num_tensors=2))
        yield _same("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], [(D, a.ffn_size)], Split(1))
        return
    F = a.experts.ffn_size
    yield _same("mlp.router.weight", ["mlp.gate.weight"], [(a.experts.num, D)], Replicated())
    tables = (
        ("linear_fc1", ("gate_proj", "up_proj"), ((F, D), (F, D)), Split(0, num_tensors=2)),
        ("linear_fc2", ("down_proj",), ((D, F),), Split(1)),
    )
    for i, e in enumerate(range(a.experts.num) if experts is None else experts):
        for name, projections, shapes, sharding in tables:
            yield _LayerParam(
                local=f"mlp.experts.local_experts.{i}.{name}.weight",
                fused=f"mlp.experts.{name}.weight{i}",
                hf=tuple(f"mlp.experts.{e}.{p}.weight" for p in projections),
                shapes=shapes,
                sharding=sharding,
                key=f"mlp.experts.experts.{name}.weight",
                expert=e,
            )
