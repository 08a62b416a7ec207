"""What is done under Transformer Engine's own layers, in a process that has loaded them (see source.py).

    python -m tests.transformer_engine.inside FUNCTION JSON      prints JSON: the function's result of every rank

The functions take ``(rank, world, **JSON)``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from tests.transformer_engine import source

BINDINGS = source.load() if __name__ == "__main__" else None
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from packaging.version import Version  # noqa: E402
from transformer_engine.pytorch import DotProductAttention  # noqa: E402
from transformer_engine.pytorch.attention.dot_product_attention import utils  # noqa: E402
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule  # noqa: E402

from megatron_ext import cpu_compat  # noqa: E402
from megatron_ext.checkpoint.checkpoint import Checkpoints  # noqa: E402
from megatron_ext.config.checks import read_hf_config as read_json  # noqa: E402
from megatron_ext.config.schema import Config, OptimizerConfig, ParallelConfig  # noqa: E402
from megatron_ext.model import architectures, hf_weights, kernels, layers, parallel  # noqa: E402
from megatron_ext.model.build import Policy, build_policy  # noqa: E402
from megatron_ext.model.megatron_config import Fusions, ModelOptions  # noqa: E402
from megatron_ext.model.trainable import TrainableModel  # noqa: E402
from tests import gloo  # noqa: E402
from tests.train.tiny_run import TINY as ARCHITECTURE  # noqa: E402

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def policy_of(world: int, path: str, layout: Mapping[str, Any]) -> Policy:
    """``layout``: keys of [parallel], and ``fusions``, whether there are any."""
    layout = dict(layout)
    fusions = Fusions(*[layout.pop("fusions", True)] * 4)
    cpu_compat.enter()
    assert layers.have_transformer_engine()
    config = ParallelConfig(ranks_per_node=world, **layout)
    parallel.initialize(config)
    architecture = architectures.read_architecture(read_json(path))
    options = ModelOptions(torch.float32, fusions=fusions)
    return build_policy(architecture, parallel.model_layout(config), options, overlap=parallel.overlap(config))


def names(rank: int, world: int, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Of the model in each case of (directory, layout): what ``described`` says."""
    found = []
    for path, layout in cases:
        [module] = policy_of(world, path, layout).modules
        found.append(described(module))
        parallel_state.destroy_model_parallel()
    return found


def described(module: Any) -> dict[str, Any]:
    """Where its classes come from, parameters, extra states, switches, and what of it stands where in a checkpoint."""
    sharded = module.sharded_state_dict(metadata=METADATA)
    apply_factories(sharded)
    entries = list(nested_values(sharded))
    parameters = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    linear = [child for child in module.modules() if isinstance(child, TransformerEngineBaseModule)]
    return {
        "classes": sorted({base.__module__ for child in module.modules() for base in type(child).__mro__}),
        "parameters": parameters,
        "others": sorted(module.state_dict().keys() - parameters.keys()),
        "tensors": [
            [e.key, e.global_shape, e.global_offset, e.local_shape] for e in entries if isinstance(e, ShardedTensor)
        ],
        "objects": sorted(name for name, e in sharded.items() if isinstance(e, ShardedObject)),
        "accumulates": [child.fuse_wgrad_accumulation for child in linear if hasattr(child, "in_features")],
        "rope": module.config.apply_rope_fusion,
        "bias_activation": module.config.bias_activation_fusion,
        "moe_permute": module.config.moe_permute_fusion,
    }


def save(rank: int, world: int, path: str, layout: dict[str, Any], root: str) -> dict[str, Any]:
    """The checkpoint of a run that has the model's weights, with moments as if it had trained."""
    each = trained(world, path, layout, fill=True)
    generator = torch.Generator().manual_seed(rank)
    for moments in states(each):
        for value in moments.values():
            value.copy_(torch.rand(value.shape, generator=generator))
    checkpoints = checkpoints_of(each, world, path, layout, root)
    checkpoints.save(1, {})
    checkpoints.publish(wait=True)
    return contents(each)


def resume(rank: int, world: int, path: str, layout: dict[str, Any], root: str) -> dict[str, Any]:
    """What a new process has after loading that checkpoint."""
    each = trained(world, path, layout, fill=False)
    loaded = checkpoints_of(each, world, path, layout, root).load()
    assert loaded is not None and loaded.step == 1
    return contents(each) | {"refused": list(loaded.refused)}


def checkpoints_of(each: TrainableModel, world: int, path: str, layout: Mapping[str, Any], root: str) -> Checkpoints:
    return Checkpoints(
        Path(root) / "checkpoints",
        trained={"policy": each},
        config=Config.model_validate({"model": {"path": path}}).model_dump(),
        layout=ParallelConfig(ranks_per_node=world, **layout).model_dump(),
        keep=1,
        asynchronous=False,
    )


