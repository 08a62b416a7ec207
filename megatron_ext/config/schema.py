"""The schema of a run: every key of a recipe with its type, bounds and default. No torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

LARGEST = 2**31 - 1  # of any count: NumPy's seeds and many kernels end near it
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"]
MAX_NAME_BYTES = 200  # file systems take 255; a temporary file's ending is still to come
Seconds = Annotated[float, Field(ge=0.1, le=7 * 86400)]
RewardValue = Annotated[float, Field(ge=-1e6, le=1e6)]


class Section(BaseModel):
    """Numbers are finite: no key has a use for NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class FusionsConfig(Section):
    """Fused kernels of Transformer Engine's layers; without Transformer Engine or a GPU they are off."""

    rope: bool = True  # rotary embedding of packed sequences: one kernel, no host synchronisation
    bias_activation: bool = True  # SwiGLU in one kernel, which keeps less for backward
    gradient_accumulation: bool = True  # weight gradients are added in fp32 by the GEMM that computes them
    moe_permute: bool = True  # tokens to their experts and back in one kernel each


class ModelConfig(Section):
    path: str = ""  # directory with config.json, safetensors and tokenizer
    hub: str = ""  # where it can be had: an id on the Hugging Face Hub
    weights: str = ""  # a checkpoint to start from instead of path's safetensors: a step_* directory, of any layout
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    fused_head: bool = False  # statistics from hidden states: the logits are never stored whole, 4 GEMMs instead of 3
    offload_reference: bool = False  # the reference's weights wait in host memory between two uses
    offload_optimizer: bool = False  # its state waits in host memory, gradients are freed, while responses are drawn
    recompute: Literal["none", "mlp", "full"] = "none"  # what backward computes again: nothing, MLPs, whole layers
    fusions: FusionsConfig = FusionsConfig()


class DataConfig(Section):
    train: str = ""  # JSON Lines: prompt, answer [, id, verifier, numbers, kind]
    hub: str = ""  # what it is made from: ids on the Hugging Face Hub, or a sentence
    prompt_suffix: str = ""
    max_prompt_tokens: Positive = 1024
    max_left_out: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of the rows that may have a fault; above, it stops
    skip_unparsable_gold: bool = False  # a gold answer that is not right when judged is such a fault; else it stops
    strict: bool = False  # stops for whatever would be left out, repeated rows and overlong prompts included
    curriculum: str = ""  # file of tools/semantic_entropy.py: train stage by stage, from certain to uncertain problems
    stage_starts: list[Positive] = []  # first steps of its stages after the first; empty: equal shares of the run


class ServersConfig(Section):
    """Of engine vllm_server: vLLM in processes of their own, on the GPUs of other nodes or (num) of this one."""

    urls: list[str] = []  # servers that run already; empty: the run starts its own on the first node
    token_variable: str = "MEGATRON_ENTROPY_TOKEN"  # of the environment: the token of the servers at urls
    num: Positive = 1  # how many it starts
    port: Annotated[int, Field(ge=1024, le=65535)] = 8100  # of the first one; the others follow
    devices: list[str] = []  # CUDA_VISIBLE_DEVICES of each one that is started
    address: str = ""  # of rank 0 for the weight transfer, where the servers are on other machines
    deadline_s: Seconds = 1800.0  # for one response
    max_restarts: NonNegative = 3  # of all servers together, in the whole run


class RolloutConfig(Section):
    engine: str = "hf"  # a name of rollout/registry.py, or an engine of one's own: package.module:NAME
    options: dict[str, Any] = {}  # of an engine of one's own, checked against what it declares
    tensor_parallel_size: Positive = 1  # ranks that share the weights of one vLLM engine
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = (
        0.5  # of the GPU's memory: what a vLLM engine may take, awake
    )
    enforce_eager: bool = False  # vLLM without compilation: starts at once, generates slower
    model_runner: Literal["auto", "v1", "v2"] = "auto"  # vLLM's; auto: V2 where Triton has a device, V1 elsewhere
    servers: ServersConfig = ServersConfig()
    prompts: Positive = 128  # prompts per step
    samples: Positive = 8  # responses per prompt: the group size G
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_p: Fraction = 1.0
    max_response_tokens: Positive = 3072
    batch_size: Positive = 256  # sequences decoded at once by one rank
    dynamic_sampling: bool = False  # drop groups whose rewards are all equal and draw others in their place (DAPO)
    oversample: Annotated[float, Field(ge=1, le=1000)] = 1.0  # of it: the first round draws this many times the prompts
    max_generations: Positive = 10  # rounds of it in one step; then dropped groups fill the batch


class RewardConfig(Section):
    function: str = ""  # of one's own: package.module:name or file.py:name; empty: the verifier that a problem names
    options: dict[str, Any] = {}  # of that function: its keyword-only parameters
    correct: RewardValue = 1.0
    wrong: RewardValue = 0.0
    workers: Annotated[int, Field(ge=0, le=1024)] = 0  # processes of one node's pool; 0 = one per core, at most 16
    deadline_s: Seconds = 10.0  # for one answer
    max_timeout_share: Fraction = 0.2  # above it the step stops: the verifier is not to be trusted


