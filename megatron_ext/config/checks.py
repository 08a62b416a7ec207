"""Rules between the fields of a configuration, and the files that it names. No torch, no model built."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from megatron_ext.config.deterministic_checks import deterministic_faults
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.parallel_checks import engine_faults, model_faults, nearest_divisor, num_experts
from megatron_ext.config.public_sets import how_to_make
from megatron_ext.config.schema import Config, OptimizerConfig
from megatron_ext.files import read_json, read_small
from megatron_ext.rollout.registry import ENGINES, find_engine
from megatron_ext.rollout.rewards.functions import find_reward

FROM_THE_PUBLISHER = "take the file of the model's publisher"
_SIZES = (  # of a model: fields of config.json that are numbers above 0, where they are there
    *("num_attention_heads", "num_key_value_heads", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("head_dim", "vocab_size", "max_position_embeddings", "num_experts", "moe_intermediate_size"),
)


def check_layout(config: Config) -> None:
    """Rules between fields: sizes that must divide, heads against TP, and files that must exist."""
    if faults := layout_faults(config) + file_faults(config):
        raise ConfigError("\n".join(faults))


def layout_faults(config: Config) -> list[str]:
    """What does not fit together, whatever files are there; of the model only ``config.json`` is read."""
    p, faults = config.parallel, []
    together = p.tensor * p.context * p.pipeline
    if p.world % together:
        nearest = max(1, round(p.world / together)) * together
        context = f"context {p.context} x " * (p.context > 1)
        faults.append(
            f"parallel: tensor {p.tensor} x {context}pipeline {p.pipeline} = {together} does not divide the world "
            f"of nodes {p.nodes} x ranks_per_node {p.ranks_per_node} = {p.world}; nearest valid world is {nearest}"
        )
    if p.sequence and p.tensor == 1:
        faults.append("parallel.sequence: needs parallel.tensor > 1, found 1; set parallel.sequence = false")
    prompts, mini_batch = config.rollout.prompts, config.train.mini_batch_prompts
    if prompts % mini_batch:
        faults.append(
            f"train.mini_batch_prompts: {mini_batch} does not divide rollout.prompts {prompts}; "
            f"nearest valid is {nearest_divisor(prompts, mini_batch)}"
        )
    elif not p.world % together and mini_batch % p.data:
        faults.append(
            f"train.mini_batch_prompts: {mini_batch} is not divisible by the data-parallel size {p.data}; "
            f"nearest valid is {max(1, round(mini_batch / p.data)) * p.data}"
        )
    longest, padded = config.longest_sequence, p.padded(config.longest_sequence)
    if config.train.micro_batch_tokens < padded:
        context = f", padded to a multiple of 2 x parallel.context = {p.chunks}" * (padded > longest)
        faults.append(
            f"train.micro_batch_tokens: {config.train.micro_batch_tokens} cannot hold one sequence of "
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}{context}; raise it to at least {padded}"
        )
    faults += _engine_faults(config) + _schedule_faults("optimizer", config.optimizer)
    faults += _schedule_faults("critic", config.critic)
    if config.rollout.top_k == 1:
        faults.append(
            f"rollout.top_k: 1 samples the same response {config.rollout.samples} times, of which nothing can be "
            "learnt; set rollout.top_k = 0 (all tokens), or at least 2"
        )
    if config.rollout.dynamic_sampling and config.rollout.samples == 1:
        faults.append(
            "rollout.dynamic_sampling: keeps groups whose rewards differ, but rollout.samples is 1: raise "
            "rollout.samples, or set rollout.dynamic_sampling = false"
        )
    if not config.data.train:
        faults.append("data.train: no training file is named; set data.train to a JSON Lines file")
    if config.data.stage_starts and not config.data.curriculum:
        faults.append("data.stage_starts: there are no stages without data.curriculum; remove it, or name a curriculum")
    if config.data.stage_restart and not config.data.curriculum:
        faults.append(
            "data.stage_restart: there are no stages without data.curriculum; set it to false, or name a file"
        )
    if config.reward.options and not config.reward.function:
        faults.append("reward.options: are of reward.function, which names none; remove them, or name a function")
    return faults + _reward_faults(config) + _validation_faults(config) + _check_model(config)


def _validation_faults(config: Config) -> list[str]:
    validation, faults = config.validation, []
    if not validation.every:
        return []
    if not validation.data:
        faults.append(
            "validation.data: no file is named; set validation.data to a JSON Lines file, or validation.every = 0"
        )
    if validation.temperature == 0 and validation.samples > 1:
        faults.append(
            f"validation.temperature: 0 samples the same response {validation.samples} times; set validation.samples "
            "= 1, or a temperature above 0"
        )
    return faults


def _reward_faults(config: Config) -> list[str]:
    try:
        if config.reward.function:
            find_reward(config.reward)
    except ConfigError as error:
        return [str(error)]
    return []


def _engine_faults(config: Config) -> list[str]:
    rollout = config.rollout
    try:
        spec = find_engine(rollout)
    except ConfigError as error:
        return [str(error)]
    shared, faults = rollout.tensor_parallel_size, spec.faults(config)
    if shared > 1 and "tensor_parallel_size" not in spec.keys:
        faults.append(
            f"rollout.tensor_parallel_size: {shared} ranks cannot share an engine: rollout.engine is {rollout.engine}, "
            "which takes 1"
        )
    if rollout.routing_replay and "routing_replay" not in spec.keys:
        able = " or ".join(name for name, each in ENGINES.items() if "routing_replay" in each.keys)
        faults.append(
            f"rollout.routing_replay: true, but rollout.engine is {rollout.engine}, which does not tell the experts of "
            f"its tokens; expected {able}. Set rollout.engine, or rollout.routing_replay = false"
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


def _remedy(path: str) -> str:
    """How a data file of a known set is made, where ``path`` is one."""
    commands = how_to_make(path)
    return f"fetch and prepare it with\n{commands}\nor " if commands else ""


def file_faults(config: Config) -> list[str]:
    """Files that a run needs and that are not there; the model's weights are looked for when they are loaded."""
    data, weights, faults = config.data, config.model.weights, []
    if weights and not os.path.isfile(os.path.join(weights, "MANIFEST.json")):
        found = "names no checkpoint that is beside it" if os.path.isfile(weights) else "is no checkpoint"
        faults.append(
            f"model.weights: {weights} {found}; give a step_* directory of a run, or RUN/checkpoints/best where it was "
            "validated (validation.every, validation.keep_best), or make one with\n"
            "  megatron-entropy convert from-hf MODEL OUT\n"
            'or start from the safetensors of model.path with model.weights = ""'
        )
    if data.train and not os.path.isfile(data.train):
        faults.append(
            f"data.train: no such file: {data.train}; {_remedy(data.train)}give a path from here or from the recipe"
        )
    validation = config.validation
    for path in validation.data if validation.every else ():
        if not os.path.isfile(path):
            faults.append(
                f"validation.data: no such file: {path}; {_remedy(path)}give a path from here or from the recipe, or "
                "set validation.every = 0"
            )
    if data.curriculum and not os.path.isfile(data.curriculum):
        faults.append(
            f"data.curriculum: no such file: {data.curriculum}; make it from the initial policy with\n"
            f"  megatron-entropy semantic-entropy RECIPE --out {data.curriculum}\n"
            'or train on the data in any order with data.curriculum = ""'
        )
    return faults


