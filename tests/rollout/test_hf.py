"""The embedded engine draws exactly, reproducibly, and takes new weights whole."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ext.config.schema import RolloutConfig
from megatron_ext.kept_tokens import Restriction
from megatron_ext.rollout.base import Request, Sampling, unfinished
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.rollout.registry import create_engine
from megatron_ext.rollout.sampling import gumbel, sampling_logprobs, seed_of
from megatron_ext.types import Sample
from tests import tiny

SAMPLING = Sampling(temperature=0.7, max_response_tokens=9)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A tiny random model with the shipped tokenizer's files beside it."""
    _, folder = tiny.hf_model()
    base = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((base / name).read_text())
    return folder


def requests(count: int) -> list[Request]:
    draw = random.Random(3)
    return [
        Request(tuple(draw.randrange(2, tiny.VOCAB) for _ in range(draw.randint(1, 8))), seed_of(0, i))
        for i in range(count)
    ]


def same(found: list[Sample], expected: list[Sample]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.response_ids, a.truncated) == (b.response_ids, b.truncated)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_a_request_has_one_answer_whatever_it_is_batched_with(path: Path) -> None:
    wanted = requests(24)
    whole = HFEngine(path, batch_size=24).generate(wanted, SAMPLING)
    same(HFEngine(path, batch_size=5).generate(wanted, SAMPLING), whole)
    same(HFEngine(path, batch_size=24).generate(wanted[::-1], SAMPLING)[::-1], whole)
    assert len({sample.response_ids for sample in whole}) > 12


