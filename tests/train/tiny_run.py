"""A run small enough to save and resume in a second: model, optimizer and schedule of any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import cpu_compat
from megatron_ext.checkpoint.checkpoint import Checkpoints, LoadedState, set_rng
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model import groups, parallel
from megatron_ext.model.architectures import Architecture
from megatron_ext.model.build import Policy, build_optimizer, build_policy, build_scheduler
from megatron_ext.model.megatron_config import ModelOptions
from megatron_ext.model.param_mapping import stage_mappings
from megatron_ext.model.trainable import TrainableModel

TINY = Architecture(
    name="Qwen2ForCausalLM",
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_groups=2,
    head_dim=8,
    ffn_size=48,
    vocab_size=61,  # odd: padded under TP 2, not under TP 1
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=64,
    tied=False,
    qkv_bias=True,
    qk_norm=False,
)
TIED = replace(TINY, tied=True)
STATE = {"weight_version": 3, "method": {"coefficient": 0.1, "history": [1, 2]}, "order": torch.arange(7)}
CONFIG = {"optimizer": {"lr": 1e-3}, "train": {"steps": 4}}


class Trainer:
    """A tiny run of one layout: what the loop would hand to ``save`` and ``load``."""

    def __init__(
        self,
        world: int,
        tensor: int = 1,
        pipeline: int = 1,
        architecture: Architecture = TINY,
        dtype: torch.dtype = torch.float32,
        lr: float = 1e-3,
    ):
        cpu_compat.enter()
        layout = ParallelConfig(ranks_per_node=world, tensor=tensor, pipeline=pipeline)
        parallel.initialize(layout)
        self.layout = {"tensor": tensor, "pipeline": pipeline, "data": layout.data}
        self.policy: Policy = build_policy(architecture, parallel.model_layout(layout), ModelOptions(dtype))
        self.optimizer: Any = build_optimizer(
            self.policy, lr=lr, weight_decay=0.01, beta1=0.9, beta2=0.99, eps=1e-8, clip_grad=1.0
        )
        self.scheduler = build_scheduler(self.optimizer, lr=lr, warmup_steps=10, weight_decay=0.01)
        self.trained = {"policy": TrainableModel(self.policy, self.optimizer, self.scheduler)}

    def whole_values(self, seed: int) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
        """Every parameter with a value that is a part of the same whole tensor under every layout."""
        parameters = dict(self.policy.modules[0].named_parameters())
        for mapping in stage_mappings(self.policy.architecture, self.policy.stages, groups.pipeline().rank()):
            whole = [_whole(name, self.policy.architecture, seed) for name in mapping.hf]
            yield (
                parameters[mapping.megatron],
                mapping.sharding.shard(whole, groups.tensor().rank(), groups.tensor().size()),
            )

    def fill(self, seed: int) -> Trainer:
        for parameter, value in self.whole_values(seed):
            parameter.data.copy_(value)
        self.optimizer.reload_model_params()
        return self

    def train(self, steps: int) -> Trainer:
        """Optimizer steps with gradients drawn through torch's random state."""
        for _ in range(steps):
            for parameter, value in self.whole_values(seed=int(torch.randint(1 << 30, ()))):
                parameter.main_grad.copy_(value)  # pyright: ignore
            for chunk in self.policy.chunks:
                chunk.finish_grad_sync()
            self.optimizer.step()
            self.scheduler.step(1)
        self.policy.finish_param_sync()
        return self

    def checkpoints(self, root: Path, *, keep: int = 2, asynchronous: bool = True) -> Checkpoints:
        return Checkpoints(
            root, trained=self.trained, config=CONFIG, layout=self.layout, keep=keep, asynchronous=asynchronous
        )

    def save(self, root: Path, step: int, keep: int = 2, state: dict | None = None, asynchronous: bool = True) -> Path:
        checkpoints = self.checkpoints(root, keep=keep, asynchronous=asynchronous)
        checkpoints.save(step, STATE if state is None else state)
        published = checkpoints.publish(wait=True)
        assert published is not None
        return published.path

    def load(self, root: Path) -> LoadedState:
        loaded = self.try_load(root)
        assert loaded is not None
        return loaded

    def try_load(self, root: Path) -> LoadedState | None:
        loaded = self.checkpoints(root).load()
        if loaded is not None and loaded.rng is not None:
            set_rng(loaded.rng)
        return loaded

    def whole(self) -> dict[str, torch.Tensor]:
        """Every parameter and every optimizer state as a whole Hugging Face tensor, gathered without
        Megatron's checkpoint code: from the optimizer's ranges and the weight tables."""
        module, architecture = self.policy.modules[0], self.policy.architecture
        local = {("weight", name): value.detach() for name, value in module.named_parameters()}
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            local |= {(kind, name): self._state(value, kind) for name, value in module.named_parameters()}
        pieces: list = [None] * dist.get_world_size()
        dist.all_gather_object(pieces, (groups.pipeline().rank(), groups.tensor().rank(), local))
        held = {(stage, rank): tensors for stage, rank, tensors in pieces}
        found: dict[str, torch.Tensor] = {}
        for stage in range(groups.pipeline().size()):
            for mapping in stage_mappings(architecture, self.policy.stages, stage):
                for kind in ("weight", "param", "exp_avg", "exp_avg_sq"):
                    parts = [held[stage, r][kind, mapping.megatron] for r in range(groups.tensor().size())]
                    for name, value in zip(mapping.hf, mapping.sharding.join(parts), strict=True):
                        assert torch.equal(found.setdefault(f"{kind} {name}", value), value), (kind, name)
        return found

    def _state(self, parameter: torch.Tensor, kind: str) -> torch.Tensor:
        whole = torch.zeros(parameter.shape)
        for each in self.optimizer.chained_optimizers:
            for ranges in each.gbuf_ranges:
                for buckets in ranges.values():
                    for bucket in buckets:
                        if parameter in bucket["param_map"]:
                            part = bucket["param_map"][parameter]["param"]
                            value = each._get_main_param_and_optimizer_states(parameter)[kind]
                            whole.view(-1)[part.start : part.end] = value.detach()
        dist.all_reduce(whole, group=groups.data())
        return whole

    def rest(self) -> tuple:
        adam = [
            (group["lr"], group["weight_decay"], group["wd_mult"])
            for each in self.optimizer.chained_optimizers
            for group in each.optimizer.param_groups
        ]
        steps = {
            float(moments["step"])
            for each in self.optimizer.chained_optimizers
            for moments in each.optimizer.state.values()
        }
        return adam, steps, self.scheduler.state_dict()


def _whole(name: str, a: Architecture, seed: int) -> torch.Tensor:
    kind = name.rsplit(".", 2)[-2:]
    heads, kv = a.num_heads * a.head_dim, a.num_groups * a.head_dim
    rows = {"q_proj": heads, "k_proj": kv, "v_proj": kv, "o_proj": a.hidden_size, "down_proj": a.hidden_size}
    rows |= {"gate_proj": a.ffn_size, "up_proj": a.ffn_size, "embed_tokens": a.vocab_size, "lm_head": a.vocab_size}
    columns = {"o_proj": heads, "down_proj": a.ffn_size}
    rows |= {"q_norm": a.head_dim, "k_norm": a.head_dim}
    shape = [rows.get(kind[0], a.hidden_size)]
    if kind[0] in rows and kind[1] == "weight" and not kind[0].endswith("norm"):
        shape.append(columns.get(kind[0], a.hidden_size))
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)) * 31 + len(name))
    return torch.randn(shape, generator=generator)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