def trained(world: int, path: str, layout: Mapping[str, Any], *, fill: bool) -> TrainableModel:
    policy = policy_of(world, path, layout)
    for module in policy.modules:
        if fill:
            hf_weights.load_weights(module, policy.architecture, path)
        else:
            for parameter in module.parameters():
                parameter.data.zero_()
    each = TrainableModel.build(policy, OptimizerConfig())
    for part in optimizers(each):
        part.init_state_fn(part.optimizer, part.config)
    return each


def optimizers(each: TrainableModel) -> list[Any]:
    return getattr(each.optimizer, "chained_optimizers", [each.optimizer])


def states(each: TrainableModel) -> list[dict[str, Any]]:
    """Adam's moments of every parameter."""
    return [state for part in optimizers(each) for state in part.optimizer.state.values()]


def contents(each: TrainableModel) -> dict[str, Any]:
    """Hashes of the weights as Hugging Face tensors and of the moments, and whose optimizer has them."""
    digest = hashlib.sha256()
    for moments in states(each):
        for name in sorted(moments):
            digest.update(name.encode() + moments[name].detach().numpy().tobytes())
    return {
        "weights": {
            name: hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
            for name, value in hf_weights.PolicyWeights(each.model)
        },
        "moments": digest.hexdigest(),
        "optimizers": sorted({type(part.optimizer).__module__ for part in optimizers(each)}),
    }


def attention(rank: int, world: int, gpus: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    """What is said of the kernels on each GPU: compute capability, cuDNN's answer, flash-attn's version or none."""
    cpu_compat.enter()
    found = []
    bindings: Any = BINDINGS
    for gpu in gpus:
        capability = tuple(gpu["capability"])
        for name, value in {"capability": capability, "properties": None, "name": gpu["name"]}.items():
            setattr(torch.cuda, f"get_device_{name}", lambda *_, value=value: value)
        utils.get_device_compute_capability = lambda capability=capability: capability
        backend = getattr(bindings.NVTE_Fused_Attn_Backend, gpu["cudnn"])
        bindings.get_fused_attn_backend = lambda *_, backend=backend: backend
        version = gpu["flash"]
        utils.FlashAttentionUtils.is_installed = version is not None
        utils.FlashAttentionUtils.version = Version(version or "0")
        utils.FlashAttentionUtils.set_flash_attention_version() if version else None
        try:
            found.append(
                kernels.describe(
                    ARCHITECTURE, dtype=getattr(torch, gpu["dtype"]), fusions=Fusions(moe_permute=False), **options
                )
            )
        except ValueError as error:
            found.append(f"refused: {error}")
    return found


def packed_call(rank: int, world: int) -> list[str]:
    """What Megatron-Core passes to Transformer Engine's attention for packed sequences and it does not take."""
    taken = inspect.signature(DotProductAttention.forward).parameters
    passed = {field.name for field in dataclasses.fields(PackedSeqParams)} - {"cp_group", "local_cp_size"}
    return sorted(passed - taken.keys())


def cut_attention(rank: int, world: int, path: str) -> list[Any]:
    """What the attention of each layer is made with and called with where sequences are cut over all ranks."""
    [module] = policy_of(world, path, {"context": world}).modules
    starts, found = torch.tensor([0, 8, 12], dtype=torch.int32), []
    with mock.patch.object(DotProductAttention, "forward", lambda self, *arguments, **named: named):
        for child in module.modules():
            if isinstance(child, DotProductAttention):
                each: Any = child
                params = PackedSeqParams("thd", starts, starts, max_seqlen_q=8, max_seqlen_kv=8)
                layers.cut_over_context(params, torch.arange(6))
                own = torch.empty(6, 4, 8)
                named = each(own, own, own, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
                lengths = [named[f"cu_seqlens_{kind}"].tolist() for kind in ("q", "kv", "q_padded", "kv_padded")]
                ranks = torch.distributed.get_process_group_ranks(each.cp_group)
                found.append([each.cp_comm_type, ranks, named["attn_mask_type"], named["max_seqlen_q"], lengths])
    return found


def main(function: str, options: str) -> None:
    arguments = json.loads(options)
    world = arguments.pop("world")

    def call(rank: int, world: int) -> Any:
        return globals()[function](rank, world, **arguments)

    print(json.dumps(gloo.run(call, world, timeout=200)))


if __name__ == "__main__":
    main(*sys.argv[1:])
