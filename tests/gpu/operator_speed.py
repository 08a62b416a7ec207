"""The operator's speed on a GPU, beside the floor of its memory traffic, its peers, and figures others have published.

Anchors are for an H100 at T 8,192, V 151,936, bf16. Goals are ratios to the floor measured here, so that they hold on
any device: .89 of .83 ms forward, 2.7 of 2.49 with the backward, 3.1 with the nucleus in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, linear_policy_stats, policy_stats
from tests.gpu import measure, peers
from tests.gpu.echo import echo_group
from tests.gpu.harness import Here, Line, anchor, fact, limit, target
from tests.gpu.operator_checks import TOP_P
from tests.gpu.peers import language_tokens, random_targets
from tests.ops.cases import assert_values

PLAIN, WITH_NUCLEUS = ("logprob", "entropy"), ("logprob", "entropy", "nucleus_entropy")
AIMS = {"forward": 0.89 / 0.83, "forward + backward": 2.7 / 2.49, "with nucleus": 3.1 / 2.49}
PUBLISHED = {"forward": 0.89, "forward + backward": 2.6, "with nucleus": 3.1}  # TRL 7244, Fast-LLM 466, our goal
PUBLISHED_FORWARD = {"torch: log-prob + entropy": 12.8}  # TRL 7244
SAVED = 2.5e9
GB, GIB = 1e9, 2**30


def _total(out: Any, names: tuple[str, ...]) -> Tensor:
    return torch.stack([out[name].sum() for name in names]).sum()


def _backward(outputs: dict[str, Tensor], leaf: Tensor) -> object:
    return torch.autograd.grad(torch.stack([value.sum() for value in outputs.values()]).sum(), leaf)


def statistics(here: Here) -> Iterator[Line]:
    """Forward and backward at the shard widths of TP 1 to 8, without an exchange, interleaved with the peers."""
    T, V = here.size((8_192, 151_936), (32, 2_048))
    bandwidth = measure.copy_bandwidth(here.device)
    for tensor in (1, 2, 4, 8):
        width = V // tensor
        logits, targets = language_tokens(T, width, here.device), random_targets(T, width, here.device)
        read_ms = 1e3 * logits.nbytes / bandwidth
        floors = {"forward": read_ms, "forward + backward": 3 * read_ms, "with nucleus": 3 * read_ms}
        scratch = logits.clone()

        def restore(scratch: Tensor = scratch, logits: Tensor = logits) -> object:
            return scratch.copy_(logits)

        works = _works(logits, scratch, targets, tensor)
        times = measure.medians_ms(works, here.device, repeat=here.size(15, 2), before=restore)
        for name, took in times.items():
            at = f"TP {tensor}: {name}"
            if name in floors:
                yield target(f"{at}, x floor of {floors[name]:.3f} ms", took / floors[name], AIMS[name], "")
            if name in PUBLISHED and tensor == 1:
                yield anchor(at, took, PUBLISHED[name], "ms")
            elif name in PUBLISHED_FORWARD:
                yield anchor(at, took, PUBLISHED_FORWARD[name], "ms")
            else:
                yield fact(at, took, "ms")
        if tensor == 1:
            leaf = logits.detach().requires_grad_()

            def step(leaf: Tensor = leaf, y: Tensor = targets) -> Any:
                return policy_stats(leaf, y, top_p=TOP_P, want=WITH_NUCLEUS, grad=WITH_NUCLEUS)

            yield target("TP 1: saved for the backward", measure.saved_bytes(step) / GB, SAVED / GB, "GB")
            yield fact("TP 1: peak of forward above the logits", measure.peak_bytes(step, here.device) / GB, "GB")
        del logits


def _works(logits: Tensor, scratch: Tensor, targets: Tensor, tensor: int) -> dict[str, Callable[[], object]]:
    """What is timed on one shard. Our backwards are in place, over ``scratch``, as in training."""
    leaf = logits.detach().requires_grad_()

    def ours(names: tuple[str, ...]) -> Callable[[], object]:
        def step() -> object:
            own = scratch.detach().requires_grad_()
            out = policy_stats(own, targets, top_p=TOP_P, want=names, grad=names, inplace_backward=True)
            return torch.autograd.grad(_total(out, names), own)

        return step

    works: dict[str, Callable[[], object]] = {
        "forward": lambda: policy_stats(leaf, targets, want=PLAIN, grad=()),
        "forward + backward": ours(PLAIN),
        "with nucleus": ours(WITH_NUCLEUS),
        "verl's pair": lambda: _backward(peers.verl_pair(leaf, targets), leaf),
    }
    if tensor == 1:
        works["torch: log-prob + entropy"] = lambda: peers.torch_pair(logits, targets)
        works["torch: cross entropy, forward + backward"] = lambda: _backward(
            peers.torch_cross_entropy(leaf, targets), leaf
        )
        if peers.have_liger():
            works["Liger: cross entropy, forward + backward"] = lambda: _backward(
                peers.liger_cross_entropy(leaf, targets), leaf
            )
    return works


def exchange(here: Here) -> Iterator[Line]:
    """The owner's decision on rank 0 of TP 4, with three ranks that hold the same columns and no communication."""
    T, width = here.size((8_192, 151_936 // 4), (64, 301))
    logits, targets = language_tokens(T, width, here.device), random_targets(T, width, here.device)
    with echo_group(4) as group:
        shard = VocabShard.for_vocab(4 * width, group)
        out = policy_stats(logits[:32], targets[:32], shard, top_p=TOP_P, want=WITH_NUCLEUS, grad=())
        own = slice(0, 8)  # the tokens that rank 0 decides; the others' owners are echoes of it
        found = {name: out[name][own].cpu() for name in WITH_NUCLEUS}
        assert_values(found, logits[own].repeat(1, 4).cpu(), targets[own].cpu(), 1.0, TOP_P, "inclusive")
        works: dict[str, Callable[[], object]] = {
            "TP 4": lambda: policy_stats(logits, targets, shard, top_p=TOP_P, want=WITH_NUCLEUS, grad=()),
            "TP 4 without nucleus": lambda: policy_stats(logits, targets, shard, want=PLAIN, grad=()),
        }
        times = measure.medians_ms(works, here.device, repeat=here.size(15, 2))
    for name, took in times.items():
        yield fact(f"forward, {name}", took, "ms")
    added = times["TP 4"] - times["TP 4 without nucleus"]
    yield target("what the nucleus adds", added, 1.3 * 1.1 * T / 16_384, "ms")  # 1.3 x the floor reckoned at T 16,384


def num_fallback(here: Here) -> Iterator[Line]:
    """Tokens that their candidates leave unresolved are decided exactly: right, and at what price."""
    T, width = here.size((8_192, 151_936 // 4), (64, 2_048))
    targets = random_targets(T, width, here.device)
    times: dict[float, float] = {}
    for share in (0.0, 0.01, 0.1, 0.3):
        logits = language_tokens(T, width, here.device, flat=share)
        spread = logits[:, :: max(1, width // 64)].float().std(-1)
        few = spread.argsort()[:4]  # the flat ones, where there are any
        out = policy_stats(logits[few], targets[few], top_p=TOP_P, want=WITH_NUCLEUS, grad=())
        found = {name: out[name].cpu() for name in WITH_NUCLEUS}
        assert_values(found, logits[few].cpu(), targets[few].cpu(), 1.0, TOP_P, "inclusive")

        def work(logits: Tensor = logits) -> object:
            return policy_stats(logits, targets, top_p=TOP_P, want=WITH_NUCLEUS, grad=())

        times[share] = measure.medians_ms({"": work}, here.device, repeat=here.size(7, 2))[""]
        yield fact(f"forward with {share:.0%} flat tokens", times[share], "ms")
    yield fact("30 % over none", times[0.3] / times[0.0])


def fused_head(here: Here) -> Iterator[Line]:
    """Statistics from hidden states: time and memory beside the bare products and Liger."""
    T, D, V = here.size((8_192, 4_096, 151_936), (48, 32, 1_003))
    g = torch.Generator(here.device).manual_seed(0)
    options: Any = {"generator": g, "device": here.device}
    hidden = (torch.randn(T, D, **options) / D**0.25).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(V, D, **options) / D**0.25).to(torch.bfloat16).requires_grad_()
    targets = random_targets(T, V, here.device)

    main_grad = torch.zeros(V, D, device=here.device)
    asked: Any = {"top_p": TOP_P, "want": WITH_NUCLEUS, "grad": WITH_NUCLEUS}

    def fused(main_grad: Tensor | None = None) -> object:
        out = linear_policy_stats(hidden, weight, targets, main_grad=main_grad, **asked)
        return torch.autograd.grad(_total(out, WITH_NUCLEUS), (hidden, weight))

    def products() -> object:
        with torch.no_grad():
            logits = hidden @ weight.T
            return logits @ weight, logits.T @ hidden

    works: dict[str, Callable[[], object]] = {
        "ours": lambda: fused(main_grad),
        "ours without main_grad": fused,
        "three bare products": products,
    }
    if peers.have_liger():
        works["Liger, cross entropy only"] = lambda: torch.autograd.grad(
            peers.liger_fused_head(hidden, weight, targets), (hidden, weight)
        )
    times = measure.medians_ms(works, here.device, repeat=here.size(7, 2))
    flops = 2.0 * T * D * V
    yield target("ours, entropy and nucleus gradients", times["ours"], 60.0, "ms")
    yield fact("ours without main_grad", times["ours without main_grad"], "ms")
    yield anchor("three bare products", times["three bare products"], 42.0, "ms")
    yield fact("ours over the bare products", times["ours"] / times["three bare products"])
    yield fact("ours: 8 T D V operations a second", 4 * flops / times["ours"] / 1e9, "TFLOP/s")
    if "Liger, cross entropy only" in times:
        yield fact("Liger, cross entropy only", times["Liger, cross entropy only"], "ms")
        yield anchor("Liger: 6 T D V", 3 * flops / times["Liger, cross entropy only"] / 1e9, 763.0, "TFLOP/s")
    gradients = 2 * (hidden.numel() + weight.numel())
    for name, work in works.items():
        peak = measure.peak_bytes(work, here.device)
        if name == "ours":
            yield target("ours: peak above inputs and gradients", (peak - gradients) / GIB, 3.0, "GiB")
        else:
            yield fact(f"{name}: peak above inputs", peak / GIB, "GiB")


def verl_arithmetic(here: Here) -> Iterator[Line]:
    """The peer that is timed computes what it should: verl's two functions in plain torch against fp64."""
    logits = language_tokens(8, 1_003, here.device, dtype=torch.float32).requires_grad_()
    targets = random_targets(8, 1_003, here.device)
    exact = logits.detach().double().cpu().requires_grad_()
    expected = peers.torch_pair(exact, targets.cpu())
    found = peers.verl_pair(logits, targets)
    for name, value in expected.items():
        (wanted,) = torch.autograd.grad(value.sum(), exact, retain_graph=True)
        (got,) = torch.autograd.grad(found[name].sum(), logits, retain_graph=True)
        yield limit(f"{name}: value", float((found[name].cpu() - value).abs().max().detach()), 2e-5)
        yield limit(f"{name}: gradient", float((got.cpu() - wanted).abs().max()), 2e-5)
