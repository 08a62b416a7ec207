"""The operator benchmark: correctness, then time, bytes and memory, ours and the peers' interleaved in one run."""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor

from megatron_ext.ops import VocabShard, policy_stats, reference

from .peers import Outputs, Peer, peers, process_group

WANT = {
    "log-prob": ("logprob",),
    "log-prob + entropy": ("logprob", "entropy"),
    "log-prob + nucleus": ("logprob", "nucleus_entropy"),
    "log-prob + entropy + nucleus": ("logprob", "entropy", "nucleus_entropy"),
}
DETERMINISTIC = ", deterministic"  # ends the name of such a line
CHECKED_TOKENS = 8


@dataclass
class Line:
    """One operator on one shape. Bytes are per rank; ``floor`` reads the logits twice and writes the gradient once."""

    name: str
    ours: bool
    error: float = float("nan")  # largest value error, against fp64
    gradient_error: float = float("nan")  # largest, over the largest gradient
    milliseconds: float = float("nan")
    times: list[float] = field(default_factory=list)
    saved_bytes_per_element: float = float("nan")
    peak_bytes_per_element: float = float("nan")
    exchanged_bytes_per_token: float = 0.0
    collectives: int = 0
    resolved: float | None = None
    note: str = ""


@dataclass
class Table:
    device: str
    dtype: str
    tp: int
    tokens: int
    vocab: int
    floor_ms: float
    lines: list[Line]


