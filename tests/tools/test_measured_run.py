"""Rates of a run, recovered by hand from a folder that the run's own writers wrote, and what plans with them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import cpu_compat
from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config, ParallelConfig
from megatron_ext.metrics.writer import MetricsWriter, write_config, write_planner
from megatron_ext.model import parallel
from megatron_ext.model.architectures import read_architecture
from megatron_ext.plan.device import TOTAL_BYTES
from megatron_ext.plan.measured import COMPARED, gpu_of
from megatron_ext.plan.memory import Roles
from megatron_ext.plan.speed import RATES, Lengths, step_seconds
from megatron_ext.train.timeline import describe_run
from tests import gloo
from tools import plan
from tools.measured_run import WARM_UP, comparison, read_measured
from tools.report.page import report

RECIPES = Path(__file__).parents[2] / "recipes"
SIREN = str(RECIPES / "siren" / "siren-qwen2.5-math-7b-2n8g.toml")
SEVEN = RECIPES / "models" / "qwen2.5-math-7b"
TINY = str(RECIPES / "grpo" / "grpo-tiny-cpu.toml")
H100 = {"host": "n1", "device": "NVIDIA H100 80GB HBM3", "memory": round(79.1 * 2**30)}
PARAMETERS, KV = 7_615_616_512, 57_344  # of the model; bytes of a token's keys and values
CONFIG = Config.model_validate(
    {
        "model": {"path": str(SEVEN)},
        "data": {"train": "data.jsonl"},
        "rollout": {"batch_size": 64, "max_response_tokens": 3072},
        "train": {"mini_batch_prompts": 8},
        "parallel": {"ranks_per_node": 4, "tensor": 4, "sequence": True},  # one copy of the model: nothing to exchange
    }
)
LENGTHS = {"prompt/length": 1000.0, "response/length": 3000.0}


def write_run(
    folder: Path,
    config: Config,
    seconds: dict[str, float],
    *,
    roles: Roles = Roles(),  # noqa: B008 (frozen)
    steps: int = 5,
    **rank: Any,
) -> Path:
    """A run whose first WARM_UP steps are ten times as slow, and whose others have ``seconds`` as their median."""
    described = {"first_step": 1, "torch": "2.13.0", "roles": asdict(roles)}
    write_config(folder, config.model_dump(mode="json"))
    write_planner(folder, described | {"ranks": [H100 | rank] * config.parallel.world})
    with MetricsWriter(folder, trackers=[], total_steps=steps) as writer:
        for step in range(1, steps + 1):
            pace = 10.0 if step <= WARM_UP else (0.9, 1.0, 1.3)[step % 3]
            writer.write(step, {f"time/{phase}_s": pace * value for phase, value in seconds.items()} | LENGTHS)
    return folder


def test_rates_are_those_at_which_the_work_takes_the_time(tmp_path: Path) -> None:
    """Three forwards' worth of backward and update and one before, at 400 s on four H100; 4 batches of decoding."""
    batches, decoded = 128 * 8 / 4 / 64, 3072
    seconds = {"old_logprob": 100.0, "update": 300.0, "rollout": batches * decoded * 0.01, "sync": 3.0}
    measured = read_measured(write_run(tmp_path, CONFIG, seconds))
    rates = measured.rates()
    forward = 2 * (28 * 3584 * (2 * 3584 + 2 * 512 + 3 * 18944) + 152064 * 3584) + 2 * 28 * 3584 * 4000
    assert rates.mfu == pytest.approx(4 * 128 * 8 * 4000 * forward / (4 * 989e12 * 400))
    assert rates.decode == pytest.approx((2 * PARAMETERS + 64 * (1000 + 3072 / 2) * KV) / (3.35e12 * 0.01))
    assert rates.launch_s == pytest.approx(0.01 / 28)  # not the .8 ms that would take longer than the step
    assert rates.host_link == pytest.approx(2 * PARAMETERS / 3)
    assert (rates.flops, rates.bandwidth, rates.network) == (989e12, 3.35e12, 50e9)
    assert (measured.gpu, measured.num_steps, measured.lengths) == ("h100", 3, Lengths(1000, 3000))


