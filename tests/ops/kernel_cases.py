"""The Triton kernels against the portable path and the fp64 truth: on a GPU, or in the interpreter on a CPU.

Run as a module with TRITON_INTERPRET=1 it prints one JSON object {case: worst error / tolerance}; the interpreter must
be chosen before triton is first imported, so the tests start a process for it.
"""

from __future__ import annotations

import json

import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, backend, policy_stats, rows
from megatron_ext.ops.kernels import rows as kernels
from megatron_ext.ops.policy_stats import DIFFERENTIABLE
from tests.ops.cases import ALL, assert_values, language_like, weighted

V, PADDING = 1003, 5  # off every block size
TEMPERATURE = torch.linspace(0.6, 1.5, 8)
SETTINGS = [(nucleus, ties) for nucleus in ("reach", "below") for ties in ("all", "by_id")]


def one_case(device: str, dtype: torch.dtype, nucleus: str, ties: str, window: int, work) -> dict[str, Tensor]:
    """Values, and the gradients of each output alone and of all together, from the given row work."""
    logits, targets = language_like(8, V, dtype)
    logits[0] = logits[0].float().round().to(dtype)
    logits[1, 3::2] = -torch.inf
    local = torch.full((8, V + PADDING), 50.0, dtype=dtype)
    local[:, :V] = logits
    local = local.to(device).requires_grad_()
    kept = local.detach().clone()
    decide, backend.decide = backend.decide, lambda _: work
    result = {}
    try:
        for grad in (*[(name,) for name in DIFFERENTIABLE], DIFFERENTIABLE):
            out = policy_stats(
                local, targets.to(device), VocabShard(0, V + PADDING, V), temperature=TEMPERATURE.to(device), top_p=0.8,
                nucleus=nucleus, ties=ties, window=window, want=ALL, grad=grad,
            )  # fmt: skip
            loss = weighted({name: out[name] for name in grad}, out["target_in_nucleus"])
            (result["gradient of " + " + ".join(grad)],) = torch.autograd.grad(loss, local)
            result |= {name: out[name].detach() for name in ALL}
    finally:
        backend.decide = decide
    assert torch.equal(local.detach(), kept)
    return {name: value.cpu() for name, value in result.items()}


def compare(device: str) -> dict[str, float]:
    """Worst gradient difference between kernels and portable path over its tolerance, for every case."""
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        for nucleus, ties in SETTINGS:
            for window in (256, 8):
                case = (dtype, nucleus, ties, window)
                got = one_case(device, *case, work=kernels)
                expected = one_case("cpu", *case, work=rows)
                logits, targets = language_like(8, V, dtype)
                logits[0] = logits[0].float().round().to(dtype)
                logits[1, 3::2] = -torch.inf
                assert_values({n: got[n] for n in ALL}, logits, targets, TEMPERATURE, 0.8, nucleus, ties)
                for name, value in expected.items():
                    if name in ALL:
                        continue
                    assert not got[name][:, V:].any()
                    unit = 2**-7 if dtype == torch.bfloat16 else 2**-20  # one unit of bf16 apart: both were rounded
                    tolerance = unit * value.double().abs() + 2e-6
                    ratio = ((got[name].double() - value.double()).abs() / tolerance).max()
                    worst[f"{dtype} {nucleus} {ties} {window} {name}"] = float(ratio)
    return worst


if __name__ == "__main__":
    print(json.dumps(compare("cpu")))
