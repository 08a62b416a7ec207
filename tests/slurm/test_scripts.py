"""The Slurm scripts without a Slurm: shellcheck, the commands they print, headers that agree with the recipes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_ext.config.loading import read_config
from megatron_ext.plan.device import TOTAL_BYTES
from megatron_ext.plan.layout import make_plan
from megatron_ext.plan.speed import RATES
from tools.launch import Site
from tools.plan import method_roles

ROOT = Path(__file__).parents[2]
JOBS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if "#SBATCH" in path.read_text())
EVERY_JOB = ("--ntasks-per-node=1", "--requeue", "--open-mode=append")


def dry_run(script: str, *arguments: str, **variables: str) -> list[list[str]]:
    """The commands that ``DRY_RUN=1 bash slurm/script`` prints, as words."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RANKS_PER", "RECIPE"))}
    command = ["bash", f"slurm/{script}", *arguments]
    environment = {**kept, "DRY_RUN": "1", **variables}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_shellcheck_has_no_complaint() -> None:
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent)) or shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install '.[dev]'")
    scripts = [*sorted(map(str, (ROOT / "slurm").glob("*.sh"))), ".ci/run"]
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_outside_a_job_the_submission_and_the_launch_are_printed() -> None:
    submit, launch = dry_run("siren_7b.sh", "train.steps=3", 'name="a b"')
    recipe = "recipes/siren/siren-qwen2.5-math-7b-2n8g.toml"
    assert submit == [f"RECIPE={recipe}", "sbatch", "slurm/siren_7b.sh", "train.steps=3", 'name="a b"']
    assert launch[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    python = launch.index("-m")
    assert launch[python - 1] == f"{ROOT}/.venv/bin/python"
    ranks = ["-m", "tools.ranks", "--nodes", "2", "--ranks-per-node", "8", "--numa-binding", "node"]
    ranks += ["--master", "the-first-node:20000"]
    assert launch[python:] == [*ranks, "tools.train", recipe, "train.steps=3", 'name="a b"']
    other = "recipes/siren/siren-qwen3-8b-32k-4n8g.toml"
    submit, launch = dry_run("siren_7b.sh", RECIPE=other)
    size = ["--nodes=4", "--gpus-per-node=8", "--signal=B:USR1@3600"]
    assert submit == [f"RECIPE={other}", "sbatch", *size, "slurm/siren_7b.sh"]
    assert launch[1] == "--nodes=4"
    _, launch = dry_run("siren_7b.sh", NUMA_BINDING="none")
    assert "--numa-binding none " in " ".join(launch)


def test_in_a_job_the_allocation_decides(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf 'gpu%s\\n' 7 8 9\n")
    (tmp_path / "scontrol").chmod(0o755)
    job = {
        "SLURM_JOB_ID": "31",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_JOB_NODELIST": "gpu[7-9]",
        "SLURM_GPUS_ON_NODE": "4",
    }
    job |= {"SLURM_CPUS_ON_NODE": "96", "SLURM_RESTART_COUNT": "2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (launch,) = dry_run("siren_7b.sh", **job)
    assert {"--nodes=3", "--ntasks=3", "--cpus-per-task=96"} <= set(launch)
    assert f"--output={ROOT}/runs/slurm/%x-%j-restart2-node%n.log" in launch
    found = " ".join(launch)
    assert "--nodes 3 --ranks-per-node 4 --numa-binding node --master gpu7:20031 tools.train" in found
    (launch,) = dry_run("siren_7b.sh", **job, RANKS_PER_NODE="1", RECIPE="recipes/base.toml", MASTER_ADDR="10.0.0.1")
    found = " ".join(launch)
    assert "--ranks-per-node 1 --numa-binding node --master 10.0.0.1:20031 tools.train recipes/base.toml" in found


@pytest.mark.parametrize("submitted", ["{root}", "{root}/slurm", "/tmp"])
def test_a_job_finds_the_project_wherever_it_was_submitted(submitted: str, tmp_path: Path) -> None:
    """In a job the script is Slurm's copy. From elsewhere its first call, outside the job, has said where it is."""
    spool = tmp_path / "job31" / "slurm_script"
    spool.parent.mkdir()
    shutil.copy(ROOT / "slurm/siren_7b.sh", spool)
    environment = {"PATH": os.environ["PATH"], "DRY_RUN": "1", "SLURM_JOB_ID": "31"}
    environment["SLURM_SUBMIT_DIR"] = submitted.format(root=ROOT)
    if submitted == "/tmp":
        environment["PROJECT_DIR"] = str(ROOT)
    done = subprocess.run(["bash", str(spool)], cwd="/tmp", env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"{ROOT}/.venv/bin/python -m tools.ranks" in done.stdout, done.stderr


def test_every_shipped_recipe_has_time_to_stop() -> None:
    """By the signal that train.sh asks for with RECIPE=..., and by NeMo-Run's site file."""
    lead = int(re.findall(r"STOP_SECONDS:=(\d+)", (ROOT / "slurm/env.sh").read_text())[0])
    assert tomllib.loads((ROOT / "slurm/nemo-site.toml").read_text())["save_seconds"] == lead
    assert Site(account="", project_dir="", job_dir="").save_seconds == lead
    steps = {}
    for path in sorted((ROOT / "recipes").glob("*/*-*n*g.toml")):
        config = read_config(path)
        plan = make_plan(config, method_roles(config), rates=RATES["a800"], gpu_memory=TOTAL_BYTES["a800"])
        steps[path.name] = plan.step_s
    assert len(steps) > 70 and max(steps.values()) < lead, max(steps, key=lambda name: steps[name])


@pytest.mark.parametrize(
    ("failures", "said"), [(1, "the state is saved: requeued"), (9, "not requeued: scontrol failed")]
)
def test_a_controller_that_does_not_answer_does_not_lose_the_job(failures: int, said: str, tmp_path: Path) -> None:
    """``squeue`` fails, ``scontrol requeue`` so many times; srun ends as ranks do that have saved."""
    programs = {
        "srun": "exit 75",
        "squeue": "exit 1",
        "scontrol": f"[[ $1 == show ]] && exec echo node1; echo x >> {tmp_path}/tried; "
        f"(($(wc -l < {tmp_path}/tried) > {failures}))",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "31", "SLURM_JOB_NODELIST": "node1"}
    environment |= {"REQUEUE_PAUSE": "0", "LOG_DIR": str(tmp_path / "logs")}
    done = subprocess.run(["bash", "slurm/siren_7b.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 75 and said in done.stdout, done
    assert len((tmp_path / "tried").read_text().split()) == min(failures + 1, 6)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {"RECIPE": "nope.toml"}, "no such recipe: nope.toml, looked for from"),
        ([], {"RECIPE": "recipes"}, "no such recipe: recipes,"),
        ([], {"RANKS_PER_NODE": "two"}, "RANKS_PER_NODE: found 'two', expected a number above 0"),
        ([], {"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE: found '0'"),
        (["train.steps", "50"], {}, "argument 'train.steps': expected key=value"),
        (["--nodes=4"], {}, "argument '--nodes=4': expected key=value (train.steps=50) or --dry-run; sbatch's own"),
    ],
)
@pytest.mark.parametrize("job", [{}, {"SLURM_JOB_ID": "31"}])
def test_what_cannot_be_is_refused_before_it_is_queued(
    arguments: list[str], variables: dict[str, str], message: str, job: dict[str, str]
) -> None:
    environment = {"PATH": os.environ["PATH"], **variables, **job}  # no DRY_RUN: without Slurm a submission would fail
    command = ["bash", "slurm/siren_7b.sh", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("configuration error: ") and message in done.stderr


def test_the_site_file_decides_container_and_account(tmp_path: Path) -> None:
    text = (ROOT / "slurm/env.sh").read_text()
    own = {
        "SBATCH_OPTIONS=()": "SBATCH_OPTIONS=(--account=team)",
        "CONTAINER_IMAGE:=": "CONTAINER_IMAGE:=/images/me.sqsh",
    }
    for shipped, adapted in (own | {"$PROJECT_DIR:$PROJECT_DIR": "/shared:/shared"}).items():
        assert shipped in text
        text = text.replace(shipped, adapted)
    site = tmp_path / "site.sh"
    site.write_text(text)
    submit, launch = dry_run("siren_7b.sh", ENV_FILE=str(site))
    assert submit[1:] == ["sbatch", "--account=team", "slurm/siren_7b.sh"]
    assert {"--container-image=/images/me.sqsh", "--container-mounts=/shared:/shared"} <= set(launch)
    assert f"--container-workdir={ROOT}" in launch
    assert launch[launch.index("-m") - 1] == "python"


@pytest.mark.parametrize("script", JOBS, ids=lambda path: path.stem)
def test_a_script_asks_for_what_its_recipe_needs(script: Path) -> None:
    options = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.MULTILINE)
    assert set(EVERY_JOB) <= set(options)
    leads = [int(seconds) for seconds in re.findall(r"--signal=B:USR1@(\d+)", " ".join(options))]
    _, launch = dry_run(script.name)
    recipe = launch[launch.index("tools.train") + 1]
    config = read_config(ROOT / recipe)
    parallel = config.parallel
    assert len(leads) == 1
    assert f"--nodes={parallel.nodes}" in options and f"--nodes={parallel.nodes}" in launch
    assert launch[launch.index("--ranks-per-node") + 1] == str(parallel.ranks_per_node)
    if "cpu" not in recipe:
        assert f"--gpus-per-node={parallel.ranks_per_node}" in options
        assert {"--exclusive", "--mem=0"} <= set(options)
        plan = make_plan(config, method_roles(config), rates=RATES["a800"], gpu_memory=TOTAL_BYTES["a800"])
        assert sum(plan.seconds.values()) < leads[0], "a step and a save must fit between signal and time limit"
