"""How a process is asked for: a request in JSON with three descriptors, answered by a pid and, later, a status.

Also a program, ``python -IS client.py SOCKET MODULE ...``, which takes the exit code of what it asked for; therefore it
imports nothing of the project.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys

LENGTH, NUMBER = struct.Struct("=q"), struct.Struct("=q")


class Reply:
    """What the server says of a process: its pid, and how it ended."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.pid: int = receive_number(connection)
        self._status: int | None = None

    def status(self, *, wait: bool) -> int | None:
        """As ``os.waitpid`` gives it; None while the process runs."""
        if self._status is None and (wait or select.select([self._connection], [], [], 0)[0]):
            self._status = receive_number(self._connection)
            self._connection.close()
        return self._status


def ask(path: str, request: dict, streams) -> Reply:
    """``streams``: the descriptors of its standard input, output and error."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    content = json.dumps(request).encode()
    socket.send_fds(connection, [LENGTH.pack(len(content))], list(streams))
    connection.sendall(content)
    return Reply(connection)


def take(connection: socket.socket) -> tuple[dict, list[int]]:
    """A request, on the server's side."""
    head, streams, _, _ = socket.recv_fds(connection, LENGTH.size, 3)
    content = _receive(connection, LENGTH.unpack(head)[0])
    return json.loads(content), list(streams)


def send_number(connection: socket.socket, number: int) -> None:
    connection.sendall(NUMBER.pack(number))


def receive_number(connection: socket.socket) -> int:
    return NUMBER.unpack(_receive(connection, NUMBER.size))[0]


def _receive(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        if not (part := connection.recv(size - len(content))):
            raise EOFError("the server of warm processes is gone")
        content += part
    return content


def main() -> int:
    path, module, *arguments = sys.argv[1:]
    request = {
        "module": module,
        "arguments": arguments,
        "cwd": os.getcwd(),
        "environment": dict(os.environ),
        "session": False,
    }
    status = ask(path, request, (0, 1, 2)).status(wait=True)
    assert status is not None
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code  # as a shell says it


if __name__ == "__main__":
    sys.exit(main())