def marked_checkpoint(path: str) -> str:
    """The directory that the marker ``path`` of a run, its ``checkpoints/best`` or ``latest``, names; else ``path``."""
    try:
        name = read_small(Path(path), max_bytes=1000).decode(errors="replace").strip() if os.path.isfile(path) else ""
    except OSError:
        return path
    beside = os.path.join(os.path.dirname(path), name)
    return beside if re.fullmatch(r"step_[0-9]+", name) and os.path.isdir(beside) else path


def _meant(path: str | Path) -> str:
    """What a path that is no model's directory may be: a run's folder, or a name of the Hub."""
    if os.path.isdir(Path(path) / "checkpoints"):
        return f"; of a run, export one: megatron-entropy convert to-hf {path} {path}/hf"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", f"{path}") and not os.path.exists(path):
        name = str(path).partition("/")[2].lower()
        return f"; a model of the Hub is fetched first: hf download {path} --local-dir recipes/models/{name}"
    return ""


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The model directory's ``config.json``."""
    file = Path(path) / "config.json"
    if not os.path.isfile(file):  # False too for a name that no file can have
        raise ConfigError(
            f"model.path: {path} holds no config.json; expected a Hugging Face model directory "
            f"(config.json, *.safetensors, tokenizer files){_meant(path)}"
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
        hf = read_hf_config(config.model.path)
    except ConfigError as error:
        return [str(error)]
    missing = [name for name in ("num_attention_heads", "num_hidden_layers") if hf.get(name) is None]
    if missing:
        return [f"model.path: {config.model.path}/config.json: {', '.join(missing)} missing; {FROM_THE_PUBLISHER}"]
    faults = []
    positions, longest = hf.get("max_position_embeddings"), config.longest_sequence
    validated = config.data.max_prompt_tokens + config.max_validation_tokens
    if positions is not None and longest > positions:
        faults.append(
            f"rollout.max_response_tokens: data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceed the "
            f"model's {positions} positions; lower them, or set max_position_embeddings if its rope stretches that far"
        )
    elif positions is not None and validated > positions:
        faults.append(
            f"validation.max_response_tokens: data.max_prompt_tokens + {config.max_validation_tokens} = {validated} "
            f"exceed the model's {positions} positions; lower it"
        )
    if config.rollout.routing_replay and not num_experts(hf):
        faults.append(
            "rollout.routing_replay: true, but the model has no experts: there is no num_experts in "
            f"{config.model.path}/config.json; set rollout.routing_replay = false"
        )
    faults += model_faults(hf, config.parallel) + engine_faults(hf, config.rollout.tensor_parallel_size)
    return faults + deterministic_faults(hf, config)
