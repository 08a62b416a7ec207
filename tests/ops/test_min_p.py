"""The nucleus that ends at a probability (min_p): values, gradients, ranks, and the divergence that its mass is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, linear_policy_stats, policy_stats, reference
from megatron_ext.ops.policy_stats import DIFFERENTIABLE
from tests import gloo
from tests.ops.cases import ALL, language_like, padded_shard, stats_of, weighted

T, VOCAB, WIDE = 12, 101, 9001  # wide: the highest logits are found by blocks, of all but the flat tokens
RULES = [(min_p, nucleus) for min_p in (0.02, 0.5) for nucleus in ("inclusive", "exclusive")]
TEMPERATURE = torch.linspace(1.5, 0.6, T)


def some_logits(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """From nearly certain to open; a flat token, one of ties, one that is mostly minus infinity."""
    logits, targets = language_like(T, vocab, dtype)
    logits[3] = (logits[3].float() * 0.01).to(dtype)
    logits[5] = logits[5].float().round().to(dtype)
    logits[7, 4:] = -torch.inf
    targets[7] = 2
    return logits, targets


def run_rules(rank: int, world: int, vocab: int, dtype: torch.dtype, deterministic: bool) -> list[dict[str, Tensor]]:
    """For each rule every output, and the gradient of all of them and of the mass alone."""
    logits, targets = some_logits(vocab, dtype)
    group = torch.distributed.group.WORLD if world > 1 else None
    local, shard = padded_shard(logits, rank, world, group)
    kept = local.clone()
    local.requires_grad_()
    found = []
    for min_p, nucleus in RULES:
        out = policy_stats(
            local, targets, shard, temperature=TEMPERATURE, min_p=min_p, nucleus=nucleus, want=ALL, grad=DIFFERENTIABLE,
            deterministic=deterministic,
        )  # fmt: skip
        result = {name: out[name].detach() for name in ALL}
        assert out["num_fallback"] == 0
        for name, names in (("all", DIFFERENTIABLE), ("mass", ("nucleus_mass",))):
            loss = weighted({each: out[each] for each in names})
            (result[f"gradient of {name}"],) = torch.autograd.grad(loss, local, retain_graph=True)
        assert torch.equal(local.detach(), kept) and not result["gradient of all"][:, shard.real :].any()
        found.append(result)
    return found


def check(found: list[list[dict[str, Tensor]]], vocab: int, dtype: torch.dtype) -> None:
    """All ranks' results against the definitions in fp64."""
    logits, targets = some_logits(vocab, dtype)
    unit = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 1e-6}[dtype]
    for number, (min_p, nucleus) in enumerate(RULES):
        wide = logits.double().requires_grad_()
        mask = reference.min_p_mask(logits, min_p, TEMPERATURE.double(), nucleus)
        assert mask.sum(-1).min() >= 1 and (mask.sum(-1) == 1).any() and mask.sum(-1).max() > vocab / 2
        expected = stats_of(wide, targets, mask, TEMPERATURE.double())
        for name in ALL:
            assert all(torch.equal(rank[number][name], found[0][number][name]) for rank in found), name
            got, value = found[0][number][name].double(), expected[name].detach().double()
            torch.testing.assert_close(got, value, rtol=8 * unit, atol=8 * unit, msg=f"{name} {min_p} {nucleus}")
        for name, names in (("all", DIFFERENTIABLE), ("mass", ("nucleus_mass",))):
            loss = weighted({each: expected[each] for each in names})
            (gradient,) = torch.autograd.grad(loss, wide, retain_graph=True)
            got = torch.cat([rank[number][f"gradient of {name}"] for rank in found], 1)[:, :vocab].double()
            rounding = 2**-8 if dtype == torch.bfloat16 else 4 * unit
            torch.testing.assert_close(got, gradient, rtol=rounding, atol=8 * unit, msg=f"{name} {min_p} {nucleus}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [VOCAB, WIDE])
@pytest.mark.parametrize("deterministic", [False, True])
def test_values_and_gradients_are_the_definitions(dtype: torch.dtype, vocab: int, deterministic: bool) -> None:
    check([run_rules(0, 1, vocab, dtype, deterministic)], vocab, dtype)


@pytest.mark.parametrize(("world", "dtype"), [(2, torch.float64), (4, torch.float32), (2, torch.bfloat16)])
def test_every_number_of_ranks_gives_the_definitions(world: int, dtype: torch.dtype) -> None:
    check(gloo.run(run_rules, world, WIDE, dtype, False), WIDE, dtype)


def test_deterministic_gives_the_same_bits_on_any_number_of_ranks() -> None:
    one, two = run_rules(0, 1, VOCAB, torch.float32, True), gloo.run(run_rules, 2, VOCAB, torch.float32, True)
    for number, expected in enumerate(one):
        for name in ALL:
            assert torch.equal(two[0][number][name], expected[name]), name
        got = torch.cat([rank[number]["gradient of all"] for rank in two], 1)[:, :VOCAB]
        assert torch.equal(got, expected["gradient of all"][:, :VOCAB])


def run_divergence(rank: int, world: int) -> dict[str, Tensor]:
    """-log of the mass of what is above .02 of the likeliest, and its gradient, fp64."""
    logits, targets = some_logits(VOCAB, torch.float64)
    local, shard = padded_shard(logits, rank, world, torch.distributed.group.WORLD if world > 1 else None)
    local.requires_grad_()
    want = ("logprob", "nucleus_mass")
    out = policy_stats(
        local, targets, shard, temperature=0.7, min_p=0.02, nucleus="exclusive", want=want, grad=("nucleus_mass",)
    )
    value = -out["nucleus_mass"].log()
    (gradient,) = torch.autograd.grad(value.sum(), local)
    return {"value": value.detach(), "gradient": gradient}


@pytest.mark.parametrize("world", [1, 2])
def test_minus_log_of_the_mass_is_the_divergence_from_the_policy_without_its_noise(world: int) -> None:
    """KL(q || pi) with q a constant: the same value, and the same gradient, (p - q) / T."""
    ranks = gloo.run(run_divergence, world) if world > 1 else [run_divergence(0, 1)]
    logits, _ = some_logits(VOCAB, torch.float64)
    logits.requires_grad_()
    logp = reference.log_softmax(logits, 0.7)
    p = logp.detach().exp()
    q = torch.where(p > 0.02 * p.amax(-1, keepdim=True), p, 0.0)
    q /= q.sum(-1, keepdim=True)
    divergence = torch.where(q > 0, q * (q.clamp_min(1e-300).log() - logp.clamp_min(-1e30)), 0.0).sum(-1)
    (gradient,) = torch.autograd.grad(divergence.sum(), logits)
    got = torch.cat([rank["gradient"] for rank in ranks], 1)[:, :VOCAB]
    torch.testing.assert_close(ranks[0]["value"], divergence.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(got, (p - q) / 0.7, rtol=1e-10, atol=1e-14)


def test_the_fused_head_gives_the_same() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, 16, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(VOCAB, 16, generator=g, dtype=torch.float64).requires_grad_()
    targets = torch.randint(VOCAB, (T,), generator=g)
    asked = {"min_p": 0.1, "nucleus": "exclusive", "want": ("logprob", "nucleus_mass"), "grad": ("nucleus_mass",)}
    fused = linear_policy_stats(hidden, weight, targets, chunk=5, **asked)
    plain = policy_stats(hidden @ weight.T, targets, **asked)
    for name in ("logprob", "nucleus_mass"):
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-12, atol=1e-14)
    for got, expected in zip(
        torch.autograd.grad(fused["nucleus_mass"].log().sum(), (hidden, weight)),
        torch.autograd.grad(plain["nucleus_mass"].log().sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_the_mass_of_a_nucleus_by_mass_has_a_gradient_too() -> None:
    logits, targets = some_logits(VOCAB, torch.float64)
    logits.requires_grad_()
    out = policy_stats(logits, targets, top_p=0.8, want=("nucleus_mass",), grad=("nucleus_mass",))
    (got,) = torch.autograd.grad(weighted({"nucleus_mass": out["nucleus_mass"]}), logits)
    mask = reference.nucleus_mask(logits, 0.8)
    (expected,) = torch.autograd.grad(weighted({"nucleus_mass": reference.nucleus_mass(logits, mask)}), logits)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-14)


def test_no_tokens_and_a_nan() -> None:
    empty = torch.empty(0, 30, requires_grad=True)
    out = policy_stats(empty, torch.empty(0, dtype=torch.int64), min_p=0.1, want=ALL)
    assert out["nucleus_mass"].shape == (0,) and out["num_fallback"] == 0
    logits, targets = language_like(4, 300)
    clean = policy_stats(logits, targets, min_p=0.1, want=ALL, grad=())
    logits[2, 7] = torch.nan
    out = policy_stats(logits, targets, min_p=0.1, want=ALL, grad=())
    others = torch.tensor([0, 1, 3])
    for name in ("logprob", "entropy", "nucleus_entropy", "nucleus_mass"):
        assert out[name][2].isnan(), name
        assert torch.equal(out[name][others], clean[name][others]), name


@pytest.mark.parametrize(
    "asked", [{}, {"min_p": 0.0}, {"min_p": 1.0}, {"min_p": 0.1, "top_p": 0.8}, {"top_p": 0.8, "min_p": 2.0}]
)
def test_what_does_not_fit_is_named(asked: dict[str, Any]) -> None:
    targets = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"nucleus outputs need top_p in \(0, 1\], or in its place min_p in"):
        policy_stats(torch.zeros(2, 8), targets, VocabShard(0, 8, 8), want=("nucleus_mass",), grad=(), **asked)
