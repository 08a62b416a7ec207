"""Model directories: any files in them are a model or a message, through the commands and readers of a run."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.model.architectures import read_architecture
from tests.properties.oddities import SPOILERS, damaged, limits, mutated, to_bytes, to_json
from tests.tiny import hf_model
from tools import convert, train

TINY = Path(__file__).parents[2] / "recipes" / "tiny"
KINDS = ("qwen2", "llama", "qwen3_moe")
SLOW = settings(max_examples=max(10, settings().max_examples // 3))


@contextmanager
def copied(model: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(model, Path(folder) / "model"))


def code(command: Any, *arguments: object) -> int:
    """The exit code of a command, which says why where it is not 0."""
    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err), limits():
        found = command([str(each) for each in arguments])
    assert found == 0 or (found == 2 and len(err.getvalue()) > 20)
    return found


def convert_it(model: Path) -> int:
    return code(convert.main, "from-hf", model, model.parent / "out")


@given(data=st.data())
def test_a_configuration_with_something_wrong(data: st.DataObject) -> None:
    base = hf_model(data.draw(st.sampled_from(KINDS)))[1]
    with tempfile.TemporaryDirectory() as folder:
        config = (base / "config.json").read_bytes()
        text = data.draw(mutated(json.loads(config)).map(to_json).map(to_bytes) | damaged(config))
        (Path(folder) / "config.json").write_bytes(text)
        code(train.main, TINY / "tiny-cpu.toml", f"model.path={folder}", "--print-config")
        with limits():
            try:
                found = read_architecture(read_hf_config(folder))
            except (ConfigError, ValueError) as error:
                assert type(error) in (ConfigError, ValueError) and len(str(error)) < 2000
            else:
                assert found.num_heads % found.num_groups == 0 and found.head_dim % 2 == 0 and found.norm_eps > 0


@SLOW
@given(data=st.data())
def test_weights_that_do_not_fit_their_configuration(data: st.DataObject) -> None:
    with copied(hf_model(data.draw(st.sampled_from(KINDS)))[1]) as model:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_bytes(to_bytes(to_json(data.draw(mutated(config)))))
        convert_it(model)


@SLOW
@given(data=st.data())
def test_safetensors_with_something_wrong(data: st.DataObject) -> None:
    with copied(hf_model()[1]) as model:
        file = model / "model.safetensors"
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        text = to_bytes(to_json(data.draw(mutated(json.loads(content[8 : 8 + length])))))
        sealed = len(text).to_bytes(8, "little") + text + content[8 + length :]
        file.write_bytes(data.draw(st.just(sealed) | damaged(content)))
        convert_it(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("how", SPOILERS)
def test_what_is_no_file(how: str, name: str) -> None:
    with copied(hf_model()[1]) as model:
        if name.endswith(".index.json"):
            (model / name).write_text(json.dumps({"weight_map": {"x": "model.safetensors"}}))
        assert convert_it(model) == 0
        shutil.rmtree(model.parent / "out")
        SPOILERS[how](model / name)
        assert convert_it(model) == (0 if name.endswith(".index.json") and not (model / name).is_file() else 2)
