"""The embedded rollout engine: transformers' ``generate`` on this rank's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging

from megatron_ext import cpu_compat, heartbeat
from megatron_ext.kept_tokens import KeptTokens, Restriction
from megatron_ext.rollout.base import IsNeeded, OnBatch, Request, Sampling, unfinished
from megatron_ext.rollout.hf.routing import RoutingRecorder
from megatron_ext.rollout.model_files import eos_ids, load_tokenizer
from megatron_ext.rollout.sampling import gumbel, sampling_logprobs
from megatron_ext.types import Sample


class HFEngine:
    """Generates with a whole copy of the model on every rank (rollout/base.py::RolloutEngine).

    Starts with the directory's weights as version 0. Raises ValueError when streamed weights do not cover
    the model exactly.
    """

    def __init__(self, model_path: str | Path, *, batch_size: int = 256, dtype: str = "auto") -> None:
        """``dtype``: of the weights and the arithmetic, by torch's name; "auto": as ``config.json`` has it."""
        logging.disable_progress_bar()
        self.tokenizer = load_tokenizer(model_path)
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_path, trust_remote_code=False, use_safetensors=True, dtype=dtype
        )
        self.model = model.to(cpu_compat.device()).eval()
        self.model.generation_config = GenerationConfig()  # a penalty of the model's own would change what is sampled
        self.batch_size = batch_size
        self.version = 0
        self._eos = eos_ids(model_path)

    @torch.no_grad()
    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy streamed weights into the model; a tied output layer may be left out of the stream."""
        own = {name: part for whole in self.model.state_dict().items() for name, part in _as_stored(*whole)}
        missing = {value.data_ptr(): name for name, value in own.items()}
        for name, value in weights:
            if name not in own or own[name].shape != value.shape:
                raise ValueError(f"update_weights: {name} {list(value.shape)} does not fit the rollout model")
            own[name].copy_(value)
            missing.pop(own[name].data_ptr(), None)
        if missing:
            raise ValueError(f"update_weights: the stream left out {', '.join(sorted(missing.values()))}")
        self.version = version

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        on_batch: OnBatch | None = None,
        is_needed: IsNeeded | None = None,
    ) -> list[Sample]:
        """One sample per request, in order; batches hold prompts of similar length.

        A batch ends with the last of its responses that is needed. It is never made smaller: no bit of a response
        depends on when others were given up.
        """
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        samples: dict[int, Sample] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            if is_needed is not None and not any(map(is_needed, chosen)):
                continue
            stop = StoppingCriteriaList([] if is_needed is None else [_NotNeeded(chosen, is_needed)])
            with cpu_compat.as_it_is():
                batch = self._generate([requests[i] for i in chosen], sampling, stop)
            finished = dict(zip(chosen, batch, strict=True))
            if is_needed is not None:
                finished = {i: sample for i, sample in finished.items() if is_needed(i)}
            samples.update(finished)
            if on_batch is not None:
                on_batch(finished)
        return [samples.get(i) or unfinished(request, self.version) for i, request in enumerate(requests)]

    def sleep(self) -> None:
        """Nothing to release: the weights stay where they are."""

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        del self.model

    @torch.no_grad()
    def _generate(self, requests: list[Request], sampling: Sampling, stop: StoppingCriteriaList) -> list[Sample]:
        longest = max(len(request.prompt_ids) for request in requests)
        pad = [longest - len(request.prompt_ids) for request in requests]
        filled = [[self._eos[0]] * n + list(request.prompt_ids) for n, request in zip(pad, requests, strict=True)]
        ids = torch.tensor(filled, device=cpu_compat.device())
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pad], device=cpu_compat.device())
        sampler = _Sampler(torch.tensor([request.seed for request in requests], device=cpu_compat.device()), sampling)
        recorder = RoutingRecorder(self.model, len(requests)) if sampling.routing else None
        with recorder or nullcontext():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=None if recorder else self._read_prompts(ids, mask),
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=stop,
                do_sample=False,
                max_new_tokens=sampling.max_response_tokens,
                eos_token_id=self._eos,
                pad_token_id=self._eos[0],
            )
        tokens = output[:, longest:].cpu().tolist()
        logprobs = torch.stack(sampler.logprobs, 1).cpu().tolist()
        samples = [
            self._sample(request, row, logprob, sampling, sampler.support(number))
            for number, (request, row, logprob) in enumerate(zip(requests, tokens, logprobs, strict=True))
        ]
        if recorder is None:
            return samples
        experts = recorder.experts()
        ends = [longest + len(sample.response_ids) - 1 for sample in samples]  # the last token was never read
        told = [experts[i, start:end].copy() for i, (start, end) in enumerate(zip(pad, ends, strict=True))]
        return [replace(sample, routing=each) for sample, each in zip(samples, told, strict=True)]

    def _read_prompts(self, ids: Tensor, mask: Tensor) -> Any:
        """The cache of all prompts but their last tokens; a prompt of several responses is read once."""
        different, copies = torch.stack([ids, mask], 1).unique(dim=0, return_inverse=True)
        if len(different) == len(ids) or ids.shape[1] == 1:
            return None
        ids, mask = different[:, :, :-1].unbind(1)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        read = self.model(ids, attention_mask=mask, position_ids=position, use_cache=True, logits_to_keep=1)
        read.past_key_values.reorder_cache(copies)
        return read.past_key_values

    def _sample(
        self,
        request: Request,
        row: list[int],
        logprobs: list[float],
        sampling: Sampling,
        support: Sequence[np.ndarray] | None,
    ) -> Sample:
        end = next((i + 1 for i, token in enumerate(row) if token in self._eos), None)
        response = row[:end]
        return Sample(
            prompt_ids=request.prompt_ids,
            response_ids=tuple(response),
            logprobs=tuple(logprobs[: len(response)]),
            text=self.tokenizer.decode(response, skip_special_tokens=True),
            truncated=end is None and len(response) >= sampling.max_response_tokens,
            weight_version=self.version,
            support=None if support is None else KeptTokens.of_lists(support[: len(response)]),
        )


class _NotNeeded(StoppingCriteria):
    """Ends the sequences of a batch that are needed no more; ``numbers`` are those of their requests."""

    def __init__(self, numbers: Sequence[int], is_needed: IsNeeded) -> None:
        self.numbers, self.is_needed = numbers, is_needed

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        return torch.tensor([not self.is_needed(number) for number in self.numbers], device=input_ids.device)


class _Sampler(LogitsProcessor):
    """Turns greedy decoding into exact sampling: leaves only the sampled token, and keeps its log-prob and, if asked,
    the tokens it was sampled from."""

    def __init__(self, seeds: Tensor, sampling: Sampling) -> None:
        self.seeds = seeds
        self.sampling = sampling
        self.logprobs: list[Tensor] = []
        is_restricted = sampling.temperature > 0 and sampling.restriction != Restriction()
        self.kept: list[list[np.ndarray]] | None = [] if sampling.keeps_support and is_restricted else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore
        heartbeat.progress()
        if self.sampling.temperature == 0:
            logprob = scores.float().log_softmax(-1)
            sampled = logprob.argmax(-1, keepdim=True)
        else:
            options = {"temperature": self.sampling.temperature, "restriction": self.sampling.restriction}
            logprob = sampling_logprobs(scores, **options)
            sampled = (logprob + gumbel(self.seeds, len(self.logprobs), scores.shape[-1])).argmax(-1, keepdim=True)
        self.logprobs.append(logprob.gather(-1, sampled)[:, 0])
        if self.kept is not None:
            kept = logprob > -torch.inf
            ids = kept.nonzero()[:, 1].to(torch.int32).cpu().numpy()
            self.kept.append(np.split(ids, kept.sum(-1).cumsum(0)[:-1].cpu().numpy()))
        return torch.full_like(scores, -torch.inf).scatter(-1, sampled, 0.0)

    def support(self, number: int) -> list[np.ndarray] | None:
        """The ids kept for each token of the batch's response ``number``, ascending."""
        return None if self.kept is None else [ids[number] for ids in self.kept]


def _as_stored(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A parameter as its files have it: transformers stacks the experts of a layer, and gate on up."""
    at, _, kind = name.rpartition(".")
    if not at.endswith(".experts"):
        yield name, value
    elif kind == "down_proj":
        yield from ((f"{at}.{number}.down_proj.weight", expert) for number, expert in enumerate(value))
    else:
        for number, expert in enumerate(value):
            gate, up = expert.chunk(2)
            yield f"{at}.{number}.gate_proj.weight", gate
            yield f"{at}.{number}.up_proj.weight", up
