"""The operators others train with, called as their own training code calls them. Imported by name: all are optional.

A peer is a function (logits, targets, vocab, group) -> outputs; it owns ``logits``, of which it gets a fresh leaf.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

Outputs = dict[str, Tensor]
Peer = Callable[[Tensor, Tensor, int, Any], Outputs]


def verl_pair(logits: Tensor, targets: Tensor, vocab: int, group: Any) -> Outputs:
    """verl's Megatron actor: entropy of the logits, log-probs of a copy: the cross entropy overwrites its input."""
    verl = importlib.import_module("verl.utils.megatron.tensor_parallel")
    copy = logits.clone()
    entropy = verl.vocab_parallel_entropy(logits)
    return {"entropy": entropy, "logprob": verl.vocab_parallel_log_probs_from_logits(copy, targets)}


def megatron_cross_entropy(logits: Tensor, targets: Tensor, vocab: int, group: Any) -> Outputs:
    """Megatron-Core's vocabulary-parallel cross entropy: the log-probability only."""
    core = importlib.import_module("megatron.core.tensor_parallel")
    return {"logprob": -core.vocab_parallel_cross_entropy(logits.clone(), targets)}


def liger_cross_entropy(logits: Tensor, targets: Tensor, vocab: int, group: Any) -> Outputs:
    """Liger's cross entropy kernel (one rank): the log-probability only. Needs a GPU."""
    if not logits.is_cuda or dist.get_world_size(group) > 1:
        raise RuntimeError("needs a GPU and one rank")
    liger = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    loss = liger.apply(logits.clone(), targets, None, -100, 0.0, 0.0, "none", None, False)
    return {"logprob": -(loss[0] if isinstance(loss, tuple) else loss)}


def torch_cross_entropy(logits: Tensor, targets: Tensor, vocab: int, group: Any) -> Outputs:
    """torch's cross entropy (one rank): the log-probability only."""
    if dist.get_world_size(group) > 1:
        raise RuntimeError("needs one rank")
    return {"logprob": -torch.nn.functional.cross_entropy(logits[:, :vocab], targets, reduction="none")}


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: Any) -> Tensor:
        world = dist.get_world_size(group)
        ctx.rank, ctx.width = dist.get_rank(group), logits.shape[1]
        if world == 1:
            return logits.clone()
        out = logits.new_empty((world * len(logits), logits.shape[1]))
        dist.all_gather_into_tensor(out, logits.detach().contiguous(), group=group)
        return out.unflatten(0, (world, len(logits))).movedim(0, 1).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple:
        return gradient[0][:, ctx.rank * ctx.width : (ctx.rank + 1) * ctx.width], None


def gathered(logits: Tensor, group: Any) -> Tensor:
    """``[T, V/TP] -> [T, V]``, with the gradient of this rank's columns."""
    full = _Gather.apply(logits, group)
    assert isinstance(full, Tensor)
    return full


def gather_and_sort(top_p: float) -> Peer:
    """Gather the logits, sort, mask the top-p set: what exists where a nucleus is needed under tensor parallelism."""

    def call(logits: Tensor, targets: Tensor, vocab: int, group: Any) -> Outputs:
        logp = torch.log_softmax(gathered(logits, group)[:, :vocab].float(), -1)
        p = logp.exp()
        with torch.no_grad():
            ordered, order = p.sort(-1, descending=True)
            kept = torch.zeros_like(p, dtype=torch.bool).scatter(1, order, ordered.cumsum(-1) - ordered < top_p)
        logq = torch.log_softmax(logp.masked_fill(~kept, -torch.inf), -1)
        return {
            "logprob": logp.gather(1, targets[:, None])[:, 0],
            "entropy": -(p * logp).sum(-1),
            "nucleus_entropy": -(logq.exp() * logq.masked_fill(~kept, 0)).sum(-1),
        }

    return call


def peers(top_p: float, tp: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """The peers that can run here, and why the others cannot."""
    wanted: dict[str, tuple[str, Peer]] = {
        "verl pair": ("verl.utils.megatron.tensor_parallel", verl_pair),
        "Megatron cross entropy": ("megatron.core.tensor_parallel", megatron_cross_entropy),
        "Liger cross entropy": ("liger_kernel.ops.cross_entropy", liger_cross_entropy),
        "torch cross entropy": ("torch", torch_cross_entropy),
        "gather + sort": ("torch", gather_and_sort(top_p)),
    }
    found, missing = {}, {}
    for name, (module, peer) in wanted.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                importlib.import_module(module)
            found[name] = peer
        except Exception as error:  # a peer's own trouble is a line of the table
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    if "Megatron cross entropy" in found:
        parallel_state = importlib.import_module("megatron.core.parallel_state")
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    return found, missing


@contextlib.contextmanager
def process_group(device: str) -> Iterator[tuple[int, int]]:
    """Join the process group of this run's ranks (one rank makes its own), and leave it. Gives rank and world size."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(name, value)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device == "cuda" else "gloo"
    store = HashStore() if world == 1 else None
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield rank, world
    finally:
        dist.destroy_process_group()
