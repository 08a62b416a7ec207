"""A checkpoint is the same whatever layout wrote it, is read under every other, and converts to the same bytes."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file

from megatron_ext import cpu_compat
from megatron_ext.checkpoint import checkpoint
from megatron_ext.checkpoint.full_tensors import CheckpointTensors, TensorLocation
from megatron_ext.checkpoint.local_shards import trained_pieces
from megatron_ext.checkpoint.manifest import CheckpointError
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import OptimizerConfig, ParallelConfig
from megatron_ext.model import architectures, build, groups, hf_weights, parallel
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.model.trainable import TrainableModel
from tests import gloo, tiny
from tests.checkpoint import known_values
from tools import convert

DENSE: list[tuple[int, dict[str, Any]]] = [
    (4, {"tensor": 2, "pipeline": 2}),
    (2, {"pipeline": 2, "virtual": 2}),
    (3, {"pipeline": 3, "stage_layers": (1, 2, 1)}),
    (2, {"context": 2}),
    (4, {"tensor": 2, "context": 2}),
]
EXPERTS: list[tuple[int, dict[str, Any]]] = [
    (4, {"tensor": 2, "sequence": True, "expert": 2}),
    (4, {"pipeline": 2, "expert": 2}),
    (2, {"tensor": 2, "sequence": True, "expert_tensor": 2}),
    (2, {"pipeline": 2, "virtual": 2}),
    (2, {"context": 2, "expert": 2}),
]
CASES = [("qwen2", *case) for case in DENSE] + [("qwen3_moe", *case) for case in EXPERTS]
CASES.append(("qwen3_moe_mixed", 2, {"pipeline": 2}))


def trained(world: int, path: str, layout: dict[str, Any]) -> TrainableModel:
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, **layout))
    architecture = architectures.read_architecture(read_hf_config(path))
    policy = build.build_policy(architecture, ModelLayout(**layout), ModelOptions(torch.float32))
    for module in policy.modules:
        hf_weights.load_weights(module, architecture, path)
    return TrainableModel.build(policy, OptimizerConfig(lr=0.01, clip_grad=1e9))


def of(each: TrainableModel, root: Path, config: dict[str, Any], layout: dict[str, Any]) -> checkpoint.Checkpoints:
    options: dict[str, Any] = {"config": config, "layout": layout, "keep": 1, "asynchronous": True}
    return checkpoint.Checkpoints(root, trained={"policy": each}, **options)


def save(rank: int, world: int, path: str, layout: dict[str, Any], root: Path) -> None:
    """The checkpoint of a model after one step whose gradient is the weights themselves, so that no layout rounds."""
    each = trained(world, path, layout)
    each.zero_grad()
    for module in each.model.modules:
        for name, parameter in module.named_parameters():
            ranks = groups.expert_data() if ".experts." in name else groups.data_context()
            vars(parameter)["main_grad"].copy_(parameter.detach() / ranks.size())
    for chunk in each.model.chunks:
        chunk.finish_grad_sync()
    each.update(1)
    each.model.finish_param_sync()
    checkpoints = of(each, root, {"model": {"path": path}}, layout)
    checkpoints.save(0, {})
    assert checkpoints.publish(wait=True) is not None


def load(rank: int, world: int, path: str, layout: dict[str, Any], root: Path) -> tuple[dict, dict]:
    """The weights that a checkpoint has under a layout: as part of a resumed run, and alone."""
    each = trained(world, path, layout)
    assert of(each, root, {}, layout).load() is not None
    resumed = {name: value.clone() for name, value in hf_weights.PolicyWeights(each.model)}
    for module in each.model.modules:
        for parameter in module.parameters():
            parameter.data.zero_()
    checkpoint.load_model(root / "step_000000", each.model.modules)
    return resumed, dict(hf_weights.PolicyWeights(each.model))


def everything(path: Path, vocab: int) -> dict[str, torch.Tensor]:
    """Each key's full tensor, optimizer state included, without vocabulary padding."""
    stored = CheckpointTensors(path)
    sizes = {key: tuple(entry.size) for key, entry in stored.entries.items() if entry.size}
    found = {key: stored.read(TensorLocation(key, (), (), size)) for key, size in sizes.items()}
    return {
        key: value[:vocab] if "embedding" in key or "output_layer" in key else value for key, value in found.items()
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one rank saves, by kind of model, with its export beside it."""
    roots = {}
    for kind in {kind for kind, _, _ in CASES}:
        roots[kind] = tmp_path_factory.mktemp(kind)
        gloo.run(save, 1, str(tiny.hf_model(kind)[1]), {}, roots[kind])
        assert convert.main(["to-hf", str(roots[kind]), str(roots[kind] / "hf")]) == 0
    return roots


@pytest.mark.parametrize(("kind", "world", "layout"), CASES, ids=str)
def test_every_layout_saves_the_same_and_loads_it(
    kind: str, world: int, layout: dict[str, Any], reference: dict[str, Path], tmp_path: Path
) -> None:
    model = str(tiny.hf_model(kind)[1])
    gloo.run(save, world, model, layout, tmp_path)
    expected = everything(reference[kind] / "step_000000", tiny.VOCAB)
    found = everything(tmp_path / "step_000000", tiny.VOCAB)
    assert found.keys() == expected.keys() and any("exp_avg_sq" in key for key in found)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert convert.main(["to-hf", str(tmp_path), str(tmp_path / "hf")]) == 0
    expected = reference[kind] / "hf" / "model.safetensors"
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == expected.read_bytes()
    exported = load_file(expected)
    for resumed, alone in gloo.run(load, world, model, layout, reference[kind]):
        for weights in (resumed, alone):
            assert weights.keys() == exported.keys()
            assert all(torch.equal(weights[name], value) for name, value in exported.items())


@pytest.mark.parametrize(("kind", "world", "layout"), [CASES[0], ("qwen3_moe", *EXPERTS[1])], ids=str)
def test_a_converted_model_directory_is_read_under_every_layout(
    kind: str, world: int, layout: dict[str, Any], tmp_path: Path
) -> None:
    _, path = tiny.hf_model(kind)
    assert convert.main(["from-hf", str(path), str(tmp_path)]) == 0
    stored = load_file(path / "model.safetensors")
    for weights in gloo.run(load_alone, world, str(path), layout, tmp_path):
        assert weights.keys() == stored.keys() and all(torch.equal(weights[n], value) for n, value in stored.items())


def load_alone(rank: int, world: int, path: str, layout: dict[str, Any], root: Path) -> dict[str, torch.Tensor]:
    model = trained(world, path, layout).model
    for parameter in (parameter for module in model.modules for parameter in module.parameters()):
        parameter.data.zero_()
    checkpoint.load_model(root / "step_000000", model.modules)
    return dict(hf_weights.PolicyWeights(model))


def test_a_checkpoint_of_another_model_is_refused_by_name(reference: dict[str, Path]) -> None:
    stored = CheckpointTensors(reference["qwen2"] / "step_000000")
    own = architectures.read_architecture(read_hf_config(tiny.hf_model("qwen2")[1]))
    vocab = own.vocab_size
    assert stored.check_policy(own, 1) == torch.float32
    for changed, tensor, message in (
        ({"qk_norm": True}, 1, "missing tensor decoder.layers.self_attention.q_layernorm.weight"),
        ({"qkv_bias": False}, 1, "unexpected tensor decoder.layers.self_attention.linear_qkv.bias"),
        ({"tied": True}, 1, "unexpected tensor output_layer.weight"),
        ({"vocab_size": vocab - 1}, 1, f"output_layer.weight: found [{vocab}, 32], expected [{vocab - 1}, 32]"),
        ({"vocab_size": vocab + 1}, 1, f"expected [{vocab + 1}, 32]"),
        ({"vocab_size": vocab - 9}, 2, f"expected [{vocab - 9 + (vocab - 9) % 2}, 32]"),
    ):
        with pytest.raises(CheckpointError) as caught:
            stored.check_policy(replace(own, **changed), tensor)
        assert message in str(caught.value)
    location = TensorLocation("output_layer.weight", (), (), (61, 32), padded=True)
    assert vocab == 61
    padded = [location.saved_shape(own.padded_vocab(tensor)) for tensor in (1, 2, 4)]
    assert padded == [(61, 32), (62, 32), (64, 32)]


def loads_known(rank: int, world: int, layout: dict[str, Any], root: Path) -> None:
    each = known_values.build_trained(world, layout)
    for module in each.model.modules:
        for parameter in module.parameters():
            parameter.data.fill_(torch.nan)
    loaded = of(each, root, {}, layout).load()
    assert loaded is not None and loaded.step == known_values.STEPS and loaded.state["note"]
    values = {(parameter, kind): tensor for parameter, kind, tensor in known_values.expected(each)}
    assert all(
        torch.equal(parameter, tensor.bfloat16()) for (parameter, kind), tensor in values.items() if kind == "weight"
    )
    count = 0
    for parameter, own, states in known_values.held(each):
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert torch.equal(states[kind].detach(), values[parameter, kind].view(-1)[own]), kind
        assert float(states["step"]) == known_values.STEPS
        count += 1
    assert count and each.scheduler.num_steps == 1 + known_values.STEPS


@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, {}), (2, {}), (4, known_values.LAYOUT), (4, {"tensor": 4, "sequence": True}), (2, {"pipeline": 2})],
    ids=str,
)
def test_a_checkpoint_of_the_optimizer_that_was_gathered_still_loads(
    world: int, layout: dict[str, Any], tmp_path: Path
) -> None:
    with tarfile.open(Path(__file__).parent / "checkpoint_of_5053ed2.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    gloo.run(loads_known, world, layout, tmp_path)


def saves_known(rank: int, world: int, layout: dict[str, Any], root: Path) -> None:
    each = known_values.build_trained(world, layout)
    trained_pieces("policy", each)  # gives the optimizer its state
    known_values.fill(each)
    each.scheduler.step(known_values.STEPS)
    checkpoints = of(each, root, {}, layout)
    checkpoints.save(known_values.STEPS, {"note": "known"})
    assert checkpoints.publish(wait=True) is not None


def test_a_stage_without_experts_saves_and_loads_like_the_others(tmp_path: Path) -> None:
    """The optimizer of its experts has no state, and no steps."""
    gloo.run(saves_known, 2, {"pipeline": 2}, tmp_path)
    gloo.run(loads_known, 4, known_values.LAYOUT, tmp_path)


def with_extra_states(rank: int, world: int, function: Callable, *args: Any) -> Any:
    """``function`` where a layer of experts has what it has under Transformer Engine: 16 pickled objects."""
    kind: Any = GPTModel
    real = kind.sharded_state_dict

    def sharded_state_dict(self: Any, *given: Any, **named: Any) -> dict[str, Any]:
        layer = "decoder.layers.0.mlp.experts.linear_fc1._extra_state"
        names = [f"{layer}{number or ''}" for number in range(16)]
        extra = {name: ShardedObject(name, io.BytesIO(b"recipe"), (1,), (0,)) for name in names}
        return real(self, *given, **named) | extra

    kind.sharded_state_dict = sharded_state_dict
    return function(rank, world, *args)


def test_extra_states_of_experts_are_neither_saved_nor_missed(reference: dict[str, Path], tmp_path: Path) -> None:
    model, layout = str(tiny.hf_model("qwen3_moe")[1]), {"tensor": 2, "sequence": True, "expert": 2}
    gloo.run(with_extra_states, 4, save, model, layout, tmp_path)
    assert not [key for key in CheckpointTensors(tmp_path / "step_000000").entries if "extra" in key]
    assert convert.main(["to-hf", str(tmp_path), str(tmp_path / "hf")]) == 0
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    expected = load_file(reference["qwen3_moe"] / "hf" / "model.safetensors")
    assert exported.keys() == expected.keys() and all(torch.equal(exported[n], value) for n, value in expected.items())
    for resumed, alone in gloo.run(with_extra_states, 4, load, model, layout, tmp_path):
        assert all(torch.equal(each[name], value) for each in (resumed, alone) for name, value in expected.items())
