"""The operator on a GPU against the portable path and fp64: values, gradients, edges, large offsets, launches."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_ext.ops import VocabShard, linear_policy_stats, policy_stats
from megatron_ext.ops.policy_stats import DIFFERENTIABLE
from tests.gpu import measure
from tests.gpu.echo import echo_group
from tests.gpu.harness import Absent, Here, Line, anchor, equal, fact, limit
from tests.gpu.peers import language_tokens, random_targets
from tests.ops.cases import ALL, assert_values, language_like, truth, weighted
from tools.bench.count import count

TOP_P = 0.8
LAUNCHES, ECHO = 40, 8  # of a forward and a backward with the nucleus; what the echo's copies may add
NUCLEUS_WANT = ("logprob", "entropy", "nucleus_entropy")
UNIT = {torch.float32: 2**-20, torch.bfloat16: 2**-7}  # of a gradient: one step of bf16, some of fp32


def machine(here: Here) -> Iterator[Line]:
    """What the figures belong to."""
    yield fact("python", platform.python_version())
    for package in ("torch", "triton", "liger_kernel", "transformers", "megatron.core", "transformer_engine"):
        yield fact(package, _version(package))
    if not here.rehearse:
        properties = torch.cuda.get_device_properties(0)
        yield fact("device", properties.name)
        yield fact("memory", properties.total_memory, "bytes")
        yield fact("capability", f"{properties.major}.{properties.minor}")
        yield fact("multiprocessors", properties.multi_processor_count)
        yield fact("CUDA", torch.version.cuda)
        yield fact("free at start", torch.cuda.mem_get_info()[0], "bytes")
    yield fact("copy bandwidth", measure.copy_bandwidth(here.device) / 1e9, "GB/s")


def _version(package: str) -> str:
    try:
        return str(getattr(importlib.import_module(package), "__version__", "installed"))
    except Exception as error:  # a package that is there and cannot be imported is worth a line
        return f"{type(error).__name__}: {error}".splitlines()[0][:60]


def kernels(here: Here) -> Iterator[Line]:
    """The tests' own cases of the Triton kernels, compiled."""
    from tests.ops.kernel_cases import compare, whole_nucleus  # it imports triton

    if here.rehearse:
        raise Absent("the interpreter runs them in tests/ops/test_kernels.py")
    worst = compare(here.device)
    whole_nucleus(here.device)
    assert worst, "no case was compared"
    for case, ratio in worst.items():
        if not ratio <= 1:
            yield limit(case, ratio, 1, "of tolerance")
    yield limit(f"worst of {len(worst)} cases", max(worst.values()), 1, "of tolerance")


def values(here: Here) -> Iterator[Line]:
    """Every output and gradient at real vocabularies, whole, strided and padded, against fp64 and the portable path."""
    for V in here.size((5_003, 37_984, 151_936), (1_003, 5_003)):
        for dtype in (torch.float32, torch.bfloat16):
            logits, targets = language_like(8, V, dtype)
            expected = truth(logits.double(), targets, 1.0, TOP_P, "inclusive", grad=DIFFERENTIABLE)[1]
            assert expected is not None
            portable = _outputs(logits.clone(), targets, V)[1]
            for layout in ("plain", "strided", "padded"):
                local = _laid_out(logits.to(here.device), layout)
                got, gradient = _outputs(local, targets.to(here.device), V)
                assert_values(got, logits, targets, 1.0, TOP_P, "inclusive")
                assert not gradient[:, V:].any(), "padding has a gradient"
                name = f"V {V:,} {str(dtype)[6:]} {layout}: gradient"
                yield limit(f"{name} - fp64", _of_tolerance(gradient[:, :V], expected), 1, "of tolerance")
                yield limit(f"{name} - portable", _of_tolerance(gradient[:, :V], portable[:, :V]), 1, "of tolerance")


