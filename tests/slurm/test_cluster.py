"""The Slurm scripts on a real two-node Slurm: dry run, training over both nodes, requeue and resume, and what is not
put back into the queue."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, NoSlurm, cluster, processes, wait_until
from tools.launch import SRUN

TINY = "recipes/siren/siren-tiny-cpu.toml"
SMALL = (
    *("rollout.prompts=4", "rollout.samples=4", "train.mini_batch_prompts=2", "checkpoint.every=1"),
    *("parallel.nodes=2", "parallel.ranks_per_node=1", "log.trackers=[]"),
)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        with cluster(folder) as found:
            found.environment |= {
                "VENV": sys.prefix,
                "MASTER_ADDR": "127.0.0.1",  # no resolver knows the nodes' names
                "LOG_DIR": str(folder / "logs"),
                "OMP_NUM_THREADS": "1",
                "TMPDIR": str(folder),
            }
            yield found
    except NoSlurm as reason:
        pytest.skip(str(reason))
    assert processes(folder) == []
    shutil.rmtree(folder)


@pytest.fixture
def slurm(started: Cluster) -> Iterator[Cluster]:
    """The cluster, without the jobs of other tests."""
    yield started
    started.cancel_all()


def node_log(slurm: Cluster, job: str, restart: int = 0, node: int = 0) -> str:
    found = list((slurm.folder / "logs").glob(f"*-{job}-restart{restart}-node{node}.log"))
    return found[0].read_text() if found else ""


def test_the_full_size_recipe_is_tried_on_every_node(slurm: Cluster) -> None:
    job = slurm.submit("slurm/siren_7b.sh", "--dry-run")  # two nodes of eight GPUs, as its header asks
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", slurm.output(job) + node_log(slurm, job)
    for node in (0, 1):
        log = node_log(slurm, job, node=node)
        assert "pipeline ranks of 16 built" in log, log
        assert "7,615,616,512 parameters, config.json gives 7,615,616,512" in log
        assert "sample 1024 responses to 128 prompts at temperature 1.0" in log


def test_training_over_two_nodes_is_requeued_by_a_signal_and_resumes(slurm: Cluster, tmp_path: Path) -> None:
    overrides = [*SMALL, "train.steps=6", f'log.dir="{tmp_path}"']
    job = slurm.submit("slurm/siren_7b.sh", *overrides, RECIPE=TINY, RANKS_PER_NODE="1")
    checkpoints = tmp_path / "siren-tiny-cpu" / "checkpoints"
    wait_until((checkpoints / "step_000001" / "MANIFEST.json").exists, 240)
    slurm.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@900 does
    wait_until(lambda: slurm.field(job, "Restarts") == "1", 120)
    assert slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", slurm.output(job)
    assert slurm.field(job, "Restarts") == "1"
    assert "restart 0: exit code 75" in slurm.output(job) and "restart 1: exit code 0" in slurm.output(job)
    first, second = (node_log(slurm, job, restart) for restart in (0, 1))
    assert "resuming" not in first
    assert "resuming after step " in second, second
    done = int(second.split("resuming after step ")[1].split()[0])
    assert 1 <= done < 6
    steps = [json.loads(line) for line in (tmp_path / "siren-tiny-cpu" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, 7))
    assert json.loads((tmp_path / "siren-tiny-cpu" / "config.json").read_text())["parallel"]["nodes"] == 2


def test_the_wrong_number_of_nodes_is_a_configuration_error(slurm: Cluster) -> None:
    job = slurm.submit("--nodes=1", "slurm/siren_7b.sh", *SMALL, RECIPE=TINY, RANKS_PER_NODE="1")
    assert slurm.wait(job, "COMPLETED", "FAILED") == "FAILED"
    assert slurm.field(job, "ExitCode") == "2:0"
    assert "= 2 ranks, found 1 launched; ask Slurm for --nodes=2" in node_log(slurm, job)


def stand_in(folder: Path, program: str) -> str:
    """A virtual environment whose python is a shell program that says when it is ready and then ``program``."""
    python = folder / "bin" / "python"
    python.parent.mkdir()
    ready = f'trap : USR1 TERM\ntouch "{folder}/ready$SLURM_NODEID-${{SLURM_RESTART_COUNT:-0}}"\n'
    python.write_text(f"#!/usr/bin/env bash\n{ready}{program}\n")
    python.chmod(0o755)
    return str(folder)


def submit(slurm: Cluster, folder: Path, program: str, **variables: str) -> str:
    """A job of the stand-in, once it runs on both nodes."""
    job = slurm.submit("slurm/siren_7b.sh", RECIPE=TINY, VENV=stand_in(folder, program), **variables)
    assert wait_until(lambda: len(list(folder.glob("ready*-0"))) == 2, 60), slurm.output(job)
    return job


def test_a_node_that_saves_first_does_not_take_the_other_with_it(slurm: Cluster, tmp_path: Path) -> None:
    late = "for _ in $(seq $((80 * SLURM_NODEID))); do sleep 0.1; done"  # longer than KillWait
    program = f'[[ "${{SLURM_RESTART_COUNT:-0}}" == 0 ]] || exit 0\nsleep 60 & wait\n{late}; exit 75'
    job = submit(slurm, tmp_path, program)
    slurm.call("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: slurm.field(job, "Restarts") == "1", 60)
    assert slurm.wait(job, "COMPLETED", "FAILED") == "COMPLETED", slurm.output(job)
    assert "restart 0: exit code 75" in slurm.output(job)


def test_no_more_does_it_in_the_script_of_nemo_run(slurm: Cluster, tmp_path: Path) -> None:
    task = f'[[ "$SLURM_NODEID" == 1 ]] || exit 75; sleep 8; touch "{tmp_path}/saved"'
    srun = ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--wait=60", "--kill-on-bad-exit=1", *SRUN]
    slurm.call("bash", "-c", f"{shlex.join([*srun, 'bash', '-c', task])} || [[ $? == 75 ]]")
    assert (tmp_path / "saved").exists()


def test_a_cancelled_job_does_not_come_back(slurm: Cluster, tmp_path: Path) -> None:
    job = submit(slurm, tmp_path, "sleep 60 & wait\nexit 75")
    slurm.call("scancel", job)
    wait_until(lambda: "requeued" in slurm.output(job), 60)
    assert "exit code 75" in slurm.output(job) and "not requeued: the job is" in slurm.output(job)
    assert slurm.wait(job, "CANCELLED", seconds=60) == "CANCELLED" and slurm.field(job, "Restarts") == "0"


@pytest.mark.parametrize(("code", "said"), [(75, "not requeued: MAX_RESTARTS=0"), (3, "exit code 3")])
def test_what_is_not_requeued(slurm: Cluster, tmp_path: Path, code: int, said: str) -> None:
    job = submit(slurm, tmp_path, f"exit {code}", MAX_RESTARTS="0")
    assert slurm.wait(job, "FAILED", "COMPLETED") == "FAILED"
    assert slurm.field(job, "ExitCode") == f"{code}:0" and slurm.field(job, "Restarts") == "0"
    assert said in slurm.output(job)
