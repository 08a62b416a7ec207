"""On a GPU: ``pytest tests/gpu/ops_kernels.py``. The compiled Triton kernels against the portable path."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.ops import VocabShard, linear_policy_stats, policy_stats

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_kernels_equal_the_portable_path_on_the_device():
    from tests.ops.kernel_cases import compare

    worst = compare("cuda")
    assert max(worst.values()) <= 1, {case: ratio for case, ratio in worst.items() if ratio > 1}


def test_offsets_beyond_32_bits():
    """16k rows of 152k columns are 2.5e9 elements: the last row equals the same row alone."""
    T, V = 16_384, 151_936
    logits = torch.zeros(T, V, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(V, device="cuda") * 3
    logits.requires_grad_()
    targets, shard = torch.zeros(T, dtype=torch.int64, device="cuda"), VocabShard(0, V, V)
    out = policy_stats(logits, targets, shard, want=("logprob", "entropy"), grad=("logprob",))
    alone = policy_stats(logits[-1:].detach(), targets[-1:], shard, want=("logprob", "entropy"), grad=())
    assert torch.equal(out["logprob"][-1:], alone["logprob"]) and torch.equal(out["entropy"][-1:], alone["entropy"])


def test_linear_policy_stats_equals_the_product_in_bf16():
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(64, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(5000, 128, generator=g, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(5000, (64,), generator=g, device="cuda")
    names, shard = ("logprob", "entropy", "nucleus_entropy"), VocabShard(0, 5000, 5000)
    gradients = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            out = linear_policy_stats(h, w, targets, shard, top_p=0.8, want=names, grad=names, chunk=24)
        else:
            out = policy_stats(h @ w.T, targets, shard, top_p=0.8, want=names, grad=names)
        loss = torch.stack([out[name].sum() for name in names]).sum()
        gradients.append(torch.autograd.grad(loss, (h, w)))
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).abs().max() <= 2**-6 * expected.abs().max()
