"""The operators' work on a GPU (backend.py::Implementation): launches of the kernels and the exchanges between them.

The number of launches is the same for any number of tokens, and nothing is read back to the host: tokens that their
candidates do not resolve are searched by kernels that are always launched and end at once for all others.

                             launches at TP > 1 (collectives among them)      at TP 1
    without a nucleus        summary, gather, outputs                         summary, outputs
    with one, bf16           summary, candidates, all-to-all, decide,         summary, candidates, decide,
                             gather, 4 x (search, gather), sums, gather,      4 x search, sums, outputs
                             outputs
    with one, fp32           no candidates: 8 rounds search all tokens
    with one by min_p        summary, gather, min_p, gather, outputs          summary, min_p, outputs
    backward                 gradient
"""

from __future__ import annotations

# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
import math
from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from megatron_ext.ops.collectives import all_gather, all_to_all, group_rank, group_size
from megatron_ext.ops.kernels import gradient, min_p, nucleus, outputs, summary
from megatron_ext.ops.kernels.columns import AT_COLUMNS, GLOBAL_COLUMNS, SHARD_COLUMNS, STATE_COLUMNS
from megatron_ext.ops.options import Forward, Options

GROUPS_AT_ONCE = 256  # maxima a candidates program reads at once
TILE = 64  # groups whose columns it counts at once


def forward(logits: Tensor, targets: Tensor, scale: Tensor, options: Options) -> Forward:
    """See backend.py::Implementation."""
    T = len(logits)
    if not T:
        return _no_tokens(scale, options)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    if options.rule is None:
        return _plain(logits, targets, scale, options)
    if options.rule.min_p is not None:
        return _by_min_p(logits, targets, scale, options, options.rule.min_p)
    if logits.dtype == torch.bfloat16:
        numbers, rounds = _decide(logits, targets, scale, options), 4
    else:
        numbers, rounds = _undecided(logits, targets, scale, options), 8
    return _nucleus_outputs(_search(logits, scale, options, numbers, rounds), scale, options, numbers)


def backward(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    saved: tuple[Tensor, ...],
    upstream: Mapping[str, Tensor],
    options: Options,
    out: Tensor,
) -> None:
    """See backend.py::Implementation."""
    if not len(out):
        return
    assert out.stride(1) == 1
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (numbers,) = saved
    names = ("logprob", "entropy", "nucleus_entropy", "nucleus_logprob", "nucleus_mass")
    given = [upstream.get(name) for name in names]
    pointers = [part for value in given for part in ((numbers, 0) if value is None else (value, value.stride(0)))]
    present = [value is not None for value in given]
    gradient.gradient_kernel[(len(out), triton.cdiv(out.shape[1], gradient.COLUMNS))](
        logits, logits.stride(0), targets, options.shard.start, scale, scale.stride(0), numbers,
        out, out.stride(0), options.shard.real, out.shape[1], *pointers,
        OF_LOGPROB=present[0], OF_ENTROPY=present[1], OF_INSIDE=present[2], OF_TARGET=present[3], OF_MASS=present[4],
        KEEP_EQUAL=_keep_equal(options), NUMBERS=numbers.shape[1], COLUMNS=gradient.COLUMNS, num_warps=gradient.WARPS,
    )  # fmt: skip


def _plain(logits: Tensor, targets: Tensor, scale: Tensor, options: Options) -> Forward:
    T, group = len(logits), options.shard.group
    sums = torch.empty((T, SHARD_COLUMNS.value), dtype=torch.float32, device=logits.device)
    _summarise(logits, targets, scale, options, sums, None)
    numbers, logprob, entropy = torch.empty_like(sums), *_per_token(T, 2, logits)
    outputs.outputs_kernel[(triton.cdiv(T, outputs.TOKENS),)](
        all_gather(sums, group), scale, scale.stride(0), numbers, logprob, entropy, T,
        WORLD=group_size(group), TOKENS=outputs.TOKENS, num_warps=outputs.WARPS,
    )  # fmt: skip
    return Forward({"logprob": logprob, "entropy": entropy}, (numbers,), None)


def _by_min_p(logits: Tensor, targets: Tensor, scale: Tensor, options: Options, least: float) -> Forward:
    """The nucleus that ends at a probability, the same for any dtype: no candidates, nobody is searched."""
    T, group, device = len(logits), options.shard.group, logits.device
    sums = torch.empty((T, SHARD_COLUMNS.value), dtype=torch.float32, device=device)
    maxima = torch.empty((T, triton.cdiv(options.shard.real, summary.GROUP)), dtype=torch.int16, device=device)
    _summarise(logits, targets, scale, options, sums, maxima)
    numbers = torch.empty((T, GLOBAL_COLUMNS.value), dtype=torch.float32, device=device)
    above = torch.empty((T, AT_COLUMNS.value), dtype=torch.float64, device=device)
    min_p.min_p_kernel[(T,)](
        logits, logits.stride(0), scale, scale.stride(0), all_gather(sums, group), maxima, numbers, above,
        options.shard.real, T, LOG_MIN_P=math.log(least), WORLD=group_size(group), GROUP=summary.GROUP,
        GROUPS=min_p.GROUPS, num_warps=min_p.WARPS,
    )  # fmt: skip
    found = _nucleus_outputs(all_gather(above, group), scale, options, numbers)
    assert found.fallback is not None
    return found._replace(fallback=torch.zeros_like(found.fallback))


