"""Sampling replay: what log-probabilities on a sampler's support cost, against gathering the logits and sorting them.

Every case is a forward and a backward, but for the support's own computation, which has none. The supports are those of
``--top-p`` and ``--top-k``, the targets tokens of them. Values, gradients and supports are compared with fp64 first.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.ops import Support, VocabShard, policy_stats, reference, sampling_support

from .ops import CHECKED_TOKENS, exchanged, language_like, milliseconds
from .peers import gathered, process_group

BASE, REPLAYED, RECOMPUTED, PEER = (
    *("log-prob + entropy", "replayed log-prob + entropy"),
    *("support from logits", "gather + sort"),
)
PEER_TOKENS = 128  # of the peer at once: its sorted copies of all tokens would fill the memory


@dataclass
class Line:
    name: str
    milliseconds: float = float("nan")
    times: list[float] = field(default_factory=list)
    exchanged_bytes_per_token: float = 0.0
    collectives: int = 0


@dataclass
class Table:
    device: str
    dtype: str
    tp: int
    tokens: int
    vocab: int
    top_p: float
    top_k: int
    ids_per_token: float
    stored_bytes_per_token: float  # of the support: its ids and its row
    lines: list[Line]


def run(options: argparse.Namespace) -> int:
    with process_group(options.device) as (rank, world):
        return _race(options, rank, world)


def _race(options: argparse.Namespace, rank: int, world: int) -> int:
    tables = []
    for vocab in options.vocab:
        for dtype in options.dtype:
            bench = _Replay(options, vocab, getattr(torch, dtype), world)
            if wrong := bench.wrong():
                if rank == 0:
                    print("WRONG, so nothing is timed:\n  " + "\n  ".join(wrong))
                return 1
            tables.append(bench.measured(dtype))
            if rank == 0:
                print(_text(tables[-1]))
    if rank == 0:
        folder = Path(options.out)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"replay-{options.device}-tp{world}.json"
        facts = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        path.write_text(json.dumps(facts | {"tables": [asdict(table) for table in tables]}, indent=1))
        print(f"\n{path} written")
    return 0


class _Replay:
    def __init__(self, options: argparse.Namespace, vocab: int, dtype: torch.dtype, world: int) -> None:
        self.options, self.vocab, self.world = options, vocab, world
        self.group = dist.group.WORLD if world > 1 else None
        self.shard = VocabShard.for_vocab(vocab, self.group)
        full, _ = language_like(options.tokens, self.shard.width * world, dtype)
        full[:, vocab:] = -torch.inf
        self.first = full[:CHECKED_TOKENS, :vocab].double()
        self.logits = full[:, self.shard.start : self.shard.stop].contiguous().to(options.device)
        del full
        self.support = self._recompute()
        g = torch.Generator(device=options.device).manual_seed(1)
        draw = torch.rand(options.tokens, generator=g, device=options.device)
        self.targets = self.support.ids[self.support.starts[:-1] + (draw * self.support.sizes).long()]
        self.cases: dict[str, Callable[[], object]] = {
            BASE: lambda: self._ours("logprob", "entropy"),
            REPLAYED: lambda: self._ours("support_logprob", "entropy"),
            "replayed log-prob": lambda: self._ours("support_logprob"),
            RECOMPUTED: self._recompute,
            PEER: lambda: self._gather_and_sort(options.tokens),
        }

    def _recompute(self) -> Support:
        return sampling_support(self.logits, self.shard, top_p=self.options.top_p, top_k=self.options.top_k)

    def _ours(self, *want: str) -> tuple[Tensor, Tensor]:
        """The first of ``want``, and the gradient of its sum."""
        leaf = self.logits.detach().requires_grad_()
        out = policy_stats(leaf, self.targets, self.shard, want=want, grad=want[:1], support=self.support)
        (gradient,) = torch.autograd.grad(out[want[0]].sum(), leaf)
        return out[want[0]].detach(), gradient

    def _gather_and_sort(self, tokens: int) -> tuple[Tensor, Tensor]:
        """The same from gathered logits: sort, mask, renormalise. It keeps no support, so it is made in every pass."""
        values, gradient = [], torch.empty_like(self.logits[:tokens])
        for part in torch.arange(tokens).split(PEER_TOKENS):
            at = slice(int(part[0]), int(part[-1]) + 1)
            leaf = self.logits[at].detach().requires_grad_()
            logp = torch.log_softmax(gathered(leaf, dist.group.WORLD)[:, : self.vocab].float(), -1)
            with torch.no_grad():
                ordered, order = logp.sort(-1, descending=True)
                p = ordered.exp()
                if self.options.top_k:
                    p[:, self.options.top_k :] = 0
                    p /= p.sum(-1, keepdim=True)
                inside = (p.cumsum(-1) - p < self.options.top_p) & (p > 0)
                kept = torch.zeros_like(logp, dtype=torch.bool).scatter_(1, order, inside)
            logq = torch.log_softmax(logp.masked_fill(~kept, -torch.inf), -1)
            value = logq.gather(1, self.targets[at, None])[:, 0]
            finite = torch.where(value > -torch.inf, value, 0)  # it breaks ties by id, so a target may be outside
            (gradient[at],) = torch.autograd.grad(finite.sum(), leaf)
            values.append(value.detach())
        return torch.cat(values), gradient

    def wrong(self) -> list[str]:
        """What of ours is wrong on the first tokens, in words, the same on every rank."""
        mask = reference.sampling_mask(self.first, top_p=self.options.top_p, top_k=self.options.top_k)
        found = []
        for token, part in enumerate(self.support.split(1)[:CHECKED_TOKENS]):
            if part.ids.tolist() != mask[token].nonzero()[:, 0].tolist():
                found.append(f"the support of token {token} is not that of the definition")
        truth, targets = self.first.clone().requires_grad_(), self.targets[:CHECKED_TOKENS].cpu()
        expected = reference.nucleus_logprob(truth, targets, mask)
        (d_truth,) = torch.autograd.grad(expected.sum(), truth)
        value, gradient = self._ours("support_logprob")
        error = (value[:CHECKED_TOKENS].cpu().double() - expected).abs().max().item()
        own = gradient[:CHECKED_TOKENS, : self.shard.real].cpu().double()
        d_error = (own - d_truth[:, self.shard.start : self.shard.start + self.shard.real]).abs().max().item()
        if not (error <= 2e-5 and d_error <= (2**-7 if self.logits.dtype == torch.bfloat16 else 1e-4)):
            found.append(f"replayed log-prob: value error {error:.2e}, gradient error {d_error:.2e}")
        every: list[list[str]] = [[] for _ in range(self.world)]
        dist.all_gather_object(every, found)
        return sorted({text for part in every for text in part})

    def measured(self, dtype: str) -> Table:
        lines = [Line(name) for name in self.cases]
        for line in lines:
            with exchanged() as seen:
                self.cases[line.name]()
            line.exchanged_bytes_per_token, line.collectives = sum(seen) / self.options.tokens, len(seen)
        for _ in range(self.options.repeat):
            for line in lines:
                line.times.append(milliseconds(self.cases[line.name], self.options.device, self.world))
        for line in lines:
            line.milliseconds = statistics.median(line.times)
        T, ids = self.options.tokens, len(self.support.ids)
        stored = ids * self.support.ids.element_size() + T * self.support.starts.element_size()
        given = self.options.device, dtype, self.world, T, self.vocab, self.options.top_p, self.options.top_k
        return Table(*given, ids_per_token=ids / T, stored_bytes_per_token=stored / T, lines=lines)


def _text(table: Table) -> str:
    by_name = {line.name: line for line in table.lines}
    text = [
        f"\n{table.device}, {table.dtype}, TP {table.tp}, T={table.tokens}, V={table.vocab}, top_p {table.top_p}, "
        f"top_k {table.top_k}: forward + backward, median",
        f"{'':30}{'ms':>9}{'bytes/token':>13}{'collectives':>13}   bytes: exchanged, per rank",
    ]
    for line in table.lines:
        text.append(
            f"{line.name:30}{line.milliseconds:9.1f}{line.exchanged_bytes_per_token:13.0f}{line.collectives:13}"
        )
    text.append(
        f"a support has {table.ids_per_token:.1f} ids a token and takes {table.stored_bytes_per_token:.0f} bytes of it"
    )
    share = _ratio(by_name[REPLAYED], by_name[BASE])
    text.append(f"replay in place of the log-prob: {share - 1:+.0%} of the operator's time")
    ours = [a + b for a, b in zip(by_name[REPLAYED].times, by_name[RECOMPUTED].times, strict=True)]
    faster = statistics.median(b / a for a, b in zip(ours, by_name[PEER].times, strict=True))
    text.append(f"support computed and replayed, with entropy: {faster:.1f}x as fast as gather + sort without entropy")
    return "\n".join(text)


def _ratio(line: Line, base: Line) -> float:
    """The median of the ratios within each repetition."""
    return statistics.median(a / b for a, b in zip(line.times, base.times, strict=True))
