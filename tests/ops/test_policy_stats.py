"""policy_stats against the fp64 full-vocabulary reference: values, gradients, ranks, and what it must not do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, policy_stats
from megatron_ext.ops.policy_stats import DIFFERENTIABLE, NUCLEUS
from tests import gloo
from tests.ops.cases import ALL, assert_values, language_like, padded_shard, reference_stats, truth, weighted

T, VOCAB = 12, 101
NUCLEUS_LOSS = ("logprob", "entropy", "nucleus_entropy")
GRADS = (*[(name,) for name in DIFFERENTIABLE], DIFFERENTIABLE)
CASES = [
    {"nucleus": nucleus, "num_candidates": num_candidates}
    for nucleus in ("inclusive", "exclusive")
    for num_candidates in (256, 8)
]


def world_group(world: int):
    return torch.distributed.group.WORLD if world > 1 else None


def run_cases(rank: int, world: int, dtype: torch.dtype, temperature: Tensor, spread: float = 1.0) -> list[dict]:
    """Every case with every choice of gradients: values, gradients, the second backward, the caller's tensors."""
    logits, targets = language_like(T, VOCAB, dtype)
    logits = (logits * spread).round() if spread != 1 else logits
    local, shard = padded_shard(logits, rank, world, world_group(world))
    kept = local.clone()
    local.requires_grad_()
    results = []
    for case in CASES:
        gradients, out = [], None
        for grad in GRADS:
            out = policy_stats(local, targets, shard, temperature=temperature, top_p=0.8, want=ALL, grad=grad, **case)
            loss = weighted({name: out[name] for name in grad})
            (gradient,) = torch.autograd.grad(loss, local, retain_graph=True)
            (again,) = torch.autograd.grad(loss, local)
            assert torch.equal(gradient, again)
            assert torch.equal(local.detach(), kept)
            gradients.append(gradient)
        assert out is not None
        values = {name: out[name].detach().clone() for name in ALL}
        results.append({"values": values, "gradients": gradients, "fallback": int(out["num_fallback"])})
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [1.0, 0.3], ids=["distinct", "tied"])
def test_values_and_gradients_equal_the_reference_on_every_shard(world, dtype, spread):
    temperature = torch.linspace(1.5, 0.6, T)
    arguments = (dtype, temperature, spread)
    ranks = gloo.run(run_cases, world, *arguments) if world > 1 else [run_cases(0, 1, *arguments)]
    logits, targets = language_like(T, VOCAB, dtype)
    logits = (logits * spread).round() if spread != 1 else logits
    for i, case in enumerate(CASES):
        rule = (0.8, case["nucleus"])
        values = ranks[0][i]["values"]
        for name in ALL:
            assert all(torch.equal(values[name], rank[i]["values"][name]) for rank in ranks), name
        assert_values(values, logits, targets, temperature, *rule)
        for g, grad in enumerate(GRADS):
            _, expected = truth(logits.double(), targets, temperature.double(), *rule, grad=grad)
            _, in_fp32 = truth(logits.float(), targets, temperature, *rule, grad=grad)
            assert expected is not None and in_fp32 is not None
            got = torch.cat([rank[i]["gradients"][g] for rank in ranks], dim=1)
            assert not got[:, VOCAB:].any()
            error = (got[:, :VOCAB].double() - expected).abs()
            rounding = (2**-8 if dtype == torch.bfloat16 else 2**-23) * expected.abs()
            assert bool((error <= 2 * (in_fp32 - expected).abs().amax() + rounding + 1e-7).all()), (case, grad)
    assert ranks[0][1]["fallback"] > 0  # 8 logits, or 16 counts, do not resolve the flatter tokens
    if dtype == torch.float32:
        assert ranks[0][0]["fallback"] == 0  # by default every column is a candidate


@pytest.mark.parametrize("case", CASES[1::2], ids=lambda case: "-".join(map(str, case.values())))
def test_gradcheck(case):
    logits, targets = language_like(3, 7, torch.float64)
    logits.requires_grad_()

    def outputs(x: Tensor):
        out = policy_stats(x, targets, temperature=0.7, top_p=0.9, want=ALL, grad=DIFFERENTIABLE, **case)
        nucleus_logprob = torch.where(out["nucleus_logprob"] == -torch.inf, 0, out["nucleus_logprob"])
        return out["logprob"], out["entropy"], out["nucleus_entropy"], nucleus_logprob

    assert torch.autograd.gradcheck(outputs, logits)


