"""What a run measured, in the planner's terms: rates in the place of assumed ones, and its phases beside the predicted.

Every rate is the one at which the planner's own count of the work gives the run's seconds, so a plan with them says
what another batch, another model or more ranks would take. A layout has rates of its own, and so has a rollout engine
(``misfits``).

    mfu        operations of the passes and the updates over their time, less what the gradient exchange should take
    decode     bytes that decoding reads over the time of a rollout; below half of the assumed share the time is taken
    launch_s   to go into launching layers instead
    host_link  bytes of all weights over the time of a sync

What ranks wait for one another is in these times, and so in the rates. A rollout beside training counts with all of its
time, not with the part of it that training waited for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_ext.config.schema import Config, ParallelConfig
from megatron_ext.model.architectures import Architecture
from megatron_ext.plan.device import TOTAL_BYTES
from megatron_ext.plan.memory import Roles, element_bytes
from megatron_ext.plan.sizes import num_parameters
from megatron_ext.plan.speed import RATES, Decoding, Lengths, Rates, step_seconds

ROLLOUT, BESIDE_TRAINING = "rollout", "rollout_background"  # phases of a run: the former is its wait for the latter
COMPARED = {  # what stands side by side: phases of the plan, phases of a run (time/<phase>_s)
    "rollout": (("rollout",), (ROLLOUT,)),
    "passes before updates": (("score",), ("old_logprob",)),
    "updates": (("update", "gradient exchange"), ("update", "critic")),
    "weight sync": (("weight sync",), ("sync",)),
}
NOT_PLANNED = ("reward", "validation", "save")  # phases of a run
NO_DATA_SHEET = Rates(
    flops=1.0,
    bandwidth=math.inf,
    node_link=math.inf,
    network=math.inf,
    mfu=1.0,
    mfu_experts=1.0,
    decode=1.0,
    launch_s=0.0,
)
FREE = {"nodes", "ranks_per_node", "stage_layers", "overlap_grad_reduce", "overlap_param_gather", "bucket_size"}


@dataclass(frozen=True)
class Measured:
    """A run as the planner sees it. ``seconds`` are of its phases, medians of ``num_steps`` steps; ``device`` is what
    torch calls the GPUs, ``memory`` the bytes that one has."""

    config: Config
    architecture: Architecture
    roles: Roles
    device: str
    memory: float
    lengths: Lengths
    seconds: Mapping[str, float]
    num_steps: int

    @property
    def gpu(self) -> str | None:
        """The data sheet's name of the device; None: there is none here."""
        return gpu_of(self.device, self.memory)

    @property
    def assumed(self) -> Rates:
        """What is taken of the device where nothing was measured."""
        return NO_DATA_SHEET if self.gpu is None else RATES[self.gpu]

    def _planned(self, rates: Rates) -> dict[str, float]:
        a, config = self.architecture, self.config
        return step_seconds(a, config, self.roles, rates, self.lengths, gpu_memory=self.memory)

    def predicted(self, rates: Rates) -> dict[str, float]:
        """What the planner says of the run itself, by COMPARED."""
        seconds = self._planned(rates)
        return {name: math.fsum(seconds[phase] for phase in planned) for name, (planned, _) in COMPARED.items()}

    def measured(self) -> dict[str, float]:
        """What the run took, by COMPARED and then NOT_PLANNED; only what took time."""
        found = {name: self._time_of(*phases) for name, (_, phases) in COMPARED.items()}
        found |= {phase: self._time_of(phase) for phase in NOT_PLANNED}
        return {name: seconds for name, seconds in found.items() if seconds}

    def rates(self) -> Rates:
        """The rates at which the plan of the run takes what it took; of phases without a time the assumed ones stay."""
        rates = self._decoding_rates(self.assumed)
        if sync := self._time_of("sync"):
            rates = replace(rates, host_link=num_parameters(self.architecture) * element_bytes(self.config) / sync)
        if train := self._time_of("old_logprob", "update", "critic"):
            planned = self._planned(rates)
            left = max(train - planned["gradient exchange"], train / 2)  # the exchange may be hidden behind backward
            kind = "mfu" if self.architecture.experts is None else "mfu_experts"
            reached = getattr(rates, kind) * (planned["score"] + planned["update"]) / left
            name = "flops" if self.gpu is None else kind  # of a peak that is not known: what was reached stands for it
            rates = replace(rates, **{name: reached})
        return replace(rates, source=f"measured in {self.num_steps} steps on {self.device}; the rest {_rest(self.gpu)}")

    def _decoding_rates(self, rates: Rates) -> Rates:
        seconds = self._time_of(ROLLOUT)
        if not seconds:
            return rates
        decoding = Decoding.of(self.architecture, self.config, self.lengths, self.memory)
        step = seconds / decoding.steps
        share = decoding.bytes / (rates.bandwidth * step)
        if share < rates.decode / 2:
            return replace(rates, launch_s=step / decoding.launches)
        return replace(rates, decode=share, launch_s=min(rates.launch_s, step / decoding.launches))

    def _time_of(self, *phases: str) -> float:
        seconds = {**self.seconds, ROLLOUT: self.seconds.get(BESIDE_TRAINING) or self.seconds.get(ROLLOUT, 0.0)}
        return math.fsum(seconds.get(phase, 0.0) for phase in phases)


def misfits(measured: Measured, config: Config, architecture: Architecture) -> list[str]:
    """Why the run's rates say nothing about a recipe: what is another layout, engine, dtype or kind of model."""
    run = measured.config
    pairs = {
        f"parallel.{key}": (getattr(run.parallel, key), getattr(config.parallel, key))
        for key in ParallelConfig.model_fields
        if key not in FREE
    }
    pairs |= {
        "rollout.engine": (run.rollout.engine, config.rollout.engine),
        "rollout.tensor_parallel_size": (run.rollout.tensor_parallel_size, config.rollout.tensor_parallel_size),
        "model.dtype": (run.model.dtype, config.model.dtype),
    }
    faults = [f"its {key} is {own}, the recipe's {other}" for key, (own, other) in pairs.items() if own != other]
    if (measured.architecture.experts is None) != (architecture.experts is None):
        faults.append("only one of its model and the recipe's has experts")
    return faults


def gpu_of(device: str, memory: float) -> str | None:
    """The data sheet's name of what torch calls a GPU; None for one that is not among RATES, in kind or in memory.

    The sheets are of SXM modules: a PCIe card of the same name is another device.
    """
    words = device.lower().replace("-", " ").split()
    for gpu, total in TOTAL_BYTES.items():
        if gpu in words and "pcie" not in words and abs(memory / total - 1) < 0.03:
            return gpu
    return None


def _rest(gpu: str | None) -> str:
    return "is not known of it" if gpu is None else f"assumed: {RATES[gpu].source}"
