"""The generated pages of docs/ are what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_ext.config.aliases import keys
from megatron_ext.config.schema import Config
from megatron_ext.methods import METHODS
from megatron_ext.metrics.glossary import METRICS, Glossary
from tools import docs


def test_the_pages_are_up_to_date() -> None:
    assert docs.out_of_date() == [], "run python -m tools.docs --write"


def test_every_key_has_a_row() -> None:
    section, found = "", []
    for line in docs.configuration().splitlines():
        if line.startswith("## `["):
            section = line.removeprefix("## `[").removesuffix("]`") + "."
        elif line.startswith("| `"):
            found.append(section + line.split("`")[1])
    assert sorted(found) == sorted(keys(Config))


@pytest.mark.parametrize(
    "row",
    [
        "| `workers` | integer >= 0, <= 1024 | `0` | verifier processes per node, shared out over its ranks; "
        "0: one per core, at most 16 a rank |",
        "| `temperature` | number > 0, <= 100 | `1.0` | sampling temperature |",
        '| `dtype` | "float32" or "bfloat16" | `"bfloat16"` | precision of weights and activations |',
        "| `stage_layers` | list of integer >= 1 | `[]` | decoder layers of each of the pipeline x virtual stages; "
        "empty: equal |",
    ],
)
def test_a_row_by_hand(row: str) -> None:
    assert row in docs.configuration().splitlines()


def test_every_method_has_a_section() -> None:
    text = docs.method_pages()
    for name in METHODS:
        assert any(line.startswith("## ") and f"`{name}`" in line for line in text.splitlines()), name


def test_every_metric_has_a_row() -> None:
    text = docs.metric_page()
    for cls in METHODS.values():
        for metric in Glossary(cls.glossary()).metrics:
            assert text.count(f"| `{metric.name}` |") == 1, metric.name


def test_debugging_names_metrics_and_keys_that_exist() -> None:
    everything = {metric.name: metric for cls in METHODS.values() for metric in Glossary(cls.glossary()).metrics}
    glossary = Glossary(metric for metric in everything.values() if metric not in METRICS)
    mentioned = re.findall(r"`([^`]+)`", (docs.DOCS / "debugging.md").read_text())
    for name in mentioned:
        if re.fullmatch(r"[a-z_]+(/[a-z_<>]+)+", name):
            assert glossary.find(name), f"docs/debugging.md: {name} is no metric"
        if re.fullmatch(r"[a-z]+(\.[a-z_]+)+", name) and name.partition(".")[0] in Config.model_fields:
            assert name in keys(Config) or name.startswith("method."), f"docs/debugging.md: {name} is no key"
    assert len(mentioned) > 20


def test_a_page_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docs, "DOCS", tmp_path)
    assert docs.main([]) == 1 and not list(tmp_path.iterdir())
    assert docs.main(["--write"]) == 0 and docs.main([]) == 0
    (tmp_path / "configuration.md").write_text("changed by hand")
    assert docs.out_of_date() == ["configuration.md"]
