"""The shipped tiny model's own logits: every output at TP 1, 2 and 4, and the share of tokens that are resolved."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import policy_stats
from tests import gloo
from tests.ops.cases import ALL, assert_values, padded_shard

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"


@functools.cache
def real_logits() -> tuple[Tensor, Tensor]:
    """Next-token logits ``[T, V]`` of random prompts' continuation by the model itself, and the tokens it drew."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (4, 8), generator=g)
    with torch.no_grad():
        for _ in range(24):
            last = model(tokens).logits[:, -1]
            tokens = torch.cat([tokens, torch.multinomial(last.softmax(-1), 1, generator=g)], 1)
        logits = model(tokens).logits[:, :-1]
    return logits.flatten(0, 1), tokens[:, 1:].flatten()


def run_real(
    rank: int, world: int, logits: Tensor, targets: Tensor, nucleus: str, num_candidates: int
) -> tuple[dict, int]:
    group = torch.distributed.group.WORLD if world > 1 else None
    local, shard = padded_shard(logits, rank, world, group)
    out = policy_stats(
        local, targets, shard, top_p=0.8, nucleus=nucleus, want=ALL, grad=(), num_candidates=num_candidates
    )
    return {name: out[name] for name in ALL}, int(out["num_fallback"])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tiny_models_own_logits(world, dtype, record_property):
    logits, targets = real_logits()
    logits = logits.to(dtype)
    for nucleus, num_candidates in (("inclusive", 256), ("exclusive", 256), ("inclusive", 4)):
        arguments = (logits, targets, nucleus, num_candidates)
        ranks = gloo.run(run_real, world, *arguments) if world > 1 else [run_real(0, 1, *arguments)]
        assert_values(ranks[0][0], logits, targets, 1.0, 0.8, nucleus)
        resolved = 1 - ranks[0][1] / len(logits)
        record_property(f"resolved_share_{nucleus}_{num_candidates}", resolved)
        print(f"tiny model, {dtype}, TP {world}, {nucleus}, {num_candidates} candidates: resolved {resolved:.3f}")
        assert resolved > 0.9 or num_candidates == 4