def run(options: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with process_group(options.device) as (rank, world):
        return _race(options, rank, world)


def _race(options: argparse.Namespace, rank: int, world: int) -> int:
    found, missing = peers(options.top_p, world)
    tables = []
    for vocab in options.vocab:
        for dtype in options.dtype:
            bench = _Bench(options, vocab, getattr(torch, dtype), found, rank, world)
            lines, wrong = bench.check()
            if wrong:
                if rank == 0:
                    print("WRONG, so nothing is timed:\n  " + "\n  ".join(wrong))
                return 1
            bench.measure(lines)
            lines += [Line(name, False, note=why) for name, why in missing.items()]
            table = Table(options.device, dtype, world, options.tokens, vocab, bench.floor_ms(), lines)
            tables.append(table)
            if rank == 0:
                print(_text(table))
    if rank == 0:
        _write(options, tables)
    return 0


class _Bench:
    def __init__(
        self, options: argparse.Namespace, vocab: int, dtype: torch.dtype, found: dict[str, Peer], rank: int, world: int
    ) -> None:
        self.options, self.vocab, self.dtype, self.world = options, vocab, dtype, world
        self.shard = VocabShard.for_vocab(vocab, dist.group.WORLD if world > 1 else None)
        full, targets = language_like(options.tokens, self.shard.width * world, dtype)
        full[:, vocab:] = -torch.inf
        self.full, self.targets = full, targets.clamp_max(vocab - 1).to(options.device)
        self.logits = full[:, self.shard.start : self.shard.stop].contiguous().to(options.device)
        self.calls: dict[str, Callable[[Tensor], Outputs]] = {}
        self.unresolved = 0
        for name, want in WANT.items():
            self.calls[name] = self._ours(want)
            if options.deterministic:
                self.calls[name + DETERMINISTIC] = self._ours(want, deterministic=True)
        for name, peer in found.items():
            self.calls[name] = self._peer(peer)

    def _ours(self, want: tuple[str, ...], *, deterministic: bool = False) -> Callable[[Tensor], Outputs]:
        options: Any = {"top_p": self.options.top_p, "want": want, "grad": want, "deterministic": deterministic}

        def call(logits: Tensor) -> Outputs:
            out = policy_stats(logits, self.targets, self.shard, **options)
            self.unresolved = 0 if out.num_fallback is None else int(out.num_fallback)
            return {name: out[name] for name in want}

        return call

    def _peer(self, peer: Peer) -> Callable[[Tensor], Outputs]:
        return lambda logits: peer(logits, self.targets, self.vocab, dist.group.WORLD)

    def check(self) -> tuple[list[Line], list[str]]:
        """Every operator once, against fp64 on the first tokens; what of ours is wrong, in words."""
        lines, wrong = [], []
        for name in list(self.calls):
            line = Line(name, name.removesuffix(DETERMINISTIC) in WANT)
            try:
                outputs, gradient = self.step(name)
            except Exception as error:
                if line.ours:
                    raise
                line.note = f"{type(error).__name__}: {error}".splitlines()[0][:100]
                del self.calls[name]
                lines.append(line)
                continue
            line.error, line.gradient_error = self._errors(outputs, gradient)
            if line.ours:
                line.resolved = 1 - self.unresolved / self.options.tokens if "nucleus" in name else None
                limit = 2e-5, (2**-7 if self.dtype == torch.bfloat16 else 1e-4)
                if not (line.error <= limit[0] and line.gradient_error <= limit[1]):
                    wrong.append(f"{name}: value error {line.error:.2e}, gradient error {line.gradient_error:.2e}")
            lines.append(line)
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, wrong)
        return lines, sorted({text for part in every for text in part})

    def _errors(self, outputs: Outputs, gradient: Tensor) -> tuple[float, float]:
        tokens = slice(0, CHECKED_TOKENS)
        truth = self.full[tokens, : self.vocab].double().requires_grad_()
        targets = self.targets[tokens].cpu()
        mask = reference.nucleus_mask(truth, self.options.top_p)
        expected = {
            "logprob": reference.logprob(truth, targets),
            "entropy": reference.entropy(truth),
            "nucleus_entropy": reference.nucleus_entropy(truth, mask),
        }
        loss = torch.stack([expected[name].sum() for name in outputs]).sum()
        (d_truth,) = torch.autograd.grad(loss, truth)
        own = slice(self.shard.start, self.shard.start + self.shard.real)
        d_truth = d_truth[:, own]
        got = gradient[tokens, : self.shard.real].cpu().double()
        values = [
            (outputs[name][tokens].detach().cpu().double() - expected[name]).abs().max().item() for name in outputs
        ]
        return max(values), ((got - d_truth).abs().max() / d_truth.abs().max().clamp_min(1e-3)).item()

    def step(self, name: str) -> tuple[Outputs, Tensor]:
        """Forward and backward of the sum of all outputs."""
        leaf = self.logits.detach().requires_grad_()
        outputs = self.calls[name](leaf)
        loss = torch.stack([value.sum() for value in outputs.values()]).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return outputs, gradient

    def measure(self, lines: list[Line]) -> None:
        timed = [line for line in lines if line.name in self.calls]
        for line in timed:
            self._memory(line)
        for _ in range(self.options.repeat):
            for line in timed:
                line.times.append(milliseconds(lambda name=line.name: self.step(name), self.options.device, self.world))
        for line in timed:
            line.milliseconds = statistics.median(line.times)

    def _memory(self, line: Line) -> None:
        saved: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            saved[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        elements = self.logits.numel()
        leaf = self.logits.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value), exchanged() as seen:
            outputs = self.calls[line.name](leaf)
        line.saved_bytes_per_element = sum(saved.values()) / elements
        line.exchanged_bytes_per_token, line.collectives = sum(seen) / self.options.tokens, len(seen)
        del outputs
        with _peak(self.options.device) as peak:
            self.step(line.name)
        line.peak_bytes_per_element = peak[0] / elements

    def floor_ms(self) -> float:
        """Reading the logits twice and writing the gradient, at the rate of a copy into mapped memory."""
        target = torch.empty_like(self.logits)
        copies = [milliseconds(lambda: target.copy_(self.logits), self.options.device, self.world) for _ in range(5)]
        return statistics.median(copies[1:]) * 3 / 2


def milliseconds(step: Callable[[], object], device: str, world: int) -> float:
    """How long the slowest rank takes for ``step``."""
    if world > 1:
        dist.barrier()
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor(1e3 * (time.perf_counter() - start), device=device)
    if world > 1:
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
    return float(took)


