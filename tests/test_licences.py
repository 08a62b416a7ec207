"""docs/licences.md names every package that the locks install, and none whose licence nobody has looked at."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path

import pytest

from tools import licences

ROWS = dict(re.findall(r"^\| \**([a-z0-9-]+)\** \| ([^|]*) \|", licences.PAGE.read_text(), re.MULTILINE))
ROWS.pop("package")


@pytest.mark.skipif(
    (sys.platform, sys.version_info[:2]) != ("linux", (3, 11)),
    reason="the page is of one platform",
)
def test_the_page_holds_the_locks() -> None:
    locked = {name for lock in licences.ENVIRONMENTS for name in licences.names(licences.ROOT / "requirements" / lock)}
    assert ROWS.keys() == locked, "run: make licences"


def test_the_page_says_what_packages_declare() -> None:
    found = licences.installed(Path(sysconfig.get_paths()["purelib"]))
    both = found.keys() & ROWS.keys()
    assert len(both) > 60
    assert {name: ROWS[name] for name in both} == {name: found[name] for name in both}, "run: make licences"


def test_no_licence_of_the_page_is_a_problem() -> None:
    assert licences.problems(ROWS) == []


@pytest.mark.parametrize(
    ("declared", "fault"),
    [
        ("License-Expression: AGPL-3.0-only", "AGPL-3.0-only"),
        ("License-Expression: Apache-2.0 AND LGPL-2.1-only", "Apache-2.0 AND LGPL-2.1-only"),
        ("Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "GNU General Public"),
        ("License: GPL", "GPL"),
        ("Classifier: License :: Other/Proprietary License", "Proprietary"),
        ("License: BUSL-1.1", "BUSL"),
        ("Summary: says nothing", "declares no licence"),
        ("License-Expression: MIT", None),
        ("License: BSD\n        and its text", None),
    ],
)
def test_what_a_package_declares_is_judged(declared: str, fault: str | None, tmp_path: Path) -> None:
    """By its files as pip installs them."""
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: Stranger\nVersion: 1.0\n{declared}\n")
    found = licences.problems(licences.installed(tmp_path))
    assert found == [] if fault is None else len(found) == 1 and found[0].startswith("stranger: ") and fault in found[0]
