"""vLLM in the trainer's processes: weights streamed from Megatron shards, against transformers on the same weights."""

from __future__ import annotations

import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ext.rollout.base import Request, Sampling
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.rollout.sampling import seed_of
from megatron_ext.types import Sample
from tests import gloo
from tests.rollout.test_hf import left

BASE = Path(__file__).parents[2] / "recipes" / "tiny" / "base"
GREEDY, NUCLEUS = Sampling(0.0, 1.0, 16), Sampling(0.8, 0.7, 16)
RESTRICTED = Sampling(0.8, 0.9, 16, top_k=8, min_p=0.02)
UPDATES = 3
KEPT: list[Any] = []  # engines live as long as their rank: vLLM takes the process group down with it


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny base model, and three more of its shape: what training would make of it, one after the other."""
    folders = [BASE]
    model = AutoModelForCausalLM.from_pretrained(BASE)
    for update in range(UPDATES):
        torch.manual_seed(update)
        for parameter in model.parameters():
            parameter.data += 0.1 * parameter.data.std() * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp(f"policy-{update + 1}")
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (BASE / name).is_file():
                shutil.copy(BASE / name, folder)
        folders.append(folder)
    return folders


def requests(count: int) -> list[Request]:
    """Prompts of 1 to 30 tokens, and two that are longer than a block of the prefix cache."""
    draw, vocab = random.Random(5), AutoConfig.from_pretrained(BASE).vocab_size
    lengths = [150, 150, *(draw.randint(1, 30) for _ in range(count - 2))]
    return [Request(tuple(draw.randrange(2, vocab) for _ in range(n)), seed_of(0, i)) for i, n in enumerate(lengths)]


def rollouts(rank: int, world: int, folders: list[Path], shared: int) -> list[dict[Sampling, list[Sample]]]:
    """This rank's samples after each update of a policy whose training is tensor-parallel."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1"}
    from megatron_ext import cpu_compat
    from megatron_ext.config.checks import read_hf_config
    from megatron_ext.config.schema import ParallelConfig
    from megatron_ext.model import architectures, build, hf_weights, parallel
    from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
    from megatron_ext.rollout.vllm.engine import VLLMEngine

    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world, tensor=world))
    architecture = architectures.read_architecture(read_hf_config(folders[0]))
    policy = build.build_policy(architecture, ModelLayout(tensor=world), ModelOptions(torch.float32))
    engine = VLLMEngine(folders[0], dtype="float32", max_tokens=200, tensor_parallel_size=shared, enforce_eager=True)
    KEPT.append(engine)
    mine = requests(11)[rank::world]
    found = []
    for version, folder in enumerate(folders[1:], 1):
        for module in policy.modules:
            hf_weights.load_weights(module, architecture, folder)
        engine.update_weights(hf_weights.PolicyWeights(policy), version)
        engine.sleep()
        finished: dict[int, Sample] = {}
        greedy = engine.generate(mine, GREEDY, finished.update)
        assert finished == dict(enumerate(greedy))
        found.append({GREEDY: greedy, **{way: engine.generate(mine, way) for way in (NUCLEUS, RESTRICTED)}})
    return found


@pytest.mark.parametrize("shared", [1, 2])
def test_training_at_tp_2_feeds_engines_at_tp_1_and_2(policies: list[Path], shared: int) -> None:
    ranks = gloo.run(rollouts, 2, policies, shared, timeout=120)
    wanted = requests(11)
    for update, folder in enumerate(policies[1:]):
        reference = HFEngine(folder)
        for rank in range(2):
            greedy = ranks[rank][update][GREEDY]
            expected = reference.generate(wanted[rank::2], GREEDY)
            for a, b in zip(greedy, expected, strict=True):
                assert (a.prompt_ids, a.response_ids, a.text, a.truncated) == (
                    *(b.prompt_ids, b.response_ids, b.text, b.truncated),
                )
                assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
                assert a.weight_version == update + 1
            for way in (NUCLEUS, RESTRICTED):
                for sample in ranks[rank][update][way]:
                    assert sample.logprobs == pytest.approx(logprobs_of(reference, sample, way), abs=1e-4)


def logprobs_of(reference: HFEngine, sample: Sample, sampling: Sampling) -> list[float]:
    """Of a given response under the sampling distribution, in fp64, by definition."""
    ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
    with torch.no_grad():
        logits = reference.model(ids).logits[0, len(sample.prompt_ids) - 1 : -1].tolist()
    kept = [left(row, sampling.restriction, sampling.temperature) for row in logits]
    return [math.log(p[token]) for p, token in zip(kept, sample.response_ids, strict=True)]


