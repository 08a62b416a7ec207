"""Whole runs through the command line: killed and resumed, stopped by a signal, refused for bad input.

The runs are real: two ranks over gloo, the shipped tiny model, rollouts, math-verify, checkpoints. The first is started
in fresh interpreters, the others warm (tests/warm).
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ext import cpu_compat
from megatron_ext.checkpoint.checkpoint import load_model
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.schema import ParallelConfig
from megatron_ext.methods.base import Needs
from megatron_ext.model import parallel
from megatron_ext.model.architectures import read_architecture
from megatron_ext.model.build import build_policy
from megatron_ext.model.forward import forward
from megatron_ext.model.megatron_config import ModelLayout, ModelOptions
from megatron_ext.train import packing
from tests import gloo, warm

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/siren/siren-tiny-cpu.toml"
SMALL = [
    "rollout.prompts=4",
    "rollout.samples=4",
    "train.mini_batch_prompts=2",
    "checkpoint.every=2",
    "log.trackers=[]",
    "method.coef=1.0",
    "optimizer.warmup_steps=3",
]
REPORTED = (
    *("reward/mean", "reward/outcome/correct", "entropy/full", "entropy/nucleus", "response/length"),
    *("siren/selected_share", "siren/anchor", "loss/policy", "clip/low", "clip/high", "kl/old", "grad/norm"),
    *("response/truncated", "mismatch/mean", "mismatch/max"),
)


def command(folder: Path, *overrides: str) -> list[str]:
    settings = [f'log.dir="{folder}"', *SMALL, *overrides]
    return [sys.executable, "-m", "tools.train", RECIPE, *settings]


def start(folder: Path, *overrides: str, popen: Callable[..., subprocess.Popen] = warm.popen) -> subprocess.Popen:
    return popen(
        command(folder, *overrides),
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(
    folder: Path,
    *overrides: str,
    largest_file: int = resource.RLIM_INFINITY,
    popen: Callable[..., subprocess.Popen] = warm.popen,
) -> tuple[int, str]:
    """Exit code and output. ``largest_file``: bytes beyond which the kernel refuses to write, as on a full disk."""
    process = start(folder, *overrides, popen=popen)
    if largest_file != resource.RLIM_INFINITY:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    output, _ = process.communicate(timeout=400)
    return process.returncode, output


def run_folder(folder: Path) -> Path:
    return folder / "siren-tiny-cpu"


def metrics(folder: Path) -> list[dict]:
    """What a run reports, without what depends on the machine's speed."""
    lines = (run_folder(folder) / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(("time/", "speed/"))}
        for line in lines
    ]


def checkpoint(folder: Path, step: int) -> Path:
    return run_folder(folder) / "checkpoints" / f"step_{step:06d}"


def contents(folder: Path, step: int) -> dict:
    """Every file of a checkpoint with its hash: weights, optimizer, schedule, order, method state, RNG.

    torch's index ``.metadata`` is left out: it holds a random identifier and the path of the save.
    """
    manifest = json.loads((checkpoint(folder, step) / "MANIFEST.json").read_text())
    return {name: record["sha256"] for name, record in manifest["files"].items() if name != ".metadata"}


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """In fresh interpreters: what the others, which start warm, are compared with."""
    folder = tmp_path_factory.mktemp("whole")
    code, output = finish(folder, "train.steps=4", popen=subprocess.Popen)
    assert code == 0, output
    return folder


