"""linear_policy_stats against the fp64 reference of the whole product: values, and the gradients of both inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, linear_policy_stats, policy_stats
from megatron_ext.ops.policy_stats import DIFFERENTIABLE
from tests import gloo
from tests.ops.cases import ALL, reference_stats, weighted

T, D, V = 12, 16, 101


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(T, D, generator=g), torch.randn(V, D, generator=g)
    return hidden.to(dtype), weight.to(dtype), torch.randint(V, (T,), generator=g)


def run_linear(
    rank: int, world: int, dtype, sequence_parallel: bool, chunk: int, num_candidates: int
) -> dict[str, Tensor]:
    hidden, weight, targets = inputs(dtype)
    width = -(-V // world) + 2
    padded = torch.full((width * world, D), 7.0, dtype=dtype)
    padded[:V] = weight
    local = padded[rank * width : (rank + 1) * width].clone().requires_grad_()
    group = torch.distributed.group.WORLD if world > 1 else None
    own = hidden[rank * T // world : (rank + 1) * T // world] if sequence_parallel else hidden
    own = own.clone().requires_grad_()
    out = linear_policy_stats(
        own,
        local,
        targets,
        VocabShard.for_vocab(V, group, padded_size=width * world),
        temperature=torch.linspace(0.6, 1.5, T),
        top_p=0.8,
        want=ALL,
        grad=DIFFERENTIABLE,
        sequence_parallel=sequence_parallel,
        chunk=chunk,
        num_candidates=num_candidates,
    )
    loss = weighted({name: out[name] for name in DIFFERENTIABLE})
    d_hidden, d_weight = torch.autograd.grad(loss, (own, local))
    return {name: out[name].detach() for name in ALL} | {"d_hidden": d_hidden, "d_weight": d_weight}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("world", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_values_and_gradients_equal_the_reference(dtype, world, sequence_parallel):
    arguments = (dtype, sequence_parallel, 5, 4)  # chunks that do not divide the tokens, too few candidates for some
    ranks = gloo.run(run_linear, world, *arguments) if world > 1 else [run_linear(0, 1, *arguments)]
    hidden, weight, targets = inputs(dtype)
    # the logits are rounded to the inputs' dtype, as any output layer does: the truth starts from those
    wide_hidden, wide_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = wide_hidden @ wide_weight.T
    logits = exact + ((hidden @ weight.T).double() - exact).detach()
    expected = reference_stats(logits, targets, torch.linspace(0.6, 1.5, T).double(), 0.8, "inclusive")
    loss = weighted({name: expected[name] for name in DIFFERENTIABLE})
    d_hidden, d_weight = torch.autograd.grad(loss, (wide_hidden, wide_weight))
    loss_of_dtype = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for name in ALL:
        assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks), name
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            ranks[0][name].double(), expected[name].detach().double(), rtol=tolerance, atol=tolerance, msg=name
        )
    own = [rank["d_hidden"] for rank in ranks]
    got = torch.cat(own) if sequence_parallel else own[0]
    assert error(got, d_hidden) < loss_of_dtype
    got = torch.cat([rank["d_weight"] for rank in ranks])
    assert error(got[:V], d_weight) < loss_of_dtype
    assert not got[V:].any()


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


def test_one_chunk_or_many_are_the_same():
    whole, parts = (run_linear(0, 1, torch.float64, False, chunk, 256) for chunk in (T, 1))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-14, atol=1e-14, msg=name)


def test_the_weight_gradient_is_summed_in_fp32():
    """512 tokens that each add 2^-10: a bf16 sum would stop growing at 2^-2."""
    hidden = torch.ones(512, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(512, dtype=torch.int64)
    out = linear_policy_stats(hidden, weight, targets, want=("logprob",), chunk=1)
    (gradient,) = torch.autograd.grad((out["logprob"] * 2**-9).sum(), weight)
    assert gradient[:, 0].tolist() == [0.5, -0.5]


def test_the_weight_gradient_is_added_to_main_grad():
    hidden, weight, targets = inputs(torch.bfloat16)
    weight.requires_grad_()
    gradients = []
    for main_grad in (None, torch.full((V, D), 3.0)):
        out = linear_policy_stats(hidden, weight, targets, chunk=5, main_grad=main_grad)
        (gradient,) = torch.autograd.grad(out["logprob"].sum(), weight)
        gradients.append(gradient)
    assert main_grad is not None and not gradients[1].any()
    torch.testing.assert_close(main_grad - 3, gradients[0].float(), rtol=2**-8, atol=2**-20)


def test_no_logits_of_all_tokens_exist(monkeypatch):
    """The widest product is a chunk's: counted at the passes, forward and backward."""
    from megatron_ext.ops import logit_passes

    seen: list[int] = []

    def counted(original):
        def call(logits, *arguments, **options):
            seen.append(len(logits))
            return original(logits, *arguments, **options)

        return call

    for name in ("summarise", "gradient"):
        monkeypatch.setattr(logit_passes, name, counted(getattr(logit_passes, name)))
    run_linear(0, 1, torch.float32, False, 5, 256)
    assert seen == [5, 5, 2, 5, 5, 2]


def test_equals_policy_stats_of_the_product():
    hidden, weight, targets = inputs(torch.float32)
    names = ("logprob", "nucleus_entropy")
    fused = linear_policy_stats(hidden, weight, targets, top_p=0.9, want=names, grad=())
    plain = policy_stats(hidden @ weight.T, targets, top_p=0.9, want=names, grad=())
    for name in names:
        assert torch.equal(fused[name], plain[name])


def test_gradients_through_small_nuclei_are_those_of_the_product():
    """Wider than a block of the search for the highest logits, and so peaked that a nucleus has a few tokens."""
    targets, names, grads = torch.arange(40), ("logprob", "nucleus_entropy"), []
    for fused in (False, True):
        torch.manual_seed(1)
        hidden, weight = (4 * torch.randn(40, 16)).requires_grad_(), torch.randn(300, 16, requires_grad=True)
        if fused:
            out = linear_policy_stats(hidden, weight, targets, top_p=0.8, want=names, grad=names)
        else:
            out = policy_stats(hidden @ weight.T, targets, top_p=0.8, want=names, grad=names)
            assert (out["nucleus_entropy"] > 0).float().mean() > 0.25
        grads.append(torch.autograd.grad(out["logprob"].sum() - 3 * out["nucleus_entropy"].sum(), (hidden, weight)))
    for found, expected in zip(*grads, strict=True):
        assert error(found, expected) < 1e-5


def test_what_does_not_fit_is_named():
    hidden, weight, targets = inputs(torch.float32)
    with pytest.raises(ValueError, match="of one dtype"):
        linear_policy_stats(hidden, weight.bfloat16(), targets)
    with pytest.raises(ValueError, match=r"\[100, D\]"):
        linear_policy_stats(hidden, weight, targets, VocabShard.for_vocab(100))
    with pytest.raises(ValueError, match=r"expected int64 \[12\]"):
        linear_policy_stats(hidden, weight, targets[:3])
