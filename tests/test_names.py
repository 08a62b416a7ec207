"""Names: the trainer and the tools know no method by its name, and one thing has one name, the field's.

Read from the source without running it: string constants and imports for the methods, NAME tokens for the rest.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ext.methods import METHODS

ROOT = Path(__file__).parent.parent
KNOWS_NO_METHOD = (
    *(f"megatron_ext/{room}" for room in ("train", "model", "metrics", "rollout", "plan", "data", "checkpoint")),
    *("megatron_ext/config", "megatron_ext/ops", "tools"),
)
PAGES = {path.stem for path in (ROOT / "megatron_ext/methods").glob("*.py")} - {
    "__init__",
    "base",
    "selection",
    "surrogates",
    "targets",
}
MAY_NAME = {  # file -> the methods, pages and words it may name, and why
    "megatron_ext/config/schema.py": {"grpo"},  # the default of method.name
    "tools/methods.py": {"megatron_ext.methods.grpo"},  # the base whose options the table does not repeat
    "tools/tiny/tabular.py": {  # one paper's theorems, with that method's own controller and loss
        "megatron_ext.methods.entropic",
        "entropic/entropy",
        "entropic/alpha",
    },
    "tools/analyze/pivotal.py": {"entropy_advantage"},  # one paper's figure, of that method's own term
    "tools/bench/ops.py": {"sent"},  # bytes that were sent
    "tools/bench/step.py": {"dr_grpo", "siren"},  # the loss that TRL has too, and what a method costs beside it
    "tools/bench/trl_trainer.py": {"dr_grpo"},  # TRL's own name of that loss
}

RENAMED = {  # what a name was -> what it is now
    "Rows": "PackedSequences, or problems",
    "micros": "micro_batches",
    "minis": "mini_batches",
    "weigh": "set_token_weights",
    "weighed": "set_token_weights",
    "credit": "compute_advantages",
    "observe": "on_step_start",
    "Trained": "TrainableModel",
    "Start": "WeightInitializer",
    "chief": "rank 0",
    "is_chief": "rank 0",
    "judge": "score",
    "judged": "scored",
    "slow_rows": "fallback",
    "certified": "resolved",
    "crossing": "the cutoff token",
    "memory_share": "gpu_memory_utilization",
    "eager": "enforce_eager",
    "whole_tensors": "full_tensors",
    "hf_tables": "param_mapping",
    "Rule": "ParamMapping",
    "Cut": "tp_sharding",
}
RENAMED_IN = {  # room -> likewise, for words that mean something else elsewhere
    "megatron_ext/ops": {
        "window": "candidates",
        "windows": "candidates",
        "reach": "inclusive",
        "rows": "tokens",
    },
    "megatron_ext/train": {
        "look": "compute_old_logprobs",
        "place": "the prompt's index",
        "places": "the prompts' indices",
        "rows": "sequences, or token positions",
        "draw": "sample",
        "shards": "meta_build",
        "objective": "method_factory",
        "cuts": "tp_sharding",
        "window": "candidates",
    },
    "megatron_ext/methods": {"rows": "sequences", "look": "compute_old_logprobs"},
    "megatron_ext/rollout": {"rows": "sequences", "draw": "sample", "look": "compute_old_logprobs"},
    "megatron_ext/checkpoint": {"rows": "sequences", "cuts": "tp_sharding", "place": "a shard's offset"},
    "megatron_ext/model": {"cuts": "tp_sharding", "draw": "sample", "place": "an index"},
    "megatron_ext/plan": {"rows": "sequences", "cuts": "tp_sharding"},
    "megatron_ext/types.py": {"rows": "sequences", "place": "the prompt's index"},
}
MOVED = (
    *(f"megatron_ext/train/{name}.py" for name in ("shards", "objective", "order", "rows", "cuts", "curriculum")),
    *("megatron_ext/host.py", "megatron_ext/checkpoint/whole_tensors.py", "megatron_ext/model/hf_tables.py"),
    *("megatron_ext/model/cuts.py", "megatron_ext/data/order.py", "megatron_ext/plan/shards.py", "settings"),
)


def sources(*rooms: str) -> list[str]:
    paths = [
        path for room in rooms for path in ([ROOT / room] if room.endswith(".py") else (ROOT / room).rglob("*.py"))
    ]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def methods_named(path: str) -> Iterator[tuple[int, str]]:
    """Every string that is a method's name or begins with it (``siren/hbar``, ``siren-s0``), and every page imported.

    Docstrings may name methods as examples.
    """
    tree = ast.parse((ROOT / path).read_text())
    docstrings = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            if node.value.replace("-", "/").partition("/")[0] in METHODS:
                yield node.lineno, node.value
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [f"{module}.{alias.name}" for module in modules or [""] for alias in node.names]
            for module in modules:
                if module.strip(".") in {f"megatron_ext.methods.{page}" for page in PAGES}:
                    yield node.lineno, module.strip(".")


@pytest.mark.parametrize("path", sources(*KNOWS_NO_METHOD))
def test_no_method_is_known_by_name(path: str) -> None:
    found = [(line, name) for line, name in methods_named(path) if name not in MAY_NAME.get(path, ())]
    assert not found, f"{path}: {found}; a method declares what others need (controller, metrics_glossary)"


def test_what_may_be_named_is_named() -> None:
    """No exception outlives its reason."""
    for path, names in MAY_NAME.items():
        assert names <= {name for _, name in methods_named(path)}, path


@pytest.mark.parametrize("path", sources("megatron_ext", "tools"))
def test_a_renamed_thing_keeps_its_new_name(path: str) -> None:
    renamed = dict(RENAMED)
    for room, words in RENAMED_IN.items():
        if path == room or path.startswith(f"{room}/"):
            renamed |= words
    tokens = tokenize.generate_tokens(io.StringIO((ROOT / path).read_text()).readline)
    found = {
        (token.start[0], token.string, renamed[token.string])
        for token in tokens
        if token.type == tokenize.NAME and token.string in renamed
    }
    assert not found, f"{path}: line, old name, new name: {sorted(found)}"


def test_a_moved_module_stays_away() -> None:
    assert not [path for path in MOVED if (ROOT / path).exists()]
