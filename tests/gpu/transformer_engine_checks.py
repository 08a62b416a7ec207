"""Layers of Transformer Engine on a GPU: names, precision beside transformers, recomputation, fusions, full size.

Weights are random and exact in bf16. The truth is transformers in fp32 with the same weights; what transformers itself
loses in bf16 is the measure of what may be lost. Without Transformer Engine (a rehearsal) the same checks run on the
torch modules that stand for its layers.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.loading import read_config
from megatron_ext.config.schema import AlarmsConfig, Config
from megatron_ext.methods.base import Needs
from megatron_ext.model import kernels
from megatron_ext.model.architectures import read_architecture
from megatron_ext.model.build import build_modules
from megatron_ext.model.hf_weights import module_mappings
from megatron_ext.model.layers import have_transformer_engine
from megatron_ext.model.megatron_config import Fusions, ModelLayout, ModelOptions
from megatron_ext.train.method_factory import create_method
from tests import tiny
from tests.gpu import measure, models, training_checks
from tests.gpu.harness import Here, Line, equal, fact, limit
from tests.gpu.processes import Command

FULL = "recipes/siren/siren-qwen2.5-math-7b-2n8g.toml"
SHAPE = "recipes/models/qwen2.5-math-1.5b"
MODEL_TOKENS = ((100, 400), (30, 700), (1, 5), (256, 800), (64, 64))  # prompt and response of each sequence
FUSIONS = ("rope", "bias_activation", "gradient_accumulation", "moe_permute")
ATTENTION = ("flash", "fmha", "sdpa", "attn")  # in the names of fused attention's kernels
WORSE = 1.5  # times what transformers loses in bf16: kernels of another order of sums
GB = 1e9


def present(here: Here) -> Iterator[Line]:
    """Megatron-Core could import Transformer Engine, so its layers are what is built."""
    yield equal("layers are Transformer Engine's", have_transformer_engine(), not here.rehearse)


def names(here: Here) -> Iterator[Line]:
    """The layers' parameters are called, and shaped, what the tables say."""
    for kind in tiny.KINDS:
        _, path = tiny.hf_model(kind)
        architecture = read_architecture(read_hf_config(path))
        with models.one_rank():
            (module,) = build_modules(architecture, ModelLayout(), ModelOptions(torch.bfloat16))
            found = {name: tuple(p.shape) for name, p in module.named_parameters()}
            expected = {mapping.megatron: mapping.shape for mapping in module_mappings(module, architecture)}
            others = sorted(set(module.state_dict()) - set(found))
        yield equal(f"{kind}: names in one and not the other", _few(found.keys() ^ expected.keys()), "none")
        wrong = [name for name, shape in found.items() if "embed" not in name and "output_layer" not in name]
        wrong = [name for name in wrong if expected.get(name) != found[name]]
        yield equal(f"{kind}: of another shape", _few(wrong), "none")
        unknown = [name for name in others if "_extra_state" not in name and not name.endswith("inv_freq")]
        yield equal(f"{kind}: other entries of the state", _few(unknown), "none")


def _few(found: Collection[str]) -> str:
    return f"{len(found)}: {', '.join(sorted(found)[:3])}" if found else "none"