def _laid_out(logits: Tensor, layout: str) -> Tensor:
    """The same columns; strided: a view of a wider buffer; padded: with columns behind that must not count."""
    T, V = logits.shape
    if layout == "plain":
        return logits
    wide = torch.full((T, V + 77), 50.0, dtype=logits.dtype, device=logits.device)
    wide[:, :V] = logits
    return wide[:, :V] if layout == "strided" else wide


def _outputs(local: Tensor, targets: Tensor, V: int) -> tuple[dict[str, Tensor], Tensor]:
    """All outputs, and the gradient of their weighted sum, on the CPU."""
    leaf = local.detach().requires_grad_()
    shard = VocabShard.for_vocab(V, padded_size=local.shape[1])
    out = policy_stats(leaf, targets, shard, top_p=TOP_P, want=ALL, grad=DIFFERENTIABLE)
    loss = weighted({name: out[name] for name in DIFFERENTIABLE})
    (gradient,) = torch.autograd.grad(loss, leaf)
    return {name: out[name].detach().cpu() for name in ALL}, gradient.cpu()


def _of_tolerance(got: Tensor, expected: Tensor) -> float:
    error = (got.double() - expected.double()).abs()
    return float((error / (UNIT[got.dtype] * expected.double().abs() + 2e-6)).max())


def edges(here: Here) -> Iterator[Line]:
    """No tokens; tokens of NaN and of minus infinity, which must leave the others alone."""
    V = here.size(151_936, 1_003)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        nothing = torch.empty(0, V, dtype=dtype, device=here.device)
        out, gradient = _outputs(nothing, torch.empty(0, dtype=torch.int64, device=here.device), V)
        yield equal(f"{name}, T 0: shapes", str({tuple(value.shape) for value in out.values()}), str({(0,)}))
        yield equal(f"{name}, T 0: gradient", str(tuple(gradient.shape)), str((0, V)))
        logits, targets = language_like(8, V, dtype)
        clean, clean_gradient = _outputs(logits.to(here.device), targets.to(here.device), V)
        bad = logits.clone()
        bad[0], bad[1, 7], bad[2] = torch.nan, torch.nan, -torch.inf
        bad[3, targets[3] + 1 :] = -torch.inf  # the target stays possible
        dirty, dirty_gradient = _outputs(bad.to(here.device), targets.to(here.device), V)
        portable, portable_gradient = _outputs(bad.clone(), targets, V)
        others = slice(4, None)
        alike = [torch.equal(dirty[n][others], clean[n][others]) for n in ALL]
        yield equal(f"{name}: other tokens unchanged to the bit", all(alike), True)
        same = torch.equal(dirty_gradient[others], clean_gradient[others])
        yield equal(f"{name}: their gradients too", same, True)
        for n in ("logprob", "entropy", "nucleus_entropy"):
            yield equal(f"{name}: {n} of tokens with NaN is NaN", bool(dirty[n][:2].isnan().all()), True)
        for n in ALL:
            assert torch.equal(dirty[n].isnan(), portable[n].isnan()), (n, dirty[n], portable[n])
        assert torch.equal(dirty_gradient.isnan(), portable_gradient.isnan()), "NaN gradients differ from the portable"
        masked = bad[3:]
        assert_values({n: dirty[n][3:] for n in ALL}, masked, targets[3:], 1.0, TOP_P, "inclusive")
        yield limit(
            f"{name}: gradient beside minus infinity - portable",
            _of_tolerance(dirty_gradient[3:], portable_gradient[3:]),
            1,
            "of tolerance",
        )


