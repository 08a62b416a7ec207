"""The file beside a prepared set that says what it was made from, how, and what was left out; and its check."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ext import __version__
from megatron_ext.config.errors import ConfigError
from megatron_ext.data.dataset import load_problems
from megatron_ext.files import read_json, sha256

FORMAT = "problems/1"
PACKAGES = ("datasets", "pyarrow", "math-verify", "latex2sympy2_extended", "sympy")


def manifest_of(path: Path) -> Path:
    """``data/math.jsonl`` -> ``data/math.manifest.json``."""
    return path.with_name(f"{path.name.removesuffix('.jsonl')}.manifest.json")


def versions() -> dict[str, str]:
    return {"megatron-entropy": __version__} | {package: version(package) for package in PACKAGES}


def file_record(path: Path, name: str) -> dict[str, Any]:
    """Name, size and sha256. Raises ConfigError where it cannot be read."""
    try:
        return {"name": name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def to_json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=1) + "\n").encode()


def check(path: Path) -> str:
    """A line on a prepared set that is as its manifest says. Raises ConfigError for the first thing that is not."""
    try:
        problems, report = load_problems(path, score=None, strict=True)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.train", "--check")) from None
    manifest = _read(path)
    if report.num_renamed:
        raise ConfigError(f"{path}: {report.num_renamed} problems have the id of another one")
    found = file_record(path, path.name)
    for name in ("bytes", "sha256"):
        if found[name] != manifest["output"].get(name):
            raise ConfigError(
                f"{path}: its {name} is {found[name]}, {manifest_of(path)} says {manifest['output'].get(name)}: it was "
                "changed since it was prepared; prepare it again"
            )
    if len(problems) != manifest["kept"]:
        raise ConfigError(f"{path}: has {len(problems)} problems, {manifest_of(path)} says {manifest['kept']}")
    return (
        f"{path}: {len(problems)} problems of {manifest['name']}, as its manifest says, sha256 {found['sha256'][:12]}"
    )


def _read(path: Path) -> dict[str, Any]:
    file = manifest_of(path)
    try:
        manifest = read_json(file)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}; prepare the set again") from None
    except ValueError as error:
        raise ConfigError(f"{file}: is no manifest: {error}; prepare the set again") from None
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or not isinstance(manifest.get("output"), dict)
    ):
        raise ConfigError(f"{file}: is no manifest of format {FORMAT}; prepare the set again")
    return manifest
