"""What the operators would ask of a GPU: how many launches, no waiting, and kernels that fill it."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.ops import VocabShard, linear_policy_stats, policy_stats
from megatron_ext.ops.kernels.launches import Launch, compiled, record, world_of

ALL = ("logprob", "entropy", "nucleus_entropy", "nucleus_mass", "nucleus_size", "nucleus_logprob")
GRAD = ("logprob", "entropy", "nucleus_entropy", "nucleus_logprob", "nucleus_mass")
V = 151_936


def launches(T: int, tp: int, dtype=torch.bfloat16, want=ALL, temperature: float = 0.6, **options) -> list[Launch]:
    """Forward and backward of one call on rank 0 of ``tp``."""
    width, grad = -(-V // tp), tuple(name for name in GRAD if name in want)
    with world_of(tp) as group:
        logits = torch.empty(T, width, dtype=dtype, device="meta").requires_grad_()
        targets = torch.empty(T, dtype=torch.int64, device="meta")
        upstream = [torch.empty(T, device="meta") for _ in grad]

        def call() -> None:
            shard = VocabShard.for_vocab(V, group if tp > 1 else None)
            asked = {"top_p": None if "min_p" in options else 0.8, "want": want, "grad": grad} | options
            out = policy_stats(logits, targets, shard, temperature=temperature, **asked)
            torch.autograd.grad([out[name] for name in grad], logits, upstream)

        return record(call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tp", [1, 4])
def test_the_number_of_launches_does_not_depend_on_the_tokens_and_nothing_waits(tp, dtype):
    few, many = (launches(T, tp, dtype) for T in (1024, 16_384))
    assert [launch.name for launch in few] == [launch.name for launch in many]
    assert len(many) <= 40
    assert not [launch for launch in many if launch.kind == "host copy"]
    assert [launch.name for launch in many].count("gradient_kernel") == 1


def test_without_a_nucleus_two_kernels_and_a_gradient():
    names = [launch.name for launch in launches(1024, 4, want=("logprob", "entropy"))]
    assert names == ["full", "summary_kernel", "_allgather_base_", "outputs_kernel", "gradient_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_nucleus_by_min_p_is_three_kernels_and_a_gradient(dtype):
    found = launches(1024, 4, dtype, min_p=0.02)
    assert [launch.name for launch in found if launch.kind in ("kernel", "collective")] == [
        *("summary_kernel", "_allgather_base_", "min_p_kernel", "_allgather_base_", "nucleus_outputs_kernel"),
        "gradient_kernel",
    ]
    assert not [launch for launch in found if launch.kind == "host copy"]


def test_reading_a_number_back_or_copying_one_to_the_device_is_found():
    value = torch.empty(4, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        record(lambda: bool(value.sum() > 0))
    with pytest.raises((RuntimeError, NotImplementedError)):
        record(lambda: value.nonzero())
    assert [launch.kind for launch in record(lambda: value.copy_(torch.ones(4)))][-1] == "host copy"
    assert [launch.kind for launch in record(lambda: torch.ones(4).to("meta"))][-1] == "host copy"


def test_the_fused_head_waits_for_nothing_and_multiplies_a_chunk_at_a_time():
    with world_of(4) as group:
        hidden = torch.empty(4096, 64, dtype=torch.bfloat16, device="meta").requires_grad_()
        weight = torch.empty(V // 4, 64, dtype=torch.bfloat16, device="meta").requires_grad_()
        targets = torch.empty(4096, dtype=torch.int64, device="meta")
        upstream = [torch.empty(4096, device="meta") for _ in GRAD]

        def call() -> None:
            out = linear_policy_stats(
                hidden, weight, targets, VocabShard.for_vocab(V, group), top_p=0.8, want=ALL, grad=GRAD, chunk=1024
            )
            torch.autograd.grad([out[name] for name in GRAD], (hidden, weight), upstream)

        found = record(call)
    assert not [launch for launch in found if launch.kind == "host copy"]
    assert [launch.name for launch in found].count("gradient_kernel") == 4


def test_the_fused_head_adds_its_weight_gradient_in_the_product():
    """Nothing of the weight's size is made but the zeros that autograd gets: 3 products a chunk, and one that adds."""
    with world_of(4) as group:
        hidden = torch.empty(4096, 64, dtype=torch.bfloat16, device="meta").requires_grad_()
        weight = torch.empty(V // 4, 64, dtype=torch.bfloat16, device="meta").requires_grad_()
        main_grad, upstream = torch.empty(V // 4, 64, device="meta"), torch.empty(4096, device="meta")
        targets, shard = torch.empty(4096, dtype=torch.int64, device="meta"), VocabShard.for_vocab(V, group)

        def call() -> None:
            out = linear_policy_stats(hidden, weight, targets, shard, chunk=1024, main_grad=main_grad)
            torch.autograd.grad([out["logprob"]], (hidden, weight), [upstream])

        names = [launch.name for launch in record(call)]
    assert {name: names.count(name) for name in ("mm", "addmm", "add_", "zeros", "zeros_like", "_to_copy")} == {
        **{"mm": 12, "addmm": 4, "zeros_like": 1},
        **{"add_": 0, "zeros": 0, "_to_copy": 0},
    }


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_without_spills_and_fills_half_of_an_sm(capability):
    """Every launch of every path, with the types and constants it is launched with."""
    seen = {}
    for tp in (1, 4, 8):
        for dtype in (torch.bfloat16, torch.float32):
            for want in (ALL, ("logprob", "entropy"), ("logprob",)):
                for launch in launches(1024, tp, dtype, want):
                    if launch.kind == "kernel":
                        values = [(v.dtype if isinstance(v, torch.Tensor) else None) for v in launch.arguments]
                        seen[launch.name, tuple(values), launch.options] = launch
            for launch in launches(1024, tp, dtype, min_p=0.02):
                if launch.name == "min_p_kernel":
                    seen[launch.name, dtype, launch.options] = launch
    found = [compiled(launch, capability) for launch in seen.values()]
    assert {kernel.name for kernel in found} == {
        *("summary_kernel", "candidates_kernel", "decide_kernel", "search_kernel", "search_sums_kernel"),
        *("outputs_kernel", "nucleus_outputs_kernel", "gradient_kernel", "min_p_kernel"),
    }
    for kernel in found:
        # torch's own Triton, 3.7.1, keeps one register of sm_80's decide_kernel at TP 1 in memory; 3.9.0 does not
        assert kernel.spilled_bytes <= (8 if kernel.name == "decide_kernel" else 0), kernel
        assert kernel.occupancy >= 0.5, kernel
