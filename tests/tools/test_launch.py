"""Launching through NeMo-Run: what every node runs, the site file's errors and, where it is installed, the script."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from tools import launch

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/siren/siren-tiny-cpu.toml"
EXAMPLE = ROOT / "slurm" / "nemo-site.toml"
OVERRIDES = ["parallel.nodes=2", 'name="two words"']


def test_every_nodes_task_calls_the_launcher_of_ranks_with_the_recipe(tmp_path: Path) -> None:
    stub = tmp_path / "python stub"
    stub.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), *sys.argv[1:]]))\n")
    stub.chmod(0o755)
    site = launch.read_site(EXAMPLE).model_copy(update={"python": str(stub), "project_dir": str(tmp_path)})
    config = read_config(ROOT / RECIPE, OVERRIDES)
    script = launch.node_script(config, site, RECIPE, OVERRIDES)
    environment = {"MASTER": "head:29500", "PATH": "/usr/bin:/bin"}
    printed = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True).stdout
    ranks = ["-m", "tools.ranks", "--nodes", "2", "--ranks-per-node", str(config.parallel.ranks_per_node)]
    ranks += ["--numa-binding", "node"]
    expected = [str(tmp_path), *ranks, "--master", "head:29500", "tools.train", RECIPE, *OVERRIDES]
    assert json.loads(printed) == expected


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('project_dir = "/p"\njob_dir = "/j"', "account: Field required"),
        ('account = "a"\nproject_dir = "/p"\njob_dir = "/j"\npartitoin = "x"', "partitoin: Extra inputs"),
        ('account = "a"\nproject_dir = "/p"\njob_dir = "/j"\nretries = -1', "retries: Input should be greater"),
        ("account = ", "not valid TOML"),
    ],
)
def test_a_wrong_site_file_is_named_with_its_key(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError, match=named):
        launch.read_site(tmp_path / "site.toml")


def test_a_recipe_that_cannot_be_is_not_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    """Slurm would start it, and NeMo-Run put it back into the queue after it has ended with 2."""
    recipe = str(ROOT / "recipes/siren/siren-qwen2.5-math-7b-2n8g.toml")
    assert launch.main([recipe, "parallel.tensor=8", "--site", str(EXAMPLE), "--dry-run"]) == 2
    assert "does not divide the model's 28 attention heads" in capsys.readouterr().err


def test_a_site_that_is_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--site: .* cannot be read: .*Is a directory"):
        launch.read_site(tmp_path)
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="--site: .*x cannot be read: 'utf-8' codec"):
        launch.read_site(tmp_path / "x")


def test_a_missing_site_file_ends_with_the_reason() -> None:
    with pytest.raises(ConfigError, match=r"no such file: nowhere\.toml; begin with a copy of slurm/nemo-site\.toml"):
        launch.read_site("nowhere.toml")


@pytest.mark.skipif(not importlib.util.find_spec("nemo_run"), reason="NeMo-Run is an extra: pip install '.[launch]'")
def test_nemo_run_prints_the_batch_script_of_both_nodes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.launch", RECIPE, *OVERRIDES, "--site", str(EXAMPLE), "--dry-run"]
    environment = {"NEMORUN_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in ("--nodes=2", "--ntasks-per-node=1", "--signal=USR1@3600", "export MASTER=$head_node:29500"):
        assert line in done.stdout
    assert "--mem=0" in done.stdout and "#SBATCH --cpus-per-task=96" in done.stdout
    assert last(done.stdout.split(), "--cpus-per-task=") == "--cpus-per-task=96"  # srun does not take sbatch's
    said, ours = done.stdout.split(), script_words("slurm/siren_7b.sh")
    for option in ("--kill-on-bad-exit=", "--wait="):  # srun takes the last
        assert last(said, option) == last(ours, option)


def last(words: list[str], beginning: str) -> str:
    return [word for word in words if word.startswith(beginning)][-1]


def script_words(name: str) -> list[str]:
    """What our own script would run."""
    environment = {**os.environ, "DRY_RUN": "1"}
    done = subprocess.run(["bash", name], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(bool(importlib.util.find_spec("nemo_run")), reason="NeMo-Run is installed")
def test_without_nemo_run_the_extra_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([str(ROOT / RECIPE), "--site", str(EXAMPLE)]) == 2
    assert "pip install 'megatron-entropy[launch]'" in capsys.readouterr().err


def test_a_machine_without_sbatch_is_told_before_anything_is_submitted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nemo_run", ModuleType("nemo_run"))  # whatever is asked of it fails
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch.main([str(ROOT / RECIPE), "--site", str(EXAMPLE)]) == 2
    assert "which has no sbatch; run it on a login node" in capsys.readouterr().err
