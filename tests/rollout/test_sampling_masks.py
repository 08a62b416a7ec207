"""When vLLM is asked for the tokens that its sampler kept, and what becomes of them. Without vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.rollout.vllm import version
from megatron_ext.rollout.vllm.common import finished_sample, mask_arguments, sampling_parameters


@pytest.mark.parametrize(
    ("installed", "gpu", "keeps_support", "model_runner", "asked"),
    [
        ("0.32.0", True, True, "auto", True),
        ("0.32.0", True, True, "v2", True),
        ("0.33.1", True, True, "auto", True),
        ("0.32.0", True, True, "v1", False),
        ("0.32.0", False, True, "auto", False),  # no Triton: model runner V1
        ("0.32.0", True, False, "auto", False),
        ("0.31.9", True, True, "auto", False),
        (None, True, True, "auto", False),
    ],
    ids=str,
)
def test_masks_are_asked_for_where_vllm_can_tell(
    installed: str | None, gpu: bool, keeps_support: bool, model_runner: str, asked: bool, monkeypatch
) -> None:
    monkeypatch.setattr(version, "_version", lambda package: installed if package == "vllm" else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    expected = {"return_sampling_mask": True} if asked else {}
    assert mask_arguments(keeps_support, model_runner) == expected


@pytest.mark.parametrize("mask", [None, [[9, 4], [7, 3, 5]]])
def test_a_mask_becomes_the_samples_support(mask: list[list[int]] | None) -> None:
    sample = finished_sample(
        Request((1, 2), seed=3),
        SimpleNamespace(decode=lambda ids, **_: str(ids)),
        response=[4, 5],
        logprobs=[-0.5, -0.25],
        finish_reason="stop",
        versions=["2"],
        mask=mask,
    )
    if mask is None:
        assert sample.support is None
    else:
        assert sample.support is not None
        assert (sample.support.ids.tolist(), sample.support.starts.tolist()) == ([4, 9, 3, 5, 7], [0, 2, 5])


def test_a_request_says_what_sampling_leaves_out() -> None:
    sampling = Sampling(0.8, 0.9, 16, top_k=20, min_p=0.05)
    asked = sampling_parameters(Request((1,), seed=3), sampling, eos=[1])
    expected = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "max_tokens": 16}
    assert {name: asked[name] for name in expected} == expected
    assert sampling_parameters(Request((1,), seed=3), Sampling(), eos=[1])["top_k"] == 0
