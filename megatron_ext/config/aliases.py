"""Keys of other stacks' configurations, and what they are called here: for the message about an unknown key.

A name is the end of a dotted key there, such as ``rollout.n`` of verl's ``actor_rollout_ref.rollout.n``; the longest
one that fits counts. What follows our key says where its meaning differs.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

_PROMPTS = "(counted in prompts, not in responses)"
_TOKENS = "(a budget of tokens, not a number of sequences)"
_STEPS = "(counted in rollout steps)"
_BY_ROLLOUT = '(verl counts training steps: with optimizer.step_unit = "rollout")'
_TRUNCATED = '(with importance.mode = "truncate")'
_ZERO = "(0 switches it off)"
_OF_RESPONSES = '("gspo" has one ratio for a response)'
_SAPO = '(a table: {kind = "sapo", tau_pos = 1.0, tau_neg = 1.05})'
_DEEPEST = 8  # of an unknown section, which may be nested without end
_TRACKERS = '(a list: ["tensorboard"], or [] for none)'

ALIASES = {
    # models
    "actor_rollout_ref.model.path": "model.path",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "model_id": "model.path",
    "pretrain": "model.path",
    "hf_checkpoint": "model.path",
    "bf16": 'model.dtype ("bfloat16" or "float32")',
    "torch_dtype": "model.dtype",
    "precision": "model.dtype",
    "gradient_checkpointing": 'model.recompute ("none", "mlp" or "full")',
    "enable_gradient_checkpointing": 'model.recompute ("none", "mlp" or "full")',
    "activation_checkpointing": 'model.recompute ("none", "mlp" or "full")',
    "recompute_granularity": 'model.recompute ("none", "mlp" or "full")',
    "use_fused_kernels": "model.fused_head",
    "use_liger_kernel": "model.fused_head",
    "ref.fsdp_config.param_offload": "model.offload_reference",
    "ref.megatron.param_offload": "model.offload_reference",
    "optimizer_offload": "model.offload_optimizer",
    "adam_offload": "model.offload_optimizer",
    "optimizer_cpu_offload": "model.offload_optimizer",
    # data
    "train_files": "data.train",
    "dataset_name": "data.train (a JSON Lines file)",
    "prompt_data": "data.train (a JSON Lines file)",
    "max_prompt_length": "data.max_prompt_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "rollout_max_prompt_len": "data.max_prompt_tokens",
    "max_input_seq_length": "data.max_prompt_tokens",
    "filter_overlong_prompts": "data.max_prompt_tokens (longer prompts are left out)",
    "system_prompt": "prompt.system",
    "custom_chat_template": "prompt.template (a Jinja file)",
    # rollouts
    "rollout.name": "rollout.engine",
    "use_vllm": "rollout.engine",
    "vllm_mode": 'rollout.engine ("vllm" is colocated, "vllm_server" is not)',
    "rollout.tensor_model_parallel_size": "rollout.tensor_parallel_size",
    "vllm_cfg.tensor_parallel_size": "rollout.tensor_parallel_size",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
    "rollout_num_gpus_per_engine": "rollout.tensor_parallel_size",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "sglang_mem_fraction_static": "rollout.gpu_memory_utilization",
    "vllm_num_engines": "rollout.servers.num",
    "vllm_server_base_url": "rollout.servers.urls",
    "data.train_batch_size": "rollout.prompts",
    "rollout_batch_size": "rollout.prompts",
    "num_prompts_per_step": "rollout.prompts",
    "rollout.n": "rollout.samples",
    "num_generations": "rollout.samples",
    "n_samples_per_prompt": "rollout.samples",
    "num_generations_per_prompt": "rollout.samples",
    "rollout_temperature": "rollout.temperature",
    "rollout_top_p": "rollout.top_p",
    "max_response_length": "rollout.max_response_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "generate_max_len": "rollout.max_response_tokens",
    "rollout_max_response_len": "rollout.max_response_tokens",
    "max_new_tokens": "rollout.max_response_tokens",
    "filter_groups.enable": "rollout.dynamic_sampling",
    "use_dynamic_sampling": "rollout.dynamic_sampling",
    "dynamic_filtering": "rollout.dynamic_sampling",
    "dynamic_sampling_filter_path": "rollout.dynamic_sampling",
    "gen_batch_size": "rollout.oversample (a multiple of rollout.prompts)",
    "over_sampling_batch_size": "rollout.oversample (a multiple of rollout.prompts)",
    "max_num_gen_batches": "rollout.max_generations",
    # methods
    "adv_estimator": "method.name",
    "advantage_estimator": "method.name",
    "kl_loss_coef": "method.beta",
    "use_kl_loss": f"method.beta {_ZERO}",
    "init_kl_coef": "method.beta",
    "reference_policy_kl_penalty": "method.beta",
    "clip_ratio": "method.clip_low and method.clip_high",
    "clip_ratio_low": "method.clip_low",
    "clip_ratio_high": "method.clip_high",
    "clip_ratio_c": "method.dual_clip",
    "ratio_clip_min": "method.clip_low",
    "ratio_clip_max": "method.clip_high",
    "ratio_clip_c": "method.dual_clip",
    "epsilon": "method.clip_low",
    "epsilon_high": "method.clip_high",
    "eps_clip": "method.clip_low",
    "eps_clip_high": "method.clip_high",
    "eps_clip_low_high": "method.clip_low and method.clip_high",
    "loss_agg_mode": "method.aggregation",
    "loss_type": "method.aggregation (of cispo, sapo: method.surrogate)",
    "token_level_loss": "method.aggregation",
    "policy_loss.loss_mode": "method.surrogate",
    "policy_loss_type": "method.surrogate",
    "importance_sampling_level": f"method.surrogate {_OF_RESPONSES}",
    "sequence_level_importance_ratios": f"method.surrogate {_OF_RESPONSES}",
    "sapo_temperature_pos": f"method.surrogate {_SAPO}",
    "sapo_temperature_neg": f"method.surrogate {_SAPO}",
    "tau_pos": f"method.surrogate {_SAPO}",
    "tau_neg": f"method.surrogate {_SAPO}",
    "norm_adv_by_std_in_grpo": "method.normalise",
    "scale_rewards": "method.normalise",
    "normalize_rewards": "method.normalise",
    "entropy_coeff": "method.coef (of method.name = entropy_bonus)",
    "entropy_coef": "method.coef (of method.name = entropy_bonus)",
    "lambd": "method.lam",
    "cliprange_value": "method.value_clip",
    "critic_warmup": f"method.critic_only_steps {_STEPS}",
    "overlong_buffer.len": "method.overlong_buffer",
    # optimizers
    "critic.optim.lr": "critic.lr",
    "critic_learning_rate": "critic.lr",
    "optim.lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "actor_learning_rate": "optimizer.lr",
    "lr_warmup_steps": f"optimizer.warmup_steps {_BY_ROLLOUT}",
    "lr_warmup_iters": "optimizer.warmup_steps",
    "lr_warmup_ratio": "optimizer.warmup_steps (a number of optimizer steps)",
    "warmup_ratio": "optimizer.warmup_steps (a number of optimizer steps)",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule",
    "lr_decay_style": "optimizer.schedule",
    "lr_decay_steps": "optimizer.decay_steps",
    "lr_decay_iters": "optimizer.decay_steps",
    "max_grad_norm": "optimizer.clip_grad",
    "grad_clip": "optimizer.clip_grad",
    "max_norm": "optimizer.clip_grad",
    "l2": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "adam_eps": "optimizer.eps",
    # training
    "max_steps": f"train.steps {_STEPS}",
    "max_num_steps": f"train.steps {_STEPS}",
    "total_training_steps": f"train.steps {_STEPS}",
    "total_epochs": f"train.steps {_STEPS}",
    "num_train_epochs": f"train.steps {_STEPS}",
    "num_episodes": f"train.steps {_STEPS}",
    "num_rollout": f"train.steps {_STEPS}",
    "train_iters": f"train.steps {_STEPS}",
    "ppo_mini_batch_size": f"train.mini_batch_prompts {_PROMPTS}",
    "train_batch_size": f"train.mini_batch_prompts {_PROMPTS}",
    "train_global_batch_size": f"train.mini_batch_prompts {_PROMPTS}",
    "global_batch_size": f"train.mini_batch_prompts {_PROMPTS}",
    "generation_batch_size": f"rollout.prompts {_PROMPTS}",
    "per_device_train_batch_size": f"train.micro_batch_tokens {_TOKENS}",
    "gradient_accumulation_steps": f"train.micro_batch_tokens {_TOKENS}",
    "micro_train_batch_size": f"train.micro_batch_tokens {_TOKENS}",
    "train_micro_batch_size": f"train.micro_batch_tokens {_TOKENS}",
    "ppo_micro_batch_size_per_gpu": f"train.micro_batch_tokens {_TOKENS}",
    "ppo_max_token_len_per_gpu": "train.micro_batch_tokens",
    "max_tokens_per_gpu": "train.micro_batch_tokens",
    "train_mb_tokens": "train.micro_batch_tokens",
    "data_seed": "train.seed",
    "router_replay.mode": "rollout.routing_replay",
    "use_routing_replay": "rollout.routing_replay",
    "use_rollout_routing_replay": "rollout.routing_replay",
    "moe_enable_routing_replay": "rollout.routing_replay",
    "enable_return_routed_experts": "rollout.routing_replay",
    "tis_imp_ratio_cap": f"importance.cap {_TRUNCATED}",
    "vllm_importance_sampling_cap": f"importance.cap {_TRUNCATED}",
    "tis_clip": f"importance.cap {_TRUNCATED}",
    "rollout_is": "importance.level and importance.mode",
    "rollout_is_threshold": f"importance.cap {_TRUNCATED}",
    # layout
    "nnodes": "parallel.nodes",
    "num_nodes": "parallel.nodes",
    "actor_num_nodes": "parallel.nodes",
    "n_gpus_per_node": "parallel.ranks_per_node",
    "gpus_per_node": "parallel.ranks_per_node",
    "num_gpus_per_node": "parallel.ranks_per_node",
    "actor_num_gpus_per_node": "parallel.ranks_per_node",
    "nproc_per_node": "parallel.ranks_per_node",
    "tensor_model_parallel_size": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pipeline_parallel_size": "parallel.pipeline",
    "virtual_pipeline_model_parallel_size": "parallel.virtual",
    "sequence_parallel": "parallel.sequence",
    "context_parallel_size": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "expert_tensor_parallel_size": "parallel.expert_tensor",
    # checkpoints and logs
    "save_freq": "checkpoint.every",
    "save_steps": "checkpoint.every",
    "save_interval": "checkpoint.every",
    "save_period": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "max_ckpt_num": "checkpoint.keep",
    "max_actor_ckpt_to_keep": "checkpoint.keep",
    "keep_top_k": "checkpoint.keep",
    "test_freq": f"validation.every {_STEPS}",
    "eval_steps": f"validation.every {_STEPS}",
    "eval_interval": f"validation.every {_STEPS}",
    "val_period": f"validation.every {_STEPS}",
    "val_files": "validation.data",
    "val_kwargs.n": "validation.samples",
    "val_kwargs.temperature": "validation.temperature",
    "val_kwargs.top_p": "validation.top_p",
    "n_samples_per_eval_prompt": "validation.samples",
    "eval_n_samples_per_prompt": "validation.samples",
    "save_best_model": "validation.keep_best",
    "load_best_model_at_end": "validation.keep_best",
    "async_save": "checkpoint.asynchronous",
    "output_dir": "log.dir",
    "save_path": "log.dir",
    "log_dir": "log.dir",
    "logging_dir": "log.dir",
    "checkpoint_dir": "log.dir",
    "default_local_dir": "log.dir",
    "run_name": "name",
    "experiment_name": "name",
    "log.tensorboard": f"log.trackers {_TRACKERS}",
    "report_to": "log.trackers",
    "trainer.logger": "log.trackers",
    "use_wandb": "log.trackers",
    "log_completions": "log.samples",
    "num_completions_to_print": "log.samples",
}


RENAMED = {  # our own keys of before; what follows ours says where its meaning differs
    "train.importance_cap": f"importance.cap {_TRUNCATED}",
    "data.prompt_suffix": "prompt.suffix",
    "rollout.tensor": "rollout.tensor_parallel_size",
    "rollout.memory_share": "rollout.gpu_memory_utilization",
    "rollout.eager": "rollout.enforce_eager",
}
RENAMED_VALUES = {  # likewise, of the method's options
    "nucleus": {"reach": "inclusive", "below": "exclusive"},
}


def find(key: str) -> str | None:
    """What the dotted ``key`` of another stack is here, None if that is not known."""
    if key in RENAMED:
        return RENAMED[key]
    parts = key.replace("-", "_").lower().split(".")
    ends = (".".join(parts[first:]) for first in range(len(parts)))
    return next((ALIASES[end] for end in ends if end in ALIASES), None)


def unknown_keys(schema: type[BaseModel], where: str, value: Any) -> list[str]:
    """A line for the unknown key ``where`` of a configuration, or for each key of another stack below it."""
    below = [(key, find(key)) for key in _leaves(where, value)]
    if any(ours for _, ours in below):
        return [f"{key}: unknown key; " + (f"here it is {ours}" if ours else "not known here") for key, ours in below]
    if where in keys(schema):
        return [f'"{where}": unknown key; write it without quotes, which make the dot a part of its name']
    section, last = schema, where
    while inner := _section(section.model_fields.get(last.partition(".")[0])):
        section, last = inner, last.partition(".")[2]
    elsewhere = [key for key in keys(schema) if key.split(".")[-1] == last]
    close = elsewhere or difflib.get_close_matches(last, section.model_fields, n=1)
    if close:
        return [f"{where}: unknown key; did you mean {' or '.join(close)}?"]
    return [f"{where}: unknown key; known keys: {', '.join(sorted(section.model_fields))}"]


def with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that an older version wrote, under today's names."""
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
    if (cap := config.get("train", {}).pop("importance_cap", 0)) > 0:  # 0 was off
        config["importance"] = {"mode": "truncate", "cap": cap}
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        now, _, name = new.partition(".")
        if key in config.get(section, {}):
            config.setdefault(now, {})[name] = config[section].pop(key)
    for option, _, value in renamed_values(config.get("method", {})):
        config["method"][option] = value
    return config


def renamed_values(method: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Of a method's options: name, the value's name of before, and its name now."""
    return [
        (option, old, new)
        for option, names in RENAMED_VALUES.items()
        for old, new in names.items()
        if method.get(option) == old
    ]


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a configuration that hold values."""
    for name, field in schema.model_fields.items():
        if section := _section(field):
            yield from keys(section, f"{prefix}{name}.")
        else:
            yield prefix + name


def _section(field: FieldInfo | None) -> type[BaseModel] | None:
    """The section that ``field`` holds, None where it holds a value or is no field."""
    annotation = field and field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _leaves(where: str, value: Any, depth: int = 0) -> Iterator[str]:
    if not isinstance(value, dict) or not value or depth == _DEEPEST:
        yield where
        return
    for key, each in value.items():
        yield from _leaves(f"{where}.{key}", each, depth + 1)