def test_decoding_far_below_the_memory_bandwidth_is_launching(tmp_path: Path) -> None:
    seconds = {"rollout": 128 * 8 / 4 / 64 * 3072 * 0.1}
    rates = read_measured(write_run(tmp_path, CONFIG, seconds)).rates()
    assert (rates.decode, rates.launch_s) == (0.5, pytest.approx(0.1 / 28))
    assert rates.mfu == RATES["h100"].mfu  # nothing of it was measured


def test_a_rollout_beside_training_is_not_as_fast_as_it_is_hidden(tmp_path: Path) -> None:
    """Training waits for a tenth of what servers take, which is what decoding takes."""
    seconds = {"rollout": 100.0}
    whole = read_measured(write_run(tmp_path / "whole", CONFIG, seconds))
    hidden = read_measured(write_run(tmp_path / "hidden", CONFIG, {"rollout": 10.0, "rollout_background": 100.0}))
    assert hidden.rates() == whole.rates()
    assert comparison(hidden) == comparison(whole) and hidden.measured() == pytest.approx(seconds)


@pytest.mark.parametrize("device", [{}, {"device": "cpu", "memory": 8 * 2**30}], ids=["h100", "cpu"])
def test_a_plan_with_a_runs_rates_takes_what_the_run_took(device: dict[str, Any], tmp_path: Path) -> None:
    """With a reference, a pass for every update after the first, and gradients that travel between nodes."""
    config = plan.read_valid(SIREN)
    roles = replace(plan.method_roles(config), reference=True)
    real = replace(RATES["h100"], mfu=0.31, decode=0.6, host_link=8e9)
    architecture = read_architecture(read_hf_config(SEVEN))
    planned = step_seconds(architecture, config, roles, real, Lengths(1000, 3000), gpu_memory=TOTAL_BYTES["h100"])
    seconds = {"rollout": planned["rollout"], "old_logprob": planned["score"], "sync": planned["weight sync"]}
    seconds |= {"update": planned["update"] + planned["gradient exchange"], "reward": 5.0}
    measured = read_measured(write_run(tmp_path, config, seconds, roles=roles, **device))
    rows = {each.phase: each for each in comparison(measured)}
    assert list(rows) == [*COMPARED, "reward"] and rows["reward"][1:] == (5.0, None, None)
    for name in COMPARED:
        assert rows[name].measured == pytest.approx(rows[name].at_its_own, rel=0.05 if device else 1e-9)
        assert (rows[name].at_assumed_rates is None) == bool(device)
    if not device:
        found = measured.rates()
        assert (found.mfu, found.decode, found.host_link) == pytest.approx((0.31, 0.6, 8e9))


