"""What others compute the same statistics with, on one GPU without their packages; and rows to compute them on.

verl's Megatron actor calls two functions on the logits of a shard: its own entropy, and Megatron-Core's cross entropy
on a copy, since that one overwrites its input. Their arithmetic and their passes over memory are written down here in
plain torch; the sums over ranks between the passes are left out. Liger is called itself where it is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.gpu.harness import Absent


class _Entropy(torch.autograd.Function):
    """verl's: softmax and mean logit in the dtype of the logits, both kept; the gradient is written over the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        maximum = logits.amax(-1, keepdim=True)
        softmax = (logits - maximum).exp_()
        total = softmax.sum(-1, keepdim=True)
        softmax.div_(total)
        mean = (softmax * logits).sum(-1, keepdim=True)
        ctx.save_for_backward(logits, softmax, mean)
        return (maximum + total.log() - mean)[:, 0]

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Tensor:
        logits, softmax, mean = ctx.saved_tensors
        return (mean - logits).mul_(softmax).mul_(upstream[0][:, None])


class _CrossEntropy(torch.autograd.Function):
    """Megatron-Core's: an fp32 copy becomes the softmax in place and then, in the backward, the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        x = logits.float()
        x -= x.amax(-1, keepdim=True)
        at_target = x.gather(1, targets[:, None])[:, 0]
        total = x.exp_().sum(-1, keepdim=True)
        x.div_(total)
        ctx.save_for_backward(x, targets)
        ctx.dtype = logits.dtype
        return total[:, 0].log() - at_target

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple:
        softmax, targets = ctx.saved_tensors
        softmax[torch.arange(len(targets), device=targets.device), targets] -= 1
        return softmax.mul_(upstream[0][:, None]).to(ctx.dtype), None


def verl_pair(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    copy = logits.clone()
    return {"entropy": _apply(_Entropy, logits), "logprob": -_apply(_CrossEntropy, copy, targets)}


def torch_pair(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Log-probability and entropy as one writes them down; fp64 stays fp64."""
    logp = torch.log_softmax(logits.float() if logits.dtype == torch.bfloat16 else logits, -1)
    return {"logprob": logp.gather(1, targets[:, None])[:, 0], "entropy": -(logp.exp() * logp).sum(-1)}


def torch_cross_entropy(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"logprob": -F.cross_entropy(logits, targets, reduction="none")}


def liger_cross_entropy(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Liger's kernel: the gradient is computed in the forward, over the logits, so it gets a copy."""
    liger: Any = _liger("cross_entropy").LigerCrossEntropyFunction
    loss = liger.apply(logits.clone(), targets, None, -100, 0.0, 0.0, "none", None, False)
    return {"logprob": -(loss[0] if isinstance(loss, tuple) else loss)}


def liger_fused_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused linear cross entropy: the summed loss, whose gradients its forward has already computed."""
    liger: Any = _liger("fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    loss = liger.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "sum")
    return loss[0] if isinstance(loss, tuple) else loss


def have_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available()


def _liger(module: str) -> Any:
    if not have_liger():
        raise Absent("liger-kernel is not installed, or there is no GPU")
    return importlib.import_module(f"liger_kernel.ops.{module}")


def _apply(function: Any, *arguments: Tensor) -> Tensor:
    return function.apply(*arguments)


def language_tokens(T: int, V: int, device: str, dtype: torch.dtype = torch.bfloat16, flat: float = 0.0) -> Tensor:
    """``[T, V]`` logits made on the device: Zipf-like from nearly certain to open, and a share of flat tokens.

    The cutoff token of a flat one lies among most of the vocabulary: no candidates resolve it.
    """
    g = torch.Generator(device).manual_seed(0)
    log_rank = torch.empty(V, device=device)
    log_rank[torch.randperm(V, generator=g, device=device)] = torch.arange(1, V + 1, device=device).log()
    steepness = torch.linspace(1.3, 4.0, T, device=device)[torch.randperm(T, generator=g, device=device)]
    steepness[torch.randperm(T, generator=g, device=device)[: round(flat * T)]] = 0.0
    logits = torch.empty(T, V, dtype=dtype, device=device)
    for start in range(0, T, 512):
        part = torch.randn(len(steepness[start : start + 512]), V, generator=g, device=device)
        steep = steepness[start : start + 512, None]
        part = torch.where(steep > 0, part - steep * log_rank.roll(start), part * 0.1)
        logits[start : start + 512] = part + 16
    return logits


def random_targets(T: int, V: int, device: str) -> Tensor:
    return torch.randint(V, (T,), generator=torch.Generator(device).manual_seed(1), device=device)