def test_a_killed_run_resumes_to_the_bits_of_an_uninterrupted_one(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "train.steps=4")
    wait_for(checkpoint(tmp_path, 2) / "MANIFEST.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not checkpoint(tmp_path, 4).exists()
    code, output = finish(tmp_path, "train.steps=4")
    assert code == 0 and "resuming after step 2 of 4" in output, output
    assert "random states start from the seed" not in output
    assert metrics(tmp_path) == metrics(uninterrupted)
    assert contents(tmp_path, 4) == contents(uninterrupted, 4)


def test_what_a_run_reports(uninterrupted: Path) -> None:
    last = metrics(uninterrupted)[-1]
    assert last["step"] == 4
    for key in REPORTED:
        assert isinstance(last[key], float), key
    assert last["mismatch/max"] < 1e-4
    kept = [json.loads(line) for line in (run_folder(uninterrupted) / "samples.jsonl").read_text().splitlines()]
    for step in metrics(uninterrupted):  # all four groups of a step are kept, each with its mean
        groups = [row["group_reward"] for row in kept if row["step"] == step["step"]]
        assert len(groups) == 4 and sum(groups) / 4 == pytest.approx(step["reward/mean"], abs=1e-4)
    assert any(row["group_reward"] != row["reward"] for row in kept)
    assert (run_folder(uninterrupted) / "report.html").read_text().startswith("<!doctype html>")


def megatron_log_probs(rank: int, world: int, source: str, path: str, sequences: list) -> list[float]:
    """Log-probs and entropies of a checkpoint under TP 2, as the trainer computes them."""
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=2, tensor=2))
    architecture = read_architecture(read_hf_config(source))
    policy = build_policy(architecture, ModelLayout(tensor=2), ModelOptions(torch.float32))
    load_model(Path(path), policy.modules)
    stats = forward(policy, [packing.pack(sequences)], Needs(entropy=True), 1.0)
    assert stats is not None and stats[0].entropy is not None
    return [*stats[0].logprob.tolist(), *stats[0].entropy.tolist()]


