"""Hugging Face ``config.json`` -> ``Architecture``: dense Qwen2 / Qwen2.5, Qwen3 and Llama 3.x, and Qwen3-MoE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ext.files import first_fault

QWEN2, QWEN3, QWEN3_MOE, LLAMA = "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"
ARCHITECTURES = (QWEN2, QWEN3, QWEN3_MOE, LLAMA)
_EXPECTED = {  # fields that change the mathematics, and the only value of each that is implemented
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
    "pretraining_tp": 1,
    "partial_rotary_factor": 1.0,
}
_NEEDED = (
    *("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("rms_norm_eps", "max_position_embeddings"),
)
_NEEDED_OF_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")


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


def read_architecture(hf: dict[str, Any]) -> Architecture:
    """Raises ValueError for an architecture, or a field of it, that is not supported."""
    named = hf.get("architectures") or ["none"]
    name = named[0] if isinstance(named, list) else named
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"config.json: architecture {name} is not supported; expected one of {', '.join(ARCHITECTURES)}"
        )
    try:
        _Fields.model_validate(hf)
    except ValidationError as error:
        raise ValueError(f"config.json: {first_fault(error)}; take the file of the model's publisher") from None
    _refuse(hf, name)
    missing = [field for field in _NEEDED + (_NEEDED_OF_EXPERTS if name == QWEN3_MOE else ()) if field not in hf]
    if name == QWEN3_MOE and not (hf.get("num_experts") or hf.get("num_local_experts")):
        missing.append("num_experts")
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing; take the file of the model's publisher")
    rope = (hf.get("rope_parameters") or {}) | (hf.get("rope_scaling") or {})
    heads, groups = hf["num_attention_heads"], hf.get("num_key_value_heads") or hf["num_attention_heads"]
    head_dim = hf.get("head_dim") or hf["hidden_size"] // heads
    if heads % groups or head_dim < 2 or head_dim % 2:
        raise ValueError(
            f"config.json: {heads} attention heads, {groups} key-value heads and {head_dim} columns of a head; "
            "expected key-value heads that divide the others, and an even number of columns"
        )
    return Architecture(
        name=name,
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        num_heads=heads,
        num_groups=groups,
        head_dim=head_dim,
        ffn_size=hf["intermediate_size"],
        vocab_size=hf["vocab_size"],
        norm_eps=hf["rms_norm_eps"],
        rope_theta=hf.get("rope_theta") or rope.get("rope_theta") or 10000.0,
        max_positions=hf["max_position_embeddings"],
        tied=hf.get("tie_word_embeddings", False),
        qkv_bias=name == QWEN2,
        qk_norm=name in (QWEN3, QWEN3_MOE),
        rope_scaling=_rope_scaling(rope, name),
        experts=_experts(hf) if name == QWEN3_MOE else None,
        dtype=hf.get("dtype") or hf.get("torch_dtype"),
    )


def _refuse(hf: dict[str, Any], name: str) -> None:
    expected: dict[str, Any] = dict(_EXPECTED)
    if name != QWEN2:  # whose biases are not optional and sit on query, key and value only
        expected["attention_bias"] = False
    for field, only in expected.items():
        found = hf.get(field)
        if found is not None and found != only:
            raise ValueError(f"config.json: {field} is {repr(found)[:100]}; only {only!r} is supported for {name}")
    kinds = set(hf.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise ValueError(f"config.json: layer_types holds {sorted(kinds)[:9]}; only 'full_attention' is supported")


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


def _experts(hf: dict[str, Any]) -> Experts:
    every, only = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    layers = range(hf["num_hidden_layers"])
    found = Experts(
        num=hf.get("num_experts") or hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"],
        ffn_size=hf["moe_intermediate_size"],
        renormalise=hf.get("norm_topk_prob", False),
        dense_layers=tuple(i for i in layers if i in only or (i + 1) % every),
    )
    if found.top_k > found.num:
        raise ValueError(f"config.json: num_experts_per_tok is {found.top_k}, expected at most num_experts {found.num}")
    if found.top_k == 1 and found.renormalise:
        raise ValueError(
            "config.json: norm_topk_prob with num_experts_per_tok 1 makes every routing weight 1, which no gradient "
            "reaches; set norm_topk_prob to false"
        )
    return found
