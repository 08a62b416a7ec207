"""The schema of a run: TOML with at most one parent, unknown keys forbidden, no torch imported.

A recipe holds only what differs from its parent (``parent = "../base.toml"``). ``load_config`` merges the
chain, applies ``key=value`` overrides from the command line and checks everything that can be checked
without building a model. Every fault is a ``ConfigError`` that says what, found, expected, what to do.
"""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from megatron_ext.files import read_json, read_small
from megatron_ext.train.aliases import unknown_keys
from megatron_ext.train.layout_rules import model_faults, nearest_divisor
from megatron_ext.train.redact import redact, redact_text

LARGEST = 2**31 - 1  # of any count: NumPy's seeds and many kernels end near it
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio"]
MAX_NAME_BYTES = 200  # file systems take 255; a temporary file's ending is still to come
FROM_THE_PUBLISHER = "take the file of the model's publisher"
_PATHS = (("model", "path"), ("model", "weights"), ("data", "train"), ("data", "curriculum"))
_SIZES = (  # of a model: fields of config.json that are numbers above 0, where they are there
    *("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("head_dim", "vocab_size", "max_position_embeddings", "num_experts", "moe_intermediate_size"),
)
Seconds = Annotated[float, Field(ge=0.1, le=7 * 86400)]
RewardValue = Annotated[float, Field(ge=-1e6, le=1e6)]


class ConfigError(ValueError):
    """A fault of the configuration or of the data: the run must not start. Exit code 2. It shows no secret."""

    def __init__(self, message: str) -> None:
        super().__init__(redact_text(message))


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
    engine: Literal["hf", "vllm", "vllm_server"] = "hf"  # transformers; vLLM in the trainer's processes, or in its own
    tensor: Positive = 1  # ranks that share the weights of one vLLM engine
    memory_share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of the GPU's memory: what a vLLM engine may take, awake
    eager: bool = False  # vLLM without compilation: starts at once, generates slower
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
    asynchronous: bool = True  # written while training goes on, from a copy in host memory (train/checkpoint.py: size)


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
    """When to warn (train/alarms.py). Entropies are relative to the first step's."""

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


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a recipe, its parents and ``key=value`` overrides (dotted keys, TOML values), and check them.

    Relative paths in ``model.path``, ``data.train`` and ``data.curriculum`` are tried from the current directory
    first, then from the file that states them; data that is in neither place is expected in the second.
    """
    config = read_config(path, overrides)
    check_layout(config)
    return config


def read_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """``load_config`` without the rules between fields."""
    merged = _read_chain(Path(path))
    for override in overrides or []:
        _apply_override(merged, override)
    given = [override.partition("=")[0] for override in overrides or []]
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_readable(error, path, given)) from None


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an older version wrote, with the keys that it did not have."""
    return _merge(Config().model_dump(), config)


def check_layout(config: Config) -> None:
    """Rules between fields: sizes that must divide, heads against TP, and files that must exist."""
    if faults := layout_faults(config) + file_faults(config):
        raise ConfigError("\n".join(faults))


def layout_faults(config: Config) -> list[str]:
    """What does not fit together, whatever files are there; of the model only ``config.json`` is read."""
    p, faults = config.parallel, []
    model_parallel = p.tensor * p.pipeline
    if p.world % model_parallel:
        nearest = max(1, round(p.world / model_parallel)) * model_parallel
        faults.append(
            f"parallel: tensor {p.tensor} x pipeline {p.pipeline} = {model_parallel} does not divide the world "
            f"of nodes {p.nodes} x ranks_per_node {p.ranks_per_node} = {p.world}; nearest valid world is {nearest}"
        )
    if p.sequence and p.tensor == 1:
        faults.append("parallel.sequence: needs parallel.tensor > 1, found 1; set parallel.sequence = false")
    prompts, mini = config.rollout.prompts, config.train.mini_batch_prompts
    if prompts % mini:
        faults.append(
            f"train.mini_batch_prompts: {mini} does not divide rollout.prompts {prompts}; "
            f"nearest valid is {nearest_divisor(prompts, mini)}"
        )
    elif not p.world % model_parallel and mini % p.data:
        faults.append(
            f"train.mini_batch_prompts: {mini} is not divisible by the data-parallel size {p.data}; "
            f"nearest valid is {max(1, round(mini / p.data)) * p.data}"
        )
    longest = config.longest_sequence
    if config.train.micro_batch_tokens < longest:
        faults.append(
            f"train.micro_batch_tokens: {config.train.micro_batch_tokens} cannot hold one sequence of "
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}; raise it to at least {longest}"
        )
    faults += _engine_faults(config) + _schedule_faults("optimizer", config.optimizer)
    faults += _schedule_faults("critic", config.critic)
    if config.rollout.dynamic_sampling and config.rollout.samples == 1:
        faults.append(
            "rollout.dynamic_sampling: keeps groups whose rewards differ, but rollout.samples is 1: raise "
            "rollout.samples, or set rollout.dynamic_sampling = false"
        )
    if not config.data.train:
        faults.append("data.train: no training file is named; set data.train to a JSON Lines file")
    if config.data.stage_starts and not config.data.curriculum:
        faults.append("data.stage_starts: there are no stages without data.curriculum; remove it, or name a curriculum")
    return faults + _check_model(config)