@dataclass(frozen=True)
class Truth:
    """A model's log-probabilities ``[T]`` and gradients by HF name in fp32, and what transformers loses in bf16."""

    folder: Path
    weights: Mapping[str, Tensor]
    pairs: list[models.Pair]
    logprobs: Tensor
    gradients: Mapping[str, Tensor]
    lost_logprob: float  # mean, nats
    lost_gradient: float  # relative, all parameters together

    @classmethod
    def of(cls, here: Here, experts: bool) -> Truth:
        folder = _shape(here, experts)
        torch.manual_seed(0)
        with torch.device(here.device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
        if experts:
            model.set_experts_implementation("eager")  # grouped products know no fp32 on a GPU
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.02 if here.device == "cuda" else 0.2)
                if "norm" in name:
                    parameter.add_(1)
                parameter.copy_(parameter.bfloat16())
        weights = {name: tensor.bfloat16() for name, tensor in _by_hf_name(here, model, model.state_dict()).items()}
        lengths = here.size(MODEL_TOKENS, ((5, 9), (1, 3), (8, 11)))
        pairs = models.sequences(model.config.vocab_size, lengths)
        logprobs, gradients = _passes(here, model, pairs)
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay fp32, as when it is loaded
            parameter.data = parameter.data.bfloat16()
        lower, lower_gradients = _passes(here, model, pairs)
        lost = float((lower - logprobs).abs().mean())
        return cls(folder, weights, pairs, logprobs, gradients, lost, _distance(lower_gradients, gradients))


