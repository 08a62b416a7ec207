"""The embedded engine says which experts its tokens went through."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.rollout.sampling import seed_of
from tests import tiny

SAMPLING = Sampling(temperature=3.0, max_response_tokens=24, routing=True)
BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"


def model_path(kind: str) -> Path:
    _, folder = tiny.hf_model(kind)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((BASE / name).read_text())
    return folder


def requests() -> list[Request]:
    draw = random.Random(3)
    return [
        Request(tuple(draw.randrange(2, tiny.VOCAB) for _ in range(draw.randint(1, 9))), seed_of(0, i))
        for i in range(12)
    ]


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_moe_mixed"])
def test_the_experts_are_those_of_a_forward_over_the_whole_response(kind: str) -> None:
    """Of every token but the last, whatever the padding of its batch, by the model's own router logits."""
    folder = model_path(kind)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with_experts = [number for number in range(4) if number not in tiny.OPTIONS[kind].get("mlp_only_layers", [])]
    samples = HFEngine(folder, batch_size=5).generate(requests(), SAMPLING)
    for sample in samples:
        ids = [*sample.prompt_ids, *sample.response_ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        expected = np.stack([each.topk(2).indices.sort(-1).values[:-1].numpy() for each in logits], axis=1)
        assert sample.routing is not None and sample.routing.dtype == np.uint8
        assert sample.routing.shape == (len(ids) - 1, 4, 2)
        assert (np.sort(sample.routing[:, with_experts], axis=-1) == expected).all()
        assert not np.delete(sample.routing, with_experts, axis=1).any()
    assert len({len(sample.response_ids) for sample in samples}) > 2  # some ended before the others of their batch


def test_experts_are_told_where_they_are_asked_for_alone() -> None:
    engine = HFEngine(model_path("qwen3_moe"))
    told = engine.generate(requests(), SAMPLING)
    plain = engine.generate(requests(), replace(SAMPLING, routing=False))
    assert plain == told and all(each.routing is None for each in plain)
    assert all(not gate._forward_hooks for gate in engine.model.modules())


def test_a_dense_model_has_none_to_tell() -> None:
    with pytest.raises(ValueError, match=r"rollout.routing_replay: Qwen2ForCausalLM .* no router .* = false"):
        HFEngine(model_path("qwen2")).generate(requests(), SAMPLING)
