"""The rollout engine of real runs: vLLM inside the trainer's processes, fed by the weight stream, without files.

Every rank of the trainer is one vLLM worker: ``tensor_parallel_size`` consecutive ranks make one engine, whatever the
trainer's own layout. vLLM joins the trainer's process group (``external_launcher``) and every rank of an engine runs
the same scheduler on the same requests, so the ranks of an engine pool their requests and each keeps the answers to its
own.

Log-probs are those of the distribution that was sampled from, after temperature and nucleus. A prompt is computed once
for all its responses by vLLM's prefix cache; every response has a seed of its own.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import heartbeat
from megatron_ext.config.positions import max_positions
from megatron_ext.rollout.base import OnBatch, Request, Sampling, Weights
from megatron_ext.rollout.model_files import eos_ids, load_config, load_tokenizer
from megatron_ext.rollout.vllm.common import (
    cpu_arguments,
    finished_sample,
    gpu_arguments,
    mask_arguments,
    model_runner_variable,
    sampling_parameters,
)
from megatron_ext.rollout.vllm.spec import NEEDS_V2
from megatron_ext.types import Sample

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vllm is imported
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # workers of one NUMA node could not all be bound to it
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler must run here: external_launcher demands it

from vllm import LLM, SamplingParams  # noqa: E402  # pyright: ignore[reportAttributeAccessIssue]
from vllm.config import WeightTransferConfig  # noqa: E402
from vllm.inputs import TokensPrompt  # noqa: E402
from vllm.outputs import RequestOutput  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

from megatron_ext.rollout.vllm import weight_transfer

logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)  # RoPE has no weights


class VLLMEngine:
    """Generates with vLLM on this rank's device (rollout/base.py::RolloutEngine).

    Starts with the directory's weights as version 0. Raises ValueError when the model has no end-of-sequence token, and
    when streamed weights do not cover the model.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        dtype: str,
        max_tokens: int,
        batch_size: int = 256,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.5,
        enforce_eager: bool = False,
        model_runner: str = "auto",
        keeps_support: bool = False,
        routing_replay: bool = False,
    ) -> None:
        """``max_tokens``: of prompt and response together. ``gpu_memory_utilization``: of the GPU's total memory,
        while awake. ``model_runner``: vLLM's, auto, v1 or v2. ``keeps_support``: samples bear the tokens that the
        sampler kept, if vLLM can tell; then every request has a top-k. ``routing_replay``: ``Sampling.routing`` may be
        asked for. Raises ValueError where vLLM cannot."""
        if routing_replay and not torch.cuda.is_available():
            raise ValueError(
                f"rollout.routing_replay: {NEEDS_V2}, which its build for CPUs lacks; set "
                'rollout.engine = "hf", or rollout.routing_replay = false'
            )
        self.tokenizer = load_tokenizer(model_path)
        self.group = _engine_group(tensor_parallel_size)
        self.here = (
            self.group is not None or tensor_parallel_size == 1
        )  # else vLLM starts workers: to evaluate, not to be updated
        self.version = 0
        self.asleep = False
        self.eos = eos_ids(model_path)
        config = load_config(model_path)
        max_tokens = min(max_tokens, max_positions(config.to_dict()) or max_tokens)
        os.environ.update(model_runner_variable(model_runner))
        weight_transfer.register()
        _forget_shared_memory(self.group)
        if self.group is None and self.here:
            _join_nobody()
        self.llm = LLM(
            model=str(model_path),
            trust_remote_code=False,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="external_launcher" if self.group is not None else None,
            max_model_len=max_tokens,
            max_num_seqs=batch_size,
            enforce_eager=enforce_eager,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,
            weight_transfer_config=WeightTransferConfig(backend=weight_transfer.IN_PROCESS) if self.here else None,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
            **mask_arguments(keeps_support, model_runner),
            **({"enable_return_routed_experts": True} if routing_replay else {}),
            **_for_device(config, gpu_memory_utilization, batch_size=batch_size, max_tokens=max_tokens, dtype=dtype),
        )
        self.model_runner = 2 if self.llm.llm_engine.vllm_config.use_v2_model_runner else 1
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"rollout: vLLM samples with its model runner V{self.model_runner}", flush=True)
        if self.here:
            self.llm.init_weight_transfer_engine({"init_info": {}})

    def update_weights(self, weights: Weights, version: int) -> None:
        """Load the stream layer by layer; what was computed with older weights is forgotten.

        The KV cache is away meanwhile, at the first update too: whole tensors are gathered in its place.
        """
        assert self.here
        self.sleep()
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"weights": weights}})
        self.llm.finish_weight_update(str(version))
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        self.llm.reset_prefix_cache()
        self.version = version

    def sleep(self) -> None:
        """Drop weights and KV cache until the next update. On a CPU they stay."""
        if torch.cuda.is_available() and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_batch: OnBatch | None = None
    ) -> list[Sample]:
        """One sample per request, in order; every rank of an engine calls it, as often as the others."""
        if self.asleep:
            raise RuntimeError("generate: the engine sleeps; update_weights wakes it")
        pooled, first = self._pool(requests)
        for number, request in enumerate(pooled):
            prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
            self.llm.llm_engine.add_request(str(number), prompt, self._parameters(request, sampling))
        samples: dict[int, Sample] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            heartbeat.progress()
            finished = [output for output in self.llm.llm_engine.step() if output.finished]
            numbers = [int(output.request_id) - first for output in finished]
            own = {
                number: self._sample(requests[number], output, sampling)
                for number, output in zip(numbers, finished, strict=True)
                if 0 <= number < len(requests)
            }
            samples |= own
            if own and on_batch is not None:
                on_batch(own)
        return [samples[number] for number in range(len(requests))]

    def metrics(self) -> dict[str, float]:
        return {"vllm/model_runner": float(self.model_runner)}

    def close(self) -> None:
        del self.llm

    def _pool(self, requests: Sequence[Request]) -> tuple[list[Request], int]:
        """The requests of all ranks of this engine, the same on each, and the number of this rank's first one."""
        if self.group is None or self.group.size() == 1:
            return list(requests), 0
        parts: list[Any] = [None] * self.group.size()
        dist.all_gather_object(parts, list(requests), group=self.group)
        return [request for part in parts for request in part], sum(len(p) for p in parts[: self.group.rank()])

    def _parameters(self, request: Request, sampling: Sampling) -> SamplingParams:
        return SamplingParams(
            **sampling_parameters(request, sampling, self.eos),
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _sample(self, request: Request, output: RequestOutput, sampling: Sampling) -> Sample:
        answer = output.outputs[0]
        response = tuple(answer.token_ids)
        assert answer.logprobs is not None and answer.weight_versions is not None
        return finished_sample(
            request,
            self.tokenizer,
            response=response,
            logprobs=(at[token].logprob for at, token in zip(answer.logprobs, response, strict=True)),
            finish_reason=answer.finish_reason,
            versions=(span.version for span in answer.weight_versions),
            mask=None if (mask := getattr(answer, "sampling_mask", None)) is None else mask.token_ids,
            routing=answer.routed_experts if sampling.routing else None,
        )


def _engine_group(tensor_parallel_size: int) -> dist.ProcessGroup | None:
    """The consecutive ranks that share this rank's engine; None where no launcher started this process."""
    if not dist.is_initialized():
        return None
    ranks = range(dist.get_world_size())
    engines = [list(ranks[first : first + tensor_parallel_size]) for first in ranks[::tensor_parallel_size]]
    # requests are Python objects: over NCCL they would pass through the GPU and cost a communicator
    mine, _ = dist.new_subgroups_by_enumeration(engines, backend="gloo", timeout=timedelta(days=1))
    assert isinstance(mine, dist.ProcessGroup)  # every rank is in one of them
    return mine


def _join_nobody() -> None:
    """Make the process group of one that vLLM would make with a store, and gloo, that listen on all interfaces."""
    if "lo" in (name for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]


def _forget_shared_memory(group: dist.ProcessGroup | None) -> None:
    """vLLM's CPU build gives its shared memory the same name in every launched run; a killed one leaves it.

    A run that still uses its own has it mapped, and keeps it.
    """
    if group is None or group.size() == 1 or torch.cuda.is_available():
        return
    if group.rank() == 0:
        for file in Path("/dev/shm").glob("-tp:*-cpushm_*"):
            file.unlink(missing_ok=True)
    dist.barrier(group)


def _for_device(config: Any, share: float, *, batch_size: int, max_tokens: int, dtype: str) -> dict[str, Any]:
    """On a GPU a share of its memory, given back while asleep; on a CPU a cache for a full batch, if there is room."""
    if torch.cuda.is_available():
        return gpu_arguments(share, batch_size=batch_size) | {"enable_sleep_mode": True}
    engines = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return cpu_arguments(config, engines=engines, batch_size=batch_size, max_tokens=max_tokens, dtype=dtype)