def _shape(here: Here, experts: bool) -> Path:
    """A directory with config.json: Qwen2.5-1.5B, or a small mixture of experts; tiny ones in a rehearsal."""
    if not experts:
        return here.size(Path(SHAPE), tiny.hf_model("qwen2")[1])
    if here.rehearse:
        return tiny.hf_model("qwen3_moe")[1]
    folder = here.folder / "moe-shape"
    config = Qwen3MoeConfig(
        vocab_size=32_000,
        hidden_size=1_024,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,  # pyright: ignore[reportCallIssue]
        moe_intermediate_size=384,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=4_096,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    return folder


def _passes(here: Here, model: PreTrainedModel, pairs: list[models.Pair]) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of each sequence alone and the gradient of minus their sum."""
    model.zero_grad()
    found = []
    for pair in pairs:
        logprobs = training_checks.logprobs_of(model, pair)
        (-logprobs.sum()).backward()
        found.append(logprobs.detach().float())
    gradients = {name: p.grad.detach().float() for name, p in model.named_parameters() if p.grad is not None}
    return torch.cat(found), _by_hf_name(here, model, gradients)


def _by_hf_name(here: Here, model: PreTrainedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a transformers model by the names of its files: in memory it holds a layer's experts in one tensor."""
    if not any(".experts." in name for name in values):
        return {name: value.detach() for name, value in values.items()}
    folder = here.folder / "by-hf-name"
    model.save_pretrained(folder, state_dict=dict(values))
    found = load_file(folder / "model.safetensors", device=here.device)
    shutil.rmtree(folder)
    return found


def _distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of all tensors together, relative: |found - expected| / |expected|."""
    off = sum(float((found[name] - value).square().sum()) for name, value in expected.items())
    return (off / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def _config(here: Here, truth: Truth, *overrides: str) -> Config:
    one = ("parallel.nodes=1", "parallel.ranks_per_node=1", "parallel.tensor=1", "parallel.sequence=false")
    return read_config(FULL, [*one, f'model.path="{truth.folder}"', *overrides])


@dataclass(frozen=True)
class Found:
    """What one way of building the model makes of the truth's sequences."""

    logprobs: Tensor
    alone: Tensor  # of each sequence in a micro-batch of its own
    gradients: dict[str, Tensor]  # by HF name
    peak: float
    milliseconds: float


def _built(here: Here, truth: Truth, *overrides: str) -> Found:
    config = _config(here, truth, *overrides)
    architecture = read_architecture(read_hf_config(config.model.path))
    with models.one_rank():
        learning = models.Learning.build(config, architecture, Needs(), truth.weights)
        packed = [models.pack(truth.pairs, config.parallel)]
        logprobs = learning.score(packed)[0].logprob
        single = [models.pack([pair], config.parallel) for pair in truth.pairs]
        alone = torch.cat([stats.logprob for stats in learning.score(single)])
        peak = measure.peak_bytes(lambda: learning.gradients(packed), here.device)
        took = measure.medians_ms({"": lambda: learning.gradients(packed)}, here.device, repeat=here.size(5, 1))[""]
        learning.gradients(packed)
        (module,) = learning.trained.model.modules
        gradients: dict[str, Tensor] = {}
        for mapping in module_mappings(module, architecture):
            parts = mapping.sharding.join([learning.gradient_of(mapping.megatron).clone()])
            gradients |= dict(zip(mapping.hf, parts, strict=True))
        return Found(logprobs, alone, gradients, peak, took)


def _judged(name: str, found: Found, truth: Truth) -> Iterator[Line]:
    off = float((found.logprobs - truth.logprobs).abs().mean())
    yield limit(f"{name}: log-probs off fp32, mean", off, WORSE * truth.lost_logprob, "nats")
    gradients = {name: value for name, value in found.gradients.items() if name in truth.gradients}
    assert gradients.keys() == truth.gradients.keys(), gradients.keys() ^ truth.gradients.keys()
    yield limit(f"{name}: gradients off fp32", _distance(gradients, truth.gradients), WORSE * truth.lost_gradient)


def precision(here: Here) -> Iterator[Line]:
    """bf16 log-probabilities and gradients at the 1.5B shape; packed sequences beside each alone."""
    truth = Truth.of(here, experts=False)
    yield fact("transformers in bf16: log-probs off fp32, mean, nats", truth.lost_logprob)
    yield fact("transformers in bf16: gradients off fp32", truth.lost_gradient)
    found = _built(here, truth)
    yield from _judged("packed", found, truth)
    off = float((found.alone - truth.logprobs).abs().mean())
    yield limit("alone: log-probs off fp32, mean", off, WORSE * truth.lost_logprob, "nats")
    apart = float((found.alone - found.logprobs).abs().mean())
    yield limit("packed off alone, mean", apart, WORSE * truth.lost_logprob, "nats")


def recompute(here: Here) -> Iterator[Line]:
    """What backward computes again changes memory and time, and nothing else beyond bf16."""
    truth = Truth.of(here, experts=False)
    for mode in ("none", "mlp", "full"):
        found = _built(here, truth, f'model.recompute="{mode}"')
        yield from _judged(mode, found, truth)
        yield fact(f"{mode}: peak of forward and backward", found.peak / GB, "GB")
        yield fact(f"{mode}: forward and backward", found.milliseconds, "ms")


def fusions(here: Here) -> Iterator[Line]:
    """Each fused kernel on and off: both as near to fp32 as transformers is, and how far apart."""
    for experts in (False, True):
        truth, kind = Truth.of(here, experts), "experts" if experts else "dense"
        keys = FUSIONS if experts else FUSIONS[:-1]
        every = _built(here, truth)
        yield from _judged(f"{kind}, all on", every, truth)
        yield fact(f"{kind}, all on: forward and backward", every.milliseconds, "ms")
        for off in here.size(keys, keys[-1:]):
            found = _built(here, truth, f"model.fusions.{off}=false")
            yield from _judged(f"{kind}, {off} off", found, truth)
            apart = float((found.logprobs - every.logprobs).abs().max())
            yield fact(f"{kind}, {off} off: log-probs apart, largest, nats", apart)
            yield fact(f"{kind}, {off} off: gradients apart", _distance(found.gradients, every.gradients))
            yield fact(f"{kind}, {off} off: forward and backward", found.milliseconds, "ms")


def experts_run(here: Here) -> Iterator[Line]:
    """A mixture of 16 experts trains, is saved, resumed, and converted where no GPU is seen."""
    size = {"layers": 4, "experts": 16, "hidden": 64, "expert_width": 32}
    model = tiny.experts_model(here.folder / "moe", dtype=torch.bfloat16, **size)
    options = (f'model.path="{model}"', 'model.dtype="bfloat16"', "rollout.prompts=4", "rollout.samples=4")
    options = (*options, "train.mini_batch_prompts=2")
    first = training_checks.train(here, "experts", *options, "train.steps=1")
    resumed = training_checks.train(here, "experts", *options, "train.steps=2")
    yield equal("steps of both runs together", len(resumed.metrics()), 2)
    yield limit("mismatch with the sampler", resumed.metrics()[1]["mismatch/mean"], AlarmsConfig().mismatch, "nats")
    out = here.folder / "converted"
    Command(here, "tools.convert", ["to-hf", str(first.path), str(out)], {"CUDA_VISIBLE_DEVICES": ""}).wait()
    trained = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    same = [torch.equal(value, before[name]) for name, value in trained.state_dict().items()]
    yield equal("tensors", len(same), len(before))
    yield fact("of them moved by training", same.count(False))
    yield equal("every value is finite", all(bool(v.isfinite().all()) for v in trained.state_dict().values()), True)


def dry_run(here: Here) -> Iterator[Line]:
    """The documented first step, on this machine with its packages and the GPU hidden."""
    for recipe in here.size(("recipes/siren/siren-tiny-cpu.toml", FULL), (FULL,)):
        command = Command(here, "tools.train", [recipe, "--dry-run"], {"CUDA_VISIBLE_DEVICES": ""})
        command.wait()
        yield fact(Path(recipe).stem, command.output.strip().splitlines()[-1])


def full_size(here: Here) -> Iterator[Line]:
    """Score and update of SIREN's 7B recipe on rank 0 of TP 4 with sequence parallelism, DP 4, at 16k tokens.

    The other ranks are echoes (echo.py): memory and kernels are real, the time is without communication.
    """
    off = [f"model.fusions.{name}=false" for name in FUSIONS]
    for name, overrides in (("fusions on", []), ("fusions off", off)):
        yield from _full_step(here, name, overrides)


def _kernels(config: Config) -> str:
    """What a run says when it starts. Raises ValueError where attention would not be a fused one."""
    return kernels.describe(
        read_architecture(read_hf_config(config.model.path)),
        tensor=config.parallel.tensor,
        dtype=getattr(torch, config.model.dtype),
        longest=config.longest_sequence,
        fusions=Fusions(**config.model.fusions.model_dump()),
    )


def _full_step(here: Here, name: str, overrides: list[str]) -> Iterator[Line]:
    overrides = [*overrides, "train.micro_batch_tokens=16384"]
    small = ["data.max_prompt_tokens=8", "rollout.max_response_tokens=24", "train.micro_batch_tokens=128"]
    small = ['model.path="recipes/tiny/base"', *small] if here.rehearse else []
    config = read_config(FULL, [*overrides, *small])
    architecture = read_architecture(read_hf_config(config.model.path))
    lengths = (config.data.max_prompt_tokens, config.rollout.max_response_tokens)
    count = config.train.micro_batch_tokens // config.longest_sequence
    own = architecture.vocab_size // config.parallel.tensor  # tokens whose embedding and logit this rank holds
    pairs = models.sequences(own, [lengths] * count)
    yield fact(f"{name}: layers", _kernels(config))
    with models.first_rank_of(config.parallel):
        learning = models.Learning.build(config, architecture, create_method(config).needs, None)
        packed = [models.pack(pairs, config.parallel)]
        for line in training_checks.phases(here, learning, packed):
            yield replace(line, what=f"{name}: {line.what}")
        for phase, work in (("score", learning.score), ("update", learning.update)):

            def run(work: Any = work) -> object:
                return work(packed)

            counts = measure.count(run, here.device)
            yield fact(f"{name}, {phase}: kernels", counts.launches)
            yield fact(f"{name}, {phase}: synchronisations torch sees", counts.synchronisations)
            found = measure.top_kernels(run, here.device)
            for kernel, spent, number in found[:12]:
                yield fact(f"{name}, {phase}: {number} x {kernel[:60]}", spent, "ms")
            attention = [kernel[:40] for kernel, *_ in found if any(word in kernel.lower() for word in ATTENTION)]
            yield fact(f"{name}, {phase}: attention by", "; ".join(attention) or "no kernel of a known name")
