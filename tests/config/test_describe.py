"""Every key has a description, and a printed configuration is a recipe."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.describe import sections, to_toml, toml_value
from megatron_ext.config.schema import Config

SECTIONS = list(sections())


@pytest.mark.parametrize(("name", "description", "keys"), SECTIONS, ids=[name or "top" for name, *_ in SECTIONS])
def test_every_section_and_key_is_described(name: str, description: str, keys: list) -> None:
    assert description.endswith("."), f"[{name}]: its class has no docstring"
    missing = [key.name for key in keys if not key.description]
    assert not missing, f"[{name}] {missing}: give each Field(..., description=...)"


def test_a_printed_configuration_is_read_back() -> None:
    config = Config().model_dump() | {"method": {"name": "grpo", "beta": 1e-7, "dual_clip": None}}
    text = to_toml(config)
    read = tomllib.loads(text)
    assert read.pop("method") == {"name": "grpo", "beta": 1e-7} and "# dual_clip is not set" in text.splitlines()
    assert Config.model_validate(read) == Config()
    assert list(read) == [name for name in Config.model_fields if name != "method"]


def test_a_key_stands_below_its_description() -> None:
    lines = to_toml(Config().model_dump()).splitlines()
    assert lines[lines.index("keep = 2") - 1] == "# newest valid checkpoints to keep"
    assert lines[lines.index("[checkpoint]") - 1].startswith("# When checkpoints are written")
    assert max(map(len, lines)) <= 120


@settings(deadline=None)
@given(
    st.recursive(
        st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda each: st.lists(each) | st.dictionaries(st.text(), each),
    )
)
def test_any_value_is_read_back(value: object) -> None:
    assert tomllib.loads(f"value = {toml_value(value)}")["value"] == value
