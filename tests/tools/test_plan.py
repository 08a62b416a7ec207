"""The planner's command: what fits, what does not and what would, as a table, as JSON and as a chart."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_ext.plan.device import TOTAL_BYTES
from megatron_ext.plan.layout import make_plan
from megatron_ext.plan.memory import PHASES
from megatron_ext.plan.speed import RATES
from tools import plan
from tools.plan_chart import memory_chart

RECIPES = Path(__file__).parents[2] / "recipes"
SIREN = str(RECIPES / "siren" / "siren-qwen2.5-math-7b-2n8g.toml")
EMBEDDED = ["rollout.engine=hf", "rollout.tensor_parallel_size=1", "rollout.batch_size=32"]


def test_a_table(capsys: pytest.CaptureFixture) -> None:
    assert plan.main([SIREN, "--gpu", "a800"]) == 0
    text = capsys.readouterr().out
    assert "7,615,616,512 parameters" in text
    assert "groups: world 16, nodes 2, data 4, pipeline 1, virtual 1, tensor 4\n" in text
    assert "128 prompts, 1024 responses, at most 4,194,304 tokens; 16 updates of 64 responses" in text
    assert "activations by recompute mode, GB: none 19.8, mlp 6.7, full 2.2" in text
    assert "fits: " in text and " of 85.2 GB" in text and "312 TFLOP/s" in text and "data sheet" in text
    groups = "world 16, optimizer 16, tensor 4, data 4, data with context 4"
    assert f"NCCL communicators by their ranks: {groups}\n" in text


def test_json_adds_up(capsys: pytest.CaptureFixture) -> None:
    assert plan.main([SIREN, "--json", "--mean-response", "1000"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["nearest_fit"] is None and found["lengths"]["response"] == 1000
    peak = max(sum(items.values()) for items in found["memory"].values())
    assert found["peak_by_rank"] == [pytest.approx(peak)] and 40e9 < peak < 80e9
    assert found["roles"] == {"reference": False, "critic": False, "current": True, "old": True}


def test_what_does_not_fit_names_a_layout_that_does(capsys: pytest.CaptureFixture) -> None:
    small = ["parallel.nodes=1", "parallel.tensor=1", "parallel.sequence=false"]
    assert plan.main([SIREN, *small]) == 1
    text = capsys.readouterr().out
    assert "does not fit: " in text
    changes = text.split("nearest layout that fits")[1].splitlines()[0].split(": ")[1].split()
    assert plan.main([SIREN, *small, *changes]) == 0


@pytest.mark.parametrize(
    ("arguments", "help"),
    [
        ([SIREN, "--memory-gb", "10"], "another rollout.tensor_parallel_size"),
        # all of 3,888 layouts are tried, of 18,867 tensors: seconds, where each was counted anew minutes
        (["aer-qwen3-30b-a3b-base-4n8g", *EMBEDDED], "rollout.engine=vllm, which can cut its copy over GPUs"),
    ],
)
def test_no_layout_at_all_is_said(arguments: list[str], help: str, capsys: pytest.CaptureFixture) -> None:
    assert plan.main(arguments) == 1
    said = "no layout that was tried on these GPUs fits: take more nodes, shorter sequences, or "
    assert said + help in capsys.readouterr().out


def test_a_chart(tmp_path: Path) -> None:
    """Its file is SVG with a bar for each item and phase; the bars of a phase stand end to end up to its total."""
    assert plan.main([SIREN, "--svg", str(tmp_path / "memory.svg")]) == 0
    assert ElementTree.parse(tmp_path / "memory.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    config = plan.read_valid(SIREN, [])
    made = make_plan(config, plan.method_roles(config), rates=RATES["h100"], gpu_memory=TOTAL_BYTES["h100"])
    [axes] = memory_chart(made).axes
    bars = {container.get_label(): list(container) for container in axes.containers}
    assert [f"{bar.get_width():.1f}" for bar in bars["weights"]] == ["3.8"] * 3 and any("KV" in name for name in bars)  # pyright: ignore[reportOperatorIssue]
    for number, phase in enumerate(PHASES):
        end = 0.0
        for each in bars.values():
            assert each[number].get_x() == pytest.approx(end)
            end += each[number].get_width()
        assert end == pytest.approx(made.worst.total(phase) / 1e9)


def test_bad_input_is_a_configuration_error(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert plan.main([SIREN, "parallel.tensor=8"]) == 2
    assert "does not divide the model's 28 attention heads" in capsys.readouterr().err
    assert plan.main([SIREN, "rollout.max_response_tokens=8192"]) == 2
    assert "positions" in capsys.readouterr().err
    assert plan.main([SIREN, "method.tau=2"]) == 2
    assert "method.tau" in capsys.readouterr().err
    for changed in (
        {"model_type": "mistral", "architectures": ["M"]},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    ):
        hf = json.loads((RECIPES / "models/qwen2.5-math-7b/config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(hf | changed))
        assert plan.main([SIREN, f'model.path="{tmp_path}"']) == 2
        assert "not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mfu", "4"], "--mfu: found '4', expected a number above 0 and at most 1"),
        (["--mfu", "0"], "--mfu: found '0'"),
        (["--mfu-experts", "nan"], "--mfu-experts: found 'nan'"),
        (["--decode", "1.1"], "--decode: found '1.1'"),
        (["--memory-gb", "-3"], "--memory-gb: found '-3', expected a number above 0"),
        (["--flops", "1e999"], "--flops: found '1e999'"),
        (["--mean-response", "many"], "--mean-response: found 'many'"),
        (["--gpu", "h999"], "invalid choice: 'h999'"),
        (["--svg", "/dev/null/memory.svg"], "--svg: '/dev/null/memory.svg' cannot be written"),
    ],
)
def test_an_option_that_cannot_be_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main([SIREN, *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_lengths_stay_below_the_recipes_limits(capsys: pytest.CaptureFixture) -> None:
    assert plan.main([SIREN, "--mean-response", "3073"]) == 2
    assert "--mean-response: found 3073 tokens, expected at most the recipe's 3072" in capsys.readouterr().err
    assert plan.main([SIREN, "--mean-prompt", "1024", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == {"prompt": 1024, "response": 1536}


@pytest.mark.parametrize("gpu", ["a100", "a800", "b200", "h100", "h20", "h200", "h800"])
def test_every_gpu_is_planned_for(gpu: str, capsys: pytest.CaptureFixture) -> None:
    assert plan.main([SIREN, "--gpu", gpu]) == 0
    assert f"rates ({gpu}): " in capsys.readouterr().out
