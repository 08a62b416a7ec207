"""Code that a model directory brings never runs: not asked for, not by ``yes |``, in no command."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.data.prompts import encode_prompts
from megatron_ext.rollout.hf.engine import HFEngine
from megatron_ext.rollout.model_files import load_config, load_tokenizer
from megatron_ext.types import Problem
from tests import warm

ROOT = Path(__file__).parents[2]
BASE = ROOT / "recipes" / "tiny" / "base"
PAYLOAD = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\nclass C:\n    pass\n"
# which file asks for code, and what it says
ASKING = {
    "config": ("config.json", {"model_type": "unheard_of", "auto_map": {"AutoConfig": "code.C"}}),
    "model": ("config.json", {"auto_map": {"AutoModelForCausalLM": "code.C"}}),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "UnheardOf", "auto_map": {"AutoTokenizer": ["code.C", "code.C"]}},
    ),
}


def model_with_code(folder: Path, asking: str) -> tuple[Path, Path]:
    """A copy of the tiny model that asks for its own code, and the file that this code would write."""
    model, marker = folder / "model", folder / "marker"
    shutil.copytree(BASE, model)
    (model / "code.py").write_text(PAYLOAD.format(marker=str(marker)))
    name, said = ASKING[asking]
    file = model / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | said))
    return model, marker


def run_with_yes(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return warm.run([sys.executable, "-m", *command], input="y\n" * 1000, cwd=ROOT, env=environment, timeout=300)


def test_evaluation_refuses_a_model_that_brings_code(tmp_path: Path) -> None:
    model, marker = model_with_code(tmp_path, "config")
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "1+1", "answer": "2"}) + "\n")
    ran = run_with_yes("tools.evaluate", str(model), "--data", str(data), "--samples", "1")
    assert not marker.exists(), "the payload ran"
    assert ran.returncode == 2, ran.stderr
    assert "brings code of its own: auto_map in config.json" in ran.stderr and "Traceback" not in ran.stderr


def test_training_refuses_a_model_that_brings_code(tmp_path: Path) -> None:
    model, marker = model_with_code(tmp_path, "tokenizer")
    recipe = str(ROOT / "recipes" / "tiny" / "tiny-cpu.toml")
    ran = run_with_yes("tools.train", recipe, f"model.path={model}", f"log.dir={tmp_path / 'runs'}", "train.steps=1")
    assert not marker.exists(), "the payload ran"
    assert ran.returncode == 2, ran.stderr
    assert "brings code of its own: auto_map in tokenizer_config.json" in ran.stderr


@pytest.mark.parametrize("load", [load_config, load_tokenizer, HFEngine])
@pytest.mark.parametrize("asking", ASKING)
def test_the_message_names_file_and_code(tmp_path: Path, load: Callable[[Path], Any], asking: str) -> None:
    model, marker = model_with_code(tmp_path, asking)
    name = ASKING[asking][0].replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"auto_map in {name} is .*code\.C.*expected none, for code of a model never"):
        load(model)
    assert not marker.exists()


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def test_weights_that_are_a_pickle_are_not_read(tmp_path: Path) -> None:
    model, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(BASE, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(marker)}))
    with pytest.raises(OSError, match="no file named model.safetensors"):
        HFEngine(model)
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].system('touch MARKER') }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_chat_template_does_not_reach_python(tmp_path: Path, template: str) -> None:
    model, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(BASE, model)
    (model / "chat_template.jinja").write_text(template.replace("MARKER", str(marker)))
    problem = Problem(problem_id="0", prompt="1+1", answer="2", verifier="math")
    with pytest.raises(ConfigError, match="chat template cannot be applied to problem 0"):
        list(encode_prompts(load_tokenizer(model), [problem]))
    assert not marker.exists()


def test_every_loader_of_transformers_is_told_to_trust_no_code() -> None:
    """``None``, the default, asks on standard input; GenerationConfig, which has no code, does not take the option."""
    silent = []
    for file in [*(ROOT / "megatron_ext").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            auto = ast.unparse(node.func.value).startswith("Auto") and node.func.attr == "from_config"
            if not auto and node.func.attr != "from_pretrained":
                continue
            said = {option.arg: ast.unparse(option.value) for option in node.keywords}
            if said.get("trust_remote_code") != "False" and ast.unparse(node.func.value) != "GenerationConfig":
                silent.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert not silent, silent
