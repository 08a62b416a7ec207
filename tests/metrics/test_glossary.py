"""Every metric is described once, in words that name only what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.config.aliases import keys
from megatron_ext.config.schema import Config
from megatron_ext.methods import METHODS
from megatron_ext.metric import Metric
from megatron_ext.metrics.glossary import METRICS, Glossary
from megatron_ext.metrics.writer import STRICT, MetricsWriter, read_steps

EVERY = {metric.name: metric for cls in METHODS.values() for metric in Glossary(cls.glossary()).metrics}


@pytest.mark.parametrize("name", EVERY)
def test_a_description_is_complete_and_names_what_exists(name: str) -> None:
    metric = EVERY[name]
    assert metric.section and metric.title and metric.unit and metric.meaning
    text = f"{metric.meaning} {metric.good}; {metric.low}; {metric.high}"
    everything = Glossary(metric for metric in EVERY.values() if metric not in METRICS)
    for mentioned in re.findall(r"\b[a-z_]+/[a-z_]+\b", text):
        assert everything.find(mentioned), f"{name}: {mentioned} is no metric"
    sections = {key.partition(".")[0] for key in keys(Config) if "." in key}
    for mentioned in re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+\b", text):
        if mentioned.partition(".")[0] in sections:
            assert mentioned in keys(Config), f"{name}: {mentioned} is no key of a recipe"


def test_a_metric_is_described_once() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    short = [metric.short for metric in EVERY.values() if metric.short]
    assert len(set(short)) == len(short)
    with pytest.raises(ValueError, match="described twice: grad/norm"):
        Glossary([Glossary().require("grad/norm")])


def test_a_family_is_one_part_of_a_name() -> None:
    glossary = Glossary()
    family = glossary.require("reward/outcome/<outcome>")
    assert glossary.find("reward/outcome/correct") is family and glossary.find("reward/outcome/a/b") is None
    assert glossary.find("reward/outcome") is None and glossary.find("siren/hbar") is None
    assert Glossary(METHODS["siren"].glossary()).require("siren/hbar").unit == "nats per token"


def test_a_method_has_what_its_parents_report() -> None:
    names = [metric.name for metric in METHODS["entropy_advantage_ppo"].glossary()]
    assert {"loss/policy", "overlong/share", "critic/value"} <= set(names) and len(set(names)) == len(names)


def test_an_undescribed_metric_is_an_error_where_tests_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT, "1")
    own = Metric(name="mine/value", section="Mine", title="Value", unit="1", meaning="of a method in a test")
    with MetricsWriter(tmp_path, trackers=[], total_steps=3, glossary=Glossary([own])) as writer:
        writer.write(1, {"mine/value": 1.0, "reward/mean": 0.5})
        with pytest.raises(ValueError, match="nothing describes mine/other; add it to"):
            writer.write(2, {"mine/other": 1.0})
        monkeypatch.delenv(STRICT)
        writer.write(3, {"mine/other": 1.0})  # a user's run goes on
    assert [record["step"] for record in read_steps(tmp_path / "metrics.jsonl")] == [1, 3]


def test_the_glossary_needs_no_torch() -> None:
    code = "import sys; import megatron_ext.metrics.glossary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
