"""What the operators ask of a GPU, counted without one: launches, synchronisations, bytes, and the compiled kernels.

The calls run on meta tensors under a process group that answers for the other ranks (ops/kernels/launches.py); a call
that would wait for the device cannot finish there. The kernels it launches are then compiled for sm_80 and sm_90a.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_ext.ops import VocabShard, policy_stats
from megatron_ext.ops.kernels import implementation, summary
from megatron_ext.ops.kernels.launches import Compiled, Launch, compiled, record, world_of

CAPABILITIES = (80, 90)
WIDTHS = (1, 2, 4, 8)
WANTED = {
    "log-prob + entropy": ("logprob", "entropy"),
    "log-prob + entropy + nucleus": ("logprob", "entropy", "nucleus_entropy"),
}


@dataclass(frozen=True)
class Count:
    """Forward and backward of one call on one rank. Gigabytes are counted from shapes, with no token to be searched."""

    outputs: str
    tp: int
    tokens: int
    columns: int
    launches: int
    collectives: int
    host_copies: int
    by_name: dict[str, int]
    gigabytes: float
    floor_gigabytes: float  # the logits read twice and their gradient written once
    sent_bytes_per_token: float


def count(outputs: str, tp: int, T: int, vocab: int, dtype: torch.dtype) -> tuple[Count, list[Launch]]:
    want = WANTED[outputs]
    with world_of(tp) as group:
        shard = VocabShard.for_vocab(vocab, group if tp > 1 else None)
        logits = torch.empty(T, shard.width, dtype=dtype, device="meta").requires_grad_()
        targets = torch.empty(T, dtype=torch.int64, device="meta")
        upstream = [torch.empty(T, device="meta") for _ in want]

        def call() -> None:
            out = policy_stats(logits, targets, shard, temperature=0.6, top_p=0.8, want=want, grad=want)
            torch.autograd.grad([out[name] for name in want], logits, upstream)

        launches = record(call)
    sent = sum(_sent(launch) for launch in launches if launch.kind == "collective")
    found = Count(
        outputs=outputs,
        tp=tp,
        tokens=T,
        columns=shard.width,
        launches=len(launches),
        collectives=sum(launch.kind == "collective" for launch in launches),
        host_copies=sum(launch.kind == "host copy" for launch in launches),
        by_name=dict(Counter(launch.name for launch in launches)),
        gigabytes=sum(_bytes(launch, T, shard.width, dtype.itemsize) for launch in launches) / 1e9,
        floor_gigabytes=3 * T * shard.width * dtype.itemsize / 1e9,
        sent_bytes_per_token=sent / T,
    )
    return found, launches


def _bytes(launch: Launch, T: int, width: int, element: int) -> float:
    """Read from and written to device memory. Candidates come from at most two tiles of groups where maxima decide."""
    groups = -(-width // summary.GROUP)
    looked_at = min(width, 2 * implementation.TILE * summary.GROUP)
    tensors = {
        "summary_kernel": width * element + (2 * groups if dict(launch.options).get("WITH_MAXIMA") else 0),
        "candidates_kernel": 3 * 2 * groups + looked_at * element,
        "gradient_kernel": 2 * width * element,
    }
    return T * (tensors.get(launch.name, 0) + 100)  # 100: the token's own numbers, read or written once


def _sent(launch: Launch) -> int:
    """Bytes that this rank hands to the collective."""
    own = launch.arguments[1]
    value = own[0] if isinstance(own, list) else own
    return value.numel() * value.element_size()


def run(options: argparse.Namespace) -> int:
    counts, kernels = [], {}
    for vocab in options.vocab:
        for outputs in WANTED:
            for tp in WIDTHS:
                for T in (1024, 16_384):
                    found, launches = count(outputs, tp, T, vocab, torch.bfloat16)
                    counts.append(found)
                    kernels |= {launch.name: launch for launch in launches if launch.kind == "kernel"}
    found = [compiled(launch, capability) for launch in kernels.values() for capability in CAPABILITIES]
    print("\n".join([*table(counts), "", *kernel_table(found)]))
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "counts": [asdict(c) for c in counts],
        "kernels": [asdict(c) | {"occupancy": c.occupancy} for c in found],
    }
    (folder / "ops-count.json").write_text(json.dumps(content, indent=1))
    print(f"\n{folder / 'ops-count.json'} written")
    return 0


def table(counts: list[Count]) -> list[str]:
    lines = [
        "forward + backward, bf16; launches include the collectives; a synchronisation is a copy from the host or a "
        "number read back",
        f"{'':30}{'V':>8}{'TP':>4}{'T':>8}{'launches':>10}{'collectives':>13}{'syncs':>7}{'GB':>8}{'x floor':>9}"
        f"{'sent B/token':>14}",
    ]
    for c in counts:
        lines.append(
            f"{c.outputs:30}{c.columns * c.tp:8}{c.tp:4}{c.tokens:8}{c.launches:10}{c.collectives:13}{c.host_copies:7}"
            f"{c.gigabytes:8.2f}{c.gigabytes / c.floor_gigabytes:9.2f}{c.sent_bytes_per_token:14.0f}"
        )
    return lines


def kernel_table(found: list[Compiled]) -> list[str]:
    lines = [f"{'kernel':26}{'sm':>5}{'registers':>11}{'spilled B':>11}{'shared B':>10}{'warps':>7}{'occupancy':>11}"]
    for k in found:
        lines.append(
            f"{k.name:26}{k.capability:>5}{k.registers:11}{k.spilled_bytes:11}{k.shared_bytes:10}{k.warps:7}"
            f"{k.occupancy:11.2f}"
        )
    return lines
