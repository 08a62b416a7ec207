"""The schema of a run: every key of a recipe with its type, bounds, default and description. No torch.

``--print-config`` and docs/configuration.md show the descriptions; a section's own description is its docstring.
"""

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
RightReward = Annotated[float, Field(gt=0, le=1e6)]  # by its sign a response counts as right
WrongReward = Annotated[float, Field(ge=-1e6, le=0)]


class Section(BaseModel):
    """A table of a recipe. Unknown keys are errors, and numbers are finite: no key has a use for NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


class FusionsConfig(Section):
    """Fused kernels of Transformer Engine's layers. Without Transformer Engine or a GPU all are off."""

    rope: bool = Field(
        default=True, description="rotary embedding of packed sequences in one kernel, without host sync"
    )
    bias_activation: bool = Field(
        default=True, description="SwiGLU in one kernel; stores fewer activations for backward"
    )
    gradient_accumulation: bool = Field(
        default=True, description="the GEMM of a weight gradient adds it to the fp32 buffer"
    )
    moe_permute: bool = Field(default=True, description="tokens to their experts and back in one kernel each")


class ModelConfig(Section):
    """The policy: where its weights come from, their precision, and how memory is saved."""

    path: str = Field(default="", description="directory with config.json, safetensors files and the tokenizer")
    hub: str = Field(default="", description="the model's id on the Hugging Face Hub, for messages and model cards")
    family: str = Field(
        default="",
        description="a model family of your own, package.module:NAME or path/to/file.py:NAME; empty: by config.json",
    )
    weights: str = Field(
        default="",
        description="start from this checkpoint (a step_* directory of any layout, or a run's checkpoints/best) "
        "instead of path's safetensors",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="precision of weights and activations"
    )
    fused_head: bool = Field(
        default=False,
        description="log-prob and entropy from hidden states: logits are never stored whole; 4 GEMMs, not 3",
    )
    deterministic: bool = Field(
        default=False,
        description="the same bits at every parallel.tensor, on a CPU in float32; docs/architecture.md says what it "
        "covers",
    )
    offload_reference: bool = Field(
        default=False, description="keep the reference model in host memory between its uses"
    )
    offload_optimizer: bool = Field(
        default=False, description="during generation, keep the optimizer state in host memory and free the gradients"
    )
    recompute: Literal["none", "mlp", "full"] = Field(
        default="none", description="what backward recomputes to save memory: nothing, the MLPs, or whole layers"
    )
    fusions: FusionsConfig = FusionsConfig()


class DataConfig(Section):
    """The training problems, and what happens to those that cannot be used."""

    train: str = Field(
        default="", description="JSON Lines file; keys: prompt, answer [, id, verifier, numbers, kind, level]"
    )
    hub: str = Field(
        default="", description="where the data come from, for messages: ids on the Hugging Face Hub, or a sentence"
    )
    max_prompt_tokens: Positive = Field(default=1024, description="longest prompt, in tokens; longer ones are left out")
    max_left_out: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="largest share of problems that may be left out as faulty; above it, the run stops",
    )
    skip_unparsable_gold: bool = Field(
        default=False,
        description="leave out problems whose gold answer fails its own verifier; otherwise the run stops",
    )
    strict: bool = Field(
        default=False, description="stop for anything that would be left out, duplicates and overlong prompts included"
    )
    curriculum: str = Field(
        default="",
        description="file made by tools.semantic_entropy: train in stages, from certain to uncertain problems",
    )
    stage_starts: list[Positive] = Field(
        default=[],
        description="steps done before each curriculum stage after the first; empty: equal shares of the run",
    )
    stage_restart: bool = Field(
        default=False,
        description="each curriculum stage after the first starts like a run of its own: Adam's moments and steps are "
        "zero, the reference is the present policy; the learning-rate schedule and the method's state go on",
    )