def test_transformers_alone_loads_the_export_and_matches_megatron(uninterrupted: Path, tmp_path: Path) -> None:
    source, export = str(ROOT / "recipes/tiny/base"), tmp_path / "hf"
    command = [sys.executable, "-m", "tools.convert", "to-hf", str(run_folder(uninterrupted)), str(export)]
    converted = warm.run(command, cwd=ROOT)
    assert converted.returncode == 0, converted.stderr
    script = (
        "import sys, json, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "logprob, entropy, sequences = [], [], []\n"
        "for prompt, answer in (('9 5 1 > 44?', '9*5-1}'), ('3 4 7 > 5?', '3*4-7}'), ('12-7*3=?', '-9}')):\n"
        "    p, r = tokenizer.encode(prompt), tokenizer.encode(answer)\n"
        "    logp = model(torch.tensor([p + r])).logits[0, len(p) - 1 : -1].double().log_softmax(-1)\n"
        "    logprob += logp.gather(1, torch.tensor(r)[:, None])[:, 0].tolist()\n"
        "    entropy += (-(logp.exp() * logp).sum(-1)).tolist()\n"
        "    sequences.append((p, r))\n"
        "assert not any(name.startswith(('megatron', 'tools')) for name in sys.modules)\n"
        "print(json.dumps([sequences, logprob + entropy]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(export)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sequences, expected = json.loads(done.stdout.splitlines()[-1])
    for found in gloo.run(megatron_log_probs, 2, source, str(checkpoint(uninterrupted, 4)), sequences):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    base = gloo.run(megatron_log_probs, 2, source, str(checkpoint(uninterrupted, 2)), sequences)[0]
    assert max(abs(a - b) for a, b in zip(base, expected, strict=True)) > 1e-4  # another checkpoint is another model


def test_a_finished_run_ends_at_once(uninterrupted: Path) -> None:
    before = metrics(uninterrupted)
    planner = run_folder(uninterrupted) / "planner.json"
    code, output = finish(uninterrupted, "train.steps=4")
    assert code == 0, output
    assert metrics(uninterrupted) == before
    assert json.loads(planner.read_text())["first_step"] == 1  # its steps still count as measured


def test_a_damaged_checkpoint_is_named_and_the_older_one_used(uninterrupted: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", uninterrupted, copy], check=True)
    shard = next(checkpoint(copy, 4).glob("*.distcp"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    code, output = finish(copy, "train.steps=4")
    assert code == 0, output
    assert f"step_000004: {shard.name}" in output and "resuming after step 2 of 4" in output
    assert metrics(copy) == metrics(uninterrupted)


def test_a_signal_saves_and_asks_to_be_run_again(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "train.steps=300")
    wait_for(checkpoint(tmp_path, 2) / "MANIFEST.json", process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    done = len(metrics(tmp_path))
    assert process.returncode == 75 and done < 300, output
    assert checkpoint(tmp_path, done).is_dir()
    code, output = finish(tmp_path, f"train.steps={done + 1}")
    assert code == 0 and f"resuming after step {done} of" in output, output
    assert metrics(tmp_path)[:4] == metrics(uninterrupted)[: done + 1]


def test_a_start_that_is_stopped_asks_to_be_run_again_but_not_for_ever(tmp_path: Path) -> None:
    for count, code in ((1, 75), (2, 75), (3, 76)):  # fresh: they load libraries when the signal comes
        process = start(tmp_path, "train.steps=4", popen=subprocess.Popen)
        wait_for(run_folder(tmp_path) / ".lock", process)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == code, output
        assert output.count("SIGTERM: ") == 1 and "stopped while starting: nothing new to save" in output
        assert "Traceback" not in output and not (run_folder(tmp_path) / "checkpoints").exists()
        assert json.loads((run_folder(tmp_path) / "stops.json").read_text()) == {"stops": count, "checkpoint": ""}
    assert output.count("stopped 3 times in a row before anything new was saved: not to be queued again") == 1


def test_a_full_disk_ends_the_run_with_its_reason_and_the_checkpoint_before(
    uninterrupted: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted, copy)
    code, output = finish(copy, "train.steps=6", largest_file=500_000)
    assert code == 4, output
    assert "File too large" in output and "resuming after step 4 of 6" in output and "Traceback" not in output
    left = sorted(path.name for path in checkpoint(copy, 4).parent.iterdir())
    assert left == ["latest", "step_000002", "step_000004"]


def test_an_interrupt_saves_and_meanwhile_a_second_run_is_refused(uninterrupted: Path, tmp_path: Path) -> None:
    process = start(tmp_path, "train.steps=300")
    wait_for(checkpoint(tmp_path, 2) / "MANIFEST.json", process)
    code, refused = finish(tmp_path, "train.steps=300")
    assert code == 2 and refused.count("another run is at work in") == 1, refused
    assert re.search(rf"process \d+ on {re.escape(socket.gethostname())}", refused) and "Traceback" not in refused
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=300)
    steps = metrics(tmp_path)
    assert process.returncode == 75, output
    assert output.count("SIGINT: the ranks save after this step and end") == 1
    assert f"stopped after step {len(steps)} of 300: the state is saved" in output and "Traceback" not in output
    assert checkpoint(tmp_path, len(steps)).is_dir()
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[:2] == metrics(uninterrupted)[:2]


def test_a_fault_that_every_rank_finds_is_said_once(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "recipes/tiny/base", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    code, output = finish(tmp_path, f'model.path="{tmp_path}/model"')
    assert code == 2, output
    assert output.count("configuration error") == output.count("model_type qwen2 is not supported") == 1, output
    assert "Traceback" not in output and not run_folder(tmp_path).exists()


@pytest.mark.parametrize(
    ("overrides", "rows", "message"),
    [
        (["train.step=3"], None, "train.step: unknown key; did you mean steps?"),
        (["parallel.tensor=3", "parallel.ranks_per_node=3"], None, "3 does not divide the model's 4 attention heads"),
        (["method.cof=1"], None, "method.cof: siren has no such option; did you mean coef?"),
        ([], [], "no usable problem"),
        ([], [{"prompt": "1 2 3 > 6?", "answer": "\\frac{1}{"}], "line 1, field answer"),
    ],
)
def test_bad_input_exits_2_and_says_what_to_do(
    overrides: list[str], rows: list | None, message: str, tmp_path: Path
) -> None:
    if rows is not None:
        data = tmp_path / "train.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        overrides = [*overrides, f'data.train="{data}"']
    code, output = finish(tmp_path, *overrides)
    assert code == 2, output
    assert message in output, output
    assert not run_folder(tmp_path).exists()
