"""A real Slurm on this machine for the length of a test: one controller and two nodes of eight pretended GPUs.

The daemons run in the foreground as this user, with every file in one folder and ports of their own, so nothing is
installed and nothing is left. Without an installed Slurm, apt fetches Debian's packages and they are only unpacked
into that folder.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.ranks import free_port

NODES, GPUS = ("n1", "n2"), 8
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
KillWait=5
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurm(RuntimeError):
    """Why there can be no Slurm on this machine."""


class Cluster:
    """The commands of a running cluster."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder = folder
        self.environment = environment

    def call(self, *command: str | Path, **variables: str) -> str:
        """The output of a Slurm command, run in the repository with ``variables`` added to the environment."""
        done = subprocess.run(
            [str(word) for word in command],
            cwd=Path(__file__).parents[2],
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, *command: str | Path, **variables: str) -> str:
        """Submit a batch job; its number. What the script prints is in ``output(job)``."""
        output = f"--output={self.folder}/job-%j.out"
        return self.call("sbatch", "--parsable", output, *command, **variables)

    def output(self, job: str) -> str:
        file = self.folder / f"job-{job}.out"
        return file.read_text() if file.exists() else ""

    def field(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``: JobState, Restarts, ExitCode, ..."""
        words = self.call("scontrol", "show", "job", job).split()
        return next(word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}="))

    def wait(self, job: str, *states: str, seconds: float = 240) -> str:
        """The job's state when it first is one of ``states``, or the last one after so many seconds."""
        wait_until(lambda: self.field(job, "JobState") in states, seconds)
        return self.field(job, "JobState")

    def cancel_all(self) -> None:
        """End every job and wait until its processes have."""
        for options in (["--full", "--signal=KILL"], []):
            self.call("scancel", *options, f"--user={getpass.getuser()}")
        wait_until(lambda: not self.call("squeue", "--noheader"), 30)

    def logs(self) -> str:
        return "\n".join(f"{file.name}\n{file.read_text()[-3000:]}" for file in self.folder.glob("*.log"))


def wait_until(true: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return bool(found)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start the daemons, wait until both nodes are idle; at the end kill every job and daemon.

    Raises NoSlurm where Slurm is neither installed nor to be had from apt.
    """
    environment, plugins = _programs(folder)
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    _configure(folder, plugins)
    slurm = Cluster(folder, environment)
    daemons: list[subprocess.Popen] = []
    try:
        for name, *options in _commands(folder, environment["PATH"]):
            daemons.append(_start(folder, environment, name, *options))
            if name == "munged":
                wait_until((folder / "munge.socket").exists, 10)
        ready = wait_until(lambda: _states(slurm) == ["idle"] * len(NODES), 60)
        assert ready, f"the nodes are not idle: {_states(slurm)}\n{slurm.logs()}"
        yield slurm
    finally:
        with suppress(AssertionError, subprocess.TimeoutExpired):  # the controller may not run
            slurm.cancel_all()
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for pid in processes(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes(folder: Path) -> list[int]:
    """The processes of the cluster in ``folder`` and of its jobs."""
    mark, found = f"SLURM_CONF={folder}/slurm.conf".encode(), []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def _states(slurm: Cluster) -> list[str]:
    with suppress(AssertionError):
        return slurm.call("sinfo", "--noheader", "--Node", "--format=%T").split()
    return []


def _programs(folder: Path) -> tuple[dict[str, str], Path | None]:
    """An environment whose PATH has Slurm's programs, and the folder of its plugins unless it is the installed one."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    environment = {**os.environ, "PATH": path}
    if all(shutil.which(name, path=path) for name in (*DAEMONS[:3], "sbatch")):
        return environment, None
    root = _unpack(folder / "packages")
    libraries = next(root.glob("usr/lib/*/libmunge.so*")).parent
    plugins = next(root.glob("usr/lib/*/slurm*/auth_munge.so")).parent
    for daemon in DAEMONS:  # Debian's alternatives; Slurm looks at the name it is called by
        if not (root / "usr/sbin" / daemon).exists():
            (root / "usr/sbin" / daemon).symlink_to(f"{daemon}-wlm")
    environment["PATH"] = os.pathsep.join([f"{root}/usr/bin", f"{root}/usr/sbin", path])
    environment["LD_LIBRARY_PATH"] = os.pathsep.join([str(libraries), str(plugins)])
    return environment, plugins


def _unpack(folder: Path) -> Path:
    """Debian's packages and what they need and is not installed, unpacked under ``folder``."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NoSlurm("Slurm is not installed (slurmctld, slurmd, sbatch, munged), and there is no apt-get to fetch it")
    root, archives, lists = folder / "root", folder / "archives", folder / "lists"
    for path in (root, archives / "partial", lists / "partial"):
        path.mkdir(parents=True)
    own = [f"Dir::Cache::archives={archives}", "Debug::NoLocking=1", "APT::Sandbox::User=", "Acquire::Retries=1"]
    own += ["Acquire::http::Timeout=20", "Acquire::https::Timeout=20"]
    fresh = [*own, f"Dir::State::lists={lists}"]  # lists of its own where the machine's are old or gone
    install = ("install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES)
    if _apt(own, *install):
        _apt(fresh, "update")
        if error := _apt(fresh, *install):
            raise NoSlurm(f"Slurm is not installed, and apt-get cannot fetch {' '.join(PACKAGES)}: {error}")
    for archive in archives.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", archive, root], check=True)
    return root


def _apt(options: list[str], *arguments: str) -> str:
    """Run apt-get; why it failed, or nothing."""
    command = ["apt-get", *(word for option in options for word in ("-o", option)), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    except subprocess.TimeoutExpired:
        return "no answer in 240 s"
    return "" if done.returncode == 0 else done.stderr.strip() or f"exit code {done.returncode}"


def _configure(folder: Path, plugins: Path | None) -> None:
    host = socket.gethostname()
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=16 Gres=gpu:{GPUS}"
        for node in NODES
    ]
    text = CONFIG.format(host=host, port=free_port(), user=getpass.getuser(), folder=folder, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text + (f"PluginDir={plugins}\n" if plugins else ""))
    for number in range(GPUS):
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
    (folder / "cgroup.conf").write_text("IgnoreSystemd=yes\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)


def _commands(folder: Path, path: str) -> list[list[str]]:
    stepd = shutil.which("slurmstepd", path=path)
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munge.pid", "log-file": "munge.log"}
    files["seed-file"] = "munge.seed"
    munge = ["munged", "--force", "--foreground", *(f"--{name}={folder}/{file}" for name, file in files.items())]
    where = ["-d", stepd] if stepd else []
    return [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", node, *where] for node in NODES)]


def _start(folder: Path, environment: dict[str, str], *command: str) -> subprocess.Popen:
    """A daemon that ends with this process, however that ends."""
    with (folder / f"{command[0]}.out").open("a") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", *command], env=environment, stdout=output, stderr=output
        )
