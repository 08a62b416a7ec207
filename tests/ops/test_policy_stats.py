"""policy_stats against the fp64 full-vocabulary reference: values, gradients, ranks, and what it must not do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, policy_stats, reference
from megatron_ext.ops.policy_stats import DIFFERENTIABLE, NUCLEUS
from tests import gloo

ALL = ("logprob", "entropy", *NUCLEUS)


def reference_stats(logits: Tensor, targets: Tensor, temperature, top_p: float, nucleus: str) -> dict[str, Tensor]:
    logits = logits.double() if not logits.requires_grad else logits
    mask = reference.nucleus_mask(logits, top_p, temperature, nucleus)
    return {
        "logprob": reference.logprob(logits, targets, temperature),
        "entropy": reference.entropy(logits, temperature),
        "nucleus_entropy": reference.nucleus_entropy(logits, mask, temperature),
        "nucleus_mass": reference.nucleus_mass(logits, mask, temperature),
        "nucleus_size": mask.sum(-1).double(),
        "nucleus_logprob": reference.nucleus_logprob(logits, targets, mask, temperature),
        "target_in_nucleus": mask.gather(-1, targets[:, None])[:, 0],
    }


def language_like(rows: int, vocab: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits with a heavy head and a long tail, of every sharpness; the likeliest or a random token as target."""
    torch.manual_seed(seed)
    tail = torch.randn(rows, vocab)
    head = torch.linspace(0, 12, rows)[:, None] * torch.rand(rows, vocab).pow(8)
    logits = (3 * tail + head).to(dtype)
    targets = torch.where(torch.arange(rows) % 2 == 0, logits.float().argmax(-1), torch.randint(vocab, (rows,)))
    return logits, targets