def _engine_faults(config: Config) -> list[str]:
    rollout, faults = config.rollout, []
    shared, ranks, servers = rollout.tensor, config.parallel.ranks_per_node, rollout.servers
    if shared > 1 and (rollout.engine == "hf" or (rollout.engine == "vllm" and ranks % shared)):
        faults.append(
            f"rollout.tensor: {shared} ranks cannot share an engine: rollout.engine is {rollout.engine} and "
            f"parallel.ranks_per_node is {ranks}; hf takes 1, vllm a divisor of the ranks of a node"
        )
    if servers.devices and len(servers.devices) != servers.num:
        faults.append(
            f"rollout.servers.devices: {len(servers.devices)} entries for rollout.servers.num = {servers.num} servers; "
            "give one string of device numbers for each"
        )
    return faults


def _schedule_faults(section: str, o: OptimizerConfig) -> list[str]:
    if o.schedule != "constant":
        above = f"{section}.min_lr: {o.min_lr:g} is above {section}.lr {o.lr:g}, from which it falls; lower it"
        return [above] if o.min_lr > o.lr else []
    return [
        f"{section}.{key}: {value:g} says how the learning rate falls, but {section}.schedule is constant; set it to "
        f'"linear" or "cosine", or {section}.{key} = 0'
        for key, value in (("min_lr", o.min_lr), ("decay_steps", o.decay_steps))
        if value
    ]


def file_faults(config: Config) -> list[str]:
    """Files that a run needs and that are not there; the model's weights are looked for when they are loaded."""
    data, weights, faults = config.data, config.model.weights, []
    if weights and not os.path.isfile(os.path.join(weights, "MANIFEST.json")):
        faults.append(
            f"model.weights: {weights} is no checkpoint; give a step_* directory of a run, or make one with\n"
            "  python -m tools.convert from-hf MODEL OUT\n"
            'or start from the safetensors of model.path with model.weights = ""'
        )
    if data.train and not os.path.isfile(data.train):
        faults.append(f"data.train: no such file: {data.train}; give a path from here or from the recipe")
    if data.curriculum and not os.path.isfile(data.curriculum):
        faults.append(
            f"data.curriculum: no such file: {data.curriculum}; make it from the initial policy with\n"
            f"  python -m tools.semantic_entropy RECIPE --out {data.curriculum}\n"
            'or train on the data in any order with data.curriculum = ""'
        )
    return faults


def hf_config(path: str | Path) -> dict[str, Any]:
    """The model directory's ``config.json``."""
    file = Path(path) / "config.json"
    if not os.path.isfile(file):  # False too for a name that no file can have
        raise ConfigError(
            f"model.path: {path} holds no config.json; expected a Hugging Face model directory "
            "(config.json, *.safetensors, tokenizer files)"
        )
    try:
        hf = read_json(file)
        if not isinstance(hf, dict):
            raise ValueError(f"expected an object, found {str(hf)[:60]!r}")
    except (ValueError, OSError) as error:
        raise ConfigError(f"model.path: {file} is not the JSON of a model's configuration: {error}") from None
    faults = [
        f"{name} is {hf[name]!r}, expected a whole number above 0"
        for name in _SIZES
        if hf.get(name) is not None and (type(hf[name]) is not int or hf[name] < 1)
    ]
    if faults:
        raise ConfigError(f"model.path: {file}: " + "; ".join(faults) + f"; {FROM_THE_PUBLISHER}")
    return hf


