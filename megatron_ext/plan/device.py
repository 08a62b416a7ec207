"""What a GPU has, and what is gone of it before the first tensor. Every assumption is one constant or function here.

``TOTAL_BYTES`` is what torch and vLLM call the total memory: less than the vendor's figure, more than its decimal GB.
Taken from out-of-memory reports, the lowest seen of each kind:

    h100  79.11 GiB, H100 80GB HBM3 (vLLM issue 27508; 79.14 to 79.19 with other drivers; nvidia-smi says 81,559 MiB)
    a800  79.33 GiB, A800 80GB (Kimi-VL issue 51, PB-LLM issue 3; nvidia-smi says 81,920 MiB)
    h200  139.72 GiB, H200 141GB (139.72 to 139.81 in public logs)
    a100  79.15 GiB, A100 80GB (MiniCPM-V issue 338; up to 79.25 in OOTDiffusion issue 235)
    h20   95.00 GiB, H20 96GB (DiffSynth-Studio issue 1238)
    b200  178.35 GiB, B200 180GB (178.35 and 178.36 in public logs)
    h800  not found: assumed to be the h100's, which has the same 80 GB of HBM3

Nothing here was measured with this repository. A measured number replaces its constant and changes nothing else.
"""

from __future__ import annotations

from megatron_ext.config.schema import Config
from megatron_ext.model.architectures import Architecture
from megatron_ext.rollout.registry import find_engine

GIB = 2**30
TOTAL_BYTES = {
    "a100": 79.15 * GIB,
    "a800": 79.33 * GIB,
    "h20": 95.00 * GIB,
    "h100": 79.11 * GIB,
    "h800": 79.11 * GIB,
    "h200": 139.72 * GIB,
    "b200": 178.35 * GIB,
}
MARGIN = 3e9  # what a plan leaves free, for what is assumed here
CONTEXT = 1.3 * GIB  # assumed: context, modules and workspaces of a process; vLLM pull request 11743 logs 1.27 GiB
PAIR, LARGER = 544 * 2**20, 688 * 2**20  # of a communicator of two, of more ranks: 4 A100, NVLink (NCCL issue 964)
GRAPHS = 1.5e9  # assumed: vLLM's CUDA graphs; its issue 47654 reports 1,503,657,984 bytes at 256 sequences
FRAGMENTATION = 0.10  # assumed: of what is allocated anew for every micro-batch, in blocks that the allocator keeps


def communicators(a: Architecture, config: Config) -> dict[str, int]:
    """Ranks of every group over which a rank sends tensors between GPUs. NCCL buffers belong to each.

    Groups of one rank are left out, and gloo's: Python objects travel over those. That of the whole world counts
    whether it is used or not: the others may be split from it. Megatron has two groups of the data-parallel ranks,
    with context-parallel ones and without, and one of all that share an optimizer; vLLM one of torch and one of its own
    for an engine, and another of its own for one with experts.

    A send outside of a batch has a communicator of its own, of two ranks (torch's ProcessGroupNCCL): with the next and
    the previous one, where Transformer Engine passes keys and values round more than two ranks, and where interleaved
    stages exchange activations.
    """
    p, tied_ends = config.parallel, a.tied and config.parallel.pipeline > 1
    groups = {
        "world": p.world,
        "optimizer": p.world,
        "tensor": p.tensor,
        "pipeline": p.pipeline,
        "data": p.data,
        "data with context": p.data * p.context,
        "context": p.context,
        "embedding": 2 if tied_ends else 1,
    }
    if a.experts is not None:
        expert_model = p.expert * p.expert_tensor
        groups |= {
            "expert": p.expert,
            "expert tensor": p.expert_tensor,
            "expert tensor and model": expert_model,
            "expert data": p.world // (p.pipeline * expert_model),
        }
    for name, sends_alone in {"context": p.context > 2, "pipeline": p.virtual > 1}.items():
        groups |= {f"{name} with {neighbour}": 2 for neighbour in ("next", "previous") if sends_alone}
    spec = find_engine(config.rollout)
    named = spec.communicators + (spec.expert_communicators if a.experts is not None else ())
    groups |= dict.fromkeys(named, config.rollout.tensor_parallel_size)
    return {name: ranks for name, ranks in groups.items() if ranks > 1}


def communicator_bytes(a: Architecture, config: Config) -> float:
    """NCCL's buffers on one GPU once every group has been used."""
    return float(sum(PAIR if ranks == 2 else LARGER for ranks in communicators(a, config).values()))


def graph_bytes(config: Config) -> float:
    """CUDA graphs of a colocated engine: within its share while awake, and still there while it sleeps."""
    return GRAPHS if find_engine(config.rollout).cuda_graphs and not config.rollout.enforce_eager else 0.0
