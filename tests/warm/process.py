"""A fork that goes on as another program: what ``exec`` and a fresh interpreter would have made of it."""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import io
import logging
import multiprocessing.util
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tests.warm import client

ROOT = Path(__file__).parents[2]
OURS = ("tools.", "tests.gpu.", "tests.transformer_engine.")  # modules
RENDERER = ROOT / "megatron_ext" / "rollout" / "chat_template.py"  # a process of every rank, and of evaluations
VERIFIER = "megatron_ext.rollout.rewards.verify"  # a worker of every pool of rewards; a module
VERIFIERS = "WARM_VERIFIERS"  # the socket of the server that forks these, in the environment of warm processes
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_old_streams: list[Any] = []  # kept, for one that owns its descriptor would close what has its number now
_added = ["", str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]  # to sys.path, besides installed packages


def module_of(command: Any) -> tuple[str, list[str]]:
    """The module, or file, that ``command`` runs, and its arguments; an empty name for one that is started fresh."""
    if isinstance(command, (list, tuple)) and len(command) > 2 and command[0] == sys.executable:
        match [*map(os.fspath, command[1:])]:
            case ["-m", name, *arguments] if name.startswith(OURS):
                return name, arguments
            case ["-P", name, *arguments] | ["-P", "-m", name, *arguments] if name in (str(RENDERER), VERIFIER):
                return name, arguments
    return "", []


def request(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a server is asked for (client.py); ``options`` are those of ``subprocess.Popen``."""
    module, arguments = module_of(options["args"])
    return {
        "module": module,
        "arguments": arguments,
        "cwd": os.fspath(options["cwd"] or os.getcwd()),
        "environment": dict(os.environ if options["env"] is None else options["env"]),
    }


class Warm(subprocess.Popen):
    """A command of the project that is not started but forked; every other command is started."""

    _reply: client.Reply | None = None  # of a process that is no child of this one

    def _is_warm(self, module: str) -> bool:
        return bool(module)

    def _start(self, options: dict[str, Any], streams: Sequence[int]) -> int:
        """The pid. ``streams``: the descriptors of its standard input, output and error."""
        raise NotImplementedError

    def _execute_child(self, *given: Any) -> None:
        execute = super()._execute_child  # pyright: ignore[reportAttributeAccessIssue]
        options = inspect.signature(execute).bind(*given).arguments
        if not self._is_warm(module_of(options["args"])[0]):
            execute(*given)
            return
        pipes = {name: options[name] for name in _PIPES}
        ends = (pipes["p2cread"], pipes["c2pwrite"], pipes["errwrite"])
        try:
            self.pid = self._start(options, [own if end == -1 else end for own, end in enumerate(ends)])
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes.values())  # pyright: ignore[reportAttributeAccessIssue]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._reply is None:
            return super()._try_wait(wait_flags)  # pyright: ignore[reportAttributeAccessIssue]
        status = self._reply.status(wait=not wait_flags & os.WNOHANG)
        return (0, 0) if status is None else (self.pid, status)

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._reply is None:
            return super()._internal_poll(*given, **named)  # pyright: ignore[reportAttributeAccessIssue]
        if self.returncode is None and (status := self._reply.status(wait=False)) is not None:
            self._handle_exitstatus(status)  # pyright: ignore[reportAttributeAccessIssue]
        return self.returncode


class Forked(Warm):
    """Forked from this process; a verifier from its own server."""

    def _is_warm(self, module: str) -> bool:
        return module != "" and (module != VERIFIER or VERIFIERS in os.environ)

    def _start(self, options: dict[str, Any], streams: Sequence[int]) -> int:
        asked = request(options)
        if asked["module"] == VERIFIER:
            self._reply = client.ask(
                os.environ[VERIFIERS], asked | {"session": bool(options["start_new_session"])}, streams
            )
            return self._reply.pid
        if pid := os.fork():
            return pid

        def before() -> None:
            if options["start_new_session"]:
                os.setsid()
            if options["process_group"] >= 0:
                os.setpgid(0, options["process_group"])
            if options["preexec_fn"] is not None:
                options["preexec_fn"]()

        become(**asked, streams=streams, keep=options["pass_fds"], before=before)


def become(
    module: str,
    arguments: Sequence[str],
    *,
    cwd: str,
    environment: Mapping[str, str],
    streams: Sequence[int],
    keep: Sequence[int] = (),
    before: Callable[[], None] | None = None,
) -> NoReturn:
    """Run ``module`` (or a file) as the main program and end with its exit code. ``keep``: descriptors that stay open,
    with the ``streams`` that become 0, 1 and 2. ``before``: what is done before anything of the program."""
    code = 1
    try:
        os.chdir(cwd)
        _forget_signals()
        if before is not None:
            before()
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        _forget_exits()
        _take_streams(streams, keep, unbuffered=bool(environment.get("PYTHONUNBUFFERED")))
        _settle(environment, "" if module.endswith(".py") or module == VERIFIER else cwd)
        code = _main(module, arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(module: str, arguments: Sequence[str]) -> int:
    """The exit code, after what the interpreter does at its end."""
    try:
        sys.argv = [module, *arguments]
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    return code


def _forget_signals() -> None:
    """Of handlers only the choice to ignore outlives ``exec``."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)


def _forget_exits() -> None:
    """What the parent would do at its end, for objects of its own: remove its temporary folders, say."""
    atexit._clear()
    weakref.finalize._registry.clear()  # pyright: ignore[reportAttributeAccessIssue]
    atexit.register(weakref.finalize._exitfunc)  # pyright: ignore[reportAttributeAccessIssue]
    atexit.register(logging.shutdown)
    atexit.register(multiprocessing.util._exit_function)  # pyright: ignore[reportAttributeAccessIssue]


def _take_streams(streams: Sequence[int], keep: Sequence[int], *, unbuffered: bool) -> None:
    moved = [os.dup(stream) for stream in streams]  # above 2, whichever they are
    for number, stream in enumerate(moved):
        os.dup2(stream, number)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in keep:
            with suppress(OSError):  # the list's own is closed
                os.close(number)
    for number in keep:
        os.set_inheritable(number, True)
    _old_streams.extend((sys.stdin, sys.stdout, sys.stderr))
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8")  # noqa: SIM115
    for name, number, errors in (("stdout", 1, "strict"), ("stderr", 2, "backslashreplace")):
        stream = io.TextIOWrapper(
            open(number, "wb", closefd=False),  # noqa: SIM115
            encoding="utf-8",
            errors=errors,
            line_buffering=number == 2,
            write_through=unbuffered or number == 2,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _settle(environment: Mapping[str, str], first: str) -> None:
    """What an interpreter reads when it starts, and libraries when they are imported. ``first``: of sys.path."""
    os.environ.clear()
    os.environ.update(environment)
    places = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    installed = [entry for entry in sys.path if entry not in _added]
    _added[:] = [*filter(None, [first]), *places]
    sys.path[:] = [*_added, *installed]
    warnings._processoptions(  # pyright: ignore[reportAttributeAccessIssue]
        [each for each in environment.get("PYTHONWARNINGS", "").split(",") if each]
    )
    warnings.filterwarnings("ignore", ".* found in sys.modules after import", RuntimeWarning)  # it is
    tempfile.tempdir = None
    random.seed()
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "") or len(os.sched_getaffinity(0))))
    subprocess.Popen = Forked
    for place in places:
        if (hook := Path(place) / "sitecustomize.py").is_file():
            _load("sitecustomize", hook)


def _load(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
