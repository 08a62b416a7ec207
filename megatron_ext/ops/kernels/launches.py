"""What a call asks of a GPU, and what the compiler makes of its kernels, found out on any machine.

``record`` runs a call on meta tensors as if they were a GPU's: every kernel of this package, every other operation of
torch and every collective is written down, and nothing is computed. A call that would wait for the device (read a
number back, copy from the host) cannot hide: meta tensors have none to give, and a copy is counted.

``compiled`` translates a recorded launch for a GPU architecture with Triton's own compiler and assembler: registers,
spills, shared memory, and how many warps of it an SM holds at once.
"""

from __future__ import annotations

# pyright: reportMissingImports=false
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from megatron_ext.ops import backend

FREE = (  # operations of torch that launch nothing
    *("empty", "empty_like", "new_empty", "view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("detach", "alias", "t", "transpose", "as_strided", "split", "unbind", "_reshape_alias", "permute"),
)
REGISTERS, SHARED_BYTES, MOST_WARPS, MOST_BLOCKS = 65536, {80: 163 * 1024, 90: 227 * 1024}, 64, 32  # of one SM


@dataclass(frozen=True)
class Launch:
    """One thing the GPU is asked to do."""

    kind: str  # kernel (of this package), torch, collective, host copy
    name: str
    arguments: tuple[Any, ...] = ()
    kernel: Any = None
    grid: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()


def record(call: Callable[[], object]) -> list[Launch]:
    """What ``call``, which works on meta tensors, would launch on a GPU.

    Raises RuntimeError or NotImplementedError where it would have to wait for the device.
    """
    from megatron_ext.ops.kernels import implementation

    found: list[Launch] = []

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch("kernel", self.fn.__name__, arguments, self, tuple(grid), tuple(options.items())))

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(backend, "decide", lambda device: implementation),
        _Operations(found),
    ):
        call()
    return found


class _Operations(TorchDispatchMode):
    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, name = func._schema.name.split("::")
        if space == "c10d":
            self.found.append(Launch("collective", name, args))
        elif name in ("_to_copy", "copy_") and args[-1 if name == "copy_" else 0].device.type != "meta":
            self.found.append(Launch("host copy", name, args))
        elif name not in FREE:
            self.found.append(Launch("torch", name, args))
        return result


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture. ``occupancy``: warps an SM holds over the most it can."""

    name: str
    capability: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    warps: int

    @property
    def blocks(self) -> int:
        """Programs that are on an SM at once. Registers are dealt by 256 a warp."""
        by_registers = REGISTERS // (-(-self.registers * 32 // 256) * 256 * self.warps)
        by_shared = SHARED_BYTES[self.capability] // (self.shared_bytes + 1024)
        return min(MOST_BLOCKS, MOST_WARPS // self.warps, by_registers, by_shared)

    @property
    def occupancy(self) -> float:
        return self.blocks * self.warps / MOST_WARPS


def compiled(launch: Launch, capability: int) -> Compiled:
    """A recorded kernel launch, translated for sm_80 or sm_90a (``capability`` 80 or 90)."""
    options = dict(launch.options)
    names = [parameter.name for parameter in launch.kernel.params]
    values = dict(zip(names, launch.arguments, strict=False)) | {n: options[n] for n in names if n in options}
    constants = {p.name: values[p.name] for p in launch.kernel.params if p.is_constexpr}
    signature = {name: "constexpr" if name in constants else _type(values[name]) for name in names}
    divisible = [i for i, name in enumerate(names) if name not in constants and _divisible(values[name])]
    aligned = {(i,): [["tt.divisibility", 16]] for i in divisible}
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=aligned)
    warps = options.get("num_warps", 4)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    usage = _usage(kernel.asm["cubin"])
    return Compiled(
        name=launch.name,
        capability=capability,
        registers=usage["REG"],
        spilled_bytes=usage["LOCAL"] + usage["STACK"],
        shared_bytes=max(usage["SHARED"], kernel.metadata.shared),
        warps=warps,
    )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        names = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64"}
        return "*" + (names | {torch.int32: "i32", torch.int16: "i16", torch.int8: "i8"})[value.dtype]
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "fp32"


def _divisible(value: Any) -> bool:
    """What Triton takes for divisible by 16 at a launch: addresses of allocations, and numbers that are."""
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text.stdout)}


@cache
def _cuobjdump() -> str:
    return str(next(Path(triton.__file__).parent.rglob("bin/cuobjdump")))


@contextmanager
def world_of(size: int) -> Iterator[torch.distributed.ProcessGroup]:
    """A process group of ``size`` ranks that answers for the others, this process being rank 0."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
