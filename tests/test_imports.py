"""The import arrows of the repository, read from the source without running it.

tools -> train -> {checkpoint, metrics, plan, data}
      -> {model -> ops -> ops.kernels, rollout} -> {methods, config, types}
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_BELOW = (  # import no room
    *("types", "records", "kept_tokens", "metric", "plugins", "files", "hashing", "heartbeat", "cpu_compat"),
)
BOTTOM = {f"megatron_ext.{name}" for name in _BELOW}
ROOMS = {  # room -> what it may import of this project, besides itself and BOTTOM
    "megatron_ext.types": {"megatron_ext.records", "megatron_ext.kept_tokens"},
    "megatron_ext.records": set(),
    "megatron_ext.metric": set(),
    "megatron_ext.plugins": set(),
    "megatron_ext.files": set(),
    "megatron_ext.hashing": set(),
    "megatron_ext.heartbeat": set(),
    "megatron_ext.cpu_compat": set(),
    "megatron_ext.gpu_libraries": set(),
    "megatron_ext.config": {"megatron_ext.rollout.registry", "megatron_ext.rollout.rewards.functions"},  # without torch
    "megatron_ext.ops": set(),
    "megatron_ext.methods": set(),
    "megatron_ext.model": {"megatron_ext.ops", "megatron_ext.methods.base", "megatron_ext.config"},
    "megatron_ext.rollout": {"megatron_ext.config"},
    "megatron_ext.data": {"megatron_ext.config", "megatron_ext.rollout"},
    "megatron_ext.checkpoint": {"megatron_ext.model", "megatron_ext.config"},
    "megatron_ext.metrics": {
        "megatron_ext.methods.base",
        "megatron_ext.config",
        "megatron_ext.rollout.rewards.outcome",
    },
    "megatron_ext.plan": {
        *("megatron_ext.model", "megatron_ext.methods.base", "megatron_ext.config"),
        "megatron_ext.rollout.registry",
    },
    "megatron_ext.train": {"megatron_ext"},
    "tools": {"megatron_ext"},
}
OF_BOTTOM = {  # where a room does with less than all of BOTTOM
    "megatron_ext.config": {"megatron_ext.files", "megatron_ext.plugins"},
    "megatron_ext.ops": set(),
    "megatron_ext.methods": {f"megatron_ext.{name}" for name in ("types", "metric", "plugins", "hashing")},
}
ONLY_IN = {  # package -> the rooms that may import it
    "megatron": (
        "megatron_ext.model",
        "megatron_ext.checkpoint",
        "megatron_ext.plan",
        "megatron_ext.cpu_compat",
        "tools.bench",
    ),
    "triton": ("megatron_ext.ops.kernels",),
    "vllm": ("megatron_ext.rollout",),
}
NO_PROCESS_GROUPS = ("megatron_ext.methods", "megatron_ext.types", "megatron_ext.metrics.eval_stats")


def modules() -> list[tuple[str, Path]]:
    files = [path for room in ("megatron_ext", "tools") for path in sorted((ROOT / room).rglob("*.py"))]
    return [(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path) for path in files]


def imports(path: Path) -> Iterator[str]:
    """Every module named by an import statement, wherever it stands; ``from a import b`` also gives ``a.b``.

    Only the tools name one another relatively: the wheel has them as ``megatron_ext.tools``.
    """
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            own = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*own, *([node.module] if node.module else [])])
            assert bool(node.level) == within(module, ["tools"]), f"{path}: {module} is imported the other way"
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, rooms) -> bool:
    return any(name == room or name.startswith(room + ".") for room in rooms)


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_follow_the_arrows(name: str, path: Path) -> None:
    room = max((room for room in ROOMS if within(name, [room])), key=len, default=None)
    for imported in imports(path):
        if within(imported, ["megatron_ext", "tools"]) and room is not None:
            allowed = ROOMS[room] | {room} | OF_BOTTOM.get(room, BOTTOM if room not in BOTTOM else set())
            assert imported == "megatron_ext" or within(imported, allowed), f"{name} imports {imported}"
        assert not imported.startswith("tests"), f"{name} imports {imported}"
        for package, homes in ONLY_IN.items():
            if within(imported, [package]):
                assert within(name, homes), f"{name} imports {imported}"
        if within(name, NO_PROCESS_GROUPS):
            assert not within(imported, ["torch.distributed"]), f"{name} imports {imported}"


def test_a_module_of_the_trainer_knows_few_others() -> None:
    """At most 12 modules of other rooms each: a subject that needs more is two."""
    known = {name for name, _ in modules()}
    for name, path in modules():
        if within(name, ["megatron_ext.train"]):
            others = {each for each in imports(path) if each in known and not within(each, ["megatron_ext.train"])}
            others -= {each for each in others if any(within(other, [each]) for other in others - {each})}
            assert len(others) <= 12, f"{name} imports {len(others)} modules of other rooms: {sorted(others)}"


def test_the_trainers_functions_are_short() -> None:
    for name, path in modules():
        if within(name, ["megatron_ext.train"]):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef):
                    assert (node.end_lineno or 0) - node.lineno < 60, f"{name}.{node.name}"


def test_only_collectives_talks_to_other_ranks_in_ops() -> None:
    for name, path in modules():
        if within(name, ["megatron_ext.ops"]) and name != "megatron_ext.ops.collectives":
            talk = [line for line in path.read_text().splitlines() if "dist.all_" in line or "dist.broadcast" in line]
            assert not talk, f"{name}: {talk}"


def test_a_recipe_loads_without_torch() -> None:
    code = (
        "import sys; from megatron_ext.config.loading import load_config; "
        "load_config('recipes/siren/siren-tiny-cpu.toml'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_layout_is_planned_without_torch() -> None:
    code = "import sys; import megatron_ext.plan.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_reward_worker_starts_without_torch() -> None:
    code = "import sys; import megatron_ext.rollout.rewards.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