def extreme_logits() -> tuple[Tensor, Tensor]:
    logits, targets = language_like(9, 40)
    logits[0] = logits[0].round()  # ties
    logits[1] = 0.0
    logits[1, ::2] = -0.0
    logits[2, 5:] = -torch.inf
    logits[3] = logits[3] * 1000
    logits[4] -= 1e4
    logits[5] = torch.tensor([1e4, -1e4]).repeat(20)
    logits[6, :10] = -torch.inf  # the first shard of four
    logits[7, 10:] = -torch.inf  # all others
    logits[8] = 3.0  # every token ties
    targets[2], targets[7] = 0, 12
    return logits, targets


def run_extremes(rank: int, world: int, top_p: float, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    logits, targets = extreme_logits()
    shard = VocabShard.for_vocab(40, world_group(world))
    local = logits.to(dtype)[:, shard.start : shard.stop].clone()
    results = []
    for case in CASES:
        out = policy_stats(local, targets, shard, top_p=top_p, want=ALL, grad=(), **case)
        results.append({name: out[name] for name in ALL})
    return results


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize(("world", "dtype"), [(1, torch.float32), (1, torch.bfloat16), (4, torch.float32)])
def test_ties_infinities_and_extremes(top_p, world, dtype):
    ranks = gloo.run(run_extremes, world, top_p, dtype) if world > 1 else [run_extremes(0, 1, top_p, dtype)]
    logits, targets = extreme_logits()
    for i, case in enumerate(CASES):
        for rank in ranks:
            assert_values(rank[i], logits.to(dtype), targets, 1.0, top_p, case["nucleus"])


def test_gradients_beside_infinities_are_finite():
    logits, targets = extreme_logits()
    targets[7] = 3
    logits.requires_grad_()
    out = policy_stats(logits, targets, top_p=0.8, want=ALL, grad=DIFFERENTIABLE)
    loss = weighted({name: out[name] for name in DIFFERENTIABLE})
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all() and gradient.any()


def test_a_nan_stays_with_its_token():
    logits, targets = language_like(4, 300)
    clean = policy_stats(logits, targets, top_p=0.8, want=ALL, grad=())
    logits[2, 7] = torch.nan
    out = policy_stats(logits, targets, top_p=0.8, want=ALL, grad=())
    others = torch.tensor([0, 1, 3])
    for name in ("logprob", "entropy", "nucleus_entropy", "nucleus_mass"):
        assert out[name][2].isnan(), name
        assert torch.equal(out[name][others], clean[name][others]), name


def test_only_what_is_wanted_is_returned_and_only_grad_carries_a_gradient():
    logits, targets = language_like(4, 30)
    logits.requires_grad_()
    out = policy_stats(logits, targets, want=("logprob", "entropy"), grad=("logprob",))
    assert out["logprob"].requires_grad and not out["entropy"].requires_grad
    assert out.nucleus_entropy is None and out.num_fallback is None
    assert policy_stats(logits, targets, want=("logprob",)).entropy is None
    with pytest.raises(KeyError, match="name it in want"):
        out["nucleus_entropy"]


def run_empty_shard(rank: int, world: int) -> dict[str, Tensor]:
    """A vocabulary of 5 in shards of 4: the last ranks hold nothing but padding."""
    logits, targets = language_like(3, 5)
    local, shard = torch.full((3, 4), 50.0), VocabShard.for_vocab(5, world_group(world), padded_size=16)
    local[:, : shard.real] = logits[:, shard.start : shard.start + shard.real]
    local.requires_grad_()
    stats = policy_stats(local, targets, shard, top_p=0.8, want=ALL, grad=("logprob",), num_candidates=1)
    (gradient,) = torch.autograd.grad(stats["logprob"].sum(), local)
    assert not gradient[:, shard.real :].any()
    return {name: stats[name].detach() for name in ALL}


def test_shards_of_padding_only():
    logits, targets = language_like(3, 5)
    for out in gloo.run(run_empty_shard, 4):
        assert_values(out, logits, targets, 1.0, 0.8, "inclusive")


def test_no_tokens():
    logits = torch.empty(0, 30, requires_grad=True)
    out = policy_stats(logits, torch.empty(0, dtype=torch.int64), top_p=0.8, want=ALL)
    (gradient,) = torch.autograd.grad(out["logprob"].sum(), logits)
    assert out["nucleus_entropy"].shape == (0,) and gradient.shape == (0, 30)


def test_the_backward_in_place_writes_over_the_logits_and_cannot_run_twice():
    logits, targets = language_like(6, 5000)
    shard = VocabShard(0, 5000, 5000)
    expected = torch.autograd.grad(nucleus_loss(logits.requires_grad_(), targets, shard), logits)[0]
    buffer = logits.detach().clone().requires_grad_()
    loss = nucleus_loss(buffer * 1, targets, shard, inplace_backward=True)
    (gradient,) = torch.autograd.grad(loss, buffer, retain_graph=True)
    assert torch.equal(gradient, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, buffer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [300, 5000])
def test_the_backward_in_place_visits_small_nuclei_before_it_overwrites_them(vocab: int, dtype: torch.dtype):
    """Peaked logits: most nuclei have a handful of tokens, which are visited one by one."""
    logits, targets = language_like(64, vocab, torch.float64)
    logits, shard = (4 * logits).to(dtype), VocabShard(0, vocab, vocab)
    sizes = policy_stats(logits, targets, shard, top_p=0.8, want=("nucleus_size",), grad=())["nucleus_size"]
    assert (sizes <= vocab / 32).float().mean() > 0.5
    nuclei: list[dict[str, Any]] = [{"top_p": 0.8}, {"min_p": 0.05}]
    for by in nuclei:
        found = {}
        for inplace in (False, True):
            x = logits.clone().requires_grad_()
            out = policy_stats(
                x * 1, targets, shard, want=NUCLEUS_LOSS, grad=NUCLEUS_LOSS, inplace_backward=inplace, **by
            )
            (found[inplace],) = torch.autograd.grad(weighted({name: out[name] for name in NUCLEUS_LOSS}), x)
        assert torch.equal(found[True], found[False])


def nucleus_loss(logits: Tensor, targets: Tensor, shard: VocabShard, **options) -> Tensor:
    names = ("logprob", "entropy", "nucleus_entropy")
    out = policy_stats(logits, targets, shard, top_p=0.8, want=names, grad=names, **options)
    return out["logprob"].sum() + 2 * out["entropy"].sum() - 3 * out["nucleus_entropy"].sum()


def test_the_backward_of_wide_logits_in_many_blocks(monkeypatch):
    monkeypatch.setattr("megatron_ext.ops.logit_passes.BLOCK", 1 << 14)
    monkeypatch.setattr("megatron_ext.ops.logit_passes.GROUP", 1 << 15)
    logits, targets = language_like(16, 5003)
    for dtype in (torch.float32, torch.bfloat16):
        x = logits.to(dtype).requires_grad_()
        (got,) = torch.autograd.grad(nucleus_loss(x, targets, VocabShard(0, 5003, 5003)), x)
        wide = x.detach().double().requires_grad_()
        stats = reference_stats(wide, targets, 1.0, 0.8, "inclusive")
        loss = stats["logprob"].sum() + 2 * stats["entropy"].sum() - 3 * stats["nucleus_entropy"].sum()
        (expected,) = torch.autograd.grad(loss, wide)
        rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
        torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=4e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 9)}, r"expected \[T, 8\]"),
        ({"logits": torch.zeros(9), "shard": None}, r"expected \[T, V\]"),
        ({"logits": torch.zeros(2, 8, dtype=torch.float16)}, "expected bfloat16, float32 or float64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"expected int64 \[2\]"),
        ({"want": ("logprob", "entrpy")}, "entrpy"),
        ({"grad": ("entropy",), "want": ("logprob",)}, "expected wanted outputs"),
        ({"want": NUCLEUS}, "top_p in"),
        ({"nucleus": "above"}, "'inclusive' or 'exclusive'"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"temperature": torch.ones(3)}, r"temperature"),
        ({"temperature": 0.0}, r"temperature"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments: dict = {"logits": torch.zeros(2, 8), "targets": torch.zeros(2, dtype=torch.int64), "grad": ()}
    with pytest.raises(ValueError, match=message):
        policy_stats(**(arguments | {"shard": VocabShard(0, 8, 8)} | change))
