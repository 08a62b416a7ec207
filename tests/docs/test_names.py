"""Files and modules that code, comments and docstrings name are there: a move must not leave a name behind."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import ROOT
from tests.soak.watched_run import _PHASES as SOAK_PHASES

FOLDERS = ("megatron_ext", "tools", "tests")
OLD_NAMES = ROOT / "tests" / "test_names.py"  # it names what must not be there
SOURCES = sorted({path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} - {OLD_NAMES})
ROOMS = [path.name for path in (ROOT / "megatron_ext").iterdir() if path.is_dir()]
FILE = re.compile(rf"(?<![\w./])((?:{'|'.join([*FOLDERS, 'docs', 'slurm', *ROOMS])})/[\w/]*\.(?:py|md|sh))\b")
MODULE = re.compile(rf"(?<![\w./])((?:{'|'.join(FOLDERS)})(?:\.[A-Za-z]\w*)+)")


def test_files_named_in_the_code_exist() -> None:
    """``train/loop.py`` may be meant from the repository's root or from megatron_ext."""
    named = [(path, name) for path in SOURCES for name in FILE.findall(path.read_text())]
    missing = [
        f"{path.relative_to(ROOT)} names {name}"
        for path, name in named
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "megatron_ext"))
    ]
    assert len(named) > 50 and not missing, missing


def test_modules_named_in_the_code_exist() -> None:
    """``megatron_ext.tools`` is the installed name of ``tools``."""
    named = [(path, name) for path in SOURCES for name in MODULE.findall(path.read_text())]
    missing = [
        f"{path.relative_to(ROOT)} names {name}"
        for path, name in named
        if not _is_there(name.removeprefix("megatron_ext.") if name.startswith("megatron_ext.tools") else name)
    ]
    assert len(named) > 500 and not missing, missing


def test_functions_by_which_the_soak_tells_phases_exist() -> None:
    for phase, file, function in SOAK_PHASES:
        [path] = [path for path in SOURCES if path.name == file and path.is_relative_to(ROOT / "megatron_ext")]
        assert function in {"", *_functions(path)}, f"{phase}: {path} has no {function}"


def _is_there(dotted: str) -> bool:
    """A package, a module, or a name that the module's text holds."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:count])
        file = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
        if file.exists() or path.is_dir():
            rest = parts[count:]
            return not rest or rest[0].startswith("__") or re.search(rf"\b{rest[0]}\b", file.read_text()) is not None
    return False


def _functions(path: Path) -> Iterator[str]:
    return (node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
