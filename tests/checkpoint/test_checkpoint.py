"""A run resumes bitwise, under the same or another layout, from the newest checkpoint that can be trusted."""

from __future__ import annotations

import os
import pickle
import random
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_ext.checkpoint import manifest
from megatron_ext.checkpoint.manifest import CheckpointError
from megatron_ext.config.schema import ParallelConfig
from tests import gloo
from tests.checkpoint import faults
from tests.train.tiny_run import CONFIG, STATE, TIED, TINY, Trainer, equal


def _save_trained(rank, world, root, tensor, pipeline, architecture, dtype):
    run = Trainer(world, tensor, pipeline, architecture, dtype).fill(1)
    torch.manual_seed(5)
    run.train(3).save(root, 3)
    return run.whole(), run.rest()


def _load_afresh(rank, world, root, tensor, pipeline, architecture, dtype):
    run = Trainer(world, tensor, pipeline, architecture, dtype).fill(2)
    before = run.rest()
    loaded = run.load(root)
    assert loaded.step == 3 and before != run.rest()
    assert loaded.state["weight_version"] == 3 and torch.equal(loaded.state["order"], torch.arange(7))
    assert loaded.state["method"] == STATE["method"] and loaded.manifest.config == CONFIG
    return run.whole(), run.rest(), loaded.refused


@pytest.mark.parametrize(
    ("saved", "resumed", "architecture", "dtype"),
    [
        ((2, 2, 1), [(2, 2, 1), (1, 1, 1), (2, 1, 2)], TIED, torch.float32),
        ((2, 1, 2), [(2, 1, 2), (1, 1, 1), (2, 2, 1)], TIED, torch.float32),
        ((2, 1, 1), [(2, 1, 1), (1, 1, 1), (4, 2, 2)], TINY, torch.float32),
        ((2, 2, 1), [(2, 2, 1), (2, 1, 1)], TINY, torch.bfloat16),
    ],
    ids=["TP2", "PP2", "DP2", "bf16"],
)
def test_every_layout_resumes_what_another_one_saved(tmp_path, saved, resumed, architecture, dtype):
    world, *layout = saved
    whole, rest = gloo.run(_save_trained, world, tmp_path, *layout, architecture, dtype)[0]
    assert all(value.abs().sum() > 0 for value in whole.values())
    assert whole["weight lm_head.weight" if not architecture.tied else "weight model.norm.weight"].dtype == dtype
    for world, *layout in resumed:
        for loaded, others, refused in gloo.run(_load_afresh, world, tmp_path, *layout, architecture, dtype):
            assert equal(loaded, whole) and others == rest, (world, *layout)
            assert bool(refused) == ((world, *layout) != saved)