def language_like(T: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Zipf-like logits from nearly certain to open (entropy about 0 to 5 nats); every other target is the likeliest."""
    g = torch.Generator().manual_seed(0)
    order = torch.randperm(vocab, generator=g)
    log_rank = torch.empty(vocab).scatter_(0, order, torch.arange(1, vocab + 1).log())
    logits = torch.randn(T, vocab, generator=g)
    shift = torch.randint(vocab, (T,), generator=g)
    for token in range(T):
        steepness = 1.3 + 2.7 * token / max(T - 1, 1)
        logits[token] -= steepness * log_rank.roll(int(shift[token]))
        logits[token] += 16 - logits[token].max()
    logits = logits[torch.randperm(T, generator=g)].to(dtype)
    targets = torch.randint(vocab, (T,), generator=g)
    return logits, torch.where(torch.arange(T) % 2 == 0, logits.float().argmax(-1), targets)


@contextmanager
def exchanged() -> Iterator[list[int]]:
    """Bytes this rank hands to every collective."""
    seen: list[int] = []
    names = {"all_reduce": 0, "all_gather_into_tensor": 1, "all_to_all_single": 1, "reduce_scatter_tensor": 1}
    originals = {name: getattr(dist, name) for name in names}

    def counted(name: str, position: int) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            value = arguments[position]
            seen.append(value.numel() * value.element_size())
            return originals[name](*arguments, **options)

        return call

    for name, position in names.items():
        setattr(dist, name, counted(name, position))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextmanager
def _peak(device: str) -> Iterator[list[float]]:
    """Bytes at the highest point above the start; on a CPU from the kernel's own high-water mark."""
    peak = [float("nan")]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield peak
        peak[0] = torch.cuda.max_memory_allocated() - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: no number rather than a wrong one
        yield peak
        return
    before = _status("VmRSS")
    yield peak
    peak[0] = _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _text(table: Table) -> str:
    head = (
        f"\n{table.device}, {table.dtype}, TP {table.tp}, T={table.tokens}, V={table.vocab}, forward + backward, "
        f"median; floor (3 passes over the shard at copy speed) {table.floor_ms:.1f} ms\n"
    )
    base = next((line for line in table.lines if line.name == "verl pair" and line.times), None)
    text = [
        f"{'':45}{'ms':>8}{'x verl':>8}{'x floor':>8}{'saved':>8}{'peak':>8}{'sent':>9}{'coll':>5}{'resolved':>9}"
        f"{'error':>10}{'d error':>10}"
    ]
    for line in table.lines:
        if not line.times:
            text.append(f"{line.name:45}  {line.note}")
            continue
        text.append(
            f"{line.name:45}{line.milliseconds:8.1f}{speedup(base, line):8.2f}"
            f"{line.milliseconds / table.floor_ms:8.2f}{line.saved_bytes_per_element:8.2f}"
            f"{line.peak_bytes_per_element:8.2f}{line.exchanged_bytes_per_token:9.0f}{line.collectives:5}"
            f"{'' if line.resolved is None else format(line.resolved, '.3f'):>9}{line.error:10.1e}"
            f"{line.gradient_error:10.1e}"
        )
    by_name = {line.name: line for line in table.lines}
    added = 1 / speedup(by_name["log-prob + entropy"], by_name["log-prob + entropy + nucleus"]) - 1
    text.append("saved, peak: bytes per element of the shard; sent: bytes per token and rank")
    text.append(f"the nucleus adds {added:.0%} to log-prob + entropy (median of the repetitions' ratios)")
    return head + "\n".join(text)


def speedup(base: Line | None, line: Line) -> float:
    """How many times ``line`` is faster than ``base``: the median of the ratios within each repetition."""
    if base is None:
        return float("nan")
    return statistics.median(b / t for b, t in zip(base.times, line.times, strict=True))


def _write(options: argparse.Namespace, tables: list[Table]) -> None:
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"ops-{options.device}-tp{options.tp}"
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    facts = {"hardware": hardware, "threads": torch.get_num_threads(), "torch": torch.__version__}
    (folder / f"{name}.json").write_text(json.dumps(facts | {"tables": [asdict(table) for table in tables]}, indent=1))
    chart(tables).savefig(folder / f"{name}.svg")
    print(f"\n{folder / name}.json and .svg written")


def chart(tables: list[Table]) -> Figure:
    """Milliseconds as bars, one chart a table: ours dark, peers light."""
    timed = [[line for line in table.lines if line.times] for table in tables]
    figure = Figure(figsize=(9, 1 + sum(0.7 + 0.3 * len(lines) for lines in timed)), layout="constrained")
    rows = figure.subplots(len(tables), squeeze=False, height_ratios=[0.7 + 0.3 * len(lines) for lines in timed])
    for axes, table, lines in zip(rows[:, 0], tables, timed, strict=True):
        colors = ["#1f4e79" if line.ours else "#b8c4d0" for line in lines]
        bars = axes.barh([line.name for line in lines], [line.milliseconds for line in lines], color=colors)
        axes.bar_label(bars, fmt="{:.3g}", padding=4)
        axes.set_title(f"{table.device} {table.dtype}, TP {table.tp}, {table.tokens} x {table.vocab}: milliseconds")
        axes.margins(x=0.12)
        axes.invert_yaxis()
    return figure
