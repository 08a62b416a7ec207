"""The wheel, as a stranger gets it: what is in it, what it needs, and that it works far from a checkout.

Two environments see the installed wheel. One has torch and what torch asks for, and nothing else; the other has all
packages of this environment. Nothing is downloaded: packages are linked to those installed here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.mutations import copy_tree

ROOT = Path(__file__).parents[1]
HERE = Path(sysconfig.get_paths()["purelib"])
OPERATOR = """
import os, sys
import torch, torch.distributed as dist
from megatron_ext.ops import VocabShard, policy_stats
import megatron_ext.methods

V, rank, world, store = 32, *map(int, sys.argv[1:3]), sys.argv[3]
group = None
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    group = dist.group.WORLD
generator = torch.Generator().manual_seed(0)
whole, targets = 3 * torch.randn(5, V, generator=generator).double(), torch.arange(5) * 6
begin, end = rank * V // world, (rank + 1) * V // world

logits = whole[:, begin:end].clone().requires_grad_()
names = ("logprob", "entropy", "nucleus_entropy")
stats = policy_stats(logits, targets, VocabShard(begin, end, V, group), top_p=0.8, want=names, grad=names)
(stats.logprob + 2 * stats.entropy + 3 * stats.nucleus_entropy).sum().backward()

logp = whole.requires_grad_().log_softmax(-1)
ordered = logp.exp().sort(descending=True)
inside = torch.zeros_like(whole, dtype=torch.bool)
inside.scatter_(1, ordered.indices, ordered.values.cumsum(-1) - ordered.values < 0.8)
q = whole.masked_fill(~inside, -torch.inf).log_softmax(-1).masked_fill(~inside, 0)
expected = {
    "logprob": logp.gather(1, targets[:, None])[:, 0],
    "entropy": -(logp.exp() * logp).sum(-1),
    "nucleus_entropy": -(q.exp() * q * inside).sum(-1),
}
(expected["logprob"] + 2 * expected["entropy"] + 3 * expected["nucleus_entropy"]).sum().backward()
for name in names:
    torch.testing.assert_close(getattr(stats, name), expected[name])
torch.testing.assert_close(logits.grad, whole.grad[:, begin:end])

heavy = {"megatron", "transformers", "vllm", "pydantic", "numpy"} & {name.partition(".")[0] for name in sys.modules}
assert not heavy, heavy
assert "site-packages" in megatron_ext.__file__ and len(megatron_ext.methods.METHODS) > 15
"""

MISSING = """
from megatron_ext.config.loading import read_config
from megatron_ext.tools.dry_run import missing
print("\\n".join(missing(read_config("siren-qwen2.5-math-7b-2n8g"))))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows, with weights where users put them; a build leaves its own files beside them."""
    tree = tmp_path_factory.mktemp("tree")
    copy_tree(tree)
    (tree / "recipes" / "models" / "qwen3-14b" / "model.safetensors").write_bytes(b"of many gigabytes")
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", out, tree)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def torch_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel, torch and what torch asks for."""
    packages = tmp_path_factory.mktemp("torch")
    link("torch", packages)
    assert not (packages / "numpy").exists()
    return environment(tmp_path_factory.mktemp("alone"), packages, wheel)


@pytest.fixture(scope="module")
def everything(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the wheel and all packages of this environment, but not this checkout."""
    packages = tmp_path_factory.mktemp("all")
    for each in HERE.iterdir():
        if "megatron_entropy" not in each.name and each.suffix != ".pth":
            (packages / each.name).symlink_to(each)
    return environment(tmp_path_factory.mktemp("full"), packages, wheel)


def link(name: str, packages: Path) -> None:
    """An installed package, and what it asks for without its extras, into the folder ``packages``."""
    found = distribution(name)
    for first in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if (packages / first).exists():
            return
        (packages / first).symlink_to(HERE / first)
    for line in found.requires or ():
        asked = Requirement(line)
        if asked.marker is None or asked.marker.evaluate({"extra": ""}):
            link(asked.name, packages)


def environment(folder: Path, packages: Path, *project: str | Path) -> Path:
    """The Python of a fresh environment that has ``project``, as pip names it, and the folder ``packages``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    [site] = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--no-build-isolation", "--no-compile", *project)
    return python


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments), "--quiet", "--no-deps", "--no-index"]
    subprocess.run(command, check=True)