class PromptConfig(Section):
    """What the model reads, in training as in evaluation: a turn of the system, then prefix + problem + suffix."""

    system: str = Field(
        default="", description="a system turn; of a model without a chat template, text and an empty line before"
    )
    prefix: str = Field(default="", description="text before every problem, in the user's turn")
    suffix: str = Field(default="", description="text after every problem, in the user's turn")
    template: str = Field(
        default="", description="Jinja file of a chat template instead of the tokenizer's; a run keeps its text"
    )
    answer_format: Literal["boxed", "answer_line"] = Field(
        default="boxed", description=r"where the answer stands: the last \boxed{}, or the last line that begins Answer:"
    )


class ServersConfig(Section):
    """vLLM servers of engine vllm_server: processes of their own, on other nodes or on spare GPUs of this one."""

    urls: list[str] = Field(
        default=[], description="servers that already run; empty: the run starts its own on the first node"
    )
    token_variable: str = Field(
        default="MEGATRON_ENTROPY_TOKEN", description="environment variable that holds the token of the servers at urls"
    )
    num: Positive = Field(default=1, description="number of servers to start")
    port: int = Field(
        default=8100, ge=1024, le=65535, description="port of the first started server; the others follow"
    )
    devices: list[str] = Field(default=[], description="CUDA_VISIBLE_DEVICES of each started server")
    address: str = Field(
        default="", description="address of rank 0 for weight transfer, if servers are on other machines"
    )
    deadline_s: Seconds = Field(default=1800.0, description="time limit for one response, in seconds")
    max_restarts: NonNegative = Field(
        default=3, description="restarts of servers in the whole run, all servers together"
    )


class RolloutConfig(Section):
    """Generation of responses: the engine, sampling, and dynamic sampling."""

    engine: str = Field(
        default="hf",
        description="hf (transformers), vllm (in the trainer's processes), vllm_server, or package.module:NAME",
    )
    options: dict[str, Any] = Field(default={}, description="of an engine of one's own: what it declares")
    tensor_parallel_size: Positive = Field(default=1, description="ranks that share the weights of one vLLM engine")
    gpu_memory_utilization: float = Field(
        default=0.5, gt=0, lt=1, description="share of GPU memory that a vLLM engine may use while awake"
    )
    enforce_eager: bool = Field(default=False, description="vLLM without compilation: starts at once, generates slower")
    model_runner: Literal["auto", "v1", "v2"] = Field(
        default="auto", description="vLLM's model runner; auto: V2 where Triton has a device, V1 elsewhere"
    )
    servers: ServersConfig = ServersConfig()
    prompts: Positive = Field(default=128, description="prompts per step")
    samples: Positive = Field(default=8, description="responses per prompt: the group size G")
    temperature: float = Field(default=1.0, gt=0, le=100, description="sampling temperature")
    top_p: Fraction = Field(default=1.0, description="nucleus sampling mass; 1 samples from the whole vocabulary")
    top_k: NonNegative = Field(default=0, description="sample from the so many likeliest tokens; 0: from all")
    min_p: float = Field(
        default=0.0, ge=0, lt=1, description="leave out tokens below this share of the likeliest token's probability"
    )
    sampling_replay: Literal["auto", "off"] = Field(
        default="auto",
        description="train on the distribution that was sampled from, where top_k, min_p or top_p leave tokens out; "
        "off: on the whole policy",
    )
    routing_replay: bool = Field(
        default=False,
        description="the trainer sends each token through the experts that the engine chose for it; of models with "
        "experts, on an engine that tells them",
    )
    max_response_tokens: Positive = Field(
        default=3072, description="longest response, in tokens; longer ones are truncated"
    )
    batch_size: Positive = Field(default=256, description="sequences that one rank decodes at once")
    dynamic_sampling: bool = Field(
        default=False, description="replace groups whose rewards are all equal by newly sampled ones (DAPO)"
    )
    oversample: float = Field(
        default=1.0,
        ge=1,
        le=1000,
        description="dynamic sampling: the first round generates this multiple of the prompts",
    )
    max_lag: NonNegative = Field(
        default=0,
        description="a step trains on a batch that the weights of so many steps before have sampled, exactly; servers "
        "then generate beside training",
    )
    max_generations: Positive = Field(
        default=10, description="dynamic sampling: rounds per step; after the last one, dropped groups fill the batch"
    )

    @property
    def restricts_sampling(self) -> bool:
        """Whether sampling leaves tokens of the vocabulary out."""
        return self.top_k > 0 or self.min_p > 0 or self.top_p < 1

    @property
    def replays_sampling(self) -> bool:
        """Whether training restricts the policy to the tokens that the sampler kept."""
        return self.restricts_sampling and self.sampling_replay == "auto"