def _draws() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def _straight(rank, world, root):
    run = Trainer(world, tensor=2).fill(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(11)
    run.train(2).save(root, 2)
    return run.train(2).whole(), run.rest(), _draws()


def _interrupted(rank, world, root):
    run = Trainer(world, tensor=2).fill(2)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(99)
    assert run.load(root).refused == ()
    return run.train(2).whole(), run.rest(), _draws()


def test_an_interrupted_run_equals_an_uninterrupted_one_bitwise(tmp_path):
    straight = gloo.run(_straight, 2, tmp_path)
    for one, other in zip(straight, gloo.run(_interrupted, 2, tmp_path), strict=True):
        assert equal(one[0], other[0]) and one[1:] == other[1:]


def _newer_keys(rank, world, root):
    run = Trainer(world).fill(1)
    run.save(root, 1)
    assert not {"context", "virtual"} & run.layout.keys()
    run.layout = ParallelConfig().model_dump() | run.layout
    same = run.load(root)
    run.layout |= {"context": 2}
    return same.rng is not None, same.refused, run.load(root).refused


def test_a_layout_of_before_a_key_was_there_is_that_of_its_default(tmp_path):
    [(has_rng, refused, other)] = gloo.run(_newer_keys, 1, tmp_path)
    assert has_rng and refused == ()
    assert len(other) == 1 and "random states start from the seed" in other[0]


def _save_untrained(rank, world, root):
    run = Trainer(world).fill(1)
    assert run.try_load(root) is None
    run.save(root, 0)
    straight = run.train(1).whole()
    torch.manual_seed(3)
    other = run.fill(2).load(root)
    assert other.step == 0
    return straight, run.train(1).whole()


def test_an_untrained_model_is_saved_and_an_empty_directory_is_a_fresh_start(tmp_path):
    for straight, resumed in gloo.run(_save_untrained, 2, tmp_path):
        assert equal(straight, resumed)


def _save_once(rank, world, root, step, die):
    run = Trainer(world).fill(1)
    torch.manual_seed(0)
    run.train(1)
    if die:
        faults.kill_at(root, die)
    run.save(root, step, keep=1)


def _resumed_step(rank, world, root):
    run = Trainer(world).fill(2)
    loaded = run.load(root)
    return loaded.step, loaded.refused, run.whole()


def test_a_save_killed_at_many_points_resumes_from_the_older_step(tmp_path):
    gloo.run(_save_once, 1, tmp_path / "root", 10, 0)
    whole = gloo.run(_resumed_step, 1, tmp_path / "root")[0][2]
    outcomes, point = set(), 1
    while True:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "root", tmp_path / "copy")
        try:
            gloo.run(_save_once, 1, tmp_path / "copy", 20, point)
            break
        except AssertionError as error:
            assert "died without a report" in str(error)
        found = manifest.newest_valid(tmp_path / "copy")
        assert found is not None
        assert found.manifest.step == int((tmp_path / "copy" / "latest").read_text()[5:])
        if found.manifest.step == 10 and point % 4 == 1:
            step, refused, resumed = gloo.run(_resumed_step, 1, tmp_path / "copy")[0]
            assert step == 10 and equal(resumed, whole)
            assert bool(refused) == bool(len(list((tmp_path / "copy").iterdir())) > 2)
        outcomes.add((found.manifest.step, bool(found.refused)))
        point += 3
    assert outcomes >= {(10, False), (10, True), (20, False)} and point > 20


def _one_rank_fails(rank, world, root, how, asynchronous=True):
    run = Trainer(world, tensor=2).fill(1)
    torch.manual_seed(0)
    run.train(1).save(root, 10)
    if rank == 1 and how == "full":  # the kernel refuses to write beyond the limit: as real as a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    if rank == 0 and how == "full state":
        faults.full_at(root / "nowhere", 3)
    if rank == 1 and how == "one write":
        faults.fail_once(root, "open")
    if rank == 1 and how == "dies":
        faults.kill_at(root, 1)
    try:
        run.save(root, 20, asynchronous=asynchronous)
    except Exception as error:
        if how == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        (root.parent / f"fault{rank}").write_text(f"{type(error).__name__}: {error}")
        return run.load(root).step if how != "dies" else None
    return None


@pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "waiting"])
@pytest.mark.parametrize(("how", "culprit"), [("full", 1), ("full state", 0), ("one write", 1)])
def test_a_disk_fault_of_one_rank_fails_the_save_on_all_ranks(tmp_path, how, culprit, asynchronous):
    root = tmp_path / "root"
    assert gloo.run(_one_rank_fails, 2, root, how, asynchronous) == [10, 10]
    for rank in range(2):
        fault = (tmp_path / f"fault{rank}").read_text()
        assert fault.startswith("CheckpointError: ") and f"rank {culprit}: OSError" in fault, fault
        assert any(text in fault for text in ("No space left", "File too large", "Input/output error"))
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000010"]


def test_a_rank_that_dies_while_saving_does_not_hang_the_others(tmp_path):
    root = tmp_path / "root"
    with pytest.raises(AssertionError, match="died without a report|Connection"):
        gloo.run(_one_rank_fails, 2, root, "dies")
    found = manifest.newest_valid(root)
    assert found and found.manifest.step == 10 and (tmp_path / "fault0").is_file()


