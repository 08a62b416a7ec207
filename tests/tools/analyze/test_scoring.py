"""A model's numbers of given responses against the whole model in fp64 and against HF's own loss."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from megatron_ext.methods.base import Needs
from megatron_ext.rollout.model_files import load_tokenizer
from tests.tools.analyze.inputs import BASE, DATA, analyze, row, write_lines, write_samples
from tools.analyze import forward, scored
from tools.analyze.scored import of_model

PROMPTS = {f"tiny-eval-{n}": json.loads(line)["prompt"] for n, line in enumerate(DATA.read_text().splitlines())}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "samples.jsonl")


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    scored._scored.cache_clear()
    scored.load.cache_clear()


def options(**changed) -> argparse.Namespace:
    return argparse.Namespace(**({"data": [DATA], "limit": None, "temperature": 1.0, "dtype": "float32"} | changed))


def prompt_of(tokenizer, problem: str, prefix: str = "") -> list[int]:
    """What the tiny base model's chat template makes of a problem."""
    return tokenizer.encode(f"<user>{prefix}{PROMPTS[problem]}<assistant>", add_special_tokens=False)


def reference(samples: Path, temperature: float = 1.0, prefix: str = "") -> list[torch.Tensor]:
    """``[T, V]`` log-probabilities of each response's positions, in fp64, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).eval()
    tokenizer = load_tokenizer(BASE)
    found = []
    for line in samples.read_text().splitlines():
        each = json.loads(line)
        if "header" in each:
            continue
        prompt = prompt_of(tokenizer, each["id"], prefix)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *each["response_ids"]]])).logits[0, len(prompt) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1))
    return found


def targets(samples: Path) -> list[list[int]]:
    lines = map(json.loads, samples.read_text().splitlines())
    return [line["response_ids"] for line in lines if "header" not in line]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_entropy_and_logprob_are_those_of_the_whole_softmax(
    samples: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "LOGITS_AT_ONCE", 64 * 5)  # several chunks of a batch
    monkeypatch.setattr(forward, "BATCH_TOKENS", 60)  # several batches, with padding
    source = of_model("m", BASE, samples, options(temperature=temperature), Console(quiet=True))
    for response, logp, ids in zip(source.responses, reference(samples, temperature), targets(samples), strict=True):
        entropy = -(logp.exp() * logp).sum(-1)
        assert response.entropy == pytest.approx(entropy.numpy(), abs=2e-5)
        assert response.logprob == pytest.approx(logp[range(len(ids)), ids].numpy(), abs=2e-5)
        assert "".join(response.texts[:-1]) + "<eos>" == "".join(response.texts)


def test_nucleus_entropy_is_that_of_the_likely_tokens(samples: Path) -> None:
    needs = Needs(nucleus_p=0.8)
    source = of_model("m", BASE, samples, options(), Console(quiet=True), needs)
    for response, logp in zip(source.responses, reference(samples), strict=True):
        assert response.stats is not None and response.stats.nucleus_entropy is not None
        for found, row_logp in zip(response.stats.nucleus_entropy.tolist(), logp, strict=True):
            p = row_logp.exp().sort(descending=True).values
            kept = p[: int((p.cumsum(0) < 0.8).sum()) + 1]
            q = kept / kept.sum()
            assert found == pytest.approx(float(-(q * q.log()).sum()), abs=2e-5)


def test_perplexity_is_the_exponential_of_hf_s_loss(tmp_path: Path, samples: Path) -> None:
    found = analyze(tmp_path / "out", "perplexity", samples, "--base", BASE, "--data", DATA)["models"]["samples"]
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).eval()
    tokenizer = load_tokenizer(BASE)
    losses, lengths = [], []
    for line in samples.read_text().splitlines():
        each = json.loads(line)
        prompt = prompt_of(tokenizer, each["id"])
        ids = torch.tensor([[*prompt, *each["response_ids"]]])
        labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
        losses.append(float(model(ids, labels=labels).loss))
        lengths.append(len(each["response_ids"]))
    assert found["mean"] == pytest.approx(np.exp(losses).mean(), rel=1e-4)
    assert found["median"] == pytest.approx(np.median(np.exp(losses)), rel=1e-4)
    assert found["token_perplexity"] == pytest.approx(np.exp(np.average(losses, weights=lengths)), rel=1e-4)
    assert found["low"] <= found["mean"] <= found["high"] and found["responses"] == 16


def test_the_prompt_is_that_of_the_samples_header(tmp_path: Path, samples: Path) -> None:
    header = {"header": {"set": "eval", "prompt": {"prefix": "1+"}}}
    with_prefix = tmp_path / "prefixed.jsonl"
    with_prefix.write_text(json.dumps(header) + "\n" + samples.read_text())
    source = of_model("m", BASE, with_prefix, options(), Console(quiet=True))
    expected = reference(with_prefix, prefix="1+")[0]
    assert source.responses[0].entropy == pytest.approx((-(expected.exp() * expected).sum(-1)).numpy(), abs=2e-5)


def test_responses_without_ids_are_tokenised_and_it_is_said(tmp_path: Path) -> None:
    rows = [row(0, 0, r"\boxed{5}", True), row(0, 1, r"\boxed{7}", False, response_ids=[10**6])]
    source = of_model("m", BASE, write_lines(tmp_path / "s.jsonl", rows), options(), Console(quiet=True))
    assert [response.texts for response in source.responses] == [(r"\boxed{", "5", "}"), (r"\boxed{", "7", "}")]
    assert "2 of 2 responses" in source.notes[0]


def test_the_histogram_counts_every_token(tmp_path: Path, samples: Path) -> None:
    found = analyze(
        tmp_path / "out", "entropy-histogram", BASE, BASE, "--samples", samples, "--data", DATA, "--labels", "a", "b"
    )
    logp = torch.cat(reference(samples))
    entropy = -(logp.exp() * logp).sum(-1).numpy()
    for each in (found["models"]["a"], found["models"]["b"]):
        assert sum(each["counts"]) == each["tokens"] == len(entropy)
        assert each["mean"] == pytest.approx(entropy.mean(), rel=1e-4)
        assert each["quantiles"]["0.8"] == pytest.approx(np.quantile(entropy, 0.8), rel=1e-4)


def test_first_tokens_are_the_mean_of_the_models_distributions(tmp_path: Path) -> None:
    found = analyze(tmp_path / "out", "first-tokens", BASE, "--data", DATA, "--limit", 5, "--labels", "base")
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float64).eval()
    tokenizer = load_tokenizer(BASE)
    ids = [prompt_of(tokenizer, f"tiny-eval-{n}") for n in range(5)]
    with torch.no_grad():
        p = torch.stack([model(torch.tensor([each])).logits[0, -1].softmax(-1) for each in ids])
    mean = p.mean(0)
    each = found["models"]["base"]
    assert each["prompts"] == 5
    assert each["top"][0]["token"] == tokenizer.decode([int(mean.argmax())])
    assert each["top"][0]["probability"] == pytest.approx(float(mean.max()), abs=1e-5)
    assert each["entropy_of_the_mean"] == pytest.approx(float(-(mean * mean.log()).sum()), abs=1e-5)
    assert each["mean_entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), abs=1e-5)