def alone(_rank: int, _world: int) -> dict[str, Any]:
    """What one engine says and is, what it draws, and last what it refuses."""
    from megatron_ext.rollout.vllm import engine as module

    said: list[str] = []
    module.__dict__["print"] = lambda line, **_: said.append(line)
    torch.distributed.destroy_process_group()
    engine = module.VLLMEngine(BASE, dtype="float32", max_tokens=64, enforce_eager=True)
    KEPT.append(engine)
    listening = [each.laddr.ip for each in psutil.Process().net_connections("inet") if each.status == "LISTEN"]
    assert set(listening) <= {"127.0.0.1"}, listening
    found: dict[str, Any] = {
        "said": said,
        "modules": engine.llm.collective_rpc(lambda worker: type(worker.model_runner).__module__),  # what really runs
        "reported": engine.model_runner,
        "metrics": engine.metrics(),
        "variable": os.environ.get("VLLM_USE_V2_MODEL_RUNNER"),
    }
    many = [Request(requests(3)[2].prompt_ids[:4], seed_of(1, i)) for i in range(200)]
    found["again"] = engine.generate(many[::-1][:7], Sampling(2.0, 1.0, 8))
    found["drawn"] = engine.generate(many, Sampling(2.0, 1.0, 8))
    weights = list(AutoModelForCausalLM.from_pretrained(BASE).state_dict().items())
    try:
        engine.update_weights(Listed([pair for pair in weights if pair[0] != "model.norm.weight"]), 1)
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def engine() -> dict[str, Any]:
    return gloo.run(alone, 1, timeout=240)[0]


class Listed(list):
    """Weights that are all there."""

    closed = False

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        return [(name, value.dtype, tuple(value.shape)) for name, value in self]


def test_a_response_follows_from_its_seed_and_seeds_differ(engine: dict[str, Any]) -> None:
    drawn, again = engine["drawn"], engine["again"]
    for a, b in zip(drawn[::-1], again, strict=False):
        assert a.response_ids == b.response_ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    assert len({sample.response_ids for sample in drawn}) > 20


def test_weights_that_do_not_cover_the_model_are_refused(engine: dict[str, Any]) -> None:
    assert re.search("left out .*norm", engine["refused"])


def test_the_model_runner_is_reported(engine: dict[str, Any]) -> None:
    """vLLM's build for CPUs has no Triton: its runner is V1, chosen by itself; GPUs have V2 (vllm.v1.worker.gpu)."""
    assert engine["modules"] == ["vllm.v1.worker.cpu_model_runner"] and engine["variable"] is None
    assert engine["reported"] == 1 and engine["metrics"] == {"vllm/model_runner": 1.0}
    assert engine["said"].count("rollout: vLLM samples with its model runner V1") == 1


def test_the_model_runner_is_the_configured_one() -> None:
    """vLLM's own rule, where it finds a Triton as on a GPU."""
    code = """
import os
from megatron_ext.rollout.vllm.common import model_runner_variable
import vllm.config.vllm as module
module.HAS_TRITON = True
for choice in ("auto", "v1", "v2"):
    os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    os.environ.update(model_runner_variable(choice))
    print(choice, 2 if module.VllmConfig().use_v2_model_runner else 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-3:] == ["auto 2", "v1 1", "v2 2"], done.stderr[-2000:]


def first_update(_rank: int, _world: int) -> list[str]:
    """What an engine on a GPU asks of vLLM at its first update, at the second and when it goes to sleep."""
    from megatron_ext.rollout.vllm.engine import VLLMEngine

    asked: list[str] = []

    class Asked:
        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: asked.append(name + "".join(kwargs.get("tags", ())))

    torch.cuda.is_available = lambda: True
    engine: Any = VLLMEngine.__new__(VLLMEngine)
    engine.llm, engine.here, engine.asleep = Asked(), True, False
    engine.update_weights(Listed(), 1)
    engine.sleep()
    engine.update_weights(Listed(), 2)
    return asked


def test_weights_never_arrive_beside_a_full_kv_cache() -> None:
    [asked] = gloo.run(first_update, 1, timeout=60)
    one = ["sleep", "wake_upweights", "start_weight_update", "update_weights", "finish_weight_update"]
    assert asked == [*one, "wake_upkv_cache", "reset_prefix_cache"] * 2
