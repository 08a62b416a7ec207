"""Hugging Face -> Megatron -> Hugging Face: the same bits and the same logits under every layout."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model import architectures, build, groups, hf_weights, parallel, param_mapping, rope
from megatron_ext.model.forward import logits_of, run_pipeline, select_hidden
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.train import packing
from megatron_ext.types import PackedSequences
from tests import gloo, tiny

Sequences = list[tuple[tuple[int, ...], tuple[int, ...]]]
NUM_BINS = 2  # what the interleaved schedule takes at least
DENSE: dict[int, list[dict[str, Any]]] = {  # by number of ranks
    1: [{}],
    2: [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"pipeline": 2, "virtual": 2}],
    3: [{"pipeline": 3, "stage_layers": (1, 2, 1)}],
    4: [{"tensor": 4}, {"tensor": 2, "pipeline": 2}],
}
EXPERTS: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [
        {"tensor": 2, "sequence": True},
        {"pipeline": 2},
        {"pipeline": 2, "virtual": 2},
        {"expert": 2},
        {"tensor": 2, "sequence": True, "expert_tensor": 2},
    ],
    3: [{"pipeline": 3, "stage_layers": (1, 2, 1)}],
    4: [
        {"tensor": 4, "sequence": True},
        {"tensor": 2, "pipeline": 2, "sequence": True},
        {"tensor": 2, "sequence": True, "expert": 2},
        {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2},
        {"pipeline": 2, "expert": 2},
    ],
}
MIXED = {1: [{}], 2: [{"expert": 2}], 4: [{"tensor": 2, "pipeline": 2, "sequence": True}]}
KINDS = [
    ("qwen2", False, DENSE),
    ("qwen2", True, DENSE),
    ("qwen3", True, DENSE),
    ("llama", False, DENSE),
    ("qwen3_moe", False, EXPERTS),
    ("qwen3_moe_mixed", False, MIXED),
]


def in_layouts(rank: int, world: int, path: str, layouts: list[dict], sequences: Sequences) -> list[tuple]:
    """For each layout: the streamed weights, their announced names, and the logits of each micro-batch."""
    cpu_compat.enter()
    return [in_layout(world, path, layout, sequences) for layout in layouts]


def in_layout(world: int, path: str, layout: dict[str, Any], sequences: Sequences) -> tuple:
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    try:
        architecture = architectures.read_architecture(read_hf_config(path))
        policy = build.build_reference(architecture, ModelLayout(**layout), ModelOptions(torch.float32))
        for module in policy.modules:
            hf_weights.load_weights(module, architecture, path)
        streamed = list(hf_weights.PolicyWeights(policy))
        multiple = layout.get("tensor", 1) if layout.get("sequence") else 1
        packed = [packing.pack([sequences[i] for i in indices], multiple=multiple) for indices in bins(sequences)]
        with torch.no_grad():
            logits = run_pipeline(
                policy, packed, lambda output, micro_batch: full_logits(policy, output, micro_batch), None
            )
        return streamed, hf_weights.stream_names(policy), logits
    finally:
        parallel_state.destroy_model_parallel()


def bins(sequences: Sequences) -> list[list[int]]:
    return packing.split(sequences, 60, NUM_BINS)


def full_logits(policy: build.Policy, output: Tensor, micro_batch: PackedSequences) -> Tensor:
    """``[T, V]`` of the positions that predict a response token."""
    own = logits_of(policy, select_hidden(policy, output, micro_batch))
    parts = [torch.empty_like(own) for _ in range(groups.tensor().size())]
    dist.all_gather(parts, own, group=groups.tensor())
    return torch.cat(parts, 1)[:, : policy.architecture.vocab_size]


def random_sequences() -> Sequences:
    draw = random.Random(1)

    def tokens() -> tuple[int, ...]:
        return tuple(draw.randrange(tiny.VOCAB) for _ in range(draw.randint(1, 9)))

    return [(tokens(), tokens()) for _ in range(9)]


@pytest.mark.parametrize(("kind", "tied", "every_layout"), KINDS, ids=[f"{kind}-{tied}" for kind, tied, _ in KINDS])
def test_weights_return_bitwise_and_logits_match_transformers(kind: str, tied: bool, every_layout: dict) -> None:
    model, path = tiny.hf_model(kind, tied)
    sequences = random_sequences()
    with torch.no_grad():
        logits = [
            model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            for prompt, response in sequences
        ]
    expected = torch.cat([logits[i] for indices in bins(sequences) for i in indices])
    stored = load_file(path / "model.safetensors")
    for world, layouts in every_layout.items():
        for found in gloo.run(in_layouts, world, str(path), layouts, sequences):
            for layout, (streamed, names, own) in zip(layouts, found, strict=True):
                assert [(name, tuple(tensor.shape)) for name, tensor in streamed] == names, layout
                assert {name for name, _ in streamed} == set(stored) and len(streamed) == len(stored), layout
                assert all(torch.equal(tensor, stored[name]) for name, tensor in streamed), layout
                if own is not None:
                    torch.testing.assert_close(torch.cat(own), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_rotary_frequencies_are_those_of_transformers_to_the_bit(kind: str) -> None:
    model, path = tiny.hf_model(kind)
    architecture = architectures.read_architecture(read_hf_config(path))
    assert torch.equal(rope.frequencies(architecture, "cpu"), model.model.rotary_emb.inv_freq)


def test_every_target_model_has_the_tensors_that_transformers_has() -> None:
    folders = sorted((Path(__file__).parents[2] / "recipes" / "models").glob("*/config.json"))
    assert folders
    for file in folders:
        architecture = architectures.read_architecture(json.loads(file.read_text()))
        shapes = param_mapping.hf_shapes(architecture)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file.parent))
        expected = sum(parameter.numel() for parameter in model.parameters())
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == expected, file
