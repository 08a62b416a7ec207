"""What Megatron-Core needs on a machine without CUDA: the same code, every tensor on the CPU.

``enter()`` is called once per process before Megatron-Core is used. With CUDA it picks the device and adds one name
that megatron-core 0.16.1 forgets; nothing else of it is touched. Without, these stand in for what Megatron-Core takes
for granted. Each says what a GPU does in its place, and so what no test without one can see:

- ``device="cuda"``, ``.cuda()`` and ``torch.cuda.current_device()`` mean the CPU. A GPU: a tensor left on the host by
  mistake fails there in the first kernel that gets it.
- ``Tensor.type()`` answers ``torch.cuda.FloatTensor``, the form the distributed optimizer compares with. A GPU: as is.
- Streams, events and ``synchronize`` do nothing, all work is in order. A GPU: a missing wait between streams is a race.
- ``torch.cuda``'s random state is that of the CPU generator, and a call that waits for a CUDA context runs at once:
  Megatron's tracker seeds, forks and restores by its own code. A GPU: a generator of its own beside the CPU's.
- The token dispatcher takes its counts as numpy arrays. A GPU: they are copied off it, on a side stream.
- Gathers of unequal lengths are padded, scatters of such sum the full tensor. A GPU: NCCL takes them as they are.

The forgotten name is ``te_general_gemm`` of the router: without Transformer Engine it is undefined, there as here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

_entered: contextlib.ExitStack | None = None
_host = torch.device("cpu")  # what stands for the GPU where there is none


def device() -> torch.device:
    """The device tensors live on: this rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _host


def backend() -> str:
    """The collective backend that fits the device."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def enter() -> None:
    """Make this process ready for Megatron-Core. Idempotent."""
    global _entered
    _name_what_is_absent()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        return
    if _entered is None:
        _patch_cuda()
        _patch_megatron()
        _entered = contextlib.ExitStack()
        _entered.enter_context(_CudaMeansCpu())


def as_it_is() -> contextlib.AbstractContextManager[None]:
    """Within, torch is called directly: for code that names no CUDA, whose every call would else be looked at first."""
    return contextlib.nullcontext() if _entered is None or _host.type == "meta" else torch._C.DisableTorchFunction()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Within, tensors have a shape and no storage, whatever device is asked for. Only without CUDA, after ``enter``."""
    global _host
    assert not torch.cuda.is_available() and _entered is not None
    _host = torch.device("meta")
    try:
        with torch.device("meta"), _EverythingIsMeta():
            yield
    finally:
        _host = torch.device("cpu")


class _EverythingIsMeta(TorchFunctionMode):
    """Rewrites every device to meta. What the distributed optimizer asks of a type is answered as for a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "meta"}
        if func in (torch.Tensor.cuda, torch.Tensor.cpu):
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device):
            args = (args[0], "meta", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return torch.empty(0, dtype=args[0].dtype, device="cpu").type()
        return func(*args, **kwargs)


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of every torch call from CUDA to CPU."""

    _named = frozenset((torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.type))  # whose arguments may be a device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not kwargs and func not in self._named:  # most of a step's thousands of calls
            return func(*args)
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _NoStream:
    """Stands for ``torch.cuda.Stream`` and ``Event``: on the CPU all work is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def record_event(self, event=None) -> _NoStream:
        return self

    def record(self, stream=None) -> None:
        pass

    def wait(self, stream=None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


def _as_dispatched(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_unequal(own: torch.Tensor, group: Any, sizes: list[int]) -> Any:
    """``_gather_along_first_dim`` of tensor_parallel/mappings.py for tensors of unequal length."""
    longest = max(sizes)
    padded = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, padded, group=group)
    return torch.cat([tensor[:size] for tensor, size in zip(gathered, sizes, strict=True)])


def _reduce_scatter_unequal(full: torch.Tensor, group: Any, sizes: list[int]) -> Any:
    """``_reduce_scatter_along_first_dim`` for tensors of unequal length."""
    total = full.clone()
    torch.distributed.all_reduce(total, group=group)
    return total.split(sizes)[group.rank()].clone()


def _where_unequal(original: Any, unequal: Any) -> Any:
    def chosen(tensor: torch.Tensor, group: Any, sizes: list[int] | None = None, *rest: Any, **options: Any) -> Any:
        sizes = options.pop("output_split_sizes", options.pop("input_split_sizes", sizes))
        plain = sizes is None or group.size() == 1
        return original(tensor, group, None, *rest, **options) if plain else unequal(tensor, group, sizes)

    return chosen


def _patch_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _host
    cuda.synchronize = lambda device=None: None
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda device=None: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.default_generator.get_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.default_generator.set_state(state)
    cuda.manual_seed = cuda.random.manual_seed = torch.default_generator.manual_seed
    cuda.default_generators = _OneGenerator()


class _OneGenerator:
    """Stands for ``torch.cuda.default_generators``, a generator for each device."""

    def __getitem__(self, device: Any) -> torch.Generator:
        return torch.default_generator


def _patch_megatron() -> None:
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer.moe import token_dispatcher

    cast(Any, token_dispatcher).maybe_move_tensor_to_cpu = _as_dispatched
    cast(Any, random)._lazy_call = lambda call: call()  # torch keeps such calls until CUDA is initialised
    maps = cast(Any, mappings)
    maps._gather_along_first_dim = _where_unequal(maps._gather_along_first_dim, _gather_unequal)
    maps._reduce_scatter_along_first_dim = _where_unequal(maps._reduce_scatter_along_first_dim, _reduce_scatter_unequal)


def _name_what_is_absent() -> None:
    """The router asks whether Transformer Engine's matrix product is None, and never says that it is."""
    from megatron.core.transformer.moe import moe_utils

    names: Any = vars(moe_utils)
    names.setdefault("te_general_gemm", None)
