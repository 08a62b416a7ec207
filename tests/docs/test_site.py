"""The site builds without a warning and fetches nothing; what hand-written pages name is there; the README is short."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.docs.pages import PAGES, ROOT, blocks
from tests.methods.cases import Case, clipped, close, entropy, run
from tools.cli import COMMANDS

WORDS = 900  # of the README
OURS = ("megatron_ext", "tools", "tests", "recipes", "slurm", "docs", "requirements")
FILES = re.compile(rf"`((?:{'|'.join(OURS)})/[\w./-]*)`")
MODULES = re.compile(r"python -m ((?:tools|tests)(?:\.\w+)+)")
CONSOLE = re.compile(r"(?m)(?:^|`)megatron-entropy ([a-z][a-z-]*)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
OLD_WORDS = (  # of the vocabulary before 0.1.0, where today's word is another
    *(r"\bthe house\b", r"\bjudge[sd]?\b", r"\bminis\b", r"\bmicros\b", r"\bcertifie[sd]\b", r"\bchief\b"),
    *(r"rollout\.(tensor|memory_share|eager)\b", r'nucleus = "(reach|below)"', r"numbers that are none"),
)


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed here")
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    loads = re.compile(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(?:https?:)?//')
    for page in tmp_path.rglob("*.html"):
        assert not loads.search(page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_modules_and_links_of_a_page_are_there(page: Path) -> None:
    text = page.read_text()
    for path in FILES.findall(text):
        if path.split("/")[0] == "docs" or not path.endswith("/"):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
    for module in MODULES.findall(text):
        assert (ROOT / (module.replace(".", "/") + ".py")).exists() or (ROOT / module.replace(".", "/")).is_dir(), (
            f"{page.name} names {module}"
        )
    for command in CONSOLE.findall(text):
        assert command in COMMANDS, f"{page.name} names megatron-entropy {command}"
    for link in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}"


def test_the_hook_keeps_links_within_docs_and_warns_of_dead_ones(caplog: pytest.LogCaptureFixture) -> None:
    hook = imported(ROOT / "docs/hooks/links.py")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="gpu/README.md"))
    text = "[a](../lab.md#x) ![b](../../x.png) [c](../../README.md#top) [d](e.md)"
    with caplog.at_level(logging.WARNING):
        found = hook.on_page_markdown(text, page=page, config=None, files=None)
        assert found == "[a](../lab.md#x) ![b](../../x.png) c [d](e.md)" and not caplog.records
        assert hook.on_page_markdown("[c](../../none.md)", page=page, config=None, files=None) == "c"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_readme_is_short_and_says_early_what_has_not_run() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= WORDS
    assert text.index("**Not run: ") < text.index("\n## ")


@pytest.mark.parametrize("word", OLD_WORDS)
def test_no_page_speaks_the_old_vocabulary(word: str) -> None:
    for page in [*PAGES, *(ROOT / "recipes").rglob("README.md")]:
        found = re.search(f".*{word}.*", page.read_text(), re.IGNORECASE)
        assert found is None, f"{page}: {found[0]}"


def test_the_example_of_a_method_is_its_equation(tmp_path: Path) -> None:
    [(_, _, code)] = blocks((ROOT / "docs/adding-a-method.md").read_text(), "python")
    (tmp_path / "entropy_floor_example.py").write_text(code)
    method = imported(tmp_path / "entropy_floor_example.py").EntropyFloor(floor=9.0, coef=0.7)
    case = Case()
    strength = 0.7 * (1 - float(entropy(case.old)[case.tokens].mean()) / 9)
    per_token = clipped(case.ratio, case.advantages(), 0.2, 0.2) - strength * entropy(case.logits)
    loss = torch.stack([per_token[list(case.tokens_of(i))].mean() for i in case.valid]).mean()
    assert close(run(case, method), loss, case)


def imported(path: Path) -> Any:
    """The module of a file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for a class's module
    spec.loader.exec_module(module)
    return module
