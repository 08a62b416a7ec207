"""What vLLM says of the experts of its tokens, and where it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue]
from vllm.outputs import CompletionOutput, RequestOutput

from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.rollout.vllm.engine import VLLMEngine
from tests import tiny

SAMPLING = Sampling(1.0, 1.0, 4, routing=True)


def test_an_engine_on_a_cpu_is_refused_before_it_is_built(tmp_path: Path) -> None:
    """As vLLM itself refuses it: with its own runner there, and with the other one."""
    model = tiny.experts_model(tmp_path / "moe", layers=2, experts=4)
    with pytest.raises(ValueError, match=r"rollout.routing_replay: vLLM tells .* V2 only, which its build for CPUs"):
        VLLMEngine(model, dtype="float32", max_tokens=64, routing_replay=True)
    options: dict[str, Any] = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True}
    for variable, message in ((None, "AuxOutput Connector requires Model Runner V2"), ("1", "V2 requires Triton")):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=message):
            if variable is not None:
                patch.setenv("VLLM_USE_V2_MODEL_RUNNER", variable)
            LLM(model=str(model), enable_return_routed_experts=True, **options)


def test_the_experts_of_an_answer_are_kept_where_they_are_asked_for() -> None:
    """vLLM tells those of all tokens but the last, for every layer of the model: as ``Sample.routing`` has them."""
    told = np.arange(6 * 2 * 2, dtype=np.uint8).reshape(6, 2, 2)
    logprobs: Any = [{7: SimpleNamespace(logprob=-1.0)}, {8: SimpleNamespace(logprob=-2.0)}]
    versions: Any = [SimpleNamespace(version="3")]
    answer = CompletionOutput(
        index=0, text="", token_ids=[7, 8], cumulative_logprob=None, logprobs=logprobs, finish_reason="length",
        routed_experts=told, weight_versions=versions,
    )  # fmt: skip
    output = RequestOutput("0", None, [1, 2, 3, 4, 5], None, [answer], True)
    engine: Any = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: "text"))
    request = Request((1, 2, 3, 4, 5), 0)
    sample = VLLMEngine._sample(engine, request, output, SAMPLING)
    assert sample.routing is told and len(told) == len(sample.prompt_ids) + len(sample.response_ids) - 1
    assert VLLMEngine._sample(engine, request, output, replace(SAMPLING, routing=False)).routing is None
