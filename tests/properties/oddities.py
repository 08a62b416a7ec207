"""Hypothesis strategies that spoil real documents and files, and limits within which their readers must stay.

A reader meets valid files with one thing wrong more often than noise: ``mutated`` takes a parsed document and changes
one to three of its nodes, ``damaged`` does the same to bytes, ``spoil`` to what stands at a path. Trees are written
by ``to_json`` and ``to_toml``, which can say what ``json`` does not: keys that occur twice, numbers and nesting beyond
what Python reads, halves of surrogate pairs.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

CPU_SECONDS = 30.0
EXTRA_BYTES = 2 << 30
DEEP = 100_000


class Raw(str):
    """Text that stands in the file as it is."""


class Again(str):
    """A key that occurs a second time: equal to no other, whatever its letters."""

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


NUMBERS = (0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e-300, 1e300)
TEXTS = ("", " ", "\0", "\n", "a\nb", "\ud800", "é", "x" * 100_000, "../../x", "/", ".", "nan", "1", "-1", "null")
OTHERS = (None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": 1}}, [1, "a"], ["a"] * 300)
RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "nan", "-inf", "1" * 5000, "00", "0x10", "1_0", "1979-05-27", "'"),
    *("[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, "{a=" * DEEP + "1" + "}" * DEEP, "[" * DEEP),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.one_of(
    st.sampled_from([*NUMBERS, *TEXTS, *OTHERS, *map(Raw, RAW)]),
    st.recursive(
        SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@st.composite
def mutated(draw: st.DrawFn, document: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """A copy of a JSON-like ``document`` with one to three of its nodes changed."""
    root = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(_nodes(root)))
        match draw(st.sampled_from(("replace", "remove", "repeat", "rename", "move", "wrap"))):
            case "replace":
                container[key] = copy.deepcopy(draw(values))
            case "remove" if container is not root:
                del container[key]
            case "repeat" if isinstance(container, dict):
                container[Again(key)] = copy.deepcopy(draw(values | st.just(container[key])))
            case "repeat":
                container.append(copy.deepcopy(container[key]))
            case "rename" if isinstance(container, dict):
                container[draw(st.sampled_from(TEXTS) | st.text(max_size=8))] = container.pop(key)
            case "move":
                other, place = draw(st.sampled_from(_nodes(root)))
                container[key] = copy.deepcopy(other[place])
            case _:
                container[key] = draw(st.sampled_from(([container[key]], {"a": container[key]})))
    return root[0]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with one to three of its bytes or parts changed."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = start + draw(st.integers(0, min(40, len(content) - start)) | st.just(len(content) - start))
        part = content[start:end]
        new = draw(
            st.sampled_from((b"", part * 2, part[::-1], b"\0", b"\xff\xfe", b"\n", b'"', b"1" * 5000))
            | st.binary(max_size=12)
        )
        content = content[:start] + new + content[end:]
    return content


def _nodes(container: Any) -> list[tuple[Any, Any]]:
    """``(container, key)`` of everything that the container holds, at any depth."""
    keys = container if isinstance(container, dict) else range(len(container))
    found = [(container, key) for key in keys]
    return found + [node for key in keys if isinstance(container[key], (dict, list)) for node in _nodes(container[key])]


def to_json(value: Any) -> str:
    """JSON text, also of what JSON cannot say."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {to_json(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    if type(value) is int and abs(value) > 10**4000:
        return "1" * 5000
    return json.dumps(value)


def to_bytes(text: str) -> bytes:
    """UTF-8, with half a surrogate pair as three bytes that are not."""
    return text.encode("utf-8", "surrogatepass")


def to_toml(document: Any) -> str:
    """TOML text: a key a line, tables inline. Null, which TOML lacks, is left out."""
    if not isinstance(document, dict):
        return _toml(document)
    return "".join(f"{_key(key)} = {_toml(value)}\n" for key, value in document.items() if value is not None)


def _key(key: str) -> str:
    return json.dumps(str(key), ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)  # nan and inf are TOML
    if isinstance(value, str):
        return _key(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)} = {_toml(each)}" for key, each in value.items() if each is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(each) for each in value if each is not None) + "]"
    return '""'


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        _remove(path)
        make(path)

    return change


SPOILERS: dict[str, Callable[[Path], None]] = {
    "missing": _remove,
    "empty": _replace(lambda path: path.write_bytes(b"")),
    "directory": _replace(lambda path: path.mkdir()),
    "circular link": _replace(lambda path: path.symlink_to(path)),
    "dangling link": _replace(lambda path: path.symlink_to("nowhere")),
    "link to a directory": _replace(lambda path: path.symlink_to("/")),
    "endless": _replace(lambda path: path.symlink_to("/dev/zero")),
    "waiting for a writer": _replace(os.mkfifo),
    "10 GB of zeros": lambda path: os.truncate(path, 10 * 10**9),  # a hole: it takes no room on the disk
}


@contextmanager
def limits(cpu_seconds: float = CPU_SECONDS, extra_bytes: int = EXTRA_BYTES) -> Iterator[None]:
    """No more than so much of the processor's time and of further memory, or AssertionError.

    The time is this process's own, whatever else the machine does; a reader that only waits ends by pytest's timeout.
    """
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def late(*_: object) -> None:
        raise AssertionError(f"it took more than {cpu_seconds:g} s of the processor")

    handler = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    resource.setrlimit(resource.RLIMIT_AS, (size + extra_bytes, hard))
    try:
        yield
    except MemoryError as error:
        raise AssertionError(f"it took more than {extra_bytes} bytes of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
