"""Sizes from config.json: what transformers writes to disk, what the Hub publishes, what Megatron pads."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_ext.config.checks import read_hf_config
from megatron_ext.model.architectures import read_architecture
from megatron_ext.plan import sizes
from megatron_ext.plan.sizes import (
    Parameter,
    Sharding,
    active_parameters,
    buffers,
    hf_tensors,
    num_parameters,
    stage_parameters,
)
from tests import tiny

MODELS = Path(__file__).parents[2] / "recipes" / "models"
PUBLISHED = {
    "deepseek-r1-distill-qwen-1.5b": 1_777_088_000,
    "deepseek-r1-distill-qwen-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "openreasoning-nemotron-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-math-1.5b": 1_543_714_304,
    "qwen2.5-math-7b": 7_615_616_512,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-30b-a3b-base": 30_532_122_624,
    "qwen3-4b-base": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-8b-base": 8_190_735_360,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_tensors_are_those_that_transformers_saves(kind: str, tied: bool) -> None:
    _, folder = tiny.hf_model(kind, tied)
    saved = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            saved |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    assert dict(hf_tensors(read_architecture(read_hf_config(folder)))) == saved


def test_every_target_model_has_its_published_size() -> None:
    assert {path.parent.name for path in MODELS.glob("*/config.json")} == set(PUBLISHED)
    for name, count in PUBLISHED.items():
        assert num_parameters(read_architecture(read_hf_config(MODELS / name))) == count, name


def test_active_parameters_are_those_of_a_token() -> None:
    moe = read_architecture(read_hf_config(MODELS / "qwen3-30b-a3b"))
    # a layer: 2048 x (2 x 4096 + 2 x 512) attention, 128 x 2048 router, 8 x 3 x 2048 x 768 experts; the output layer
    layer = 2048 * (2 * 4096 + 2 * 512) + 128 * 2048 + 8 * 3 * 2048 * 768
    assert active_parameters(moe) == 48 * layer + 151936 * 2048


def test_shards_of_all_ranks_make_the_model() -> None:
    a = read_architecture(read_hf_config(MODELS / "qwen3-8b-base"))
    unsharded = stage_parameters(a, Sharding(), range(36), first=True, last=True)
    assert sum(p.numel for p in unsharded) == num_parameters(a)
    quarter = stage_parameters(a, Sharding(tensor=4), range(36), first=True, last=True)
    norms = 36 * (2 * 4096 + 2 * 128) + 4096  # the same on every rank
    assert 4 * sum(p.numel for p in quarter) - 3 * norms == num_parameters(a)


def test_experts_are_cut_twice_and_everything_else_is_not() -> None:
    a = read_architecture(read_hf_config(MODELS / "qwen3-30b-a3b"))
    s = Sharding(expert=8, expert_tensor=2)
    held = stage_parameters(a, s, range(48), first=True, last=True)
    assert sum(p.numel for p in held if p.expert) * 16 == 48 * 128 * 3 * 2048 * 768
    assert sum(p.numel for p in held if not p.expert) == num_parameters(a) - 48 * 128 * 3 * 2048 * 768


def test_a_tied_embedding_is_held_by_the_first_and_the_last_stage() -> None:
    a = read_architecture(read_hf_config(MODELS / "qwen3-4b-base"))
    s, vocabulary = Sharding(), 151936 * 2560
    first = stage_parameters(a, s, range(18), first=True, last=False)
    last = stage_parameters(a, s, range(18, 36), first=False, last=True)
    assert [p.numel for p in (*first, *last) if p.own_bucket] == [vocabulary, vocabulary]
    assert sum(p.numel for p in (*first, *last)) == num_parameters(a) + vocabulary
    critic = stage_parameters(a, s, range(18, 36), first=False, last=True, critic=True)
    assert sum(p.numel for p in critic) == sum(p.numel for p in last) - vocabulary + 2560 + 1


def test_buffers_are_padded_as_megatron_does() -> None:
    # reversed: 1 at [0, 1), 100 from the next multiple of 64 on, [64, 164); the end at a multiple of lcm(4, 128)
    found = buffers([Parameter(100), Parameter(1)], Sharding(data=4))
    assert (found.parameters, found.padded, found.owned) == (101, 256, 1)  # the first rank has [0, 64)
    # experts have a buffer and ranks of their own
    found = buffers([Parameter(100), Parameter(300, expert=True)], Sharding(data=2, expert_data=3))
    assert (found.padded, found.owned) == (128 + 384, 64 + 128)
    # a shared embedding ends a bucket before and after it
    found = buffers([Parameter(10, own_bucket=True), Parameter(10)], Sharding(data=1))
    assert (found.padded, found.owned) == (256, 20)


def test_a_full_bucket_is_closed_and_padded() -> None:
    """Two parameters of 130: in one bucket the second starts at 192 and the end, 322, is padded to 384."""
    parameters = [sizes.Parameter(130), sizes.Parameter(130)]
    assert sizes.buffers(parameters, sizes.Sharding()).padded == 384
    assert sizes.buffers(parameters, sizes.Sharding(), 130).padded == 2 * 256
    assert sizes.buffers(parameters, sizes.Sharding(), 131).padded == 384