class OptimizerConfig(Section):
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-6
    warmup_steps: NonNegative = 0  # optimizer steps
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # of the learning rate, once it is warmed up
    min_lr: Annotated[float, Field(ge=0, le=1)] = 0.0  # what it falls to
    decay_steps: NonNegative = 0  # optimizer steps until it is there, warm-up included; 0: all of the run's
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    clip_grad: Annotated[float, Field(gt=0)] = 1.0

    def with_decay_steps(self, updates: int) -> OptimizerConfig:
        """The same where it says when the decay ends; else it ends with the run's ``updates`` optimizer steps."""
        return self if self.decay_steps else self.model_copy(update={"decay_steps": updates})


class CriticConfig(OptimizerConfig):
    """Of methods with a critic: its optimizer and schedule."""

    lr: Annotated[float, Field(gt=0, le=1)] = 2e-6


class TrainConfig(Section):
    steps: Positive = 100  # rollout steps
    mini_batch_prompts: Positive = 128  # prompts per optimizer step
    micro_batch_tokens: Positive = 16384  # token budget of one packed micro-batch
    seed: NonNegative = 0
    max_bad_steps: Positive = 3  # consecutive steps with a non-finite gradient before the run stops
    hang_minutes: Annotated[float, Field(ge=0, le=10080)] = 15.0  # of a rank without progress: the run ends; 0 = off
    importance_cap: Annotated[float, Field(ge=0)] = 0.0  # truncated importance sampling of the engine's draw; 0 = off


class ParallelConfig(Section):
    nodes: Positive = 1
    ranks_per_node: Positive = 8
    tensor: Positive = 1
    pipeline: Positive = 1
    sequence: bool = False  # sequence parallelism over the tensor-parallel group
    virtual: Positive = 1  # pipeline stages on each rank, run by the interleaved schedule
    stage_layers: tuple[Positive, ...] = ()  # decoder layers of each of the pipeline x virtual stages; () = equal
    expert: Positive = 1  # ranks that share the experts of a layer out, among the data-parallel ones
    expert_tensor: Positive = 1  # tensor parallelism within an expert
    overlap_grad_reduce: bool = True  # gradients are reduced over data-parallel ranks while backward runs
    overlap_param_gather: bool = True  # updated weights are gathered while the next forward runs
    bucket_size: NonNegative = 0  # parameters in one such reduction or gather; 0: max(40e6, 1e6 x data-parallel ranks)

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def data(self) -> int:
        return self.world // (self.tensor * self.pipeline)


class CheckpointConfig(Section):
    every: NonNegative = 20  # steps; 0 = only at the end
    keep: Positive = 2  # newest valid checkpoints kept
    asynchronous: bool = (
        True  # written while training goes on, from a copy in host memory (checkpoint/checkpoint.py: size)
    )


class LogConfig(Section):
    dir: str = "runs"  # the run's folder is dir/name
    trackers: list[Tracker] = ["tensorboard"]  # each follows the run's files in a process of its own
    samples: NonNegative = 4  # responses kept per step for the report, with their token entropies
    nucleus: bool = False  # report the nucleus' entropy and size also where the method does not use them: it costs time

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: list[Tracker]) -> list[Tracker]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("names a tracker twice")
        return trackers


class AlarmsConfig(Section):
    """When to warn (metrics/alarms.py). Entropies are relative to the first step's."""

    entropy_floor: Annotated[float, Field(ge=0, lt=1)] = 0.2  # 0 = off
    entropy_ceiling: Annotated[float, Field(gt=1)] = 3.0
    zero_advantage_share: Fraction = 0.9  # of the responses; 1 = off
    mismatch: Annotated[float, Field(ge=0)] = 0.2  # mean nats between engine and trainer; always stops; 0 = off
    unknown_logprobs: Annotated[float, Field(ge=0, le=1)] = 0.01  # share that the engine does not tell; always stops
    stop: bool = False  # save and end the run, exit code 3, while an alarm lasts


class Config(Section):
    name: str = "run"  # of the run's folder below log.dir; a slash makes folders within
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    method: dict[str, Any] = {"name": "grpo"}  # checked against the method's own options by methods.create
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    alarms: AlarmsConfig = AlarmsConfig()

    @field_validator("name")
    @classmethod
    def _stays_below_log_dir(cls, name: str) -> str:
        parts = name.split("/")
        if not name.isprintable() or {"", ".", ".."} & set(parts):
            raise ValueError(
                "is no name of a folder below log.dir; expected printable characters, none of the parts between "
                'slashes empty, "." or ".."'
            )
        if max(len(part.encode()) for part in parts) > MAX_NAME_BYTES:
            raise ValueError(f"is longer than {MAX_NAME_BYTES} bytes, which a file system may not take")
        return name

    @field_validator("method")
    @classmethod
    def _finite(cls, method: dict[str, Any]) -> dict[str, Any]:
        if any(isinstance(value, float) and not math.isfinite(value) for value in method.values()):
            raise ValueError("options are finite numbers")
        return method

    @property
    def longest_sequence(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a training step."""
        return self.rollout.prompts // self.train.mini_batch_prompts

    @property
    def run_dir(self) -> Path:
        return Path(self.log.dir) / self.name
