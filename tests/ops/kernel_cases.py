"""The Triton kernels against the portable path and the fp64 truth: on a GPU, or in the interpreter on a CPU.

Run as a module with TRITON_INTERPRET=1 it prints one JSON object {case: worst error / tolerance}; the interpreter must
be chosen before triton is first imported, so the tests start a process for it. A ratio above 1 is a fault; a value
that is wrong raises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, backend, policy_stats, portable
from megatron_ext.ops.kernels import implementation as kernels
from megatron_ext.ops.kernels import summary
from megatron_ext.ops.policy_stats import DIFFERENTIABLE, NUM_CANDIDATES
from tests import gloo
from tests.ops import test_support
from tests.ops.cases import ALL, assert_values, language_like, weighted

PADDING = 5
SPLIT = 203  # columns of the nucleus by min_p on several ranks
WIDE = 2 * summary.COLUMNS + 811  # three steps of a program, and no multiple of a group
SETTINGS = [
    (nucleus, num_candidates) for nucleus in ("inclusive", "exclusive") for num_candidates in (NUM_CANDIDATES, 8)
]
GRADIENTS = (*[(name,) for name in DIFFERENTIABLE], DIFFERENTIABLE)
DTYPES = (torch.float32, torch.bfloat16)


def logits_of(V: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Ordinary tokens, tied ones, half and nearly all of minus infinity, all negative, flat; temperatures."""
    logits, targets = language_like(8, V, dtype)
    logits[0] = logits[0].float().round().to(dtype)
    logits[1, 3::2] = -torch.inf
    logits[2, 5:] = -torch.inf
    logits[3] -= 1e4
    logits[4] *= 0.01
    logits[5] = 3.0
    targets[2] = 0
    return logits, targets, torch.linspace(0.6, 1.5, 8)


def strided(logits: Tensor, padding: int) -> Tensor:
    """The logits as a view of a wider buffer, which has large values between them."""
    wide = torch.full((len(logits), 2 * (logits.shape[1] + padding)), 50.0, dtype=logits.dtype, device=logits.device)
    wide[:, : logits.shape[1]] = logits
    return wide[:, : logits.shape[1] + padding]


def outcome(
    work,
    local: Tensor,
    shard: VocabShard,
    targets: Tensor,
    temperature: Tensor,
    nucleus: str,
    num_candidates: int,
    min_p: float | None = None,
):
    """Values and gradients by the given implementation: of all outputs together and, with many candidates, of each
    alone. The backward pass knows the statistics, not by how many candidates they were found."""
    local = local.detach().requires_grad_()
    kept = local.detach().clone()
    with mock.patch.object(backend, "decide", lambda _: work):
        out = policy_stats(
            local, targets, shard, temperature=temperature, top_p=0.8 if min_p is None else None, min_p=min_p,
            nucleus=nucleus, num_candidates=num_candidates, want=ALL, grad=DIFFERENTIABLE,
        )  # fmt: skip
        result = {name: out[name].detach() for name in ALL} | {"fallback": out["num_fallback"]}
        for grad in GRADIENTS if num_candidates == NUM_CANDIDATES else GRADIENTS[-1:]:
            loss = weighted({name: out[name] for name in grad})
            (gradient,) = torch.autograd.grad(loss, local, retain_graph=True)
            result["gradient of " + " + ".join(grad)] = gradient
    assert torch.equal(local.detach(), kept)
    return {name: value.cpu() for name, value in result.items()}


def worst_ratio(got: dict[str, Tensor], expected: dict[str, Tensor], V: int) -> float:
    """Largest gradient difference over what rounding once to the dtype explains."""
    worst = 0.0
    for name, value in expected.items():
        if name.startswith("gradient"):
            assert not got[name][:, V:].any(), name
            unit = 2**-7 if value.dtype == torch.bfloat16 else 2**-20  # one unit of bf16 apart: both were rounded
            difference = (got[name].double()[:, :V] - value.double()[:, :V]).abs()
            worst = max(worst, float((difference / (unit * value.double()[:, :V].abs() + 2e-6)).max()))
    return worst