def test_the_command_plans_with_it_and_shows_both(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = plan.read_valid(SIREN)
    run = str(write_run(tmp_path, config, {"rollout": 100, "old_logprob": 20, "update": 90, "sync": 1.5}))
    assert plan.main([SIREN, "--measured", run]) == 0
    text = capsys.readouterr().out
    assert f"{run}: seconds of a step, medians of 3 on 16 x NVIDIA H100 80GB HBM3\n" in text
    assert [line.split()[:2] for line in text.splitlines() if line.startswith("  rollout  ")] == [["rollout", "100"]]
    assert "rates (h100): 989 TFLOP/s" in text and "measured in 3 steps on NVIDIA H100" in text
    assert plan.main([SIREN, "--measured", run, "--json", "--mfu", "0.2", "parallel.nodes=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rates"]["mfu"] == 0.2 and found["groups"]["world"] == 32
    assert found["lengths"] == {"prompt": 1000, "response": 3000}
    assert found["measured"][0]["phase"] == "rollout" and found["measured"][0]["measured"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parallel.tensor=2"], "its parallel.tensor is 4, the recipe's 2"),
        (["rollout.engine=vllm"], "its rollout.engine is hf, the recipe's vllm"),
        (["model.dtype=float32"], "its model.dtype is bfloat16, the recipe's float32"),
        (["--gpu", "a800"], "it ran on NVIDIA H100 80GB HBM3, not on what --gpu a800 means"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = plan.read_valid(SIREN, ["rollout.engine=hf"])
    run = str(write_run(tmp_path, config, {"update": 90.0}))
    assert plan.main([SIREN, "rollout.engine=hf", *arguments, "--measured", run]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_measurement_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(folder: Path) -> str:
        assert plan.main([SIREN, "--measured", str(folder)]) == 2
        return capsys.readouterr().err

    config = plan.read_valid(SIREN)
    assert "expected the folder of a run, found no metrics.jsonl there" in refused(tmp_path / "none")
    short = write_run(tmp_path / "short", config, {"update": 90.0}, steps=2)
    assert "its last step is 2, expected at least 3: the first 2 of a start do not count" in refused(short)
    fast = write_run(tmp_path / "fast", config, {"update": 0.001})
    assert "of the peak of NVIDIA H100 80GB HBM3: they did less than planned" in refused(fast)
    (fast / "planner.json").write_text('{"first_step": 1, "ranks": []}')
    assert f"{fast}/planner.json: roles: Field required" in refused(fast)
    (fast / "planner.json").unlink()
    assert "the run was written by an earlier version" in refused(fast)
    mixed = write_run(tmp_path / "mixed", config, {"update": 90.0})
    described = json.loads((mixed / "planner.json").read_text())
    described["ranks"][3]["device"] = "NVIDIA A100-SXM4-80GB"
    write_planner(mixed, described)
    assert "the run is on NVIDIA A100-SXM4-80GB and NVIDIA H100 80GB HBM3" in refused(mixed)


def described_here(rank: int, world: int) -> dict[str, Any]:
    cpu_compat.enter()
    parallel.initialize(ParallelConfig(ranks_per_node=world))
    return describe_run(Roles(), first_step=1)


def test_what_a_run_writes_of_its_machine_is_what_is_read(tmp_path: Path) -> None:
    [described] = gloo.run(described_here, 1)
    run = write_run(tmp_path, plan.read_valid(TINY), {"rollout": 0.2, "update": 0.5, "old_logprob": 0.2, "sync": 0.02})
    write_planner(run, described)
    measured = read_measured(run)
    assert (measured.device, measured.gpu) == ("cpu", None) and measured.memory == described["ranks"][0]["memory"]
    assert plan.main([TINY, "--measured", str(run), "--json"]) in (0, 1)


def test_a_report_has_both(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "a", CONFIG, {"rollout": 100.0, "update": 300.0}))
    assert "<h2>Plan</h2>" in page and "at assumed rates" in page and "medians of 3 on 4 x NVIDIA H100" in page
    page = report(write_run(tmp_path / "b", CONFIG, {"update": 300.0}, steps=2))
    assert "Not compared with the planner" in page and "its last step is 2" in page


@pytest.mark.parametrize(
    ("device", "gib", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", 79.11, "h100"),
        ("NVIDIA A100-SXM4-80GB", 79.15, "a100"),
        ("NVIDIA A100-SXM4-40GB", 39.4, None),
        ("NVIDIA A100 80GB PCIe", 79.15, None),
        ("NVIDIA H20", 95.0, "h20"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA GH200 480GB", 94.5, None),
        ("cpu", 79.11, None),
    ],
)
def test_a_data_sheet_is_that_of_the_device(device: str, gib: float, gpu: str | None) -> None:
    assert gpu_of(device, gib * 2**30) == gpu


def test_another_versions_configuration_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path, CONFIG, {"update": 1.0})
    write_config(run, {"train": {"no_such_key": 1}})
    with pytest.raises(ConfigError, match=r"config.json: train.no_such_key: .*measure a run anew"):
        read_measured(run)