@pytest.mark.parametrize(
    ("stored", "asked", "dtype"),
    [("float32", "", "float32"), ("bfloat16", "", "float32"), ("bfloat16", "bfloat16", "bfloat16")],
)
def test_the_engine_computes_in_the_models_dtype_or_the_one_asked_for(
    stored: str, asked: str, dtype: str, path: Path, tmp_path: Path
) -> None:
    """model.dtype, whatever the directory's weights are stored in; rollout.options.dtype goes before."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, stored))
    model.save_pretrained(tmp_path)
    for file in path.glob("token*"):
        shutil.copy(file, tmp_path)
    rollout = RolloutConfig(engine="hf", options={"dtype": asked} if asked else {})
    engine: Any = create_engine(str(tmp_path), rollout, dtype="float32", max_prompt_tokens=8, log_dir=tmp_path)
    assert {value.dtype for value in engine.model.parameters()} == {getattr(torch, dtype)}


def test_the_models_own_sampling_defaults_play_no_part(path: Path, tmp_path: Path) -> None:
    """vLLM has none of them either: a penalty would change what is sampled, and its log-probs."""
    own = tmp_path / "own"
    shutil.copytree(path, own)
    file = own / "generation_config.json"
    penalised = {
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 1,
        "do_sample": True,
        "top_k": 1,
        "min_new_tokens": 9,
    }
    written = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(written | penalised))
    same(HFEngine(own).generate(requests(24), SAMPLING), HFEngine(path).generate(requests(24), SAMPLING))


def test_what_is_no_longer_needed_is_given_up_and_changes_no_bit_of_the_others(path: Path) -> None:
    wanted, calls = requests(24), list[int]()
    given_up = {1, 2, 3, 5, 8, 13, 21}
    engine, reported = HFEngine(path, batch_size=8), dict[int, Sample]()
    whole = engine.generate(wanted, SAMPLING)

    def is_needed(number: int) -> bool:
        """Until the third token of the first batch everything is, then most, at last nothing."""
        calls.append(number)
        return len(calls) <= 24 or (number not in given_up and len(reported) < 8)

    found = engine.generate(wanted, SAMPLING, reported.update, is_needed)
    assert set(range(24)) - set(reported) > given_up and len(reported) >= 8
    for number, request in enumerate(wanted):
        assert found[number] == (whole[number] if number in reported else unfinished(request, 0))
    assert len(calls) < 24 * SAMPLING.max_response_tokens  # the last batch was not begun


def test_a_prompt_of_several_responses_is_read_once(path: Path) -> None:
    prompts = [request.prompt_ids for request in requests(4)]
    prompts += [(5,), (1, 5)]  # the first is padded to the same ids as the second
    wanted = [Request(prompts[i // 4 % 6], seed_of(1, i)) for i in range(48)]
    assert len({len(prompt) for prompt in prompts}) > 2
    engine, read = HFEngine(path), list[int]()
    engine.model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(args[0].numel()))
    whole = engine.generate(wanted, SAMPLING)
    longest = max(map(len, prompts))
    assert read[0] == 6 * (longest - 1) and max(read[1:]) == 48
    same(HFEngine(path, batch_size=1).generate(wanted, SAMPLING), whole)


def test_log_probs_are_the_sampling_distributions(path: Path) -> None:
    model, _ = tiny.hf_model()
    for top_p in (1.0, 0.6):
        for request, sample in zip(
            requests(12), HFEngine(path).generate(requests(12), Sampling(0.7, top_p, 9)), strict=True
        ):
            ids = [*request.prompt_ids, *sample.response_ids]
            logits = model(torch.tensor([ids])).logits[0, len(request.prompt_ids) - 1 : -1]
            logp = sampling_logprobs(logits, temperature=0.7, restriction=Restriction(top_p=top_p))
            expected = logp.gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
            assert sample.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_responses_end_at_eos_or_are_marked_truncated(path: Path) -> None:
    for sample in HFEngine(path).generate(requests(64), SAMPLING):
        assert sample.truncated == (sample.response_ids[-1] != 1)
        assert 1 not in sample.response_ids[:-1]
        assert not sample.truncated or len(sample.response_ids) == 9


def test_new_weights_replace_the_old_and_raise_the_version(path: Path) -> None:
    engine, other = HFEngine(path), HFEngine(path)
    weights = {name: value * 1.5 for name, value in engine.model.state_dict().items()}
    engine.update_weights(weights.items(), 7)
    other.model.load_state_dict(weights)
    found = engine.generate(requests(8), SAMPLING)
    same(found, other.generate(requests(8), SAMPLING))
    assert {sample.weight_version for sample in found} == {7}


def test_a_stream_that_does_not_cover_the_model_is_refused(path: Path) -> None:
    engine = HFEngine(path)
    weights = dict(engine.model.state_dict())
    weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match="left out model.norm.weight"):
        engine.update_weights(weights.items(), 1)
    with pytest.raises(ValueError, match="does not fit"):
        engine.update_weights({"model.norm.weight": torch.zeros(3)}.items(), 1)


def test_gumbel_noise_draws_from_the_distribution() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    seeds = torch.arange(40000)
    drawn = (logits.log_softmax(-1) + gumbel(seeds, 5, 4)).argmax(-1)
    share = torch.bincount(drawn, minlength=4) / len(seeds)
    torch.testing.assert_close(share, logits.softmax(-1), atol=0.01, rtol=0)


def test_gumbel_noise_is_independent_over_positions_and_seeds() -> None:
    seeds = torch.tensor([seed_of(0, i) for i in range(2000)])
    first, second = gumbel(seeds, 0, 8), gumbel(seeds, 1, 8)
    assert torch.equal(first[5:6], gumbel(seeds[5:6], 0, 8))
    correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten(), gumbel(seeds + 1, 0, 8).flatten()]))
    assert (correlation - torch.eye(3)).abs().max() < 0.03


def test_the_nucleus_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = sampling_logprobs(logits, temperature=1.0, restriction=Restriction(top_p=0.7)).exp()
    torch.testing.assert_close(kept, torch.tensor([[0.625, 0.375, 0.0, 0.0]]))


def left(row: list[float], restriction: Restriction, temperature: float) -> dict[int, float]:
    """Id -> probability of what sampling may give, by the words of the definition, in fp64."""
    z = [x / temperature for x in row]
    p = {i: math.exp(x - max(z)) for i, x in enumerate(z)}
    p = {i: x for i, x in p.items() if x >= restriction.min_p * max(p.values())}
    if restriction.top_k:
        last = sorted(p.values())[-restriction.top_k :][0]
        p = {i: x for i, x in p.items() if x >= last}
    p, mass, last = {i: x / sum(p.values()) for i, x in p.items()}, 0.0, 0.0
    for x in sorted(p.values(), reverse=True):
        if mass < restriction.top_p:
            mass, last = mass + x, x
    p = {i: x for i, x in p.items() if x >= last}
    return {i: x / sum(p.values()) for i, x in p.items()}


RESTRICTIONS = [
    *(Restriction(), Restriction(top_p=0.6), Restriction(top_k=5), Restriction(min_p=0.2)),
    *(Restriction(top_k=20, top_p=0.95), Restriction(top_k=9, top_p=0.7, min_p=0.02)),
]


@pytest.mark.parametrize("restriction", RESTRICTIONS, ids=str)
def test_the_sampling_distribution_is_that_of_its_definition(restriction: Restriction) -> None:
    logits = torch.randn((40, 61), generator=torch.Generator().manual_seed(5)) * 2
    logits[:, 30] = logits[:, 31]  # a tie
    found = sampling_logprobs(logits, temperature=0.8, restriction=restriction)
    for row, logprob in zip(logits.tolist(), found, strict=True):
        expected = left(row, restriction, 0.8)
        assert (logprob > -torch.inf).nonzero()[:, 0].tolist() == sorted(expected)
        values = [expected[i] for i in sorted(expected)]
        torch.testing.assert_close(logprob[logprob > -torch.inf].exp(), torch.tensor(values), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("restriction", RESTRICTIONS[1:], ids=str)
def test_the_kept_tokens_are_recorded(path: Path, restriction: Restriction) -> None:
    """Those of the definition on the logits of a pass over the whole response, in fp64."""
    model = copy.deepcopy(tiny.hf_model()[0]).double()
    sampling = replace(SAMPLING, **restriction._asdict(), keeps_support=True)
    samples, kept = HFEngine(path, batch_size=7).generate(requests(20), sampling), 0
    for request, sample in zip(requests(20), samples, strict=True):
        assert sample.support is not None and sample.support.ids.dtype == "int32"
        with torch.no_grad():
            logits = model(torch.tensor([[*request.prompt_ids, *sample.response_ids]])).logits[0]
        starts = sample.support.starts.tolist()
        assert len(starts) == len(sample.response_ids) + 1
        for t, token in enumerate(sample.response_ids):
            expected = left(logits[len(request.prompt_ids) - 1 + t].tolist(), restriction, 0.7)
            found = sample.support.ids[starts[t] : starts[t + 1]].tolist()
            assert found == sorted(expected) and token in found
            assert sample.logprobs[t] == pytest.approx(math.log(expected[token]), abs=1e-5)
            kept += len(found)
    assert 1.5 < kept / sum(len(sample.response_ids) for sample in samples) < 30


def test_nothing_is_recorded_where_nothing_is_left_out_or_nobody_asks(path: Path) -> None:
    for sampling in (
        replace(SAMPLING, keeps_support=True),
        replace(SAMPLING, top_k=5),
        replace(SAMPLING, temperature=0, top_k=5, keeps_support=True),
    ):
        assert {sample.support for sample in HFEngine(path).generate(requests(3), sampling)} == {None}
