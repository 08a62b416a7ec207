"""sampling_support against the fp64 definition on whole logits: every combination, ties, shards, flat distributions."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from megatron_ext.ops import Support, reference, sampling_support
from tests import gloo
from tests.ops.cases import language_like, padded_shard

MODULE = importlib.import_module("megatron_ext.ops.sampling_support")
T, VOCAB = 12, 101
RULES: list[dict] = [
    *({"top_k": k, "top_p": p, "min_p": m} for k in (0, 5) for p in (1.0, 0.8) for m in (0.0, 0.02)),
    *({"top_k": 1}, {"top_k": 400}, {"top_k": 400, "top_p": 0.9}, {"top_p": 0.05}, {"min_p": 1.0}),
]


def expected_rows(logits: Tensor, temperature, rule: dict) -> list[list[int]]:
    mask = reference.sampling_mask(logits.double(), temperature, **rule)
    return [row.nonzero()[:, 0].tolist() for row in mask]


def rows_of(support: Support) -> list[list[int]]:
    return [part.ids.tolist() for part in support.split(1)]


def logits_of(dtype: torch.dtype, tied: bool) -> Tensor:
    logits, _ = language_like(T, VOCAB, torch.float32)
    if tied:
        logits = (logits * 0.3).round()
        logits[0], logits[1, 5:] = 2.0, -torch.inf  # every token ties; few tokens are possible
    return logits.to(dtype)


def run_rules(rank: int, world: int, dtype: torch.dtype, tied: bool) -> list[Support]:
    group = torch.distributed.group.WORLD if world > 1 else None
    local, shard = padded_shard(logits_of(dtype, tied), rank, world, group)
    temperature = torch.linspace(1.5, 0.6, T)
    return [sampling_support(local, shard, temperature=temperature, **rule) for rule in RULES]


@pytest.mark.parametrize("candidates", [256, 8], ids=["candidates", "more gathered"])
@pytest.mark.parametrize("tied", [False, True], ids=["distinct", "tied"])
@pytest.mark.parametrize(
    ("world", "dtype"), [(1, "float64"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16"), (4, "float32")]
)
def test_the_support_is_that_of_the_definition_on_every_shard(world, dtype, tied, candidates, monkeypatch):
    monkeypatch.setattr(MODULE, "NUM_CANDIDATES", candidates)
    monkeypatch.setattr(MODULE, "MOST_CANDIDATES", candidates - 1)
    monkeypatch.setattr(MODULE, "GATHERED", 300)
    monkeypatch.setattr(MODULE, "MANY", 16)
    arguments = (getattr(torch, dtype), tied)
    ranks = gloo.run(run_rules, world, *arguments) if world > 1 else [run_rules(0, 1, *arguments)]
    temperature = torch.linspace(1.5, 0.6, T).double()
    for number, rule in enumerate(RULES):
        support = ranks[0][number]
        for rank in ranks:
            assert all(torch.equal(a, b) for a, b in zip(rank[number], support, strict=True)), rule
        support.check("test", T, VOCAB, torch.device("cpu"))
        if rule == {"top_k": 0, "top_p": 1.0, "min_p": 0.0}:
            assert not len(support.ids)
            continue
        assert rows_of(support) == expected_rows(logits_of(*arguments), temperature, rule), rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_logits_are_searched_at_their_highest_blocks(dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "BLOCK", 20_000)
    logits, _ = language_like(8, 9001, dtype)
    gathered: list[tuple[int, int]] = []  # tokens, and how many logits of each
    original = MODULE._of_highest
    monkeypatch.setattr(MODULE, "_of_highest", lambda x, k, *a: gathered.append((len(x), k)) or original(x, k, *a))
    rules: list[dict] = [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 50, "top_p": 0.95, "min_p": 0.01}]
    for rule in rules:
        support = sampling_support(logits, temperature=0.9, **rule)
        assert rows_of(support) == expected_rows(logits, 0.9, rule), rule
    assert gathered and all(n < 8 and k == 8192 for n, k in gathered)  # top_p of the flattest tokens alone
    flat = torch.randn(3, 9001, generator=torch.Generator().manual_seed(0)).to(dtype)
    rules = [{"top_k": 5000}, {"top_p": 0.99}, {"min_p": 1e-3}]
    for rule in rules:
        assert rows_of(sampling_support(flat, **rule)) == expected_rows(flat, 1.0, rule), rule
    assert (3, 9001) in gathered  # top_p again, beyond the many


def test_ties_with_the_last_of_top_k_count_in_the_mass_of_top_p_beyond_the_candidates():
    """Of the 3001 tokens that top_k leaves the likeliest has a quarter of the mass, of the 401 candidates 71 %."""
    logits = torch.full((1, 5000), -5.0)
    logits[0, 3], logits[0, 1000:4000] = math.log(1000), 0.0
    assert rows_of(sampling_support(logits, top_k=400, top_p=0.5)) == [[3, *range(1000, 4000)]]


def test_a_nan_leaves_its_token_unrestricted_and_no_tokens_have_no_support():
    logits, _ = language_like(4, 300)
    logits[2, 7] = torch.nan
    rows = rows_of(sampling_support(logits, top_p=0.8))
    clean = rows_of(sampling_support(logits[[0, 1, 3]], top_p=0.8))
    assert rows == [*clean[:2], [], clean[2]]
    assert sampling_support(logits[:0], top_k=3).num_tokens == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, r"top_p is 0.0, expected a number in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"logits": torch.zeros(3)}, r"expected \[T, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        sampling_support(**({"logits": torch.zeros(2, 8)} | change))
