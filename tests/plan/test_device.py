"""The groups that the planner counts are those that a run sends tensors over: recorded where torch dispatches them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import Config, ParallelConfig
from megatron_ext.model.architectures import read_architecture
from megatron_ext.plan import device
from tests import gloo
from tests.train import whole_run

RECIPE = "siren/siren-tiny-cpu.toml"
MODELS = Path(__file__).parents[2] / "recipes" / "models"
WORLD = 4
NAMES = {  # Megatron-Core's descriptions; the default group has torch's
    "default_pg": "world",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer",
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP": "data",
    "DATA_PARALLEL_GROUP_WITH_CP": "data with context",
    "CONTEXT_PARALLEL_GROUP": "context",
    "EMBEDDING_GROUP": "embedding",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert tensor and model",
    "EXPERT_DATA_PARALLEL_GROUP": "expert data",
}


class Recorder(TorchDispatchMode):
    """Ranks of each group of more than one rank in a collective or a send, by the group's description.

    Left out: groups that were asked to be gloo's, and Python objects, which do not belong on others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}
        self.on_host: set[str] = set()
        self.object = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d" and not self.object:
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
                    self._record(dist.ProcessGroup.unbox(argument))
        return func(*args, **kwargs)

    def _record(self, group: Any) -> None:
        if group.size() > 1 and group.group_name not in self.on_host:
            self.seen[group.group_desc] = group.size()

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        module: Any = dist
        new_group = module.new_group

        def noted(*args: Any, **kwargs: Any) -> Any:
            made = new_group(*args, **kwargs)
            if kwargs.get("backend") == "gloo" and isinstance(made, dist.ProcessGroup):
                self.on_host.add(made.group_name)
            return made

        def quiet(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                outer, self.object = self.object, True
                try:
                    return function(*args, **kwargs)
                finally:
                    self.object = outer

            return call

        module.new_group = noted
        for name in ("all_gather_object", "broadcast_object_list", "gather_object", "scatter_object_list"):
            setattr(module, name, quiet(getattr(module, name)))
        with self:
            yield


def groups_used(rank: int, world: int, folder: Path, overrides: Sequence[str]) -> dict[str, int]:
    recorder = Recorder()
    with recorder.recording():
        assert whole_run._rank(rank, world, folder, RECIPE, overrides, None) == 0
    return recorder.seen


def model(folder: Path, config_class: Any, **options: Any) -> Path:
    """The tiny base's tokenizer with a random model."""
    path, base = folder / "model", json.loads((whole_run.RECIPES / "tiny/base/config.json").read_text())
    shutil.copytree(whole_run.RECIPES / "tiny" / "base", path)
    torch.manual_seed(0)
    shared = {key: base[key] for key in ("vocab_size", "max_position_embeddings", "eos_token_id")}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(config_class(**shared, **sizes, head_dim=8, **options)).save_pretrained(path)
    return path


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


@pytest.mark.parametrize(
    ("config_class", "options", "layout"),
    [
        (Qwen2Config, {"tie_word_embeddings": True}, {"pipeline": 2}),
        (Qwen3MoeConfig, EXPERTS, {"tensor": 2, "sequence": True, "expert": 2}),
        (Qwen3MoeConfig, EXPERTS, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 2}),
        (Qwen2Config, {}, {"context": 2}),
    ],
    ids=["tied PP 2 x DP 2", "TP 2 x EP 2", "TP 2 x EP 2 x ETP 2", "CP 2 x DP 2"],
)
def test_the_planned_groups_are_those_in_use(
    config_class: Any, options: dict[str, Any], layout: dict[str, Any], tmp_path: Path
) -> None:
    path = model(tmp_path, config_class, **options)
    fields = {"tensor": 1} | layout
    overrides = [f"parallel.{name}={str(value).lower()}" for name, value in fields.items()]
    own = (f'model.path="{path}"', 'model.dtype="float32"', "train.steps=1", "rollout.max_response_tokens=8")
    whole_run.data()
    used = gloo.run(groups_used, WORLD, tmp_path, (*own, *overrides), timeout=120)[0]
    config = Config(parallel=ParallelConfig(ranks_per_node=WORLD, **layout))
    planned = device.communicators(read_architecture(read_hf_config(path)), config)
    assert {"world": WORLD} | {NAMES[description]: ranks for description, ranks in used.items()} == planned


def test_a_full_size_layout_counts_every_group_once() -> None:
    """Qwen3-30B-A3B on 32 ranks: eleven groups of more than two ranks, 7.9 GB of buffers by NCCL issue 964."""
    moe = read_architecture(read_hf_config(MODELS / "qwen3-30b-a3b"))
    layout = ParallelConfig(nodes=4, tensor=4, sequence=True, expert=8)
    config = Config.model_validate({"parallel": layout, "rollout": {"engine": "vllm", "tensor_parallel_size": 4}})
    assert device.communicators(moe, config) == {
        **{"world": 32, "optimizer": 32, "tensor": 4, "data": 8, "data with context": 8},
        **{"expert": 8, "expert tensor and model": 8, "expert data": 4, "engine": 4, "engine, PyNccl": 4},
        **{"engine's experts, PyNccl": 4},
    }
    assert device.communicator_bytes(moe, config) == 11 * 688 * 2**20
    alone = Config(parallel=ParallelConfig(ranks_per_node=2, tensor=2))
    assert device.communicator_bytes(moe, alone) == 4 * 544 * 2**20  # world, optimizer, tensor, expert data


def test_ranks_that_send_one_by_one_have_communicators_of_two() -> None:
    """Transformer Engine's ring of more than two, and interleaved stages; two ranks of a ring send in batches."""

    def pairs(**layout: Any) -> list[str]:
        config = Config(parallel=ParallelConfig(nodes=4, **layout))
        found = device.communicators(read_architecture(read_hf_config(MODELS / "qwen3-8b")), config)
        return [name for name, ranks in found.items() if name.endswith(("next", "previous")) and ranks == 2]

    assert pairs(context=2) == [] == pairs(pipeline=4)
    assert pairs(context=4) == ["context with next", "context with previous"]
    assert pairs(pipeline=4, virtual=3) == ["pipeline with next", "pipeline with previous"]
