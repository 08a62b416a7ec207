"""METHODS, the recipes, the tests and the table in recipes/README.md agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.config.loading import load_config
from megatron_ext.methods import METHODS
from megatron_ext.methods.clip_higher import ClipHigher
from megatron_ext.methods.grpo import GRPO
from megatron_ext.methods.siren import SIREN
from tools import methods as tool

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_methods() -> None:
    text = tool.README.read_text()
    assert tool.table() in text, "recipes/README.md is out of date: run python -m tools.methods --write"
    assert text.count("-tiny-cpu.toml](") == len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_recipe_and_a_test(name: str) -> None:
    path = ROOT / "recipes" / name / f"{name}-tiny-cpu.toml"
    assert path.is_file(), f"{name} has no {path}: write it, as short as recipes/grpo/grpo-tiny-cpu.toml"
    config = load_config(path)
    assert config.method["name"] == name and config.name == f"{name}-tiny-cpu"
    modules = [parent.__module__.rpartition(".")[2] for parent in METHODS[name].__mro__]
    tests = [ROOT / "tests" / "methods" / f"test_{module}.py" for module in modules]
    assert any(f'"{name}' in path.read_text() for path in tests if path.is_file()), (
        f"{name} has no test: write {tests[0]}, which compares it with its equations and names it"
    )


def test_no_recipe_is_of_an_unknown_method() -> None:
    paths = (ROOT / "recipes").glob("*/*-tiny-cpu.toml")
    folders = {path.parent.name for path in paths if path.name == f"{path.parent.name}-tiny-cpu.toml"}
    assert folders <= set(METHODS), f"{sorted(folders - set(METHODS))}: recipes of no method; add a line to METHODS"


def test_a_row_by_hand() -> None:
    cells = dict(zip(tool.COLUMNS[:-1], tool.cells("siren"), strict=True))
    assert cells["what it is"] == "SIREN: selective entropy regularisation"
    assert cells["paper"] == "[2509.25133](https://arxiv.org/abs/2509.25133)"
    assert tool.cells("mai_clip")[2].startswith("[report](https://microsoft.ai/pdf/mai-thinking-1.pdf), [2402.03300](")
    assert cells["needs"] == "nucleus entropy with gradient, a pass before each update"
    assert (cells["state"], cells["groups"]) == ("`h_anchor`", "relative")
    names = [option.name for option in tool.own_options(SIREN)]
    assert {"p", "tau", "coef", "clip_high", "normalise"} <= set(names) and not {"clip_low", "beta"} & set(names)
    assert "`coef = 0.005`" in cells["options"] and "`top_p_mask = true`" in cells["options"]
    assert [o.name for o in tool.own_options(ClipHigher)][:2] == ["aggregation", "clip_high"]
    assert "dual_clip" in [option.name for option in tool.own_options(GRPO)]
    assert tool.cells("nsr")[6] == "no part"


def test_writing_replaces_what_is_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{tool.BEGIN}\nold\n{tool.END}\nafter\n")
    assert tool.write(path) and not tool.write(path)
    assert path.read_text() == f"before\n{tool.BEGIN}\n{tool.table()}\n{tool.END}\nafter\n"
    path.write_text("no markers\n")
    with pytest.raises(ValueError, match="expected the markers"):
        tool.write(path)
