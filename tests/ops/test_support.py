"""The outputs over a sampler's support against an fp64 softmax over it: values, gradients, ranks, what is read."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.ops import Support, VocabShard, linear_policy_stats, logit_passes, policy_stats
from megatron_ext.ops.options import SUPPORT
from tests import gloo
from tests.ops.cases import language_like, padded_shard

T, VOCAB, D = 12, 101, 16
WHOLE = ("logprob", "entropy", "nucleus_entropy")
CASES = [  # wanted, with gradient, whether some rows are empty
    (SUPPORT, SUPPORT, True),
    (SUPPORT, SUPPORT, False),
    (("support_logprob",), ("support_logprob",), True),
    (("support_logprob", "entropy"), ("support_logprob",), True),
    (("entropy", "support_entropy"), ("entropy", "support_entropy"), False),
    ((*WHOLE, *SUPPORT), (*WHOLE, *SUPPORT), True),
]


def some_support(targets: Tensor, empty: bool = True) -> Support:
    """Rows of many kinds: one token, one shard, all tokens, a target outside, none where ``empty``."""
    g = torch.Generator().manual_seed(3)
    rows: list[Tensor] = []
    for token, target in enumerate(targets):
        row = torch.randperm(VOCAB, generator=g)[: 2 + 3 * token]
        rows.append(torch.cat([row[row != target], target[None]]) if token != 4 else row[row != target])
    first = int(targets[2]) // 5 * 5
    rows[0], rows[1], rows[2] = targets[:1], torch.arange(VOCAB), torch.arange(first, min(first + 5, VOCAB))
    if empty:
        rows[5] = rows[8] = torch.empty(0, dtype=torch.int64)
    return Support.from_rows(rows)


def mask_of(support: Support, vocab: int = VOCAB) -> Tensor:
    """``[T, V]`` bool, by hand."""
    mask = torch.zeros(support.num_tokens, vocab, dtype=torch.bool)
    for token in range(support.num_tokens):
        row = support.ids[int(support.starts[token]) : int(support.starts[token + 1])]
        mask[token, row if len(row) else slice(None)] = True
    return mask


def definition(logits: Tensor, targets: Tensor, temperature: Tensor, support: Support) -> dict[str, Tensor]:
    logq = (logits / temperature[:, None]).masked_fill(~mask_of(support, logits.shape[1]), -torch.inf).log_softmax(-1)
    logp = (logits / temperature[:, None]).log_softmax(-1)
    at_target = targets[:, None]
    return {
        "support_logprob": logq.gather(1, at_target)[:, 0],
        "support_entropy": -(logq.exp() * logq.masked_fill(logq == -torch.inf, 0)).sum(-1),
        "logprob": logp.gather(1, at_target)[:, 0],
        "entropy": -(logp.exp() * logp).sum(-1),
    }


def loss_of(outputs: dict[str, Tensor], names: Sequence[str]) -> Tensor:
    """With a weight for every token of every output; a target outside has none."""
    total = torch.zeros((), dtype=torch.float64)
    for number, name in enumerate(sorted(names)):
        weight = torch.randn(T, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        value = outputs[name]
        total = total + (weight * torch.where(value == -torch.inf, 0, value)).sum()
    return total


def temperatures() -> Tensor:
    return torch.linspace(1.5, 0.6, T)


def run_cases(rank: int, world: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    logits, targets = language_like(T, VOCAB, dtype)
    local, shard = padded_shard(logits, rank, world, dist.group.WORLD if world > 1 else None)
    results = []
    for want, grad, empty in CASES:
        leaf, support = local.clone().requires_grad_(), some_support(targets, empty)
        out = policy_stats(
            leaf, targets, shard, temperature=temperatures(), top_p=0.8, want=want, grad=grad, support=support
        )
        loss = loss_of({name: out[name] for name in grad}, grad)
        (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        assert torch.equal(gradient, torch.autograd.grad(loss, leaf)[0]) and torch.equal(leaf.detach(), local)
        own = local.clone().requires_grad_()
        again = policy_stats(
            own * 1, targets, shard, temperature=temperatures(), top_p=0.8, want=want, grad=grad, support=support,
            inplace_backward=True,
        )  # fmt: skip
        assert torch.equal(gradient, torch.autograd.grad(loss_of({n: again[n] for n in grad}, grad), own)[0])
        results.append({name: out[name].detach() for name in want} | {"gradient": gradient})
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients_are_those_of_a_softmax_over_the_support(world, dtype):
    ranks = gloo.run(run_cases, world, dtype) if world > 1 else [run_cases(0, 1, dtype)]
    logits, targets = language_like(T, VOCAB, dtype)
    for number, (want, grad, empty) in enumerate(CASES):
        wide = logits.double().requires_grad_()
        expected = definition(wide, targets, temperatures().double(), some_support(targets, empty))
        got = ranks[0][number]
        for name in want:
            assert all(torch.equal(got[name], rank[number][name]) for rank in ranks), name
            tolerance = 1e-12 if dtype == torch.float64 else 2e-6
            if name in expected:
                torch.testing.assert_close(got[name].double(), expected[name].detach(), rtol=tolerance, atol=tolerance)
        gradient = torch.cat([rank[number]["gradient"] for rank in ranks], 1)
        assert not gradient[:, VOCAB:].any()
        if "nucleus_entropy" in grad:  # of the operator's own: its gradient is tested elsewhere
            expected |= nucleus_alone(wide, targets)
        (d_wide,) = torch.autograd.grad(loss_of(expected, grad), wide)
        rounding = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-7}[dtype]
        torch.testing.assert_close(gradient[:, :VOCAB].double(), d_wide, rtol=rounding, atol=rounding)
        if not set(grad) & set(WHOLE):
            outside = ~mask_of(some_support(targets, empty))
            assert not gradient[:, :VOCAB][outside].any()


def nucleus_alone(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    name = "nucleus_entropy"
    out = policy_stats(logits, targets, temperature=temperatures().double(), top_p=0.8, want=(name,), grad=(name,))
    return {name: out[name]}


def test_a_target_outside_and_a_support_of_one_token():
    logits, targets = language_like(T, VOCAB)
    logits.requires_grad_()
    support = some_support(targets)
    out = policy_stats(logits, targets, want=SUPPORT, grad=SUPPORT, support=support)
    assert out["support_logprob"][4] == -torch.inf and out["support_logprob"][[0, 1, 2, 3]].isfinite().all()
    assert out["support_logprob"][0] == 0 and out["support_entropy"][0] == 0
    weight = torch.arange(1.0, T + 1)
    (gradient,) = torch.autograd.grad((out["support_logprob"] * weight).sum(), logits)
    assert gradient.isfinite().all() and not gradient[4].any() and not gradient[0].any() and gradient[3].any()


def test_an_empty_row_is_the_whole_vocabulary_to_the_bit():
    logits, targets = language_like(T, VOCAB, torch.bfloat16)
    names = ("logprob", "entropy")
    out = policy_stats(logits, targets, want=(*names, *SUPPORT), grad=(), support=some_support(targets))
    alone = policy_stats(logits, targets, want=SUPPORT, grad=(), support=Support.unrestricted(T))
    for name in names:
        assert torch.equal(alone[f"support_{name}"], out[name])
        assert torch.equal(out[f"support_{name}"][[5, 8]], out[name][[5, 8]])


def test_gradcheck():
    logits, targets = language_like(4, 7, torch.float64)
    support = Support.from_rows([[0, 3, int(targets[0])], [], [int(targets[2])], [1, 2]])
    targets[3] = 2

    def outputs(x: Tensor):
        out = policy_stats(x, targets, temperature=0.7, want=(*SUPPORT, "entropy"), grad=SUPPORT, support=support)
        return out["support_logprob"], out["support_entropy"]

    assert torch.autograd.gradcheck(outputs, logits.requires_grad_())


def test_nothing_reads_the_logits_where_only_the_support_is_wanted(monkeypatch):
    rows: list[int] = []
    for name in ("summarise", "gradient"):
        original = getattr(logit_passes, name)
        monkeypatch.setattr(logit_passes, name, lambda x, *a, f=original, **k: rows.append(len(x)) or f(x, *a, **k))
    logits, targets = language_like(T, VOCAB)
    support = some_support(targets, empty=False)
    logits[~mask_of(support)] = torch.nan  # what is not kept has no part in it
    logits.requires_grad_()
    out = policy_stats(logits, targets, want=SUPPORT, grad=SUPPORT, support=support)
    (gradient,) = torch.autograd.grad(loss_of({n: out[n] for n in SUPPORT}, SUPPORT), logits)
    assert not rows and gradient.isfinite().all() and out["support_entropy"].isfinite().all()
    clean, _ = language_like(T, VOCAB)
    out = policy_stats(clean.requires_grad_(), targets, want=SUPPORT, grad=SUPPORT, support=some_support(targets))
    torch.autograd.grad(loss_of({n: out[n] for n in SUPPORT}, SUPPORT), clean)
    assert rows == [2, 2]  # the two empty rows, forward and backward
    want = ("support_logprob", "entropy")  # an entropy that is only watched
    out = policy_stats(clean, targets, want=want, grad=want[:1], support=support)
    torch.autograd.grad(loss_of({"support_logprob": out["support_logprob"]}, want[:1]), clean)
    assert rows == [2, 2, T]  # a forward pass, and none backward


def test_a_nan_in_a_support_stays_with_its_token():
    logits, targets = language_like(T, VOCAB)
    support = some_support(targets, empty=False)
    clean = policy_stats(logits, targets, want=SUPPORT, grad=(), support=support)
    logits[3, targets[3]] = torch.nan
    out = policy_stats(logits, targets, want=SUPPORT, grad=(), support=support)
    for name in SUPPORT:
        assert out[name][3].isnan() and torch.equal(out[name][4:], clean[name][4:])


def run_bytes(rank: int, world: int) -> list[int]:
    sent, original = [], dist.all_gather_into_tensor

    def counted(out, value, **options):
        sent.append(value.numel() * value.element_size())
        return original(out, value, **options)

    dist.all_gather_into_tensor = counted
    logits, targets = language_like(T, VOCAB)
    local, shard = padded_shard(logits, rank, world, dist.group.WORLD)
    local.requires_grad_()
    out = policy_stats(local, targets, shard, want=SUPPORT, grad=SUPPORT, support=some_support(targets, empty=False))
    torch.autograd.grad(loss_of({n: out[n] for n in SUPPORT}, SUPPORT), local)
    return sent


def test_one_exchange_of_16_bytes_a_token():
    assert gloo.run(run_bytes, 2) == [[16 * T]] * 2


def run_fused(rank: int, world: int, dtype: torch.dtype, sequence_parallel: bool) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(T, D, generator=g).to(dtype), torch.randn(VOCAB, D, generator=g).to(dtype)
    targets = torch.randint(VOCAB, (T,), generator=g)
    group, width = dist.group.WORLD if world > 1 else None, -(-VOCAB // world)
    padded = torch.full((width * world, D), 7.0, dtype=dtype)
    padded[:VOCAB] = weight
    results = []
    for want, grad, empty in CASES:
        local = padded[rank * width : (rank + 1) * width].clone().requires_grad_()
        own = hidden[rank * T // world : (rank + 1) * T // world] if sequence_parallel else hidden
        own = own.clone().requires_grad_()
        out = linear_policy_stats(
            own, local, targets, VocabShard.for_vocab(VOCAB, group), temperature=temperatures(), top_p=0.8, want=want,
            grad=grad, support=some_support(targets, empty), chunk=5, sequence_parallel=sequence_parallel,
        )  # fmt: skip
        gradients = torch.autograd.grad(loss_of({name: out[name] for name in grad}, grad), (own, local))
        results.append({n: out[n].detach() for n in want} | dict(zip(("hidden", "weight"), gradients, strict=True)))
    return results


@pytest.mark.parametrize(("world", "sequence_parallel"), [(1, False), (2, True), (4, False)])
def test_the_fused_head_in_chunks_gives_the_same(world, sequence_parallel):
    arguments = (torch.float64, sequence_parallel)
    ranks = gloo.run(run_fused, world, *arguments) if world > 1 else [run_fused(0, 1, *arguments)]
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(T, D, generator=g).double(), torch.randn(VOCAB, D, generator=g).double()
    targets = torch.randint(VOCAB, (T,), generator=g)
    for leaf in (hidden, weight):
        leaf.requires_grad_()
    for number, (want, grad, empty) in enumerate(CASES):
        expected = definition(hidden @ weight.T, targets, temperatures().double(), some_support(targets, empty))
        if "nucleus_entropy" in grad:
            expected |= nucleus_alone(hidden @ weight.T, targets)
        gradients = torch.autograd.grad(loss_of(expected, grad), (hidden, weight))
        for name in set(want) & set(expected):
            torch.testing.assert_close(ranks[-1][number][name], expected[name].detach(), rtol=1e-11, atol=1e-11)
        own = [rank[number]["hidden"] for rank in ranks]
        torch.testing.assert_close(torch.cat(own) if sequence_parallel else own[0], gradients[0], rtol=1e-9, atol=1e-9)
        got = torch.cat([rank[number]["weight"] for rank in ranks])
        torch.testing.assert_close(got[:VOCAB], gradients[1], rtol=1e-9, atol=1e-9)


def test_the_support_is_cut_selected_and_joined_by_token():
    rows = [[3, 9], [], [4], [], [0, 1, 2], [7]]
    support = Support.from_rows([[9, 3], *rows[1:]])

    def read(value: Support) -> list[list[int]]:
        return [value.ids[a:b].tolist() for a, b in zip(value.starts, value.starts[1:], strict=False)]

    assert read(support) == rows and support.num_tokens == 6 and support.sizes.tolist() == [2, 0, 1, 0, 3, 1]
    assert [read(part) for part in support.split(4)] == [rows[:4], rows[4:]]
    assert read(Support.join(support.split(4))) == rows
    assert read(support.select(torch.tensor([4, 4, 1, 0]))) == [rows[4], rows[4], [], rows[0]]
    assert read(support.select(torch.tensor([False, True, True, False, False, True]))) == [[], [4], [7]]
    assert read(support.select(torch.empty(0, dtype=torch.int64))) == []
    assert support.token_of_id().tolist() == [0, 0, 2, 4, 4, 4, 5]
    assert support.unrestricted_tokens().tolist() == [1, 3]
    column, held = support.columns(VocabShard(4, 12, 8))  # columns 8 to 11 are padding
    assert held.tolist() == [False, False, True, False, False, False, True] and column[held].tolist() == [0, 3]
    assert read(Support.from_rows([])) == [] and read(Support.unrestricted(2)) == [[], []]


def test_no_tokens():
    logits = torch.empty(0, 30, requires_grad=True)
    out = policy_stats(
        logits, torch.empty(0, dtype=torch.int64), want=SUPPORT, grad=SUPPORT, support=Support.unrestricted(0)
    )
    (gradient,) = torch.autograd.grad(out["support_logprob"].sum(), logits)
    assert out["support_entropy"].shape == (0,) and gradient.shape == (0, 30)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (None, "pass support="),
        (Support.from_rows([[1]]), r"expected int64 \[3\], one more than there are tokens"),
        (Support.from_rows([[1], [8]]), r"ids from 1 to 8, expected \[0, 8\)"),
        (Support(torch.tensor([3, 1]), torch.tensor([0, 2, 2])), "must ascend"),
        (Support(torch.tensor([1, 3]), torch.tensor([0, 1, 1])), "must rise from 0 to the number of ids, 2"),
        (Support(torch.tensor([1.0]), torch.tensor([0, 1, 1])), "expected int64 or int32"),
    ],
)
def test_a_support_that_does_not_fit_is_named(support, message):
    with pytest.raises(ValueError, match=message):
        policy_stats(torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), want=SUPPORT, grad=(), support=support)
