"""Logits to try the operators on, their truth in fp64, and tolerances derived from what fp32 itself loses."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, reference
from megatron_ext.ops.policy_stats import DIFFERENTIABLE, NUCLEUS

ALL = ("logprob", "entropy", *NUCLEUS)


def language_like(T: int, vocab: int, dtype=torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A few likely tokens over a long tail, from nearly certain to open; the likeliest or a random token as target."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, vocab, generator=g)
    rank = torch.rand(T, vocab, generator=g).argsort(-1).double() + 1
    steepness = torch.linspace(1.0, 4.0, T)[:, None]
    logits = (logits - steepness * rank.log() + torch.rand(T, 1, generator=g) * 20).float().to(dtype)
    targets = torch.randint(vocab, (T,), generator=g)
    return logits, torch.where(torch.arange(T) % 2 == 0, logits.float().argmax(-1), targets)


def reference_stats(logits: Tensor, targets: Tensor, temperature, top_p: float, nucleus: str) -> dict[str, Tensor]:
    return stats_of(logits, targets, reference.nucleus_mask(logits, top_p, temperature, nucleus), temperature)


def stats_of(logits: Tensor, targets: Tensor, mask: Tensor, temperature) -> dict[str, Tensor]:
    """Every output by its definition, the nucleus being ``mask``."""
    return {
        "logprob": reference.logprob(logits, targets, temperature),
        "entropy": reference.entropy(logits, temperature),
        "nucleus_entropy": reference.nucleus_entropy(logits, mask, temperature),
        "nucleus_mass": reference.nucleus_mass(logits, mask, temperature),
        "nucleus_size": mask.sum(-1).to(logits.dtype),
        "nucleus_logprob": reference.nucleus_logprob(logits, targets, mask, temperature),
    }


def truth(logits: Tensor, targets: Tensor, temperature, *arguments, grad=()) -> tuple[dict[str, Tensor], Tensor | None]:
    """Values, and the gradient of the weighted loss of ``grad``, in the dtype of ``logits``."""
    logits = logits.detach().clone().requires_grad_()
    values = reference_stats(logits, targets, temperature, *arguments)
    gradient = None
    if grad:
        loss = weighted({name: values[name] for name in grad})
        (gradient,) = torch.autograd.grad(loss, logits)
    return {name: value.detach() for name, value in values.items()}, gradient


def weighted(outputs: dict[str, Tensor]) -> Tensor:
    """A loss with a random upstream gradient for every token of every output; none for a target outside the nucleus."""
    loss = torch.zeros((), dtype=torch.float64)
    for name, value in outputs.items():
        g = torch.Generator().manual_seed(DIFFERENTIABLE.index(name))
        upstream = torch.randn(len(value), generator=g, dtype=torch.float64).to(value.device)
        outside = (value == -torch.inf) & (name == "nucleus_logprob")
        loss = loss.to(value.device) + (upstream * torch.where(outside, 0, value)).sum()
    return loss


def assert_values(got: dict[str, Tensor], logits: Tensor, targets: Tensor, temperature, *arguments) -> None:
    """No output is further from the fp64 truth than twice what the fp32 reference is, plus rounding."""
    scale = torch.as_tensor(temperature)
    expected = reference_stats(logits.double(), targets, scale.double(), *arguments)
    in_fp32 = reference_stats(logits.float(), targets, scale.float(), *arguments)
    for name, value in got.items():
        if name == "nucleus_size":
            assert torch.equal(value.double(), expected[name].double()), name
            continue
        finite = expected[name].isfinite()
        assert torch.equal(value.isfinite(), finite), name
        lost = (in_fp32[name].double() - expected[name])[finite].abs()
        size = expected[name][finite].abs().clamp_min(1)
        error = (value.double() - expected[name])[finite].abs()
        assert bool((error <= 2 * lost.amax() + 8 * 2**-24 * size).all()) if len(error) else True, (name, error.amax())


def padded_shard(logits: Tensor, rank: int, world: int, group) -> tuple[Tensor, VocabShard]:
    """This rank's columns; the vocabulary is padded with large logits that must not count."""
    vocab = logits.shape[1]
    width = -(-vocab // world) + 3
    full = torch.full((len(logits), width * world), 50.0, dtype=logits.dtype)
    full[:, :vocab] = logits
    shard = VocabShard.for_vocab(vocab, group, padded_size=width * world)
    assert (shard.start, shard.width) == (rank * width, width)
    return full[:, shard.start : shard.stop].clone(), shard