def run(folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """In ``folder``, without what pytest's own environment says to Python."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    inherited |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], cwd=folder, env=inherited, capture_output=True, text=True, timeout=300)


def console(python: Path, folder: Path, *arguments: str) -> str:
    done = run(folder, python.parent / "megatron-entropy", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def installed_files(python: Path) -> set[tuple[Path, int]]:
    """With their times; byte code aside, which the workers that score write."""
    files = [path for path in python.parents[1].rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {(path, path.stat().st_mtime_ns) for path in files}


def test_the_wheel_is_one_package_with_the_tools_and_the_recipes(wheel: Path) -> None:
    found = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in found if name.partition("/")[0].endswith(".dist-info")}
    code = {f"megatron_ext/{path.relative_to(ROOT / 'megatron_ext')}" for path in (ROOT / "megatron_ext").rglob("*.py")}
    code.add("megatron_ext/config/public_sets.toml")
    tools = {f"megatron_ext/{path.relative_to(ROOT)}" for path in (ROOT / "tools").rglob("*.py")}
    recipes = {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.toml")}
    recipes |= {path.relative_to(ROOT) for path in (ROOT / "recipes" / "models").glob("*/config.json")}
    recipes |= {path.relative_to(ROOT) for path in (ROOT / "recipes" / "prompts").glob("*.jinja")}
    recipes |= {path.relative_to(ROOT) for path in (ROOT / "recipes" / "tiny").rglob("*") if path.is_file()}
    recipes |= {path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("README.md")}
    assert len(recipes) > 100 and Path("recipes/tiny/base/model.safetensors") in recipes
    assert found - info == code | tools | {f"megatron_ext/{path}" for path in recipes}


def test_it_needs_torch_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        [name] = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_bytes(file.read(name))
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert [each.name for each in asked if each.marker is None] == ["torch"]
    assert {"train", "vllm", "launch", "trackers", "docs", "dev"} == set(metadata.get_all("Provides-Extra", []))


@pytest.mark.parametrize("world", [1, 2])
def test_the_operator_needs_no_other_package(world: int, torch_alone: Path, tmp_path: Path) -> None:
    command = [torch_alone, "-c", OPERATOR]
    with ThreadPoolExecutor() as ranks:
        started = [
            ranks.submit(run, tmp_path, *command, str(rank), str(world), tmp_path / "store") for rank in range(world)
        ]
    for each in started:
        assert each.result().returncode == 0, each.result().stderr


def test_a_command_without_its_packages_names_the_extra(torch_alone: Path, tmp_path: Path) -> None:
    assert "semantic-entropy" in console(torch_alone, tmp_path, "--help")
    done = run(tmp_path, torch_alone.parent / "megatron-entropy", "train", "siren-tiny-cpu")
    assert done.returncode == 2 and done.stderr.splitlines() == [
        "megatron-entropy train: needs pydantic, which is not installed",
        f"  {torch_alone} -m pip install 'megatron-entropy[train]'",
    ]


def test_a_shipped_recipe_trains_and_is_evaluated_far_from_a_checkout(everything: Path, tmp_path: Path) -> None:
    before = installed_files(everything)
    quick = ["train.steps=1", "rollout.prompts=4", "train.mini_batch_prompts=4", "log.dir=mine"]
    quick += ["parallel.ranks_per_node=1", "parallel.tensor=1", "checkpoint.every=0"]
    said = console(everything, tmp_path, "train", "siren-tiny-cpu", *quick)
    run_dir = tmp_path / "mine" / "siren-tiny-cpu"
    assert "report: mine/siren-tiny-cpu/report.html" in said and (run_dir / "report.html").is_file()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 1
    data = ["--data", "recipes/tiny/data/eval.jsonl", "--limit", "2", "--samples", "1", "--max-response-tokens", "4"]
    assert "avg@1" in console(everything, tmp_path, "evaluate", "recipes/tiny/base", *data, "--workers", "1")
    assert installed_files(everything) == before


def test_a_recipe_of_ones_own_inherits_a_shipped_one(everything: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('parent = "recipes/siren/siren-tiny-cpu.toml"\nname = "mine"\n')
    found = tomllib.loads(console(everything, tmp_path, "train", "mine.toml", "--print-config"))
    assert found["name"] == "mine" and found["method"]["name"] == "siren"
    assert Path(found["data"]["train"]).is_file() and "site-packages" in found["data"]["train"]


def test_what_a_full_size_recipe_lacks_is_expected_below_the_current_directory(
    everything: Path, tmp_path: Path
) -> None:
    text = console(everything, tmp_path, "plan", "recipes/siren/siren-qwen2.5-math-7b-2n8g.toml", "--json")
    assert json.loads(text)["fits"]
    done = run(tmp_path, everything, "-c", MISSING)
    assert "--local-dir recipes/models/qwen2.5-math-7b\n" in done.stdout, done.stderr
    assert "data.train: data/openr1-math-46k-8192.jsonl not found here" in done.stdout


def test_an_editable_install_has_the_checkouts_recipes(tree: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", HERE, "--editable", tree)
    assert console(python, tmp_path, "recipes", "siren-tiny*").splitlines()[0] == f"{tree / 'recipes'}:"
    assert "siren-tiny-cpu" in console(python, tmp_path, "plan", "siren-tiny-cpu")
    assert run(tmp_path, python, "-c", "import tools").returncode == 1
