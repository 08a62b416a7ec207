"""The launcher of one node: environments, exit codes, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import ranks

ROOT = Path(__file__).parents[2]


def launch(folder: Path, program: str, *options: str, **environment: str) -> subprocess.Popen:
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "tools.ranks", "--ranks-per-node", "2", *options, "program", str(folder)]
    paths = os.pathsep.join([str(ROOT), str(folder)])
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths, **environment})


def wait_for(folder: Path, pattern: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(list(folder.glob(pattern))) < count and time.monotonic() < deadline:
        time.sleep(0.05)


SAY = """
import os, sys
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
open(f"{sys.argv[1]}/rank{os.environ['RANK']}", "w").write(" ".join(os.environ[name] for name in names))
"""


def test_each_node_starts_its_ranks_with_their_numbers(tmp_path: Path) -> None:
    for node in ("0", "1"):
        options = ("--nodes", "2", "--master", "head:1234")
        assert launch(tmp_path, SAY, *options, SLURM_NODEID=node).wait() == 0
    found = [(tmp_path / f"rank{rank}").read_text() for rank in range(4)]
    assert found == [f"{rank} {rank % 2} 4 head 1234" for rank in range(4)]


BOUND = """
import os, sys, threading
found = []
thread = threading.Thread(target=lambda: found.append(sorted(os.sched_getaffinity(0))))  # of a thread, as torch's
thread.start(); thread.join()
open(f"{sys.argv[1]}/cpus{os.environ['RANK']}", "w").write(str(found[0]))
"""
SMI = """#!/bin/sh
echo "0, GPU-aaaa-1, 00000000:1B:00.0"
echo "1, GPU-bbbb-2, 00000000:C3:00.0"
"""


@pytest.mark.parametrize(
    ("visible", "option", "near"),
    [
        (None, "node", ("first", "last")),
        ("1,0", "node", ("last", "first")),
        ("GPU-bbbb,GPU-aaaa-1", "node", ("last", "first")),
        (None, "none", ("all", "all")),
        ("0,7", "node", ("all", "all")),  # not listed: said, and nobody is bound
    ],
)
def test_a_rank_runs_on_the_cpus_near_its_gpu(
    visible: str | None, option: str, near: tuple[str, str], tmp_path: Path
) -> None:
    """The real launcher and the real affinity of its ranks; nvidia-smi and the kernel's list are made up."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU: nothing to choose from")
    places = {"first": cpus[:1], "last": cpus[-1:], "all": cpus}
    for name, listed in (("0000:1b:00.0", f"{cpus[0]}"), ("0000:c3:00.0", f"{cpus[-1]}-{cpus[-1]},9000-9001")):
        (tmp_path / "pci" / name).mkdir(parents=True)
        (tmp_path / "pci" / name / "local_cpulist").write_text(listed + "\n")
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "program.py").write_text(BOUND)
    code = f"import pathlib; from tools import numa, ranks; numa.PCI_DEVICES = pathlib.Path({str(tmp_path / 'pci')!r})"
    arguments = ["--ranks-per-node", "2", "--numa-binding", option, "program", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = [sys.executable, "-c", f"{code}; raise SystemExit(ranks.main({arguments!r}))"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"cpus{rank}").read_text() for rank in (0, 1)] == [str(places[name]) for name in near]
    assert ("bound to no CPUs: CUDA_VISIBLE_DEVICES names '7'" in done.stderr) == (visible == "0,7")


def test_without_gpus_the_launcher_says_that_nobody_is_bound(tmp_path: Path) -> None:
    launcher = launch(tmp_path, SAY, "--numa-binding", "node", PATH="/nowhere")
    assert launcher.wait() == 0 and (tmp_path / "rank1").exists()


@pytest.mark.parametrize("code", [2, 3, 75])
def test_the_exit_code_is_the_ranks(tmp_path: Path, code: int) -> None:
    assert launch(tmp_path, f"raise SystemExit({code})").wait() == code