class RewardConfig(Section):
    """Rewards of verified answers, and the verifier's worker processes."""

    function: str = Field(
        default="",
        description="a reward function, package.module:name or file.py:name; empty: each problem's verifier",
    )
    options: dict[str, Any] = Field(default={}, description="of that function: its keyword-only parameters")
    correct: RightReward = Field(
        default=1.0, description="reward of a correct answer; a response counts as right where its reward is above 0"
    )
    wrong: WrongReward = Field(default=0.0, description="reward of a wrong answer")
    workers: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="verifier processes per node, shared out over its ranks; 0: one per core, at most 16 a rank",
    )
    deadline_s: Seconds = Field(default=10.0, description="time limit for verifying one answer, in seconds")
    max_timeout_share: Fraction = Field(
        default=0.2, description="share of timed-out answers above which the step stops: the verifier cannot be trusted"
    )


class OptimizerConfig(Section):
    """Adam with decoupled weight decay, and the learning-rate schedule, of the policy."""

    lr: float = Field(default=1e-6, gt=0, le=1, description="peak learning rate")
    step_unit: Literal["update", "rollout"] = Field(
        default="update",
        description="what warmup_steps and decay_steps count: optimizer steps (update), or training steps (rollout, as "
        "verl does): the learning rate then stays the same for all updates of a training step",
    )
    warmup_steps: NonNegative = Field(default=0, description="linear warm-up, in step_unit")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="decay after the warm-up")
    min_lr: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end of the decay")
    decay_steps: NonNegative = Field(
        default=0, description="until min_lr is reached, in step_unit, warm-up included; 0: all steps of the run"
    )
    weight_decay: float = Field(default=0.01, ge=0, le=10, description="decoupled weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Adam: decay of the first moment")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Adam: decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, le=1, description="Adam: added to the denominator")
    clip_grad: float = Field(
        default=1.0, gt=0, description="largest global gradient norm; larger gradients are scaled down"
    )

    def with_decay_steps(self, steps: int) -> OptimizerConfig:
        """These options with ``decay_steps`` filled in: by default, the decay ends with the run's ``steps``."""
        return self if self.decay_steps else self.model_copy(update={"decay_steps": steps})

    @property
    def counted(self) -> str:
        """What ``step_unit`` counts, in words."""
        return "optimizer steps" if self.step_unit == "update" else "training steps"


class CriticConfig(OptimizerConfig):
    """Adam and the learning-rate schedule of the critic, for methods that train one."""

    lr: float = Field(default=2e-6, gt=0, le=1, description="peak learning rate")


class TrainConfig(Section):
    """Length of the run, batch sizes, and when a run that goes wrong stops."""

    steps: Positive = Field(default=100, description="training steps; each one generates, then updates")
    mini_batch_prompts: Positive = Field(default=128, description="prompts per optimizer step")
    micro_batch_tokens: Positive = Field(
        default=16384, description="token budget of one packed micro-batch, which context-parallel ranks share"
    )
    share_prompts: bool = Field(
        default=True,
        description="read a prompt once for several of its responses; of effect with dense models on a CPU, and where "
        "sequences are whole (parallel.context = 1)",
    )
    seed: NonNegative = Field(default=0, description="seed of generation, data order and new weights")
    max_bad_steps: Positive = Field(
        default=3, description="consecutive updates with a non-finite gradient after which the run stops"
    )
    hang_minutes: float = Field(
        default=15.0, ge=0, le=10080, description="minutes without progress of a rank after which the run ends; 0: off"
    )