def _check_model(config: Config) -> list[str]:
    if not config.model.path:
        return ["model.path: no model is named; set model.path to a Hugging Face model directory"]
    try:
        hf = hf_config(config.model.path)
    except ConfigError as error:
        return [str(error)]
    missing = [name for name in ("num_attention_heads", "num_hidden_layers") if hf.get(name) is None]
    if missing:
        return [f"model.path: {config.model.path}/config.json: {', '.join(missing)} missing; {FROM_THE_PUBLISHER}"]
    faults = []
    positions, longest = hf.get("max_position_embeddings"), config.longest_sequence
    if positions is not None and longest > positions:
        faults.append(
            f"rollout.max_response_tokens: data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceed the "
            f"model's {positions} positions; lower them, or set max_position_embeddings if its rope stretches that far"
        )
    return faults + model_faults(hf, config.parallel)


def _read_chain(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The recipe ``path`` over its parents. ``children``: the recipes that led here."""
    own = _read_recipe(path)
    if path.resolve() in children:
        raise ConfigError(f"recipe: {path} is its own parent; a chain of parents ends with a recipe that names none")
    for name, key in _PATHS:
        section = own.get(name)
        if not isinstance(section, dict) or not isinstance(value := section.get(key), str):
            continue  # the schema says what is wrong with it
        made_later = name == "data"  # by a tool, where the recipe says
        if value and not os.path.exists(value) and (made_later or os.path.exists(path.parent / value)):
            section[key] = os.path.normpath(path.parent / value)
    parent = own.pop("parent", None)
    if parent is None:
        return own
    if not isinstance(parent, str):
        raise ConfigError(f"recipe: {path}: parent is {parent!r}, expected the path of one recipe")
    return _merge(_read_chain(path.parent / parent, (*children, path.resolve())), own)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_small(path).decode())
    except FileNotFoundError:
        raise ConfigError(f"recipe: no such file: {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe: {path} is not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"recipe: {path} is not valid TOML: its values are nested too deeply") from None
    except (OSError, ValueError) as error:  # a folder, another user's, not UTF-8, a number of thousands of digits
        raise ConfigError(f"recipe: {path} cannot be read: {error}; expected a TOML file in UTF-8") from None


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """``own`` over ``base``, section by section. Another method's options are never inherited."""
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        replaced = both and key == "method" and value.get("name", base[key].get("name")) != base[key].get("name")
        merged[key] = _merge(base[key], value) if both and not replaced else value
    return merged


def _apply_override(merged: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"on the command line: {override!r} is not of the form key=value, for example train.steps=10")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {"value": text}  # a string without its quotes
    except RecursionError:
        raise ConfigError(f"on the command line: {key}: its value is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"override: {key}: its value cannot be read: {error}") from None
    if len(parsed) > 1 or (parsed["value"] is text and "\n" in text):
        raise ConfigError(
            f"on the command line: {override!r} has several lines; give each key=value as an argument of its own, and "
            "a string with line breaks in quotes"
        )
    value = parsed["value"]
    *sections, last = key.split(".")
    for section in sections:
        merged = merged.setdefault(section, {})
        if not isinstance(merged, dict):
            raise ConfigError(f"on the command line: {key} goes below {section}, which is a value and not a section")
    merged[last] = value


def _readable(error: ValidationError, path: str | Path, given: list[str]) -> str:
    """Every fault, below the place where it stands. ``given``: the keys of the command line."""
    places: dict[str, list[str]] = {"on the command line": [], str(path): []}
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        overridden = any(f"{key}.".startswith(f"{where}.") or where.startswith(f"{key}.") for key in given)
        lines = places["on the command line" if overridden else str(path)]
        if item["type"] == "extra_forbidden":
            lines += unknown_keys(Config, where, item["input"])
        else:
            lines.append(f"{where}: {item['msg']}, found {redact(item['input'], where)!r}")
    return "\n".join(f"{place}:\n  " + "\n  ".join(lines) for place, lines in places.items() if lines)
