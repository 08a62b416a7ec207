"""Launch a recipe with NeMo-Run: on this machine, or on a Slurm cluster from here or over SSH.

    megatron-entropy launch recipes/siren/siren-tiny-cpu.toml                         a process of this machine
    megatron-entropy launch RECIPE --site slurm/nemo-site.toml --dry-run [key=value]  prints the sbatch script
    megatron-entropy launch RECIPE --site slurm/nemo-site.toml [key=value]            submits it

The recipe decides nodes and ranks (parallel.nodes, parallel.ranks_per_node), the site file all that is the
cluster's: account, partition, container, mounts, the project's folder there (slurm/nemo-site.toml shows every
key). One task a node runs ``tools.ranks``, as the scripts under slurm/ do. A run that was stopped by the time limit
saves its state and is requeued at most ``retries`` times, as is one that failed: NeMo-Run does not tell them apart,
the scripts under slurm/ do. NeMo-Run is an extra: pip install 'megatron-entropy[launch]'.

Exit codes: 0 launched and done (local) or submitted (Slurm), 2 bad input, 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ext.config.checks import layout_faults
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.loading import read_config
from megatron_ext.config.schema import Config

from . import command
from .arguments import add_recipe, command_parser

STOP_SIGNAL = "USR1@{seconds}"  # to every node's task, so many seconds before the time limit
# After NeMo-Run's own --kill-on-bad-exit=1, and of two srun takes the last: a node that has saved and left must not
# take the others with it, which save too. One that has failed leaves them a minute (--wait=60).
SRUN = ["--kill-on-bad-exit=0"]


class Site(BaseModel):
    """What a cluster's administrators and its users decide. Unknown keys are forbidden."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    account: str
    project_dir: str  # this repository on the cluster's shared file system
    partition: str | None = None
    time: str = "24:00:00"
    qos: str | None = None
    python: str = "python"  # inside the container, or .venv/bin/python without one
    container_image: str | None = None
    container_mounts: list[str] = []
    exclusive: bool = True
    cpus_per_task: Annotated[int, Field(ge=1)] | None = None  # a node's; where tasks are bound, srun's default is 1
    retries: Annotated[int, Field(ge=0)] = 10
    save_seconds: Annotated[int, Field(ge=30)] = 3600  # before the time limit: it must hold a step and a save
    port: Annotated[int, Field(ge=1024, le=65535)] = 29500
    numa_binding: Literal["node", "none"] = "node"  # the CPUs that a rank may use: those near its GPU, or all
    env: dict[str, str] = {}
    ssh_host: str | None = None  # None: this machine can call sbatch
    ssh_user: str = ""
    job_dir: str  # NeMo-Run's scripts and logs, on the cluster


def read_site(path: str | Path) -> Site:
    """Raises ConfigError for a missing file, unknown or missing keys, wrong values."""
    try:
        return Site.model_validate(tomllib.loads(Path(path).read_text()))
    except FileNotFoundError:
        raise ConfigError(f"--site: no such file: {path}; begin with a copy of slurm/nemo-site.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--site: {path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--site: {path} cannot be read: {error}") from None
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors()]
        raise ConfigError(f"--site: {path}:\n" + "\n".join(lines)) from None


def node_script(config: Config, site: Site, recipe: str, overrides: list[str]) -> str:
    """What the one task of every node runs."""
    p = config.parallel
    ranks = [site.python, "-m", "tools.ranks", "--nodes", str(p.nodes), "--ranks-per-node", str(p.ranks_per_node)]
    ranks += ["--numa-binding", site.numa_binding]
    train = ["tools.train", recipe, *overrides]
    return f'cd {shlex.quote(site.project_dir)}\nexec {shlex.join(ranks)} --master "$MASTER" {shlex.join(train)}\n'


def executor(config: Config, site: Site) -> Any:
    """NeMo-Run's Slurm executor for the recipe's nodes."""
    import nemo_run

    p = config.parallel
    tunnel = nemo_run.LocalTunnel(job_dir=site.job_dir)
    if site.ssh_host:
        tunnel = nemo_run.SSHTunnel(host=site.ssh_host, user=site.ssh_user, job_dir=site.job_dir)
    found = nemo_run.SlurmExecutor(
        account=site.account,
        partition=site.partition,
        qos=site.qos,
        time=site.time,
        nodes=p.nodes,
        ntasks_per_node=1,
        gpus_per_node=p.ranks_per_node,
        exclusive=site.exclusive,
        mem="0" if site.exclusive else None,  # all of a node's: exclusive gives its CPUs alone
        cpus_per_task=site.cpus_per_task,
        signal=STOP_SIGNAL.format(seconds=site.save_seconds),
        container_image=site.container_image,
        container_mounts=site.container_mounts,
        srun_args=[*SRUN, *([f"--cpus-per-task={site.cpus_per_task}"] if site.cpus_per_task else [])],
        env_vars={**site.env, "MASTER": f"$head_node:{site.port}"},
        tunnel=tunnel,
        packager=nemo_run.Packager(),
    )
    found.retries = site.retries
    return found


def launch(config: Config, options: argparse.Namespace) -> bool:
    """Submit, run here, or print; whether that went well.

    Raises ConfigError for a recipe that would end at once, when NeMo-Run is not installed, or the nodes are too many.
    """
    site = read_site(options.site) if options.site else None
    here = site is None or not site.ssh_host  # else the model may be where the job runs alone
    if here and (faults := layout_faults(config)):
        raise ConfigError("\n".join(faults))  # a job would be queued, end with this, and be queued again
    try:
        os.environ.setdefault("COLUMNS", "240")  # a printed script keeps its lines
        import nemo_run
    except ImportError as error:
        raise ConfigError(
            f"NeMo-Run cannot be imported ({error}): pip install 'megatron-entropy[launch]', or use slurm/"
        ) from None
    if site is not None and not options.dry_run and not site.ssh_host and shutil.which("sbatch") is None:
        raise ConfigError(
            f"--site: {options.site} submits from this machine, which has no sbatch; run it on a login node, set "
            "ssh_host, or print the script with --dry-run"
        )
    if site is not None:
        script = nemo_run.Script(inline=node_script(config, site, options.recipe, options.overrides))
        where = executor(config, site)
    elif config.parallel.nodes > 1:
        raise ConfigError(f"parallel.nodes: {config.parallel.nodes} nodes need --site; see slurm/nemo-site.toml")
    else:
        train = command("train", options.recipe, *options.overrides)
        script = nemo_run.Script(inline=f"cd {shlex.quote(str(Path.cwd()))}\nexec {shlex.join(train)}\n")
        where = nemo_run.LocalExecutor()
    with nemo_run.Experiment(config.name) as experiment:
        experiment.add(script, executor=where, name=config.name)
        if options.dry_run:
            experiment.dryrun()
        else:
            experiment.run(detach=bool(options.site), tail_logs=not options.site)
    # leaving the experiment waited for a local run
    return options.dry_run or all(job.state.name not in ("FAILED", "CANCELLED") for job in experiment.jobs)


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("launch", __doc__)
    add_recipe(parser, example="train.steps=50")
    parser.add_argument("--site", help="TOML file of the cluster; without it the recipe runs on this machine")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted or run, and stop")
    options = parser.parse_intermixed_args(arguments)
    try:
        return 0 if launch(read_config(options.recipe, options.overrides), options) else 1
    except ConfigError as error:
        print(f"configuration error\n{error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
