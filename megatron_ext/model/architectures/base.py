"""What a model family is, what is read of its ``config.json``, and the reading that all families share.

A family is one file beside this one that says which blocks its layers have and what of its configuration is accepted.
No torch: a layout is planned without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ext.files import first_fault

SUPPORTED_VALUES = {  # fields that change the mathematics, and the only value of each that is implemented
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
}
REQUIRED_FIELDS = (
    *("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("rms_norm_eps", "max_position_embeddings"),
)

_Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Few = Annotated[int, Field(ge=1, le=10_000)]  # layers, experts: what is made for each of them must end
_Above0 = Annotated[float, Field(gt=0, le=1e30)]


class _Rope(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rope_type: str = "default"
    type: str = "default"
    rope_theta: _Above0 | None = None
    partial_rotary_factor: float = 1.0
    factor: _Above0 = 1.0
    low_freq_factor: _Above0 = 1.0
    high_freq_factor: _Above0 = 1.0
    original_max_position_embeddings: _Size = 1


class _Fields(BaseModel):
    """Types and ranges of what is read of config.json; which of it there must be is said below."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    num_hidden_layers: _Few = 1
    hidden_size: _Size = 1
    intermediate_size: _Size = 1
    vocab_size: _Size = 1
    max_position_embeddings: _Size = 1
    num_attention_heads: _Size = 1
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    rope_theta: _Above0 | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: _Rope | None = None
    tie_word_embeddings: bool = False
    layer_types: list[str] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    num_experts: _Few | None = None
    num_local_experts: _Few | None = None
    num_experts_per_tok: _Few = 1
    moe_intermediate_size: _Size = 1
    norm_topk_prob: bool = False
    decoder_sparse_step: _Size = 1
    mlp_only_layers: list[int] | None = None


@dataclass(frozen=True)
class Experts:
    """The mixture of experts in every layer but ``dense_layers``. No shared experts."""

    num: int
    top_k: int
    ffn_size: int
    renormalise: bool  # the chosen experts' probabilities are divided by their sum
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Llama3Rope:
    """How Llama 3.1 and later stretch low rotary frequencies (rope.py)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Architecture:
    """What the conversion and the model need of a Hugging Face configuration."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_groups: int  # key-value heads
    head_dim: int
    ffn_size: int  # of dense layers
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_positions: int
    tied: bool  # output layer shares the embedding
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: Llama3Rope | None = None
    experts: Experts | None = None
    dtype: str | None = None  # of the stored weights, torch's name; None where config.json does not say

    def padded_vocab(self, tensor: int) -> int:
        """Vocabulary size after padding to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor) * tensor

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer not in self.experts.dense_layers


@dataclass(frozen=True)
class Family:
    """What tells one model family from the others.

    Common to all: pre-norm decoder layers with RMSNorm, rotary embeddings (plain or Llama 3's), grouped-query
    attention, and a SwiGLU MLP or a mixture of experts with a SwiGLU MLP each.
    """

    name: str  # the class in config.json's "architectures"
    qkv_bias: bool = False  # query, key and value projections have a bias
    qk_norm: bool = False  # RMSNorm of every query and key head
    read_experts: Callable[[dict[str, Any]], Experts] | None = None  # None: every layer has a dense MLP
    required_fields: tuple[str, ...] = ()  # fields that config.json must have, besides REQUIRED_FIELDS
    supported_values: Mapping[str, Any] = field(default_factory=dict)  # as SUPPORTED_VALUES, of this family


def read(hf: dict[str, Any], family: Family) -> Architecture:
    """Raises ValueError for a field of ``config.json`` that is missing, of a wrong type, or not supported."""
    try:
        _Fields.model_validate(hf)
    except ValidationError as error:
        raise ValueError(f"config.json: {first_fault(error)}; take the file of the model's publisher") from None
    _refuse(hf, family)
    if missing := [name for name in REQUIRED_FIELDS + family.required_fields if name not in hf]:
        raise ValueError(f"config.json: {', '.join(missing)} missing; take the file of the model's publisher")
    rope = _rope(hf)
    heads, groups = hf["num_attention_heads"], hf.get("num_key_value_heads") or hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if heads % groups or head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"config.json: {heads} attention heads, {groups} key-value heads and {head_dim} columns of a head; "
            "expected key-value heads that divide the others, and an even number of columns"
        )
    return Architecture(
        name=family.name,
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_heads=heads,
        num_groups=groups,
        head_dim=head_dim,
        ffn_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or 10000.0,
        max_positions=hf["max_position_embeddings"],
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        rope_scaling=_rope_scaling(rope, family.name),
        experts=family.read_experts(hf) if family.read_experts else None,
        dtype=hf.get("dtype") or hf.get("torch_dtype"),
    )


def _refuse(hf: dict[str, Any], family: Family) -> None:
    for name, only in {**SUPPORTED_VALUES, **family.supported_values}.items():
        found = hf.get(name)
        if found is not None and found != only:
            raise ValueError(
                f"config.json: {name} is {repr(found)[:100]}; only {only!r} is supported for {family.name}"
            )
    kinds = set(hf.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(f"config.json: layer_types holds {sorted(kinds)[:9]}; only 'full_attention' is supported")


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of its rotary embeddings, in the places of old and of new files.

    Raises ValueError where two of them differ: another reader could take the other one.
    """
    top = {name: hf.get(name) for name in ("rope_theta", "original_max_position_embeddings")}
    sources = [top, hf.get("rope_parameters") or {}, hf.get("rope_scaling") or {}]
    scaling = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    for names in (("rope_theta",), ("rope_type", "type"), *((name,) for name in scaling)):
        found = [source[name] for source in sources for name in names if source.get(name) is not None]
        if any(value != found[0] for value in found):
            listed = " and ".join(dict.fromkeys(map(repr, found)))
            raise ValueError(
                f"config.json: states {listed} for {names[0]}, at its top, in rope_parameters and in rope_scaling; "
                "leave the right one"
            )
    return {name: value for source in sources for name, value in source.items() if value is not None}


def _rope_scaling(rope: dict[str, Any], name: str) -> Llama3Rope | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor is {rope['partial_rotary_factor']}; only 1.0 is supported for {name}"
        )
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config.json: rope type {kind!r} is not supported for {name}; expected 'default' or 'llama3'")
    fields = list(Llama3Rope.__dataclass_fields__)
    missing = [field for field in fields if field not in rope]
    if missing:
        raise ValueError(f"config.json: rope type 'llama3' needs {', '.join(fields)}; missing {', '.join(missing)}")
    return Llama3Rope(**{field: rope[field] for field in fields})