def compare(device: str, widths: tuple[int, ...] = (37, 1003, WIDE)) -> dict[str, float]:
    """One rank: every dtype, rule and number of candidates; values against fp64, gradients against the portable"""
    worst = {}
    for V in widths:
        for dtype in DTYPES:
            logits, targets, temperature = logits_of(V, dtype)
            for setting in SETTINGS:
                shard, local = VocabShard.for_vocab(V, padded_size=V + PADDING), strided(logits, PADDING)
                moved = local.to(device), shard, targets.to(device), temperature.to(device)
                got = outcome(kernels, *moved, *setting)
                expected = outcome(portable, local, shard, targets, temperature, *setting)
                assert_values({n: got[n] for n in ALL}, logits, targets, temperature, 0.8, setting[0])
                worst[f"{V} {dtype} {setting}"] = worst_ratio(got, expected, V)
                if dtype == torch.bfloat16 and setting[1] == NUM_CANDIDATES:
                    assert got["fallback"] <= 4, got["fallback"]  # what the candidates resolve is not searched
    return worst


def on_ranks(rank: int, world: int, V: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """One rank's shard of the same tokens; the last rank of four holds nothing but padding."""
    logits, targets, temperature = logits_of(V, dtype)
    padded_size = world * (-(-V // min(world, 3)) + PADDING)
    full = torch.full((len(logits), padded_size), 50.0, dtype=dtype)
    full[:, :V] = logits
    shard = VocabShard.for_vocab(V, torch.distributed.group.WORLD, padded_size=padded_size)
    local = full[:, shard.start : shard.stop].clone()
    return [outcome(kernels, local, shard, targets, temperature, *setting) for setting in SETTINGS]


def compare_ranks(V: int = 3001) -> dict[str, float]:
    """Two and four ranks: the same bits on all, values against fp64, gradients against one rank's portable path."""
    worst = {}
    gloo.run(below_a_floor, 2, timeout=300)
    for world in (2, 4):
        for dtype in DTYPES:
            logits, targets, temperature = logits_of(V, dtype)
            ranks = gloo.run(on_ranks, world, V, dtype, timeout=300)
            for number, setting in enumerate(SETTINGS):
                values = ranks[0][number]
                for name in (*ALL, "fallback"):
                    assert all(torch.equal(values[name], rank[number][name]) for rank in ranks), name
                assert_values({n: values[n] for n in ALL}, logits, targets, temperature, 0.8, setting[0])
                expected = outcome(portable, logits, VocabShard.for_vocab(V), targets, temperature, *setting)
                parts = [rank[number] for rank in ranks]
                got = {n: torch.cat([part[n] for part in parts], 1) for n in values if n.startswith("gradient")}
                worst[f"{world} ranks {dtype} {setting}"] = worst_ratio(got, expected, V)
    return worst


def below_a_floor(rank: int, world: int) -> dict[str, Tensor]:
    """The cutoff token is a candidate of rank 1, below what rank 0 left out: 140 logits that belong above it."""
    full = torch.full((2, 10_240), -20.0, dtype=torch.bfloat16)
    full[:, 0], full[:, 31:4480:32] = 20.0, 12.0
    full[:, 6000:8000] = 11.9375 - 0.0625 * (torch.arange(2000) % 8)
    targets = torch.tensor([0, 7000])
    shard = VocabShard.for_vocab(10_240, torch.distributed.group.WORLD)
    local = full[:, shard.start : shard.stop].clone()
    with mock.patch.object(backend, "decide", lambda _: kernels):
        out = policy_stats(local, targets, shard, top_p=0.8, want=ALL, grad=())
    assert out["num_fallback"] == 2
    assert_values({name: out[name] for name in ALL}, full, targets, 1.0, 0.8, "inclusive")
    return {}


def by_min_p() -> dict[str, float]:
    """The nucleus that ends at a probability, on one rank."""
    worst = {}
    for dtype in DTYPES:
        for V, min_p, nucleus in ((37, 0.5, "inclusive"), (4999, 0.02, "exclusive")):
            setting = (nucleus, 256, min_p)
            logits, targets, temperature = logits_of(V, dtype)
            shard, local = VocabShard.for_vocab(V, padded_size=V + PADDING), strided(logits, PADDING)
            got = outcome(kernels, local, shard, targets, temperature, *setting)
            expected = outcome(portable, local, shard, targets, temperature, *setting)
            compare_by_min_p(got, expected)
            worst[f"{V} {dtype} {setting}"] = worst_ratio(got, expected, V)
    return worst


def by_min_p_on_ranks() -> dict[str, float]:
    """Three ranks against one rank's portable path."""
    ranks = gloo.run(min_p_on_a_rank, 3, timeout=300)
    logits, targets, temperature = logits_of(SPLIT, torch.bfloat16)
    expected = outcome(portable, logits, VocabShard.for_vocab(SPLIT), targets, temperature, "exclusive", 256, 0.1)
    compare_by_min_p(ranks[0], expected)
    assert all(torch.equal(rank[name], ranks[0][name]) for rank in ranks for name in ALL)
    got = {n: torch.cat([rank[n] for rank in ranks], 1) for n in expected if n.startswith("gradient")}
    return {"3 ranks": worst_ratio(got, expected, SPLIT)}


def min_p_on_a_rank(rank: int, world: int) -> dict[str, Tensor]:
    """The last rank holds nothing but padding."""
    logits, targets, temperature = logits_of(SPLIT, torch.bfloat16)
    width = -(-SPLIT // (world - 1)) + PADDING
    full = torch.full((len(logits), world * width), 50.0, dtype=torch.bfloat16)
    full[:, :SPLIT] = logits
    shard = VocabShard.for_vocab(SPLIT, torch.distributed.group.WORLD, padded_size=world * width)
    local = full[:, shard.start : shard.stop].clone()
    return outcome(kernels, local, shard, targets, temperature, "exclusive", 256, 0.1)


def compare_by_min_p(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Which tokens are in it, exactly; values to the rounding of fp32."""
    assert got["fallback"] == expected["fallback"] == 0
    assert torch.equal(got["nucleus_size"], expected["nucleus_size"])
    for name in ALL:
        torch.testing.assert_close(got[name], expected[name], rtol=4e-6, atol=4e-6, msg=name)


def whole_nucleus(device: str) -> None:
    """top_p 1 and tiny, NaN, no tokens, no nucleus."""
    for dtype in DTYPES:
        logits, targets, temperature = logits_of(300, dtype)
        moved = logits.to(device), targets.to(device)
        with mock.patch.object(backend, "decide", lambda _: kernels):
            for top_p in (1e-6, 0.999, 1.0):
                for nucleus in ("inclusive", "exclusive"):
                    out = policy_stats(
                        *moved,
                        temperature=temperature.to(device),
                        top_p=top_p,
                        nucleus=nucleus,
                        want=ALL,
                        grad=(),
                    )
                    got = {name: out[name].cpu() for name in ALL}
                    assert_values(got, logits, targets, temperature, top_p, nucleus)
            plain = policy_stats(*moved, temperature=temperature.to(device), grad=())
            assert_values(
                {n: plain[n].cpu() for n in ("logprob", "entropy")}, logits, targets, temperature, 0.8, "inclusive"
            )
            clean = policy_stats(*moved, top_p=0.8, want=ALL, grad=())
            moved[0][6, 7] = torch.nan
            out = policy_stats(*moved, top_p=0.8, want=ALL, grad=())
            others = torch.arange(8) != 6
            for name in ("logprob", "entropy", "nucleus_entropy", "nucleus_mass", "nucleus_logprob"):
                assert out[name][6].isnan(), name
                assert torch.equal(out[name][others], clean[name][others]), name
            empty = logits[:0].to(device).requires_grad_()
            out = policy_stats(empty, targets[:0].to(device), top_p=0.8, want=ALL)
            (gradient,) = torch.autograd.grad(out["logprob"].sum(), empty)
            assert out["nucleus_entropy"].shape == (0,) and gradient.shape == (0, 300) and out["num_fallback"] == 0


def over_support() -> dict[str, float]:
    """Outputs over a support, which are torch's on a GPU too, beside the kernels' and in their place.

    Where both have a gradient, one of bf16 is rounded twice, each time as its parts are large: compared in fp32 alone.
    """
    worst = {}
    for dtype in DTYPES:
        expected = test_support.run_cases(0, 1, dtype)
        with mock.patch.object(backend, "decide", lambda _: kernels):
            got = test_support.run_cases(0, 1, dtype)
        for number, (values, (_, grad, _)) in enumerate(zip(expected, test_support.CASES, strict=True)):
            for name in values.keys() - {"gradient"}:
                torch.testing.assert_close(got[number][name], values[name], rtol=2e-6, atol=2e-6)
            if dtype == torch.float32 or not set(grad) & set(test_support.WHOLE):
                worst[f"{dtype} {number}"] = worst_ratio(got[number], values, test_support.VOCAB)
    return worst


CASES: dict[str, Callable[[], dict[str, float] | None]] = {
    "tokens": lambda: compare("cpu"),
    "ranks": compare_ranks,
    "edges": lambda: whole_nucleus("cpu"),
    "support": over_support,
    "min_p": by_min_p,
    "min_p on ranks": by_min_p_on_ranks,
}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]]() or {}))
