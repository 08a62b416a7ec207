"""Training on a GPU against the CPU and transformers: parity, whole runs, kill and resume, offloads, memory."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.loading import read_config
from megatron_ext.methods.base import Needs
from megatron_ext.model import hf_weights
from megatron_ext.model.architectures import read_architecture
from megatron_ext.model.build import build_reference
from megatron_ext.model.forward import forward
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.plan import device
from megatron_ext.plan.layout import make_plan
from megatron_ext.plan.memory import Roles
from megatron_ext.plan.speed import RATES
from megatron_ext.train import packing
from megatron_ext.train.method_factory import create_method
from megatron_ext.types import PackedSequences
from tests import tiny
from tests.gpu import measure, models
from tests.gpu.harness import Here, Line, anchor, equal, fact, limit
from tests.gpu.processes import Command
from tools import ranks

STEPS = 4
RECIPE = "recipes/siren/siren-tiny-cpu.toml"
GB = 1e9
TRAINED = ("weights", "gradients", "optimizer")  # items of the planner
PASSES = ("activations", "head and statistics")


def parity(here: Here) -> Iterator[Line]:
    """Log-probabilities of every model family in fp32 against transformers in fp64, and the weights back out."""
    for kind in tiny.KINDS:
        model, path = tiny.hf_model(kind)
        pairs = models.sequences(tiny.VOCAB, [(5, 9), (1, 3), (8, 11), (2, 1)])
        architecture = read_architecture(read_hf_config(path))
        with models.one_rank():
            policy = build_reference(architecture, ModelLayout(), ModelOptions(torch.float32))
            for module in policy.modules:
                hf_weights.load_weights(module, architecture, path)
            found = forward(policy, [packing.pack(pairs)], Needs(), 1.0)
            assert found is not None
            streamed = {name: tensor.cpu() for name, tensor in hf_weights.PolicyWeights(policy)}
        if "moe" in kind:
            model.set_experts_implementation("eager")  # grouped products know neither fp64 nor, on a GPU, fp32
        in_fp32 = transformers_logprobs(model.to(torch.device(here.device)), pairs)  # pyright: ignore[reportArgumentType]
        exact = transformers_logprobs(model.double(), pairs)
        model.float().cpu()
        lost = float((in_fp32 - exact).abs().max())
        error = float((found[0].logprob.double().cpu() - exact).abs().max())
        yield limit(f"{kind}: log-probs off fp64, of transformers' fp32 x 4", error / (4 * lost + 1e-6), 1)
        stored = load_file(path / "model.safetensors")
        same = streamed.keys() == stored.keys() and all(torch.equal(streamed[name], stored[name]) for name in stored)
        yield equal(f"{kind}: weights streamed back to the bit", same, True)


def transformers_logprobs(model: PreTrainedModel, pairs: list[models.Pair]) -> Tensor:
    """``[T]`` fp64, each sequence alone."""
    with torch.no_grad():
        return torch.cat([logprobs_of(model, pair) for pair in pairs]).double().cpu()


def logprobs_of(model: PreTrainedModel, pair: models.Pair) -> Tensor:
    prompt, response = pair
    device = next(model.parameters()).device
    logits = model(torch.tensor([[*prompt, *response]], device=device)).logits[0, len(prompt) - 1 : -1]
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(response, device=device)[:, None])[:, 0]


@dataclass(frozen=True)
class RunFolder:
    """What a run of ``tools.train`` left behind."""

    path: Path

    def metrics(self) -> list[dict[str, Any]]:
        """Step by step, without what depends on the machine's speed."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        timed = ("time/", "speed/", "memory/")
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(timed)} for line in lines]

    def manifest(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step_{step:06d}" / "MANIFEST.json"

    def files(self, step: int) -> dict[str, str]:
        """Every file of a checkpoint with its hash; torch's index holds a random identifier and is left out."""
        records = json.loads(self.manifest(step).read_text())["files"]
        return {name: record["sha256"] for name, record in records.items() if name != ".metadata"}


def start(here: Here, name: str, *overrides: str, seen: str | None = None) -> tuple[Command, RunFolder]:
    """``tools.train`` on one rank with the tiny task; ``seen`` is its CUDA_VISIBLE_DEVICES."""
    folder, data = here.folder / name, here.folder / "train.jsonl"
    if not data.exists():
        lines = Path("recipes/tiny/data/train.jsonl").read_text().splitlines(keepends=True)
        data.write_text("".join(lines[:64]))
    small = ("rollout.prompts=4", "rollout.samples=4", "train.mini_batch_prompts=2") if here.rehearse else ()
    options = (
        *("name=run", f"log.dir={folder}", f"data.train={data}", "log.trackers=[]", "log.samples=0"),
        *("parallel.ranks_per_node=1", "parallel.tensor=1", "checkpoint.every=1", "method.beta=0.01"),
        *(f"train.steps={STEPS}", *small, *overrides),
    )
    environment = {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
        "MASTER_PORT": str(ranks.free_port()),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # what cuBLAS wants to be the same twice, and Transformer Engine
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
    if seen is not None:
        environment["CUDA_VISIBLE_DEVICES"] = seen
    return Command(here, "tools.train", [RECIPE, *options], environment), RunFolder(folder / "run")


def train(here: Here, name: str, *overrides: str, seen: str | None = None) -> RunFolder:
    """The finished run."""
    command, run = start(here, name, *overrides, seen=seen)
    command.wait()
    return run


def baseline(here: Here) -> RunFolder:
    return RunFolder(here.folder / "baseline" / "run")


def tiny_run(here: Here) -> Iterator[Line]:
    """A short SIREN run on the GPU, and its first step on this machine's CPU: float32, draws follow from seeds."""
    gpu = train(here, "baseline").metrics()
    cpu = gpu if here.rehearse else train(here, "cpu", "train.steps=1", seen="").metrics()
    yield equal("steps", len(gpu), STEPS)
    for name in ("reward/mean", "loss/total", "grad/norm"):
        yield anchor(f"step 1: {name}, GPU beside CPU", gpu[0][name], cpu[0][name], "")
    for name in ("entropy/full", "entropy/nucleus", "response/length", "siren/anchor"):
        off = abs(gpu[0][name] - cpu[0][name]) / abs(cpu[0][name])
        yield limit(f"step 1: {name}, GPU off CPU", off, 1e-2, "relative")
    yield limit("mismatch with the sampler", max(step["mismatch/mean"] for step in gpu), 1e-4, "nats")


def kill_and_resume(here: Here) -> Iterator[Line]:
    """SIGKILL after a checkpoint, then the same command: the bits of an uninterrupted run."""
    command, killed = start(here, "killed")
    while not killed.manifest(1).exists() and command.running:
        time.sleep(0.01)
    yield equal("exit code of the killed run", command.kill(), -signal.SIGKILL)
    yield equal("killed before the last step", killed.manifest(STEPS).exists(), False)
    resumed, whole = train(here, "killed"), baseline(here)
    same_metrics = resumed.metrics() == whole.metrics()
    same_files = resumed.files(STEPS) == whole.files(STEPS)
    if not (same_metrics and same_files):  # the resume's fault, or are two runs never the same here?
        yield fact("two uninterrupted runs agree", train(here, "again").metrics() == whole.metrics())
    yield equal("metrics of all steps, to the bit", same_metrics, True)
    yield equal("checkpoint of the last step, to the bit", same_files, True)


def offloads(here: Here) -> Iterator[Line]:
    """Optimizer and reference in host memory between their uses: the same run to the bit."""
    run, whole = train(here, "off", "model.offload_optimizer=true", "model.offload_reference=true"), baseline(here)
    yield equal("metrics of all steps, to the bit", run.metrics() == whole.metrics(), True)
    yield equal("checkpoint of the last step, to the bit", run.files(STEPS) == whole.files(STEPS), True)


def fused_head(here: Here) -> Iterator[Line]:
    """Statistics from hidden states instead of logits: the first step's figures within fp32's rounding."""
    run, whole = train(here, "fused", "model.fused_head=true", "train.steps=1"), baseline(here)
    for name in ("entropy/full", "entropy/nucleus", "loss/total", "grad/norm"):
        found, expected = run.metrics()[0][name], whole.metrics()[0][name]
        yield limit(f"{name}, fused off logits", abs(found - expected) / max(abs(expected), 1e-6), 1e-4, "relative")


def memory(here: Here) -> Iterator[Line]:
    """Peaks of a step at the 1.5B shape beside the planner's, which reckons with Transformer Engine's layers."""
    recipe = here.size("recipes/siren/siren-qwen2.5-math-1.5b-1n8g.toml", RECIPE)
    tokens = here.size(4_096, 80)
    layout = ("parallel.nodes=1", "parallel.ranks_per_node=1", "parallel.tensor=1", "parallel.sequence=false")
    config = read_config(recipe, [*layout, f"train.micro_batch_tokens={tokens}"])
    architecture = read_architecture(read_hf_config(config.model.path))
    needs = create_method(config).needs
    pairs = models.sequences(architecture.vocab_size, [(tokens // 16, tokens // 4 - tokens // 16)] * 4)
    with models.one_rank():
        learning = models.Learning.build(config, architecture, needs, None)
        packed = [models.pack(pairs, config.parallel)]
        yield from phases(here, learning, packed)


def phases(here: Here, learning: models.Learning, packed: list[PackedSequences]) -> Iterator[Line]:
    """Bytes held and peaks of score and update beside the planner's items for the same configuration."""
    config = learning.config
    plan = make_plan(config, Roles(), rates=RATES["h100"], gpu_memory=device.TOTAL_BYTES["h100"]).ranks[0].phases
    scored, planned = plan["score"], plan["update"]
    norm = learning.update(packed)  # the first one makes the moments
    yield equal("the gradient's norm is finite", math.isfinite(norm), True)
    held = 0.0 if here.rehearse else float(torch.cuda.memory_allocated())
    yield anchor("held: weights, gradients, optimizer", held / GB, sum(planned[item] for item in TRAINED) / GB, "GB")
    for name, work, items in (
        ("score", lambda: learning.score(packed), scored),
        ("gradients", lambda: learning.gradients(packed), planned),
        ("update", lambda: learning.update(packed), planned),
    ):
        peak = measure.peak_bytes(work, here.device)
        yield anchor(f"{name}: peak above it", peak / GB, sum(items[item] for item in PASSES) / GB, "GB")
    times = measure.medians_ms(
        {"score": lambda: learning.score(packed), "update": lambda: learning.update(packed)}, here.device, repeat=3
    )
    if not here.rehearse:
        reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
        yield anchor("reserved over allocated at the peak", reserved / allocated, 1 + device.FRAGMENTATION, "")
        free, total = torch.cuda.mem_get_info()
        context = (total - free - torch.cuda.memory_reserved()) / GB
        yield anchor("context, with whatever else runs here", context, device.CONTEXT / GB, "GB")
    for name, took in times.items():
        yield fact(f"{name} of {len(packed[0].tokens):,} tokens", took, "ms")