def large_offsets(here: Here) -> Iterator[Line]:
    """More than 2^31 elements, with the nucleus and the backward: the last tokens equal the same tokens alone."""
    T, V = here.size((16_384, 151_936), (192, 1_003))
    logits = language_tokens(T, V, here.device)
    targets = random_targets(T, V, here.device)
    yield fact("elements over 2^31", logits.numel() / 2**31)

    def run(x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        leaf = x.detach().requires_grad_()
        out = policy_stats(leaf, y, top_p=TOP_P, want=NUCLEUS_WANT, grad=NUCLEUS_WANT)
        loss = torch.stack([out[name].sum() for name in NUCLEUS_WANT]).sum()
        return out, torch.autograd.grad(loss, leaf)[0]

    whole, gradient = run(logits, targets)
    for name, token in (("first", slice(0, 1)), ("last", slice(T - 1, T))):
        alone, own = run(logits[token].clone(), targets[token])
        for output in NUCLEUS_WANT:
            off = ((whole[output][token] - alone[output]).abs() / alone[output].abs().clamp_min(1)).item()
            yield limit(f"{output} of the {name} token off the token alone", off, 1e-5)
        yield limit(f"gradient of the {name} token", _of_tolerance(gradient[token], own), 1, "of tolerance")
        yield fact(f"gradient of the {name} token, to the bit", torch.equal(gradient[token], own))
    yield equal("every value is finite", bool(torch.stack([whole[n] for n in NUCLEUS_WANT]).isfinite().all()), True)


def fused_head(here: Here) -> Iterator[Line]:
    """linear_policy_stats against fp64 in fp32, and in bf16 against the product in two steps."""
    T, D, V = here.size((64, 256, 37_984), (24, 32, 1_003))
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, D, generator=g) / D**0.25, torch.randn(V, D, generator=g) / D**0.25
    targets = torch.randint(V, (T,), generator=g)
    expected = _head_gradients(hidden.double(), weight.double(), targets, chunk=None)
    in_two = _head_gradients(hidden.to(here.device), weight.to(here.device), targets.to(here.device), chunk=None)
    fused = _head_gradients(hidden.to(here.device), weight.to(here.device), targets.to(here.device), chunk=T // 3)
    for name, got, two, right in zip(("hidden", "weight"), fused, in_two, expected, strict=True):
        lost = (two - right).abs().max().item()  # what the product in two steps loses in the same dtype
        error = (got - right).abs().max().item()
        yield limit(f"float32: gradient of {name} - fp64", error, 4 * lost + 4e-6 * right.abs().max().item())
    h, w = hidden.to(here.device, torch.bfloat16), weight.to(here.device, torch.bfloat16)
    two = _head_gradients(h, w, targets.to(here.device), chunk=None)
    got = _head_gradients(h, w, targets.to(here.device), chunk=T // 3)
    for name, fused_, two_ in zip(("hidden", "weight"), got, two, strict=True):
        error = (fused_ - two_).abs().max().item()
        yield limit(f"bfloat16: gradient of {name} - in two steps", error, 2**-6 * two_.abs().max().item())


def _head_gradients(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int | None) -> list[Tensor]:
    """In fp64 on the CPU; ``chunk`` None multiplies first."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    options: Any = {"top_p": TOP_P, "want": NUCLEUS_WANT, "grad": NUCLEUS_WANT}
    if chunk is None:
        out = policy_stats(h @ w.T, targets, **options)
    else:
        out = linear_policy_stats(h, w, targets, chunk=chunk, **options)
    loss = torch.stack([out[name].sum() for name in NUCLEUS_WANT]).sum()
    return [x.double().cpu() for x in torch.autograd.grad(loss, (h, w))]


def sanitizer(here: Here) -> Iterator[Line]:
    """A small forward and backward under compute-sanitizer: no access out of bounds."""
    if here.rehearse:
        small_case("cpu")
        raise Absent("compute-sanitizer looks at GPUs only; its case ran without it")
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise Absent("compute-sanitizer is not on PATH (it comes with the CUDA toolkit)")
    call = "from tests.gpu.operator_checks import small_case; small_case('cuda')"
    done = subprocess.run(
        [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9", sys.executable, "-c", call],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # a block an allocation, so that bounds are bounds
        capture_output=True,
        text=True,
    )
    print(done.stdout[-8000:], done.stderr[-4000:])
    yield equal("exit code of compute-sanitizer", done.returncode, 0)
    summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    yield fact("summary", summary[-1].strip("= ") if summary else "none printed")


def small_case(device: str) -> None:
    """Every kind of token and both dtypes, off every block size."""
    for dtype in (torch.float32, torch.bfloat16):
        logits, targets = language_like(6, 9_001, dtype)
        for layout in ("plain", "strided", "padded"):
            _outputs(_laid_out(logits.to(device), layout), targets.to(device), 9_001)
        hidden = torch.randn(6, 64, device=device, dtype=dtype)
        weight = torch.randn(9_001, 64, device=device, dtype=dtype)
        _head_gradients(hidden, weight, targets.to(device), chunk=4)


def launches(here: Here) -> Iterator[Line]:
    """Kernels and host synchronisations of a forward and of a backward: the same whatever T is."""
    V = here.size(151_936, 4_012)
    for world in (1, 4):
        counted: list[int] = []
        sizes = here.size((1_024, 16_384), (16, 64))
        planned = [count("log-prob + entropy + nucleus", world, T, V, torch.bfloat16)[0].launches for T in sizes]
        with echo_group(world) as group:
            for T, without_gpu in zip(sizes, planned, strict=True):
                shard = VocabShard.for_vocab(V, group if world > 1 else None)
                logits = language_tokens(T, V // world, here.device).requires_grad_()
                targets = random_targets(T, V // world, here.device)

                def forward(x: Tensor = logits, y: Tensor = targets, shard: VocabShard = shard) -> list[Tensor]:
                    out = policy_stats(x, y, shard, top_p=TOP_P, want=NUCLEUS_WANT, grad=NUCLEUS_WANT)
                    return [out[name] for name in NUCLEUS_WANT]

                outputs = forward()
                upstream = [torch.ones_like(value) for value in outputs]

                def backward(
                    outputs: list[Tensor] = outputs, x: Tensor = logits, upstream: list[Tensor] = upstream
                ) -> object:
                    return torch.autograd.grad(outputs, x, upstream, retain_graph=True)

                at, total = f"TP {world}, T {T:,}", 0
                for name, work in (("forward", forward), ("backward", backward)):
                    found = measure.count(work, here.device)
                    yield fact(f"{at}: {name}: kernels", found.launches)
                    yield fact(f"{at}: {name}: copies and fills", found.copies)
                    yield here.claim(limit(f"{at}: {name}: synchronisations", found.synchronisations, 0))
                    total += found.launches + found.copies
                most = LAUNCHES if world == 1 else LAUNCHES + ECHO
                yield here.claim(limit(f"{at}: launches of both", total, most))
                yield anchor(f"{at}: launches beside tools.bench.count's", total, without_gpu, "")
                counted.append(total)
                del logits, outputs
        yield here.claim(equal(f"TP {world}: launches do not grow with T", counted[-1], counted[0]))


def registers(here: Here) -> Iterator[Line]:
    """Of every Triton kernel as compiled for this device: registers a thread, shared memory, and no spills."""
    try:
        jit: Any = importlib.import_module("triton.runtime.jit").JITFunction
    except ImportError:
        raise Absent("triton is not installed") from None
    functions = [f for module in _kernel_modules() for f in vars(module).values() if isinstance(f, jit)]
    yield equal("Triton functions found", bool(functions), True)
    if here.rehearse:
        return
    small_case(here.device)
    compiled = 0
    for function in functions:
        for cache in function.device_caches.values():
            for number, kernel in enumerate(cache[0].values()):
                name = f"{function.__name__.strip('_')} {number}"
                yield limit(f"{name}: spills", kernel.n_spills, 0, "bytes")
                yield fact(f"{name}: registers a thread", kernel.n_regs)
                yield fact(f"{name}: shared memory", kernel.metadata.shared, "bytes")
                compiled += 1
    yield equal("kernels were compiled", compiled > 0, True)


def _kernel_modules() -> list[Any]:
    package = importlib.import_module("megatron_ext.ops.kernels")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]
