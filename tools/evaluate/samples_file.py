"""The responses of one model to one set, on disk as they come: an evaluation that was stopped goes on with them.

A samples file (tools/samples.py) whose first line is its header. Lines are flushed and synced batch by batch; a torn
last line, of a process that was killed in the middle of it, is removed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.errors import ConfigError

from ..samples import SampleLine, sample_lines
from .responses import Response

Key = tuple[str, int]  # a problem's id and the number of its response


class Samples:
    """Responses that are kept in memory alone."""

    def __init__(self) -> None:
        self.responses: dict[Key, Response] = {}

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            self.responses[line["id"], line["sample"]] = Response.of_line(line)

    def close(self) -> None:
        pass


class SamplesFile(Samples):
    """Responses that are there, and a place for more. Held by one process at a time."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        """Makes the file, or takes over what is there. Raises ConfigError for one with another header or of another
        program, saying what differs, and where another process holds it."""
        super().__init__()
        self.path, self.header = path, json.loads(json.dumps(header))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"--out: cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConfigError(
                f"{path}: another evaluation writes there; wait for it, or choose another --out"
            ) from None
        try:
            self.responses = self._take_over()
        except ConfigError:
            self.close()
            raise

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add responses; they are on the disk when it returns."""
        self._write(lines)
        super().append(lines)

    def close(self) -> None:
        self._file.close()

    def _take_over(self) -> dict[Key, Response]:
        found: dict[Key, Response] = {}
        good = 0  # bytes
        for line in self._lines():
            if not line.whole:  # what follows is never written behind it
                break
            content = line.content
            if not good:
                self._check(line.header)
            elif not _is_response(content):
                raise ConfigError(f"{self.path}: line {line.number} is not a response of a samples file; {_REMOVE}")
            elif (key := (content["id"], content["sample"])) in found:
                raise ConfigError(f"{self.path}: has response {key[1]} of problem {key[0]} twice; {_REMOVE}")
            else:
                found[key] = Response.of_line(content)
            good = line.end
        if not good and not _HEADER.startswith(self._head()):
            raise ConfigError(f"{self.path}: is no samples file; {_REMOVE}")
        self._file.truncate(good)
        if not good:
            self._write([{"header": self.header}])
        return found

    def _lines(self) -> Iterator[SampleLine]:
        try:
            yield from sample_lines(self.path)
        except ConfigError as error:
            raise ConfigError(f"{error}; {_REMOVE}") from None

    def _head(self) -> bytes:
        self._file.seek(0)
        return self._file.read(len(_HEADER))

    def _check(self, header: Any) -> None:
        if not isinstance(header, dict):
            raise ConfigError(f"{self.path}: does not begin with the header of a samples file; {_REMOVE}")
        mine, other = _flat(self.header), _flat(header)
        keys = [key for key in dict.fromkeys([*mine, *other]) if mine.get(key) != other.get(key)]
        if keys:
            listed = "\n".join(f"  {key}: {_short(other.get(key))} there, {_short(mine.get(key))} now" for key in keys)
            raise ConfigError(
                f"{self.path}: holds responses of another evaluation; repeat that one, take another --out or --label, "
                f"or remove the file\n{listed}"
            )

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self._file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())


_HEADER = b'{"header": '
_REMOVE = "remove or rename it"
_FIELDS = {"set": str, "id": str, "sample": int, "text": str, "length": int, "truncated": bool, "outcome": str}


def _is_response(line: Mapping[str, Any]) -> bool:
    right = all(isinstance(line.get(name), kind) for name, kind in _FIELDS.items())
    return right and isinstance(line.get("extracted"), str | None)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:76]} ..."
