"""Memory, time and the search for a layout, against numbers worked out by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import Config, ParallelConfig, ValidationConfig
from megatron_ext.model.architectures import read_architecture
from megatron_ext.ops.linear_policy_stats import CHUNK_BYTES
from megatron_ext.plan import device, memory, speed
from megatron_ext.plan.layout import Plan, make_plan, nearest_fit
from megatron_ext.plan.memory import PHASES, Roles
from megatron_ext.plan.speed import RATES, Lengths
from tools.dry_run import full_size_recipes
from tools.plan import method_roles, read_valid

MODELS = Path(__file__).parents[2] / "recipes" / "models"
SEVEN = read_architecture(read_hf_config(MODELS / "qwen2.5-math-7b"))
MOE = read_architecture(read_hf_config(MODELS / "qwen3-30b-a3b"))


def config(directory: str = "qwen2.5-math-7b", **sections: dict[str, Any]) -> Config:
    given = {
        "model": {"path": str(MODELS / directory)},
        "data": {"train": "data.jsonl"},
        "rollout": {"batch_size": 64},
        "train": {"mini_batch_prompts": 8},
        "parallel": {"nodes": 2, "tensor": 4, "sequence": True},
    }
    return Config.model_validate({name: value | sections.get(name, {}) for name, value in given.items()})


def plan(found: Config, roles: Roles = Roles(), gpu_memory: float = 80e9) -> Plan:  # noqa: B008 (frozen)
    return make_plan(found, roles, rates=RATES["h100"], gpu_memory=gpu_memory)


def test_the_state_of_a_rank_is_weights_gradients_and_adam() -> None:
    found = plan(config(), Roles(reference=True, critic=True)).ranks[0].phases
    quarter = 1_904_057_344  # elements of one of four tensor-parallel ranks, norms in full
    for phase in PHASES:
        assert found[phase]["weights"] == 2 * quarter
        assert found[phase]["gradients"] == 4 * quarter
        assert found[phase]["optimizer"] == 12 * quarter / 4  # over 4 data-parallel ranks
        assert found[phase]["reference"] == 2 * quarter
        assert found[phase]["rollout weights"] == 2 * 7_615_616_512
    offloaded = plan(config(model={"offload_reference": True}), Roles(reference=True)).ranks[0].phases
    assert ["reference" in offloaded[phase] for phase in PHASES] == [False, True, False]


def test_activations_of_a_dense_layer() -> None:
    p = ParallelConfig(nodes=1, tensor=4, sequence=True)
    D, q, kv, F = 3584, 3584, 512, 18944
    outside = (4 * D + 3 * q + 3 * kv + 2 * 28) / 4
    for fused, in_mlp in ((False, 5 * F / 4), (True, 3 * F / 4)):  # fused keeps gate, up and the product alone
        kept = [memory.saved_per_token(SEVEN, p, 0, recompute, fused_swiglu=fused) for recompute in memory.RECOMPUTE]
        assert kept == [outside + in_mlp, outside - D / 4, D / 4]
    without = ParallelConfig(nodes=1, tensor=4)
    assert memory.saved_per_token(SEVEN, without, 0, "full", fused_swiglu=True) == D


def test_context_parallel_ranks_share_a_micro_batch_and_the_optimizer() -> None:
    whole, cut = plan(config()), plan(config(parallel={"context": 2}))
    assert (whole.config.parallel.data, cut.config.parallel.data) == (4, 2)
    assert cut.ranks[0].buffers == whole.ranks[0].buffers  # the optimizer is sharded over 4 ranks either way
    assert (memory.rank_tokens(whole.config), memory.rank_tokens(cut.config)) == (16384, 8192)
    exchanged = 8192 * 2 * 8 * 512 / 4  # two buffers of keys, values and their gradients, a quarter of the heads
    assert cut.activations()["none"] == pytest.approx(whole.activations()["none"] / 2 + exchanged)
    assert (whole.num_micro_batches, cut.num_micro_batches) == (4, 8)
    groups = device.communicators(SEVEN, cut.config)
    assert (groups["context"], groups["data"], groups["data with context"]) == (2, 2, 4)
    assert "context" not in device.communicators(SEVEN, whole.config)
    assert cut.seconds == pytest.approx(whole.seconds)


def test_a_sequence_that_is_cut_is_padded() -> None:
    p = ParallelConfig(nodes=1, tensor=2, sequence=True, context=4)
    assert (p.data, p.chunks, p.token_multiple, p.padded(17)) == (1, 8, 8, 24)
    wide = ParallelConfig(nodes=2, tensor=4, sequence=True, context=2)  # as many tokens on each of 4 x 2 ranks
    assert (wide.chunks, wide.token_multiple) == (4, 8)
    plain = ParallelConfig(nodes=1, tensor=4, sequence=True)
    assert (plain.chunks, plain.token_multiple, plain.padded(17)) == (1, 4, 17)


def test_activations_of_experts_count_the_busiest_rank() -> None:
    for shared, fused, kept in ((1, False, 2048 + 6 * 768), (1, True, 2048 + 3 * 768), (4, True, 4 * 2048 + 3 * 768)):
        p = ParallelConfig(nodes=4, tensor=4, sequence=True, expert=8, expert_tensor=shared)
        mlp = memory.saved_per_token(MOE, p, 0, "mlp", fused_swiglu=fused)
        routed = memory.saved_per_token(MOE, p, 0, "none", fused_swiglu=fused) - mlp
        assert routed == pytest.approx((6.5 * 128 + memory.IMBALANCE * 8 * kept) / 4)


@pytest.mark.parametrize(
    ("pipeline", "virtual", "expected"),
    [(1, 1, [1]), (4, 1, [4, 3, 2, 1]), (2, 2, [5 / 2, 3 / 2]), (4, 2, [11 / 2, 9 / 2, 7 / 2, 5 / 2])],
)
def test_micro_batches_in_flight(pipeline: int, virtual: int, expected: list[float]) -> None:
    p = ParallelConfig(pipeline=pipeline, virtual=virtual)
    assert [memory.in_flight(p, rank, 100) for rank in range(pipeline)] == expected
    assert memory.in_flight(p, 0, 1) == 1


def test_stages_may_be_uneven_and_interleaved() -> None:
    p = ParallelConfig(pipeline=2, virtual=2, stage_layers=(6, 8, 8, 6))
    assert memory.stage_layers(SEVEN, p) == [[range(0, 6), range(14, 22)], [range(6, 14), range(22, 28)]]


def test_the_kv_cache_of_known_models() -> None:
    assert memory.kv_bytes_per_token(SEVEN, config()) == 57_344  # 28 layers x 2 x 4 x 128 x 2 bytes
    cache = memory.kv_cache(SEVEN, config())
    assert cache == pytest.approx(64 * 4096 * 57_344 * 29 / 28)
    shared = config(rollout={"engine": "vllm", "tensor_parallel_size": 2})
    assert memory.kv_capacity(SEVEN, shared, 4096 * 57_344 / 2 * 7.5) == 7
    longer = ValidationConfig(every=10, data=["x.jsonl"], max_response_tokens=8192 - 1024)  # behind prompts of 1024
    validated = shared.model_copy(update={"validation": longer})
    assert memory.kv_capacity(SEVEN, validated, 8192 * 57_344 / 2 * 7.5) == 7
    doubled = config(rollout={"engine": "vllm", "tensor_parallel_size": 8})  # of 4 heads: two GPUs hold each
    assert memory.kv_capacity(SEVEN, doubled, 4096 * 57_344 / 4 * 7.5) == 7
    assert memory.kv_cache(SEVEN, config().model_copy(update={"validation": longer})) == pytest.approx(2 * cache)


def test_the_head_counts_what_is_alive_at_once() -> None:
    tokens, width, D = 16384, 152064 // 4, 3584
    logits, exchange = 2 * tokens * width * 33 / 32, 4096 * tokens  # and a maximum for every 32 of a position
    assert memory.head(SEVEN, config(), grad=False) == logits + 2 * 2 * tokens * D + exchange
    unfused = memory.head(SEVEN, config(), grad=True)
    assert unfused == logits + 2 * width * D + 3 * 2 * tokens * D + exchange
    kept = memory.head(SEVEN, config(rollout={"top_k": 20}), grad=True) - unfused
    assert kept == 20 * 128 * tokens and memory.kept_bytes(config(rollout={"top_p": 0.9})) == 128 * 128
    assert memory.kept_bytes(config(rollout={"top_k": 20, "sampling_replay": "off"})) == 0
    fused = memory.head(SEVEN, config(model={"fused_head": True}), grad=True)
    assert unfused - fused == logits - CHUNK_BYTES * 33 / 32  # a chunk of logits


def test_a_step_takes_what_its_operations_take() -> None:
    lengths, rates = Lengths(1000, 3000), RATES["h100"]
    seconds = speed.step_seconds(SEVEN, config(), Roles(), rates, lengths, gpu_memory=80e9)
    tokens = 128 * 8 * 4000
    forward = 2 * (28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18944) + 152064 * 3584) + 2 * 28 * 3584 * 4000
    assert seconds["score"] == pytest.approx(tokens * forward / (16 * 989e12 * 0.4))
    assert seconds["update"] == pytest.approx(3 * seconds["score"])
    full = speed.step_seconds(SEVEN, config(model={"recompute": "full"}), Roles(), rates, lengths, gpu_memory=80e9)
    assert full["update"] == pytest.approx((4 - 152064 * 3584 / speed.active_parameters(SEVEN)) * full["score"])
    both = speed.step_seconds(SEVEN, config(), Roles(reference=True, critic=True), rates, lengths, gpu_memory=80e9)
    assert (both["score"], both["update"]) == (3 * seconds["score"], 2 * seconds["update"])


@pytest.mark.parametrize("tokens", [64, 3072], ids=["training is the longer", "the rollout is the longer"])
def test_a_step_takes_the_longer_of_training_and_a_rollout_beside_it(tokens: int) -> None:
    found = {}
    for engine, lag in (("vllm_server", 0), ("vllm_server", 1), ("vllm", 1)):
        rollout = {"engine": engine, "max_lag": lag, "max_response_tokens": tokens}
        found[engine, lag] = plan(config(rollout=rollout, model={"recompute": "full"}))
    beside = found["vllm_server", 1]
    rollout, sync = beside.seconds["rollout"], beside.seconds["weight sync"]
    train = sum(beside.seconds[phase] for phase in ("score", "update", "gradient exchange"))
    assert (rollout > train) == (tokens == 3072)
    assert beside.step_s == pytest.approx(sync + max(rollout, train)) and beside.rolls_out_beside
    for other in (found["vllm_server", 0], found["vllm", 1]):
        assert other.step_s == pytest.approx(sum(other.seconds.values())) and not other.rolls_out_beside


def test_rollouts_read_the_weights_for_every_token_of_a_batch() -> None:
    one = config(rollout={"batch_size": 64, "max_response_tokens": 1000}, train={"micro_batch_tokens": 16384})
    rates, lengths = RATES["h100"], Lengths(0, 500)
    step = (2 * 7_615_616_512 + 64 * 500 * 57_344) / (3.35e12 * 0.5)
    assert step < 28 * 8e-4  # launching takes longer
    assert speed.rollout_seconds(SEVEN, one, rates, lengths, gpu_memory=80e9) == pytest.approx(1000 * 28 * 8e-4)
    halves = config(rollout={"batch_size": 32, "max_response_tokens": 1000})
    assert speed.rollout_seconds(SEVEN, halves, rates, lengths, gpu_memory=80e9) == pytest.approx(2 * 1000 * 28 * 8e-4)


def test_running_sequences_are_half_grown_and_no_more_than_fit() -> None:
    """Against a simulation of an engine that replaces a finished sequence at once, lengths spread evenly."""
    rollout = {"engine": "vllm", "tensor_parallel_size": 2, "batch_size": 64, "prompts": 512}
    own, lengths, kv = config(rollout=rollout | {"max_response_tokens": 1000}), Lengths(100, 500), 57_344 / 2
    rng, running, waiting, read, steps = random.Random(0), list[list[int]](), 512, 0, 0
    while waiting or running:
        while waiting and len(running) < 64:
            running.append([0, rng.randint(1, 1000)])
            waiting -= 1
        read, steps = read + sum(100 + grown for grown, _ in running), steps + 1
        running = [[grown + 1, end] for grown, end in running if grown + 1 < end]
    found = speed.Decoding.of(SEVEN, own, lengths, 80e9)
    weights = memory.engine_weights(SEVEN, own)
    assert found.steps == 512 * 500 / 64 and found.steps == pytest.approx(steps, rel=0.15)  # the last ones end alone
    assert found.steps * (found.bytes - weights) == pytest.approx(read * kv, rel=0.1)
    room = memory.engine_working(SEVEN, own) + weights + 1.5e9 + 10 * (100 + 2 * 500 / 3) * kv  # for ten
    full = speed.Decoding.of(SEVEN, own, lengths, room / own.rollout.gpu_memory_utilization)
    assert full.steps == pytest.approx(512 * 500 / 10)


def test_a_layout_that_does_not_fit_has_a_neighbour_that_does() -> None:
    large = plan(config(parallel={"nodes": 1, "tensor": 1, "sequence": False}))
    assert not large.fits
    found = nearest_fit(large, rates=RATES["h100"])
    assert found is not None
    changes, other = found
    assert other.fits and changes
    assert other.config != large.config
    assert nearest_fit(plan(config(), gpu_memory=20e9), rates=RATES["h100"]) is None  # the engine's copy alone is 15


def test_micro_batches_grow_with_the_padding_of_a_sequence_that_is_cut() -> None:
    """33,025 tokens are padded to 33,032 where four context-parallel ranks take two pieces each."""
    tight = plan(
        config(
            "qwen3-8b",
            model={"path": str(MODELS / "qwen3-8b"), "fused_head": True},
            rollout={"batch_size": 1, "max_response_tokens": 32001},
            train={"mini_batch_prompts": 8, "micro_batch_tokens": 33025},
            parallel={"nodes": 4, "tensor": 8},
        ),
        gpu_memory=44e9,
    )
    found = nearest_fit(tight, rates=RATES["h100"])
    assert not tight.fits and found is not None and found[1].fits
    assert found[0] == ["parallel.context=4", "train.micro_batch_tokens=33032"]


def test_an_engine_needs_room_for_a_sequence() -> None:
    asleep = config(rollout={"engine": "vllm", "tensor_parallel_size": 4})
    roomy = plan(asleep)
    assert roomy.fits and "rollout weights" not in roomy.worst.phases["update"]
    assert roomy.kv_sequences > 500
    tight = plan(asleep, gpu_memory=8e9)  # half of it is 4 GB, of which weights and a prefill take 4.7
    assert tight.kv_sequences == 0 and not tight.fits


@pytest.mark.parametrize(("eager", "graphs"), [(False, 1.5e9), (True, 0)])
def test_an_engine_takes_its_share_of_the_total_memory(eager: bool, graphs: float) -> None:
    """Weights, work, graphs and cache are the share; what else is on the GPU stands beside it."""
    for share in (0.3, 0.6):
        found = plan(
            config(
                rollout={
                    "engine": "vllm",
                    "tensor_parallel_size": 2,
                    "gpu_memory_utilization": share,
                    "enforce_eager": eager,
                }
            )
        )
        rollout = dict(found.worst.phases["rollout"])
        engine = [rollout.pop(item) for item in ("rollout weights", "rollout work", "KV cache")]
        engine.append(rollout.pop("CUDA graphs", 0))
        assert sum(engine) == pytest.approx(share * 80e9)
        assert rollout.keys() == {"context", "communicators", "weights", "gradients", "optimizer"}
        assert found.worst.phases["update"].get("CUDA graphs", 0) == graphs  # asleep it keeps them


def test_gpus_are_ordered_as_their_data_sheets_say() -> None:
    """The export versions differ from their models in the links alone, or (h20) in arithmetic."""
    r = RATES
    assert (r["a800"].flops, r["a800"].network) == (r["a100"].flops, r["a100"].network)
    assert r["a800"].node_link < r["a100"].node_link and r["h800"].node_link < r["h100"].node_link
    assert r["h20"].flops < r["a100"].flops < r["h100"].flops == r["h800"].flops == r["h200"].flops < r["b200"].flops
    assert r["h100"].bandwidth < r["h20"].bandwidth < r["h200"].bandwidth < r["b200"].bandwidth
    for gpu, rates in r.items():
        assert gpu.upper() in rates.source, gpu


def test_a_plan_leaves_a_margin() -> None:
    found = plan(config())
    assert found.free == 80e9 - found.worst.peak
    assert plan(config(), gpu_memory=found.worst.peak + 3.01e9).fits
    assert not plan(config(), gpu_memory=found.worst.peak + 2.99e9).fits


def test_every_gpu_has_rates_and_a_total_below_its_vendors_figure() -> None:
    assert device.TOTAL_BYTES.keys() == RATES.keys()
    vendors = {"a100": 81_920, "a800": 81_920, "h20": 97_871, "h100": 81_559, "h800": 81_559}  # MiB, nvidia-smi
    vendors |= {"h200": 143_771, "b200": 183_359}
    for gpu, total in device.TOTAL_BYTES.items():
        assert 0.96 < total / 2**20 / vendors[gpu] < 1, gpu


@pytest.mark.parametrize("path", full_size_recipes(), ids=lambda path: path.stem)
def test_every_full_size_recipe_leaves_three_gigabytes_in_every_phase(path: Path) -> None:
    """Context, communicators, fragmentation and vLLM's share of the total are counted, on the smallest of the GPUs."""
    found = read_valid(path)
    total = min(device.TOTAL_BYTES.values())
    planned = make_plan(found, method_roles(found), rates=RATES["h100"], gpu_memory=total)
    for rank in planned.ranks:
        for phase in PHASES:
            items = rank.phases[phase]
            assert items["context"] > 1e9 and items["communicators"] >= 3 * device.PAIR
            assert total - sum(items.values()) >= 3e9, (rank.rank, phase)
    assert planned.kv_sequences > 0 and planned.fits


