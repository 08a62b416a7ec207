"""A model family of the user's own: one file outside the package, and the model is built, loaded and planned by it."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.model import build, hf_weights, parallel
from megatron_ext.model.architectures import FAMILIES, Family, read_architecture
from megatron_ext.model.forward import run_pipeline
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.plan.sizes import Sharding, hf_tensors, num_parameters, stage_parameters
from megatron_ext.train import packing
from tests import gloo, tiny
from tests.model.test_hf_weights import full_logits

GUIDE = Path(__file__).parents[2] / "docs" / "adding-a-model.md"


def own_family(folder: Path) -> Family:
    """The example of docs/adding-a-model.md in a file of its own."""
    (folder / "mistral.py").write_text(GUIDE.read_text().split("```python\n")[1].split("```")[0])
    return runpy.run_path(str(folder / "mistral.py"))["MISTRAL"]


def mistral() -> tuple[MistralForCausalLM, Path]:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        sliding_window=None,
    )
    model, folder = MistralForCausalLM(config), Path(tempfile.mkdtemp(prefix="mistral-"))
    model.save_pretrained(folder)
    return model, folder


def in_megatron(
    rank: int, world: int, path: Path, family: Family, prompt: list[int], response: list[int]
) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """The streamed weights, and the logits that predict the response."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, tensor=world))
    try:
        architecture = read_architecture(read_hf_config(path), family)
        policy = build.build_reference(architecture, ModelLayout(tensor=world), ModelOptions(torch.float32))
        hf_weights.load_weights(policy.modules[0], architecture, path)
        packed = [packing.pack([(prompt, response)])]
        with torch.no_grad():
            [logits] = run_pipeline(policy, packed, lambda *found: full_logits(policy, *found), None) or []
        return list(hf_weights.PolicyWeights(policy)), logits
    finally:
        parallel_state.destroy_model_parallel()


def test_a_family_in_a_file_of_the_users_gives_the_model_of_transformers(tmp_path: Path) -> None:
    family, (model, path) = own_family(tmp_path), mistral()
    prompt, response = [3, 1, 4, 1, 5], [9, 2, 6]
    with torch.no_grad():
        expected = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    stored = load_file(path / "model.safetensors")
    for streamed, logits in gloo.run(in_megatron, 2, path, family, prompt, response):
        assert {name for name, _ in streamed} == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in streamed)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_the_planner_knows_its_sizes(tmp_path: Path) -> None:
    model, path = mistral()
    a = read_architecture(read_hf_config(path), own_family(tmp_path))
    assert dict(hf_tensors(a)) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(p.numel for p in stage_parameters(a, Sharding(), range(2), first=True, last=True)) == num_parameters(a)


def test_a_family_is_for_its_own_models_and_says_what_it_does_not_support(tmp_path: Path) -> None:
    family, (_, path) = own_family(tmp_path), mistral()
    hf = read_hf_config(path)
    with pytest.raises(ValueError, match="MistralForCausalLM of model_type mistral is not supported; expected one of"):
        read_architecture(hf)
    with pytest.raises(ValueError, match="sliding_window is 4096; only None is supported for MistralForCausalLM"):
        read_architecture(hf | {"sliding_window": 4096}, family)
    _, llama = tiny.hf_model("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM of model_type llama .* expected one of MistralForCausalLM"):
        read_architecture(read_hf_config(llama), family)


def test_every_family_is_registered_under_the_model_type_of_transformers() -> None:
    found = {config.model_type: cls.__name__ for config, cls in tiny.KINDS.values()}
    assert found == {model_type: family.name for model_type, family in FAMILIES.items()}
