"""Hugging Face -> Megatron -> Hugging Face: the same bits, the same logits, and every misfit named."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext import host
from megatron_ext.methods.base import Needs
from megatron_ext.model import build, hf_config, hf_weights
from megatron_ext.model.forward import forward
from megatron_ext.train import config as train_config
from megatron_ext.train import packing, parallel
from megatron_ext.train.config import ParallelConfig
from tests import gloo, tiny

LAYOUTS = [(1, 1, False), (2, 1, True), (4, 1, False), (1, 4, False), (2, 2, False)]


def load(rank: int, world: int, path: str, tensor: int, pipeline: int, sequence: bool) -> build.Policy:
    host.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, tensor=tensor, pipeline=pipeline, sequence=sequence))
    architecture = hf_config.read_architecture(train_config.hf_config(path))
    policy = build.build_policy(architecture, tensor=tensor, pipeline=pipeline, sequence=sequence, dtype=torch.float32)
    hf_weights.load_weights(policy.modules[0], architecture, path)
    return policy


def round_trip(rank: int, world: int, path: str, layout: tuple, sequences: list) -> tuple:
    tensor, _, sequence = layout
    policy = load(rank, world, path, *layout)
    weights = dict(hf_weights.stream_weights(policy.modules[0], policy.architecture))
    bins = packing.split([len(p) + len(r) for p, r in sequences], 40)
    packed = [packing.pack([sequences[i] for i in rows], multiple=tensor if sequence else 1) for rows in bins]
    return weights, bins, forward(policy, packed, Needs(entropy=True), 0.7)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_return_bitwise_and_log_probs_match_transformers(kind: str, tied: bool) -> None:
    model, path = tiny.hf_model(kind, tied)
    draw = random.Random(1)
    sequences = [
        tuple(tuple(draw.randrange(tiny.VOCAB) for _ in range(draw.randint(1, 9))) for _ in range(2)) for _ in range(9)
    ]
    expected = []
    for prompt, response in sequences:
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double() / 0.7
        logp = logits.log_softmax(-1)
        expected.append((logp.gather(1, torch.tensor(response)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)))
    stored = load_file(path / "model.safetensors")
    for layout in LAYOUTS:
        for weights, bins, stats in gloo.run(round_trip, layout[0] * layout[1], str(path), layout, sequences):
            assert set(weights) == set(stored)
            assert all(torch.equal(weights[name], tensor) for name, tensor in stored.items())
            for rows, found in zip(bins, stats or [], strict=stats is not None):
                for value, i in ((found.logprob, 0), (found.entropy, 1)):
                    torch.testing.assert_close(
                        value.double(), torch.cat([expected[r][i] for r in rows]), atol=1e-5, rtol=0
                    )


def broken(rank: int, world: int, path: str) -> str:
    try:
        load(rank, world, path, 1, 1, False)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), "missing tensor model.layers.2.mlp.up_proj.weight"),
        (lambda w: w.update({"model.extra": torch.zeros(2)}), "unexpected tensor model.extra"),
        (
            lambda w: w.update({"model.layers.1.self_attn.o_proj.weight": torch.zeros(32, 16)}),
            "model.layers.1.self_attn.o_proj.weight: gives shape [32, 16], expected [32, 64]",
        ),
    ],
)
def test_a_misfit_is_named(change, message: str, tmp_path: Path) -> None:
    _, path = tiny.hf_model()
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    assert message in gloo.run(broken, 1, str(tmp_path))[0]


def test_an_unsupported_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not supported; expected one of Qwen2ForCausalLM"):
        hf_config.read_architecture({"architectures": ["GPT2LMHeadModel"]})