def test_a_failing_rank_ends_the_others(tmp_path: Path) -> None:
    """Also one that does not listen, after the grace that it is given."""
    program = "import os, time\nif os.environ['RANK'] == '1': raise SystemExit(7)\ntime.sleep(600)"
    code = f"from tools import ranks; ranks.GRACE_S = 2; ranks.run_ranks('program', [{str(tmp_path)!r}], 2)"
    assert run_here(tmp_path, program, code).wait(300) == 7


def test_a_signal_reaches_every_rank(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
def stop(*_):
    open(f"{sys.argv[1]}/stopped{os.environ['RANK']}", "w")
    raise SystemExit(75)
signal.signal(signal.SIGUSR1, stop)
open(f"{sys.argv[1]}/ready{os.environ['RANK']}", "w")
time.sleep(60)
"""
    process = launch(tmp_path, program)
    wait_for(tmp_path, "ready*", 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75
    assert len(list(tmp_path.glob("stopped*"))) == 2


def test_a_signal_that_comes_before_a_rank_listens_is_not_lost(tmp_path: Path) -> None:
    program = """
import os, signal, sys, time
open(f"{sys.argv[1]}/loading{os.environ['RANK']}", "w")
time.sleep(0.5)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
time.sleep(60)
"""
    process = launch(tmp_path, program)
    wait_for(tmp_path, "loading*", 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75


LISTENING = """
import os, signal, sys, time
heard = lambda number, _: open(f"{sys.argv[1]}/heard{os.environ['RANK']}-{signal.Signals(number).name}", "w")
signal.signal(signal.SIGUSR1, lambda *a: (heard(*a), time.sleep(SAVING_S), sys.exit(75)))
signal.signal(signal.SIGINT, lambda *a: (heard(*a), os._exit(130)))
open(f"{sys.argv[1]}/pid{os.environ['RANK']}.tmp", "w").write(str(os.getpid()))
os.rename(f"{sys.argv[1]}/pid{os.environ['RANK']}.tmp", f"{sys.argv[1]}/pid{os.environ['RANK']}")
time.sleep(60)
"""


def ended(folder: Path) -> bool:
    """Whether no rank lives (a zombie does not), within 10 s."""
    deadline = time.monotonic() + 10
    states = ["?"]
    while states and time.monotonic() < deadline:
        stats = [Path(f"/proc/{(folder / f'pid{rank}').read_text()}/stat") for rank in (0, 1)]
        states = [state for stat in stats if stat.exists() and (state := stat.read_text().split()[2]) != "Z"]
        time.sleep(0.05)
    return not states


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_every_asking_signal_saves_and_is_answered(number: signal.Signals, tmp_path: Path, capfd) -> None:
    process = launch(tmp_path, LISTENING.replace("SAVING_S", "0"))
    wait_for(tmp_path, "pid?", 2)
    process.send_signal(number)
    assert process.wait() == 75
    assert sorted(path.name for path in tmp_path.glob("heard*")) == ["heard0-SIGUSR1", "heard1-SIGUSR1"]
    assert capfd.readouterr().err.startswith(f"{number.name}: the ranks save after this step and end")


def test_a_second_interrupt_ends_the_ranks_at_once(tmp_path: Path, capfd) -> None:
    process = launch(tmp_path, LISTENING.replace("SAVING_S", "60"))
    wait_for(tmp_path, "pid?", 2)
    process.send_signal(signal.SIGINT)
    wait_for(tmp_path, "heard?-SIGUSR1", 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert len(list(tmp_path.glob("heard?-SIGINT"))) == 2
    assert capfd.readouterr().err.splitlines()[1] == "SIGINT: the ranks end at once"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT])
def test_ranks_do_not_outlive_their_launcher(number: signal.Signals, tmp_path: Path) -> None:
    process = launch(tmp_path, LISTENING.replace("SAVING_S", "60"))
    wait_for(tmp_path, "pid?", 2)
    process.send_signal(number)
    assert process.wait() == -number
    assert ended(tmp_path)


def test_a_terminals_interrupt_does_not_reach_the_ranks_twice(tmp_path: Path) -> None:
    process = launch(tmp_path, LISTENING.replace("SAVING_S", "0"))
    wait_for(tmp_path, "pid?", 2)
    groups = {os.getpgid(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1)}
    assert len(groups) == 2 and os.getpgid(process.pid) not in groups
    process.send_signal(signal.SIGINT)
    assert process.wait() == 75


def test_a_signal_before_a_rank_listens_does_not_kill_it(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to every process of a job, ranks included."""
    program = """
import os, signal, sys, time
open(f"{sys.argv[1]}/loading{os.environ['RANK']}", "w").write(str(os.getpid()))
time.sleep(2)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
time.sleep(60)
"""
    process = launch(tmp_path, program)
    wait_for(tmp_path, "loading*", 2)
    time.sleep(0.2)
    for rank in (0, 1):
        os.kill(int((tmp_path / f"loading{rank}").read_text()), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75


def test_a_rank_that_cannot_leave_does_not_hold_up_one_that_has_saved(tmp_path: Path) -> None:
    program = "import os, signal, sys, time\nif os.environ['RANK'] == '1': time.sleep(60)\n"
    program += LISTENING.replace("SAVING_S", "0")
    (tmp_path / "pid1").touch()
    start = f"from tools import ranks; ranks.GRACE_S = 1; ranks.run_ranks('program', [{str(tmp_path)!r}], 2)"
    process = run_here(tmp_path, program, start)
    wait_for(tmp_path, "pid?", 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75


def test_a_rank_that_was_asked_alone_takes_the_others_along(tmp_path: Path) -> None:
    """They would wait for it: while a run starts, each rank waits for all."""
    program = "import os, sys\nif os.environ['RANK'] == '1': sys.exit(75)\n" + LISTENING.replace("SAVING_S", "0")
    process = launch(tmp_path, program)
    assert process.wait(50) == 75
    assert [path.name for path in tmp_path.glob("heard*")] == ["heard0-SIGUSR1"]


def run_here(folder: Path, program: str, code: str) -> subprocess.Popen:
    """A launcher whose waits are shorter; the last expression of ``code`` is its exit code."""
    (folder / "program.py").write_text(program)
    *lines, last = code.split("; ")
    paths = os.pathsep.join([str(ROOT), str(folder)])
    command = [sys.executable, "-c", "; ".join([*lines, f"raise SystemExit({last})"])]
    return subprocess.Popen(command, cwd=folder, env={**os.environ, "PYTHONPATH": paths})


def test_a_killed_rank_is_named(tmp_path: Path, capfd) -> None:
    process = launch(tmp_path, LISTENING.replace("SAVING_S", "60"))
    wait_for(tmp_path, "pid?", 2)
    os.kill(int((tmp_path / "pid1").read_text()), signal.SIGKILL)
    assert process.wait(20) == 137
    assert capfd.readouterr().err == "ranks: rank 1 was killed by SIGKILL; the others are ended\n"
    assert [path.name for path in tmp_path.glob("heard*")] == ["heard0-SIGINT"]  # asked, before they are killed
    assert ended(tmp_path)


def test_a_stopped_rank_is_named_and_ends_the_run(tmp_path: Path, capfd) -> None:
    start = (
        f"from tools import ranks, watchdog; watchdog.STOPPED_S = 1; ranks.run_ranks('program', [{str(tmp_path)!r}], 2)"
    )
    process = run_here(tmp_path, LISTENING.replace("SAVING_S", "60"), start)
    wait_for(tmp_path, "pid?", 2)
    stopped = int((tmp_path / "pid1").read_text())
    os.kill(stopped, signal.SIGSTOP)  # for a moment, as a debugger may
    time.sleep(0.4)
    os.kill(stopped, signal.SIGCONT)
    time.sleep(1.5)
    assert process.poll() is None
    os.kill(stopped, signal.SIGSTOP)
    assert process.wait(20) == 77
    assert f"ranks: rank 1 (process {stopped}) has been stopped for 1 s" in capfd.readouterr().err
    assert [path.name for path in tmp_path.glob("heard*")] == ["heard0-SIGINT"]
    assert ended(tmp_path)


FAULTY = """
import os, signal, sys, time
from tools import faults
signal.signal(signal.SIGINT, signal.default_int_handler)
if os.environ["RANK"] == "0":
    time.sleep(0.3)
    sys.exit(faults.consequence() or 1)
sys.exit(faults.report(2, f"the fault of {os.environ['RANK']}"))
"""


def test_a_fault_that_several_ranks_find_is_said_once(tmp_path: Path, capfd) -> None:
    process = run_here(tmp_path, FAULTY, f"from tools import ranks; ranks.run_ranks('program', [{str(tmp_path)!r}], 4)")
    assert process.wait(20) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("the fault of"), said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nodes 2 --node 0", "needs --master HOST:PORT"),
        ("--nodes 2 --node 0 --master host", "an address that every node reaches, found 'host'"),
        ("--nodes 2 --master host:1", "needs --node, this node's number from 0"),
        ("--nodes 2 --node 2 --master host:1", "--node: found 2, expected a number below --nodes 2"),
        ("--ranks-per-node 0", "found '0', expected a whole number of at least 1"),
    ],
)
def test_nodes_that_cannot_meet_are_told(
    options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_NODEID", raising=False)
    with pytest.raises(SystemExit) as caught:
        ranks.main(["--ranks-per-node", "1", *options.split(), "tools.train", "x.toml"])
    assert caught.value.code == 2 and message in capsys.readouterr().err


TELLING = """
import os, sys, time
from megatron_ext import heartbeat
heartbeat.begin(float(sys.argv[2]) * int(os.environ["RANK"]))  # rank 0 has all the time there is
heartbeat.enter("update", step=3)
if os.environ["RANK"] == "0":
    time.sleep(6)
    sys.exit(0)
for _ in range(20):
    if sys.argv[3] == "gets_on":
        heartbeat.progress()
    time.sleep(0.3)
"""


@pytest.mark.parametrize(("hang_s", "how", "code"), [("2", "idles", 77), ("2", "gets_on", 0), ("0", "idles", 0)])
def test_a_rank_without_progress_ends_the_run_at_its_deadline(
    hang_s: str, how: str, code: int, tmp_path: Path, capfd
) -> None:
    arguments = [str(tmp_path), hang_s, how]
    process = run_here(tmp_path, TELLING, f"from tools import ranks; ranks.run_ranks('program', {arguments!r}, 2)")
    assert process.wait(60) == code
    said = capfd.readouterr().err
    assert ("rank 1 (process" in said and "in update of step 3 has worked for 2 s without" in said) == (code == 77)


def test_a_killed_rank_is_named_with_its_place(tmp_path: Path, capfd) -> None:
    program = TELLING.replace("    time.sleep(6)\n    sys.exit(0)", "    os.kill(os.getpid(), 9)")
    arguments = [str(tmp_path), "0", "idles"]
    process = run_here(tmp_path, program, f"from tools import ranks; ranks.run_ranks('program', {arguments!r}, 2)")
    assert process.wait(60) == 137
    assert "ranks: rank 0 was killed by SIGKILL in update of step 3; the others are ended" in capfd.readouterr().err


WAITING = """
import os, sys, time
import torch.distributed as dist
from megatron_ext import heartbeat
dist.init_process_group("gloo")
heartbeat.begin(3)
heartbeat.enter("update", step=3)
if os.environ["RANK"] == "0":
    for _ in range(40):
        time.sleep(0.2)
        heartbeat.progress()
dist.barrier()
heartbeat.enter(heartbeat.END, step=0)
"""


def test_a_rank_that_waits_for_a_slow_one_is_not_blamed(tmp_path: Path, capfd) -> None:
    code = f"from tools import ranks; ranks.run_ranks('program', [{str(tmp_path)!r}], 2)"
    assert run_here(tmp_path, WAITING, code).wait(120) == 0
    assert "ranks: " not in capfd.readouterr().err


def test_the_only_rank_of_a_node_is_named_too(tmp_path: Path, capfd) -> None:
    code = f"from tools import ranks; ranks.run_ranks('program', [{str(tmp_path)!r}], 1)"
    assert run_here(tmp_path, "import os; os.kill(os.getpid(), 9)", code).wait(60) == 137
    assert capfd.readouterr().err == "ranks: rank 0 was killed by SIGKILL\n"