def _damaged(rank, world, root):
    run = Trainer(world, tensor=2).fill(1)
    torch.manual_seed(0)
    run.train(1).save(root, 10, keep=9)
    older = run.whole()
    path = run.train(1).save(root, 20, keep=9)
    names = manifest.payload_names(path) + [manifest.MANIFEST]
    assert {".metadata", "common.pt", "metadata.json", "state.pt", "__0_0.distcp", "__1_0.distcp"} < set(names)
    for index, name in enumerate(names):
        good = (path / name).read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 4
        damages = [bytes(bad), good[:-1], b"", (root / "step_000010" / name).read_bytes(), None]
        dist.barrier()
        if rank == 0:
            (path / name).unlink()
            damage = damages[index % len(damages)] if name != "metadata.json" else None
            if damage is not None:
                (path / name).write_bytes(damage)
        dist.barrier()
        loaded = run.load(root)
        assert loaded.step == 10 and equal(run.whole(), older), name
        assert any("step_000020" in line and name in line for line in loaded.refused), (name, loaded.refused)
        dist.barrier()
        if rank == 0:
            (path / name).write_bytes(good)
    dist.barrier()
    assert run.load(root).step == 20
    dist.barrier()
    if rank == 0:
        for step in (10, 20):
            os.truncate(root / manifest.step_name(step) / "__1_0.distcp", 100)
    dist.barrier()
    with pytest.raises(CheckpointError, match=r"(?s)no valid checkpoint.*step_000020: __1_0.*step_000010: __1_0"):
        run.load(root)


def test_a_damaged_checkpoint_is_passed_over_on_all_ranks(tmp_path):
    gloo.run(_damaged, 2, tmp_path, timeout=240)


class _Bomb:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _malicious(rank, world, root, mark):
    run = Trainer(world).fill(1)
    path = run.save(root, 10)
    for name in (".metadata", "state.pt", "common.pt"):
        good = (path / name).read_bytes()
        if name == ".metadata":
            (path / name).write_bytes(pickle.dumps(_Bomb(mark)))
        else:
            torch.save({"state": _Bomb(mark)}, path / name)
        files = manifest.record_files(path, manifest.payload_names(path))
        again = path.rename(root / f"step_000010.tmp-{name}")
        manifest.publish(again, step=10, files=files, layout=run.layout, config=CONFIG)
        assert manifest.newest_valid(root) is not None, "its hashes are in order"
        with pytest.raises(CheckpointError, match="not a checkpoint index|[Ww]eights"):
            run.load(root)
        assert not mark.exists()
        (path / name).write_bytes(good)
    with pytest.raises(CheckpointError, match="plain Python values"):
        run.save(root, 20, state={"bomb": _Bomb(mark)})
    assert not mark.exists() and not (root / "step_000020").exists()


def test_a_malicious_checkpoint_is_refused_and_its_payload_never_runs(tmp_path):
    gloo.run(_malicious, 1, tmp_path / "root", tmp_path / "mark")


def _save_as(rank, world, root, options):
    Trainer(world, 2, **options).fill(1).save(root, 10)


def _refusal(rank, world, root, options):
    run = Trainer(world, 2, **options).fill(1)
    with pytest.raises(CheckpointError) as caught:
        run.load(root)
    return str(caught.value)


def test_a_checkpoint_that_does_not_fit_says_where(tmp_path):
    normed = {"architecture": replace(TINY, qk_norm=True)}
    gloo.run(_save_as, 2, tmp_path / "plain", {})
    gloo.run(_save_as, 2, tmp_path / "normed", normed)
    for saved, options, text in (
        ("plain", {"architecture": replace(TINY, ffn_size=64)}, "mlp.linear_fc"),
        ("plain", {"architecture": replace(TINY, num_layers=4)}, "decoder.layers"),
        ("plain", normed, "only in this model: decoder.layers.self_attention.k_layernorm"),
        ("normed", {}, "only in the checkpoint: decoder.layers.self_attention.k_layernorm"),
        ("plain", {"lr": 2e-3}, "max_lr: saved with 0.001, this run has 0.002"),
    ):
        messages = gloo.run(_refusal, 2, tmp_path / saved, options)
        assert all(text in message for message in messages), (saved, options, messages)
