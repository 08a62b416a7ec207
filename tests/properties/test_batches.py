"""Sequences into micro-batches, and layouts: every token once, every budget kept, what is accepted can be built."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_ext.config.parallel_checks import model_faults, nearest_divisor
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.train.packing import MiniBatch, pack, split
from tests.properties.oddities import limits

LENGTHS = st.lists(st.integers(1, 12), min_size=3, max_size=40)
IDS = st.lists(st.integers(0, 99), min_size=1, max_size=8)


@given(lengths=LENGTHS, budget=st.integers(12, 30), num_bins=st.integers(1, 5))
def test_bins_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int, num_bins: int) -> None:
    bins = split([((0,), range(length)) for length in lengths], budget, num_bins)
    load = [sum(lengths[i] for i in each) for each in bins]
    assert sorted(sum(bins, [])) == list(range(len(lengths))) and all(each == sorted(each) for each in bins)
    assert max(load) <= budget and len(bins) >= num_bins
    if len(bins) > max(num_bins, -(-sum(lengths) // budget)):  # a bin more than seems needed: the last would not fit
        assert min(load) + max(lengths) > budget / 2
    assert max(load) - min(load) <= max(lengths)  # longest first into the emptiest


@given(pairs=st.lists(st.tuples(IDS, IDS), max_size=6), multiple=st.sampled_from([1, 2, 4, 16]))
def test_packed_sequences_unpack_to_what_they_were(pairs: list[tuple[list[int], list[int]]], multiple: int) -> None:
    packed = pack(pairs, multiple=multiple)
    starts, tokens = packed.starts.tolist(), packed.tokens.tolist()
    assert len(tokens) % multiple == 0 and starts[-1] == len(tokens) > 0
    found = [tokens[first:end] for first, end in zip(starts, starts[1:], strict=False)][: len(pairs)]
    assert found == [prompt + response[:-1] for prompt, response in pairs]
    assert len(tokens) - sum(map(len, found)) <= multiple
    for first, end in zip(starts, starts[1:], strict=False):
        assert packed.position[first:end].tolist() == list(range(end - first))
    assert packed.targets.tolist() == [token for _, response in pairs for token in response]
    position, previous = iter(packed.logit_positions.tolist()), [pair[0][-1:] + pair[1][:-1] for pair in pairs]
    assert [tokens[next(position)] for token in sum(previous, [])] == sum(previous, [])


@given(
    pairs=st.lists(st.tuples(IDS, IDS), min_size=1, max_size=8),
    budget=st.integers(16, 60),
    bins=st.integers(1, 4),
    width=st.sampled_from([0, 1, 100]),
    copies=st.integers(1, 4),
)
def test_tokens_of_micro_batches_are_found_again(
    pairs: list[tuple[list[int], list[int]]], budget: int, bins: int, width: int, copies: int
) -> None:
    pairs = [(prompt, response[copy:]) for prompt, response in pairs for copy in range(copies)]
    mini_batch = MiniBatch.pack(pairs, split(pairs, budget, bins, width=width), width=width)
    assert all(len(packed.tokens) <= budget for packed in mini_batch.micro_batches)
    joined = mini_batch.join([packed.targets for packed in mini_batch.micro_batches])
    assert joined.tolist() == [token for _, response in pairs for token in response]


@given(number=st.integers(1, 2000), wanted=st.integers(1, 3000))
def test_the_nearest_divisor_divides(number: int, wanted: int) -> None:
    found = nearest_divisor(number, wanted)
    assert number % found == 0
    assert all(number % n or abs(n - wanted) >= abs(found - wanted) for n in range(1, min(number, 256) + 1))


SMALL = st.sampled_from([1, 1, 1, 2, 3, 4, 6, 8])
HUGE = st.sampled_from([1, 2, 5, 10**6, 2**31 - 1])


def layouts(size: st.SearchStrategy[int]) -> st.SearchStrategy[ParallelConfig]:
    names = ("nodes", "ranks_per_node", "tensor", "pipeline", "virtual", "expert", "expert_tensor")
    return st.builds(
        ParallelConfig,
        **dict.fromkeys(names, size),
        sequence=st.booleans(),
        stage_layers=st.just(()) | st.lists(st.integers(1, 8), max_size=9).map(tuple),
    )


def models(size: st.SearchStrategy[int]) -> st.SearchStrategy[dict]:
    dense = {"num_attention_heads": size, "num_hidden_layers": size, "intermediate_size": size}
    experts = {"num_experts": size, "moe_intermediate_size": size}
    return st.fixed_dictionaries(dense, optional={"num_key_value_heads": size}) | st.fixed_dictionaries(dense | experts)


@given(hf=models(SMALL), layout=layouts(SMALL))
def test_an_accepted_layout_divides_the_model(hf: dict, layout: ParallelConfig) -> None:
    if model_faults(hf, layout):
        return
    tensor, stages = layout.tensor, layout.pipeline * layout.virtual
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert hf.get(name, 0) % tensor == 0
    layers = list(layout.stage_layers) or [hf["num_hidden_layers"] // stages] * stages
    assert len(layers) == stages and sum(layers) == hf["num_hidden_layers"] and min(layers) > 0
    if "num_experts" in hf:
        assert hf["num_experts"] % layout.expert == hf["moe_intermediate_size"] % layout.expert_tensor == 0
        assert layout.world % (layout.expert * layout.expert_tensor * layout.pipeline) == 0
    else:
        assert layout.expert == layout.expert_tensor == 1


@given(hf=models(HUGE), layout=layouts(HUGE))
@example(hf={"num_attention_heads": 4, "num_hidden_layers": 4}, layout=ParallelConfig(pipeline=2**31 - 1))
def test_faults_of_huge_layouts_are_short_and_quick(hf: dict, layout: ParallelConfig) -> None:
    with limits():
        assert len("\n".join(model_faults(hf, layout))) < 20_000


def test_a_size_beyond_all_is_none() -> None:
    for value in (0, -1, 2**31):
        try:
            ParallelConfig(tensor=value)
        except ValidationError:
            continue
        raise AssertionError(value)