def test_servers_have_gpus_of_their_own() -> None:
    apart = plan(config(rollout={"engine": "vllm_server", "tensor_parallel_size": 2, "servers": {"num": 3}}))
    assert not {"rollout weights", "KV cache"} & apart.worst.phases["rollout"].keys()
    assert apart.kv_sequences > 50 and memory.num_engines(apart.config) == 3


def test_replayed_experts_are_two_bytes_each() -> None:
    """Of the own tokens and layers of a rank; with recomputation those of every micro-batch in flight."""
    layout = {"nodes": 4, "tensor": 4, "pipeline": 2, "expert": 4}
    replay = {"rollout": {"routing_replay": True}, "parallel": layout, "train": {"micro_batch_tokens": 8192}}
    once = 8192 // 4 * 24 * 8 * 2
    for recompute, in_flight in (("none", 1), ("full", 2)):
        found = plan(config("qwen3-30b-a3b", model={"recompute": recompute}, **replay)).ranks[0].phases
        kept = {phase: found[phase].get("replayed experts") for phase in PHASES}
        assert kept == {"rollout": None, "score": once, "update": once * in_flight}
    without = plan(config("qwen3-30b-a3b", parallel=layout)).ranks[0].phases
    assert not any("replayed experts" in items for items in without.values())