class ImportanceConfig(Section):
    """Weights of the policy loss where the engine samples from another distribution than the trainer's old policy."""

    level: Literal["token", "sequence"] = Field(
        default="token",
        description="whose probability ratio, trainer to engine: each token's, or the geometric mean of its response's",
    )
    mode: Literal["off", "truncate", "mask"] = Field(
        default="off",
        description="weight of the policy loss: 1; the ratio, at most cap; or the ratio, 0 outside 1 / cap to cap",
    )
    cap: float = Field(default=2.0, ge=1, le=1e6, description="largest ratio that is used as it is")


class ParallelConfig(Section):
    """Ranks and how the model is split among them. What remains is data parallel."""

    nodes: Positive = Field(default=1, description="number of nodes")
    ranks_per_node: Positive = Field(default=8, description="ranks (GPUs) per node")
    tensor: Positive = Field(default=1, description="tensor-parallel size")
    pipeline: Positive = Field(default=1, description="pipeline-parallel size")
    sequence: bool = Field(default=False, description="sequence parallelism over the tensor-parallel group")
    context: Positive = Field(
        default=1, description="context-parallel size: ranks that share the tokens of each sequence out"
    )
    virtual: Positive = Field(default=1, description="pipeline stages per rank, for the interleaved schedule")
    stage_layers: tuple[Positive, ...] = Field(
        default=(), description="decoder layers of each of the pipeline x virtual stages; empty: equal"
    )
    expert: Positive = Field(
        default=1, description="expert-parallel size: data-parallel ranks that share a layer's experts"
    )
    expert_tensor: Positive = Field(default=1, description="tensor-parallel size within an expert")
    overlap_grad_reduce: bool = Field(
        default=True, description="reduce gradients over data-parallel ranks during backward"
    )
    overlap_param_gather: bool = Field(default=True, description="gather updated weights during the next forward")
    bucket_size: NonNegative = Field(
        default=0,
        description="parameters per gradient reduction or weight gather; 0: max(40e6, 1e6 x data-parallel ranks)",
    )

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def data(self) -> int:
        """Ranks that train on other sequences. Context-parallel ones share the same."""
        return self.world // (self.tensor * self.context * self.pipeline)

    @property
    def chunks(self) -> int:
        """Into how many chunks of equal length context parallelism cuts a sequence: a rank has one from each half."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def token_multiple(self) -> int:
        """What the tokens of a micro-batch are a multiple of, so that every rank has as many of them."""
        return math.lcm(self.chunks, self.context * (self.tensor if self.sequence else 1))

    def padded(self, num_tokens: int) -> int:
        """The tokens of a sequence with its padding to a multiple of ``chunks``."""
        return -(-num_tokens // self.chunks) * self.chunks


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: NonNegative = Field(default=20, description="steps between checkpoints; 0: only at the end")
    keep: Positive = Field(default=2, description="newest valid checkpoints to keep")
    asynchronous: bool = Field(
        default=True,
        description="write during training, from a copy in host memory (its size: checkpoint/checkpoint.py)",
    )


class ValidationConfig(Section):
    """Validation during training, with the run's prompt, engine and reward: before the first step and on the way."""

    every: NonNegative = Field(
        default=0,
        description="steps between validations; one more comes before training and one after the last step; 0: off",
    )
    data: list[str] = Field(
        default=[], description="JSON Lines files of problems, with the keys of data.train: one, or one per benchmark"
    )
    samples: Positive = Field(default=1, description="responses per problem")
    temperature: float = Field(default=1.0, ge=0, le=100, description="sampling temperature; 0: greedy")
    top_p: Fraction = Field(default=1.0, description="nucleus sampling mass; 1 samples from the whole vocabulary")
    max_response_tokens: NonNegative = Field(
        default=0, description="longest response, in tokens; 0: rollout.max_response_tokens"
    )
    metric: Literal["avg", "pass", "maj"] = Field(
        default="avg", description="what the best step has most of: avg@samples, pass@samples or maj@samples"
    )
    keep_best: bool = Field(
        default=True, description="keep the checkpoint of the best validated step beside the checkpoint.keep newest"
    )

    @field_validator("data", mode="before")
    @classmethod
    def _one_file(cls, data: object) -> object:
        return [data] * bool(data) if isinstance(data, str) else data

    @field_validator("data")
    @classmethod
    def _own_names(cls, data: list[str]) -> list[str]:
        stems = [Path(path).stem for path in data]
        if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
            raise ValueError(f"several files are called {', '.join(twice)}: their metrics need different names")
        return data