def _summarise(
    logits: Tensor, targets: Tensor, scale: Tensor, options: Options, sums: Tensor, maxima: Tensor | None
) -> None:
    """Each token's sums into the first four fp32 of ``sums``; the groups' maxima where there is room."""
    summary.summary_kernel[(len(logits),)](
        logits, logits.stride(0), targets, options.shard.start, scale, scale.stride(0), sums, sums.stride(0),
        sums if maxima is None else maxima, options.shard.real,
        WITH_MOMENT=options.moment, WITH_MAXIMA=maxima is not None, COLUMNS=summary.COLUMNS, GROUP=summary.GROUP,
        num_warps=summary.WARPS,
    )  # fmt: skip


def _decide(logits: Tensor, targets: Tensor, scale: Tensor, options: Options) -> Tensor:
    """Sums and candidates to the tokens' owners, their decisions to everybody: ``numbers`` ``[T, 8]``."""
    assert options.rule is not None
    T, shard, device = len(logits), options.shard, logits.device
    world, keys = group_size(shard.group), triton.next_power_of_2(2 * options.num_candidates)
    own = triton.cdiv(T, world)
    words = torch.empty((world, own, SHARD_COLUMNS.value + 1 + keys // 2), dtype=torch.int32, device=device)
    sent = words.flatten(0, 1)
    maxima = torch.empty((T, triton.cdiv(shard.real, summary.GROUP)), dtype=torch.int16, device=device)
    assert maxima.shape[1] <= 32768, shard  # a group's number must fit where its maximum was
    _summarise(logits, targets, scale, options, sent.view(torch.float32), maxima)
    summary.candidates_kernel[(T,)](
        logits, logits.stride(0), scale, scale.stride(0), sent.view(torch.float32), sent.view(torch.int16),
        sent.stride(0), maxima, shard.real, options.held_share,
        KEYS=keys, GROUP=summary.GROUP, STEP=GROUPS_AT_ONCE, TILE=TILE, num_warps=summary.CANDIDATES_WARPS,
    )  # fmt: skip
    words = all_to_all(words, shard.group)
    decided = torch.empty((own, GLOBAL_COLUMNS.value), dtype=torch.float32, device=device)
    nucleus.decide_kernel[(own,)](
        words.view(torch.float32), words.view(torch.int16), words.stride(1), words.stride(0),
        group_rank(shard.group) * own, T, scale, scale.stride(0), decided,
        TOP_P=options.rule.top_p, KEEP_EQUAL=options.rule.keep_equal, KEYS=keys, WORLD=world,
        num_warps=nucleus.DECIDE_WARPS,
    )  # fmt: skip
    return all_gather(decided, shard.group).flatten(0, 1)[:T]


def _undecided(logits: Tensor, targets: Tensor, scale: Tensor, options: Options) -> Tensor:
    """``numbers`` of fp32 logits, which have no candidates: what the sums say, and every token left to the search."""
    numbers = torch.full((len(logits), GLOBAL_COLUMNS.value), -1.0, dtype=torch.float32, device=logits.device)
    numbers[:, : SHARD_COLUMNS.value] = _plain(logits, targets, scale, options).saved[0]
    return numbers


def _search(logits: Tensor, scale: Tensor, options: Options, numbers: Tensor, rounds: int) -> Tensor:
    """Find theta of the tokens whose size is -1; their sums above it from all ranks, ``[world, T, 4]`` fp64."""
    assert options.rule is not None
    T, group, top_p = len(logits), options.shard.group, options.rule.top_p
    state, bins, sums = (
        torch.empty((T, width), dtype=torch.float64, device=logits.device)
        for width in (STATE_COLUMNS.value, nucleus.BINS, AT_COLUMNS.value)
    )
    common = logits, logits.stride(0), scale, scale.stride(0), numbers, state
    world, gathered = group_size(group), bins
    fixed = {
        "TOP_P": top_p,
        "WORLD": world,
        "COLUMNS": nucleus.SEARCH_COLUMNS,
        "num_warps": nucleus.SEARCH_WARPS,
    }
    for number in range(rounds):
        nucleus.search_kernel[(T,)](*common, gathered, bins, options.shard.real, T, ROUND=number, **fixed)
        gathered = all_gather(bins, group)
    nucleus.search_sums_kernel[(T,)](*common, gathered, sums, options.shard.real, T, ROUNDS=rounds, **fixed)
    return all_gather(sums, group)


def _nucleus_outputs(gathered: Tensor, scale: Tensor, options: Options, numbers: Tensor) -> Forward:
    T = len(numbers)
    values = dict(zip(NAMES, _per_token(T, len(NAMES), numbers), strict=True))
    fallback = torch.zeros((), dtype=torch.int64, device=numbers.device)
    outputs.nucleus_outputs_kernel[(triton.cdiv(T, outputs.TOKENS),)](
        gathered, scale, scale.stride(0), numbers, fallback, *values.values(), T,
        KEEP_EQUAL=_keep_equal(options), WORLD=group_size(options.shard.group), TOKENS=outputs.TOKENS,
        num_warps=outputs.WARPS,
    )  # fmt: skip
    return Forward(values, (numbers,), fallback)


NAMES = ("logprob", "entropy", "nucleus_entropy", "nucleus_mass", "nucleus_size", "nucleus_logprob")


def _per_token(T: int, count: int, like: Tensor) -> list[Tensor]:
    return [torch.empty(T, dtype=torch.float32, device=like.device) for _ in range(count)]


def _no_tokens(scale: Tensor, options: Options) -> Forward:
    """Every rank of the group has as many, so none of them exchanges anything."""
    values = dict(zip(NAMES, _per_token(0, len(NAMES), scale), strict=True))
    fallback = torch.zeros((), dtype=torch.int64, device=scale.device)
    numbers = scale.new_empty((0, SHARD_COLUMNS.value if options.rule is None else GLOBAL_COLUMNS.value))
    return Forward(values, (numbers,), None if options.rule is None else fallback)


def _keep_equal(options: Options) -> bool:
    return options.rule is not None and options.rule.keep_equal
