"""deterministic=True: the same bits under every sharding, on top of what the plain path promises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, linear_policy_stats, policy_stats
from megatron_ext.ops.deterministic import exponential
from megatron_ext.ops.options import SUPPORT
from megatron_ext.ops.policy_stats import DIFFERENTIABLE
from tests import gloo
from tests.ops.cases import ALL, assert_values, language_like, padded_shard, reference_stats, truth, weighted
from tests.ops.test_policy_stats import extreme_logits
from tests.ops.test_support import VOCAB as SMALL
from tests.ops.test_support import some_support

T, VOCAB, D = 12, 1001, 48
RULES = ("inclusive", "exclusive")
TEMPERATURE = torch.linspace(1.5, 0.6, T)


def world_group(world: int):
    return torch.distributed.group.WORLD if world > 1 else None


def run_stats(rank: int, world: int, dtype: torch.dtype, deterministic: bool) -> dict[str, Tensor]:
    """Outputs, and the gradient of this rank's real columns."""
    logits, targets = language_like(T, VOCAB, dtype)
    local, shard = padded_shard(logits, rank, world, world_group(world))
    local.requires_grad_()
    found = {}
    for nucleus in RULES:
        out = policy_stats(
            local, targets, shard, temperature=TEMPERATURE, top_p=0.8, nucleus=nucleus,
            want=ALL, grad=DIFFERENTIABLE, deterministic=deterministic,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(weighted({name: out[name] for name in DIFFERENTIABLE}), local)
        assert not gradient[:, shard.real :].any()
        found |= {f"{nucleus} {name}": out[name].detach() for name in ALL}
        found[f"{nucleus} gradient"] = gradient[:, : shard.real]
    return found


def whole(ranks: list[dict[str, Tensor]], sharded: dict[str, int]) -> dict[str, Tensor]:
    """One result of all ranks': those named in ``sharded`` joined along that axis, all others the same everywhere."""
    for name, value in ranks[0].items():
        assert name in sharded or all(torch.equal(value, rank[name]) for rank in ranks), name
    joined = {name: torch.cat([rank[name] for rank in ranks], axis) for name, axis in sharded.items()}
    return ranks[0] | joined


def on(world: int, function, *arguments) -> list[dict[str, Tensor]]:
    return gloo.run(function, world, *arguments) if world > 1 else [function(0, 1, *arguments)]


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_number_of_ranks_gives_the_same_bits(dtype: torch.dtype) -> None:
    axes = {f"{rule} gradient": 1 for rule in RULES}
    one = whole(on(1, run_stats, dtype, True), axes)
    for world in (2, 3, 4, 8):
        assert differing(one, whole(on(world, run_stats, dtype, True), axes)) == [], world
    if dtype == torch.float32:  # without it, other bits: the comparison can fail
        plain = [whole(on(world, run_stats, dtype, False), axes) for world in (1, 4)]
        assert differing(*plain)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    logits, targets = language_like(40, 5003)
    logits.requires_grad_()
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = policy_stats(logits, targets, top_p=0.8, want=ALL, grad=DIFFERENTIABLE, deterministic=True)
        (gradient,) = torch.autograd.grad(weighted({name: out[name] for name in DIFFERENTIABLE}), logits)
        found.append({name: out[name].detach() for name in ALL} | {"gradient": gradient})
    torch.set_num_threads(before)
    assert differing(found[0], found[1]) == differing(found[0], found[2]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nucleus", RULES)
def test_values_and_gradients_equal_the_reference(dtype: torch.dtype, nucleus: str) -> None:
    logits, targets = language_like(T, VOCAB, dtype)
    found, rule = run_stats(0, 1, dtype, True), (0.8, nucleus)
    assert_values({name: found[f"{nucleus} {name}"] for name in ALL}, logits, targets, TEMPERATURE, *rule)
    _, expected = truth(logits.double(), targets, TEMPERATURE.double(), *rule, grad=DIFFERENTIABLE)
    _, in_fp32 = truth(logits.float(), targets, TEMPERATURE, *rule, grad=DIFFERENTIABLE)
    assert expected is not None and in_fp32 is not None
    error = (found[f"{nucleus} gradient"].double() - expected).abs()
    rounding = (2**-8 if dtype == torch.bfloat16 else 2**-23) * expected.abs()
    assert bool((error <= 2 * (in_fp32 - expected).abs().amax() + rounding + 1e-7).all())


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("nucleus", RULES)
def test_ties_infinities_and_extremes(top_p: float, nucleus: str) -> None:
    logits, targets = extreme_logits()
    out = policy_stats(logits, targets, top_p=top_p, nucleus=nucleus, want=ALL, grad=(), deterministic=True)
    assert_values({name: out[name] for name in ALL}, logits, targets, 1.0, top_p, nucleus)


def test_gradcheck() -> None:
    logits, targets = language_like(3, 7, torch.float64)
    logits.requires_grad_()

    def outputs(x: Tensor):
        out = policy_stats(
            x, targets, temperature=0.7, top_p=0.9, want=ALL, grad=DIFFERENTIABLE, deterministic=True
        )  # fmt: skip
        nucleus_logprob = torch.where(out["nucleus_logprob"] == -torch.inf, 0, out["nucleus_logprob"])
        return out["logprob"], out["entropy"], out["nucleus_entropy"], nucleus_logprob

    assert torch.autograd.gradcheck(outputs, logits)


def test_a_nan_stays_with_its_token() -> None:
    logits, targets = language_like(4, 300)
    clean = policy_stats(logits, targets, top_p=0.8, want=ALL, grad=(), deterministic=True)
    logits[2, 7] = torch.nan
    out = policy_stats(logits, targets, top_p=0.8, want=ALL, grad=(), deterministic=True)
    others = torch.tensor([0, 1, 3])
    for name in ("logprob", "entropy", "nucleus_entropy", "nucleus_mass"):
        assert out[name][2].isnan(), name
        assert torch.equal(out[name][others], clean[name][others]), name


def test_no_tokens() -> None:
    logits = torch.empty(0, 30, requires_grad=True)
    out = policy_stats(logits, torch.empty(0, dtype=torch.int64), top_p=0.8, want=ALL, deterministic=True)
    (gradient,) = torch.autograd.grad(out["logprob"].sum(), logits)
    assert out["nucleus_entropy"].shape == (0,) and gradient.shape == (0, 30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_exponential_is_right_to_three_ulp_and_knows_no_position(dtype: torch.dtype) -> None:
    x = -torch.linspace(0, 80, 10_007, dtype=dtype)
    got, exact = exponential(x), x.double().exp()
    ulp = torch.finfo(dtype).eps
    assert float(((got.double() - exact) / exact / (1 - x.double())).abs().amax()) < 3 * ulp  # x log2(e) is rounded
    for start in range(1, 40):
        assert torch.equal(exponential(x[start:].clone()), got[start:])
        assert torch.equal(exponential(x[:-start].clone()), got[:-start])
    assert torch.equal(exponential(torch.tensor([-torch.inf, -1e30, 0.0], dtype=dtype)), x.new_tensor([0.0, 0.0, 1.0]))


def run_support(rank: int, world: int) -> dict[str, Tensor]:
    """Over a support whose rows lie on one shard, on all, nowhere (the whole vocabulary), or without the target."""
    logits, targets = language_like(T, SMALL)
    local, shard = padded_shard(logits, rank, world, world_group(world))
    local.requires_grad_()
    want = (*SUPPORT, "entropy")
    out = policy_stats(
        local, targets, shard, temperature=0.7, want=want, grad=want, support=some_support(targets), deterministic=True
    )
    outside = out["support_logprob"] == -torch.inf
    loss = torch.where(outside, 0, out["support_logprob"]).sum() + 2 * out["support_entropy"].sum()
    (gradient,) = torch.autograd.grad(loss - out["entropy"].sum(), local)
    return {name: out[name].detach() for name in want} | {"gradient": gradient[:, : shard.real]}


def test_a_support_gives_the_same_bits() -> None:
    one = whole(on(1, run_support), {"gradient": 1})
    for world in (2, 3, 4):
        assert differing(one, whole(on(world, run_support), {"gradient": 1})) == [], world


def run_linear(rank: int, world: int, vocab: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, D, generator=g).to(dtype).requires_grad_()
    weight, targets = torch.randn(vocab, D, generator=g).to(dtype), torch.randint(vocab, (T,), generator=g)
    width = -(-vocab // 8) * 8 // world
    padded = torch.full((width * world, D), 7.0, dtype=dtype)
    padded[:vocab] = weight
    local = padded[rank * width : (rank + 1) * width].clone().requires_grad_()
    shard = VocabShard.for_vocab(vocab, world_group(world), padded_size=width * world)
    out = linear_policy_stats(
        hidden, local, targets, shard, temperature=0.7, top_p=0.8, want=ALL, grad=DIFFERENTIABLE, chunk=5,
        deterministic=True,
    )  # fmt: skip
    loss = weighted({name: out[name] for name in DIFFERENTIABLE})
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, local))
    assert not d_weight[shard.real :].any()
    return {name: out[name].detach() for name in ALL} | {"d_hidden": d_hidden, "d_weight": d_weight[: shard.real]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [61, 1001, 5])
def test_the_product_with_the_output_weight_gives_the_same_bits(vocab: int, dtype: torch.dtype) -> None:
    one = whole(on(1, run_linear, vocab, dtype), {"d_weight": 0})
    for world in (2, 4, 8):
        assert differing(one, whole(on(world, run_linear, vocab, dtype), {"d_weight": 0})) == [], world


def test_the_product_equals_the_reference() -> None:
    found = run_linear(0, 1, VOCAB, torch.float64)
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(T, D, generator=g).double().requires_grad_()
    weight = torch.randn(VOCAB, D, generator=g).double().requires_grad_()
    expected = reference_stats(hidden @ weight.T, torch.randint(VOCAB, (T,), generator=g), 0.7, 0.8, "inclusive")
    d_hidden, d_weight = torch.autograd.grad(weighted({n: expected[n] for n in DIFFERENTIABLE}), (hidden, weight))
    for name, value in (expected | {"d_hidden": d_hidden, "d_weight": d_weight}).items():
        torch.testing.assert_close(found[name].double(), value.detach().double(), rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard": VocabShard(0, 9, 16)}, "columns 0 to 9 of this rank cut.*padded to 16"),
        ({"sequence_parallel": True}, "no sequence_parallel"),
        ({"targets": torch.zeros(2, dtype=torch.int64, device="meta")}, "on a CPU alone, found tensors on meta"),
    ],
)
def test_what_it_does_not_do_is_an_error(change: dict, message: str) -> None:
    shard = change.get("shard", VocabShard(0, 8, 8))
    arguments: dict = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(shard.width, 3)}
    arguments |= {"targets": torch.zeros(2, dtype=torch.int64), "shard": shard, "deterministic": True}
    with pytest.raises(ValueError, match=message):
        linear_policy_stats(**(arguments | change))