class LogConfig(Section):
    """What a run records and where."""

    dir: str = Field(default="runs", description="parent of the run's folder, which is dir/name")
    trackers: list[Tracker] = Field(
        default=["tensorboard"], description="trackers that get the metrics, a process each"
    )
    samples: NonNegative = Field(default=4, description="responses recorded per step, with the entropy of every token")
    nucleus: bool = Field(
        default=False, description="record nucleus entropy and size even if the method does not use them; costs time"
    )

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: list[Tracker]) -> list[Tracker]:
        if len(set(trackers)) < len(trackers):
            raise ValueError("names a tracker twice")
        return trackers


class AlarmsConfig(Section):
    """When to warn. Entropies are relative to the first step's."""

    entropy_floor: float = Field(
        default=0.2, ge=0, lt=1, description="warn below this share of the first entropy; 0: off"
    )
    entropy_ceiling: float = Field(default=3.0, gt=1, description="warn above this multiple of the first entropy")
    zero_advantage_share: Fraction = Field(
        default=0.9, description="warn above this share of zero-advantage responses; 1: off"
    )
    mismatch: float = Field(
        default=0.2,
        ge=0,
        description="stop above this mean difference of engine and trainer log-probs, in nats; 0: off",
    )
    unknown_logprobs: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="stop above this share of sampled tokens whose log-prob the engine does not tell",
    )
    stop: bool = Field(default=False, description="save and end the run with exit code 3 while any alarm lasts")


class Config(Section):
    """A whole run. Keys outside any section."""

    name: str = Field(default="run", description="the run's folder below log.dir; a slash makes subfolders")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    method: dict[str, Any] = Field(
        default={"name": "grpo"}, description="the method's name and its own options, which docs/methods.md lists"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    critic: CriticConfig = CriticConfig()
    train: TrainConfig = TrainConfig()
    importance: ImportanceConfig = ImportanceConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
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
        tables = [method, *(value for value in method.values() if isinstance(value, dict))]
        values = [value for table in tables for value in table.values()]
        if any(isinstance(value, float) and not math.isfinite(value) for value in values):
            raise ValueError("options are finite numbers")
        return method

    @property
    def longest_sequence(self) -> int:
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def max_validation_tokens(self) -> int:
        """The longest response of a validation, in tokens; 0 where there is none."""
        return (self.validation.max_response_tokens or self.rollout.max_response_tokens) * bool(self.validation.every)

    @property
    def longest_response(self) -> int:
        """What an engine samples at most, in tokens: of a rollout or of a validation."""
        return max(self.rollout.max_response_tokens, self.max_validation_tokens)

    @property
    def longest_sampled(self) -> int:
        """The longest sequence that an engine holds, in tokens."""
        return self.data.max_prompt_tokens + self.longest_response

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of a training step."""
        return self.rollout.prompts // self.train.mini_batch_prompts

    @property
    def run_dir(self) -> Path:
        return Path(self.log.dir) / self.name
