"""Engine and optimizer never hold the device together: not at the start, in a step, at any save, or after a resume."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint import checkpoint
from megatron_ext.model.trainable import TrainableModel
from megatron_ext.train import loop, setup
from tests import gloo
from tests.train import whole_run

RECIPE = "ppo/ppo-tiny-cpu.toml"  # two models that train
OPTIONS = ("model.offload_optimizer=true", "train.steps=3", "checkpoint.every=2")
STEP = ["sync", "generate", "sleep", "restored", "restored", "offloaded", "offloaded"]
START = ["built", "built", "offloaded", "offloaded", "created"]


class Device:
    """Who is on the device: the engine while awake, and each trained model's optimizer state and gradients."""

    def __init__(self) -> None:
        self.awake = False
        self.trained: list[TrainableModel] = []
        self.present: set[int] = set()
        self.events: list[str] = []

    def note(self, event: str) -> None:
        self.events.append(event)
        assert not (self.awake and self.present), self.events
        for each in self.trained:  # the gradients' memory is really there, or really freed
            assert bool(gradient_bytes(each)) == (id(each) in self.present), self.events

    def built(self, each: TrainableModel) -> TrainableModel:
        self.trained.append(each)
        self.present.add(id(each))
        self.note("built")
        return each

    def watch_trained(self) -> None:
        kind: Any = TrainableModel
        build, offload, restore = TrainableModel.build, TrainableModel.offload, TrainableModel.restore

        def offloaded(each: TrainableModel) -> None:
            offload(each)
            self.present.discard(id(each))
            self.note("offloaded")

        def restored(each: TrainableModel) -> None:
            restore(each)
            self.present.add(id(each))
            self.note("restored")

        kind.build = lambda *args, **named: self.built(build(*args, **named))
        kind.offload, kind.restore = offloaded, restored


def gradient_bytes(each: TrainableModel) -> int:
    buffers = (b for chunk in each.model.chunks for b in chunk.buffers + chunk.expert_parallel_buffers)
    return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers)


class SpyEngine:
    """The real engine, awake from its first moment; what is asked of it is noted."""

    def __init__(self, engine: Any, device: Device):
        self.engine, self.device, self.tokenizer = engine, device, engine.tokenizer
        self._awake("created")

    def _awake(self, event: str) -> None:
        self.device.awake = True
        self.device.note(event)

    def update_weights(self, weights: Any, version: int) -> None:
        self._awake("sync")
        self.engine.update_weights(weights, version)

    def generate(self, *args: Any) -> Any:
        self._awake("generate")
        return self.engine.generate(*args)

    def sleep(self) -> None:
        self.engine.sleep()
        self.device.awake = False
        self.device.note("sleep")

    def metrics(self) -> dict[str, float]:
        return self.engine.metrics()

    def close(self) -> None:
        self.engine.close()


def watched(rank: int, world: int, folder: Path, stop_in: int | None) -> tuple[int, list[str]]:
    """A run below ``folder`` and what happened; a signal comes in the step after ``stop_in``."""
    device = Device()
    module: Any = loop
    before: Any = setup
    kind: Any = checkpoint.Checkpoints
    device.watch_trained()
    create, step, save = setup.create_engine, loop.train_step, kind.save

    def saved(self: checkpoint.Checkpoints, number: int, state: dict, **named: Any) -> None:
        device.note(f"save {number}")
        save(self, number, state, **named)
        device.note("saved")

    def stepped(trainer: loop.Trainer, watch: Any) -> Any:
        if trainer.step == stop_in:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(trainer, watch)

    kind.save, module.train_step = saved, stepped
    before.create_engine = lambda *args, **named: SpyEngine(create(*args, **named), device)
    code = whole_run._rank(rank, world, folder, RECIPE, OPTIONS, None)
    return code, device.events


def test_engine_and_optimizer_take_turns(tmp_path: Path) -> None:
    whole_run.data()
    [(code, events)] = gloo.run(watched, 1, tmp_path / "whole", None)
    assert code == loop.DONE
    assert events == [*START, *STEP, *STEP, "save 2", "saved", *STEP, "save 3", "saved"]
    [(code, events)] = gloo.run(watched, 1, tmp_path / "stopped", 0)
    assert code == loop.REQUEUE
    assert events == [*START, *STEP, "save 1", "saved"], "at the signal"
    [(code, events)] = gloo.run(watched, 1, tmp_path / "stopped", 1)
    assert code == loop.REQUEUE
    assert events == [*START, *STEP, "save 2", "saved"], "resumed; at a signal in a step that is saved anyway"
    [(code, events)] = gloo.run(watched, 1, tmp_path / "stopped", None)
    assert code == loop.DONE
    assert events == [*START, *STEP, "save 3", "saved"]
    assert whole_run.metrics(tmp_path / "stopped") == whole_run.metrics(tmp_path / "whole")
    assert whole_run.contents(tmp_path / "stopped", 3) == whole_run.contents(tmp_path / "whole", 3)