def padded_shard(logits: Tensor, rank: int, world: int, group) -> tuple[Tensor, VocabShard]:
    """This rank's columns; the vocabulary is padded with large logits that must not count."""
    vocab = logits.shape[1]
    width = -(-vocab // world) + 3
    full = torch.full((len(logits), width * world), 50.0, dtype=logits.dtype)
    full[:, :vocab] = logits
    start = rank * width
    return full[:, start : start + width].clone(), VocabShard(start, start + width, vocab, group)


def run_rank(rank: int, world: int, dtype, top_p, nucleus, temperature, grad) -> dict:
    logits, targets = language_like(12, 101, dtype)
    local, shard = padded_shard(logits, rank, world, torch.distributed.group.WORLD if world > 1 else None)
    kept = local.clone()
    local.requires_grad_()
    out = policy_stats(
        local, targets, shard, temperature=temperature, top_p=top_p, nucleus=nucleus, want=ALL, grad=grad
    )
    values = {name: out[name].detach().clone() for name in ALL}
    loss = weighted({name: out[name] for name in grad}, out["target_in_nucleus"])
    (gradient,) = torch.autograd.grad(loss, local, retain_graph=True)
    (again,) = torch.autograd.grad(loss, local)
    assert torch.equal(gradient, again)
    assert torch.equal(local.detach(), kept)
    return {"values": values, "gradient": gradient, "start": shard.start}


def weighted(outputs: dict[str, Tensor], inside: Tensor) -> Tensor:
    """A loss with a random upstream gradient for every row of every output; outside the nucleus there is none."""
    loss = torch.zeros((), dtype=torch.float64)
    for name, value in outputs.items():
        upstream = torch.randn(len(value), generator=torch.Generator().manual_seed(len(name)), dtype=torch.float64)
        loss = loss + (upstream * torch.where(inside | (name != "nucleus_logprob"), value, 0)).sum()
    return loss


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("nucleus", ["reach", "below"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_equal_the_reference_on_every_shard(world, nucleus, dtype):
    temperature = torch.linspace(0.6, 1.5, 12)
    for grad in (*[(name,) for name in DIFFERENTIABLE], DIFFERENTIABLE):
        arguments = (dtype, 0.8, nucleus, temperature, grad)
        ranks = gloo.run(run_rank, world, *arguments) if world > 1 else [run_rank(0, 1, *arguments)]
        logits, targets = language_like(12, 101, dtype)
        truth = logits.double().requires_grad_()
        expected = reference_stats(truth, targets, temperature.double(), 0.8, nucleus)
        for name in ALL:
            got = ranks[0]["values"][name]
            assert all(torch.equal(got, other["values"][name]) for other in ranks), name
            torch.testing.assert_close(got.double(), expected[name].detach().double(), rtol=1e-6, atol=2e-6, msg=name)
        loss = weighted({name: expected[name] for name in grad}, expected["target_in_nucleus"])
        (gradient,) = torch.autograd.grad(loss, truth)
        got = torch.cat([rank["gradient"] for rank in ranks], dim=1)
        assert not got[:, 101:].any()
        tolerance = 2e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(got[:, :101].double(), gradient, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("nucleus", ["reach", "below"])
def test_gradcheck(nucleus):
    logits, targets = language_like(3, 7, torch.float64)
    logits.requires_grad_()

    def outputs(x: Tensor):
        out = policy_stats(
            x, targets, VocabShard(0, 7, 7), temperature=0.7, top_p=0.9, nucleus=nucleus, want=ALL, grad=DIFFERENTIABLE
        )
        nucleus_logprob = torch.where(out["target_in_nucleus"], out["nucleus_logprob"], 0)
        return out["logprob"], out["entropy"], out["nucleus_entropy"], nucleus_logprob

    assert torch.autograd.gradcheck(outputs, logits)


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.8, 0.999, 1.0])
@pytest.mark.parametrize("nucleus", ["reach", "below"])
def test_ties_infinities_and_extremes(top_p, nucleus):
    logits, targets = language_like(8, 40)
    logits[0] = logits[0].round()  # ties
    logits[1] = 0.0
    logits[1, ::2] = -0.0
    logits[2, 5:] = -torch.inf
    logits[3] = logits[3] * 1000
    logits[4] -= 1e4
    logits[5] = torch.tensor([1e4, -1e4]).repeat(20)
    targets[2] = 0
    out = policy_stats(logits, targets, VocabShard(0, 40, 40), top_p=top_p, nucleus=nucleus, want=ALL)
    expected = reference_stats(logits, targets, 1.0, top_p, nucleus)
    for name in ALL:
        torch.testing.assert_close(getattr(out, name).double(), expected[name].double(), rtol=1e-6, atol=2e-6, msg=name)


def test_only_what_is_wanted_is_returned_and_only_grad_carries_a_gradient():
    logits, targets = language_like(4, 30)
    logits.requires_grad_()
    out = policy_stats(logits, targets, VocabShard(0, 30, 30), want=("logprob", "entropy"), grad=("logprob",))
    assert out["logprob"].requires_grad and not out["entropy"].requires_grad
    assert out.nucleus_entropy is None and out.slow_rows is None
    assert policy_stats(logits, targets, VocabShard(0, 30, 30), want=("logprob",)).entropy is None


def test_no_rows_and_an_empty_shard():
    shard = VocabShard(0, 30, 30)
    logits = torch.empty(0, 30, requires_grad=True)
    out = policy_stats(logits, torch.empty(0, dtype=torch.int64), shard, top_p=0.8, want=ALL, grad=("logprob",))
    (gradient,) = torch.autograd.grad(out["logprob"].sum(), logits)
    assert out["nucleus_entropy"].shape == (0,) and gradient.shape == (0, 30)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 9)}, r"expected \[rows, 8\]"),
        ({"logits": torch.zeros(2, 8, dtype=torch.float16)}, "expected bfloat16, float32 or float64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"expected int64 \[2\]"),
        ({"want": ("logprob", "entrpy")}, "entrpy"),
        ({"grad": ("entropy",), "want": ("logprob",)}, "expected wanted outputs"),
        ({"want": NUCLEUS}, "top_p in"),
        ({"nucleus": "above"}, "'reach' or 'below'"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {
        "logits": torch.zeros(2, 8),
        "targets": torch.zeros(2, dtype=torch.int64),
        "shard": VocabShard(0, 8, 8),
    }
    with pytest.raises(ValueError, match=message):
        policy_stats(**({"grad": ()} | arguments | change))
