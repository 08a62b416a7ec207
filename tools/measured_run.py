"""A run's folder as the planner reads it: what it took, on what, and the same beside what was predicted."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_ext.config.checks import read_hf_config
from megatron_ext.config.errors import ConfigError
from megatron_ext.config.schema import Config
from megatron_ext.files import first_fault, read_json
from megatron_ext.metrics.writer import CONFIG, METRICS, PLANNER, read_steps
from megatron_ext.model.architectures import Architecture, find_family, read_architecture
from megatron_ext.plan.measured import Measured, misfits
from megatron_ext.plan.memory import Roles
from megatron_ext.plan.speed import Lengths, Rates, default_lengths

WARM_UP = 2  # steps of a start that do not count: engines compile, allocators grow


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class _Rank(_Record):
    host: str
    device: str
    memory: Annotated[int, Field(gt=0)]


class _Roles(_Record):
    reference: bool
    critic: bool
    current: bool
    old: bool


class _Described(_Record):
    """``planner.json`` (train/timeline.py::describe_run)."""

    first_step: Annotated[int, Field(ge=1)]
    roles: _Roles
    ranks: Annotated[list[_Rank], Field(min_length=1)]


class Compared(NamedTuple):
    """Seconds of a phase of a step; None: not planned, or assumed of a device without a data sheet."""

    phase: str
    measured: float
    at_assumed_rates: float | None
    at_its_own: float | None


def read_measured(folder: Path) -> Measured:
    """Raises ConfigError where the folder is not one of a run that measured something, on devices of one kind."""
    described, config = _described(folder), _config(folder)
    devices = sorted({rank.device for rank in described.ranks})
    if len(devices) > 1:
        raise ConfigError(f"{folder}: the run is on {' and '.join(devices)}; expected devices of one kind")
    steps = _steps(folder, described.first_step + WARM_UP)
    names = {name for step in steps for name in step}
    values = {name: [step[name] for step in steps if _is_number(step.get(name))] for name in names}
    medians = {name: statistics.median(known) for name, known in values.items() if known}
    assumed = default_lengths(config)
    prompt, response = (medians.get(f"{kind}/length", getattr(assumed, kind)) for kind in ("prompt", "response"))
    times = {name: value for name, value in medians.items() if name.startswith("time/") and name.endswith("_s")}
    return Measured(
        config,
        _architecture(folder, config),
        Roles(**described.roles.model_dump()),
        devices[0],
        min(rank.memory for rank in described.ranks),
        Lengths(prompt, response),
        {name.removeprefix("time/").removesuffix("_s"): value for name, value in times.items()},
        len(steps),
    )


def check_fit(folder: Path, measured: Measured, config: Config, gpu: str | None) -> None:
    """Raises ConfigError unless the run's rates say something about a recipe, on the GPU that was asked for, if any."""
    architecture = read_architecture(read_hf_config(config.model.path), find_family(config.model.family))
    faults = misfits(measured, config, architecture)
    if gpu is not None and gpu != measured.gpu:
        faults.insert(0, f"it ran on {measured.device}, not on what --gpu {gpu} means")
    rates = measured.rates()
    if (share := max(rates.mfu, rates.mfu_experts)) > 1:
        faults.append(f"its updates would use {share:.0%} of the peak of {measured.device}: they did less than planned")
    if faults:
        raise ConfigError(
            f"--measured: the rates of {folder} do not hold for this recipe: {'; '.join(faults)}; expected a run of "
            "the same layout of the model, with the same engine, on the same kind of device: measure one, or plan "
            "without"
        )


def comparison(measured: Measured) -> list[Compared]:
    """The phases of the run's step, as they were and as the planner says they are."""
    own = measured.predicted(measured.rates())
    assumed = {} if measured.gpu is None else measured.predicted(measured.assumed)
    return [
        Compared(phase, seconds, assumed.get(phase), own.get(phase)) for phase, seconds in measured.measured().items()
    ]


def rates_told(measured: Measured) -> list[tuple[str, str, str]]:
    """What a run puts in the place of an assumption: name, assumed, measured."""
    known, own, assumed = measured.gpu is not None, measured.rates(), measured.assumed
    is_dense = measured.architecture.experts is None
    told = [
        ("arithmetic of a rank", _arithmetic(assumed, is_dense), _arithmetic(own, is_dense)),
        ("decoding, of the memory bandwidth", f"{assumed.decode:.0%}", f"{own.decode:.0%}"),
        ("launching a layer", f"{1000 * assumed.launch_s:.3g} ms", f"{1000 * own.launch_s:.3g} ms"),
        ("weight sync", f"{assumed.host_link / 1e9:.3g} GB/s", f"{own.host_link / 1e9:.3g} GB/s"),
    ]
    if known:
        return told
    return [(name, "-", value) for name, _, value in told if not name.startswith("decoding")]  # no bandwidth is known


def _arithmetic(rates: Rates, is_dense: bool) -> str:
    mfu = rates.mfu if is_dense else rates.mfu_experts
    size, unit = (1e12, "TFLOP/s") if rates.flops * mfu >= 1e12 else (1e9, "GFLOP/s")
    return f"{rates.flops * mfu / size:.3g} {unit}" + (f", mfu {mfu:.2f}" if mfu != 1 else "")


def _described(folder: Path) -> _Described:
    if not (folder / METRICS).is_file():
        raise ConfigError(f"{folder}: expected the folder of a run, found no {METRICS} there")
    path = folder / PLANNER
    if not path.is_file():
        raise ConfigError(f"{path}: not there: the run was written by an earlier version; measure one anew")
    try:
        return _Described.model_validate(read_json(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(error)}; expected what a run writes there") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}; expected what a run writes there") from None


def _config(folder: Path) -> Config:
    path = folder / CONFIG
    try:
        return Config.model_validate(read_json(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {first_fault(error)}; another version wrote it: measure a run anew") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: {error}; expected the configuration that a run writes there") from None


def _architecture(folder: Path, config: Config) -> Architecture:
    try:
        return read_architecture(read_hf_config(config.model.path), find_family(config.model.family))
    except ValueError as error:
        raise ConfigError(f"{folder}: the model that the run trains is not there: {error}") from None


def _steps(folder: Path, first: int) -> list[dict[str, Any]]:
    """The steps that count. Raises ConfigError without any."""
    try:
        steps = [step for step in read_steps(folder / METRICS) if step["step"] > 0]
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    found = [step for step in steps if step["step"] >= first]
    if not found:
        last = steps[-1]["step"] if steps else 0
        raise ConfigError(
            f"{folder}: its last step is {last}, expected at least {first}: the first {WARM_UP} of a start do not count"
        )
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
